"""Attention with prefix sharing: the responses of a group share the computation of its prompt.

A batch is one flat row, ``prompt, y1, ..., yn`` of one group after another. A response attends to
its group's prompt and to itself, causally, exactly as it would alone after the prompt. The
attention is *split*: causal attention over each prompt, and for the n responses one batched call
with keys ``[prompt | own]``. No mask of the whole row is built. On CPU the prompt's keys are not
even repeated for each response: attention over the prompt and over the response itself are computed
separately and merged by their normalisers, as FlashAttention merges blocks (arXiv 2205.14135,
section 3.1).

The function is registered with transformers under `SHARED_PROMPT_ATTENTION`. A `PromptSharing`
reaches it as an attribute of the attention mask, which every architecture passes on to its layers.
Called with any other mask, the function computes plain attention, so that the model generates and
evaluates as before. Sliding windows, logit soft-caps and attention sinks follow the model.

Models with an attention of their own get a mask of the whole row (`PromptSharing.dense_mask`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface

from mpo_lightning.batch import GroupSpan

__all__ = ["SHARED_PROMPT_ATTENTION", "PromptSharing"]

SHARED_PROMPT_ATTENTION = "mpo_shared_prompt"


@dataclass
class PromptSharing:
    """Groups of a flat row whose responses share their prompt.

    Attributes:
        spans: position of each group in the row.
        calls: number of attention layers that used this object. A model that does not call the
            registered function would silently compute something else.
    """

    spans: Sequence[GroupSpan]
    calls: int = 0
    _masks: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict)

    def positions(self, device: torch.device) -> Tensor:
        """Return each token's position, long (T,): every response continues its prompt."""
        parts = []
        for _, prompt, lengths in self.spans:
            parts.append(torch.arange(prompt))
            parts += [torch.arange(prompt, prompt + length) for length in lengths]
        return torch.cat(parts).to(device)

    def fits(self, prompt: int, lengths: Sequence[int], window: int | None) -> bool:
        """Whether every response's last token sees its whole prompt, given a sliding window."""
        return window is None or prompt + max(lengths) <= window

    def as_attention_mask(self, device: torch.device) -> Tensor:
        """Return a mask of one element, bool (1, 1, 1, 1), that carries this object.

        transformers passes a four-dimensional mask on unchanged. Without one it would take
        positions that restart for packed documents, and build a mask of the whole row.
        """
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
        mask.shared_prompt = self  # type: ignore[attr-defined]
        return mask

    def dense_mask(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the additive mask of the whole row, (1, 1, T, T): zero or the dtype's minimum.

        It is quadratic in the row's length: for models whose attention cannot be split.

        Args:
            positions: position of each token, long (T,).
            dtype: dtype of the mask.
        """
        device, group, part = positions.device, [], []
        for number, (_, prompt, lengths) in enumerate(self.spans):
            for response, length in enumerate((prompt, *lengths)):
                group.append(torch.full((length,), number, device=device))
                part.append(torch.full((length,), response, device=device))
        groups, parts = torch.cat(group), torch.cat(part)
        allowed = (groups[:, None] == groups) & (positions <= positions[:, None])
        allowed &= (parts == 0) | (parts[:, None] == parts)
        mask = torch.zeros(allowed.shape, dtype=dtype, device=device)
        return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[None, None]

    def mask(self, prompt: int, length: int, window: int | None, device: torch.device) -> Tensor:
        """Return which keys a response's tokens attend to, bool (1, 1, length, prompt + length).

        Keys are the prompt's and then the response's own tokens, so a key's index is its position,
        and a sliding window means what it means to the model.
        """
        key = (prompt, length, window)
        if key not in self._masks:
            query_at = torch.arange(prompt, prompt + length, device=device)[:, None]
            key_at = torch.arange(prompt + length, device=device)[None, :]
            allowed = key_at <= query_at
            if window is not None:
                allowed &= key_at > query_at - window
            self._masks[key] = allowed[None, None]
        return self._masks[key]


def _to_rows(flat: Tensor, lengths: Sequence[int]) -> Tensor:
    """Split (1, H, sum of lengths, D) into (n, H, longest, D), padded at each row's end."""
    heads, size = flat.shape[1], flat.shape[3]
    if len(set(lengths)) == 1:
        return flat[0].view(heads, len(lengths), lengths[0], size).transpose(0, 1)
    rows = torch.split(flat[0].transpose(0, 1), list(lengths))
    return pad_sequence(list(rows), batch_first=True).transpose(1, 2)


def _from_rows(rows: Tensor, lengths: Sequence[int]) -> Tensor:
    """Join (n, longest, H, D) into (1, sum of lengths, H, D)."""
    if len(set(lengths)) == 1:
        return rows.flatten(0, 1)[None]
    return torch.cat([row[:length] for row, length in zip(rows, lengths, strict=True)])[None]


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    causal: bool,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Compute attention of one block, (n, heads, queries, D) to (n, queries, heads, D).

    PyTorch's kernels, or plain arithmetic where they lack a feature: soft-caps (Gemma-2) and sinks
    (GPT-OSS), a logit per head that takes probability mass and contributes no value.
    """
    if softcap is None and sinks is None:
        sdpa = AttentionInterface()["sdpa"]
        output: Tensor = sdpa(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=causal
        )[0]
        return output
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    logits = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is None and causal:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    if mask is not None:
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    if sinks is not None:
        column = sinks.to(logits.dtype).view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, column], dim=-1)
    weights = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    weights = weights[..., : key.shape[2]].to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2)


class _GroupAttention(torch.autograd.Function):
    """Attention of one group on CPU: the prompt over itself, responses over prompt and themselves.

    A response's two parts are merged by their normalisers. The backward pass of each part is that
    of the kernel, which recomputes attention weights from the normaliser: given the merged
    normaliser and output, it computes the weights of the whole attention. A group is one autograd
    function, so that a single output is kept, which the next layer keeps too, and gradients are
    written in one place (those of slices would each be a tensor of the full size).
    """

    @staticmethod
    def forward(  # noqa: PLR0917 (autograd passes them by position)
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prompt: int,
        lengths: Sequence[int],
        scaling: float | None,
    ) -> Tensor:
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        sizes = [prompt, sum(lengths)]
        (prompt_query, query_), (prompt_key, key_), (prompt_value, value_) = (
            torch.split(x, sizes, dim=2) for x in (query, key, value)
        )
        prompt_keys = (prompt_key, prompt_value)
        of_prompt, alone = attend(prompt_query, *prompt_keys, 0.0, True, scale=scaling)
        over_prompt, over = attend(query_, *prompt_keys, 0.0, False, scale=scaling)
        rows = (_to_rows(x, lengths) for x in (query_, key_, value_))
        # (1, S, H, D) and (1, S, H): each response's tokens one after the other.
        over_own, own = (
            _from_rows(x.transpose(1, 2), lengths) for x in attend(*rows, 0.0, True, scale=scaling)
        )
        over = over.transpose(1, 2)
        normaliser = torch.logaddexp(own, over)
        merged = over_own * (own - normaliser).exp_()[..., None]
        merged += over_prompt.transpose(1, 2) * (over - normaliser).exp_()[..., None]
        output = torch.cat([of_prompt.transpose(1, 2), merged.to(query.dtype)], dim=1)
        normaliser = torch.cat([alone.transpose(1, 2), normaliser], dim=1)
        ctx.save_for_backward(query, key, value, output, normaliser)
        ctx.sizes, ctx.lengths, ctx.scaling = sizes, lengths, scaling
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        query, key, value, output, normaliser = ctx.saved_tensors
        attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

        def back(
            gradient: Tensor,
            query: Tensor,
            keys: Sequence[Tensor],
            output: Tensor,
            normaliser: Tensor,
            *,
            causal: bool,
        ) -> list[Tensor]:
            of_output = (output, normaliser[..., 0].contiguous())
            found = attend_backward(
                gradient, query, *keys, *of_output, 0.0, causal, scale=ctx.scaling
            )
            return [x.transpose(1, 2) for x in found]

        by_head = [x.transpose(1, 2) for x in (gradients[0], output, normaliser[..., None])]
        of_prompt, of_responses = zip(
            *(torch.split(x, ctx.sizes, dim=2) for x in (query, key, value, *by_head)), strict=True
        )
        query, *prompt_keys, gradient, output, normaliser = of_prompt
        alone = back(gradient, query, prompt_keys, output, normaliser, causal=True)
        query, _, _, gradient, output, normaliser = of_responses
        over = back(gradient, query, prompt_keys, output, normaliser, causal=False)
        # Gradients of padding are zero, so its attention weights do not matter.
        query, key, value, gradient, output, normaliser = (
            _to_rows(x, ctx.lengths) for x in of_responses
        )
        own = back(gradient, query, (key, value), output, normaliser, causal=True)
        own = [_from_rows(x, ctx.lengths) for x in own]
        of_query = torch.cat([alone[0], over[0].add_(own[0])], dim=1)
        of_key, of_value = (torch.cat([alone[i].add_(over[i]), own[i]], dim=1) for i in (1, 2))
        return *(x.transpose(1, 2) for x in (of_query, of_key, of_value)), None, None, None


def _group_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    prompt: int,
    lengths: Sequence[int],
    scaling: float | None,
) -> Tensor:
    """Compute a group's attention on CPU, (1, heads, tokens, D) to (1, tokens, heads, E)."""
    size = value.shape[-1]
    # The kernel wants equal sizes; multi-head latent attention has smaller values.
    value = nn.functional.pad(value, (0, query.shape[-1] - size))
    copies = query.shape[1] // key.shape[1]
    if copies > 1:
        key, value = (x.repeat_interleave(copies, dim=1) for x in (key, value))
    output: Tensor = _GroupAttention.apply(query, key, value, prompt, lengths, scaling)  # type: ignore[no-untyped-call]
    return output[..., :size]


# Its loops run over the groups of a batch, so every batch would be compiled anew.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def split_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    shared_prompt: PromptSharing | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute attention for transformers: split where there is a `PromptSharing`, else plain.

    Args:
        module: the attention layer.
        query: (1, heads, T, D).
        key: (1, key-value heads, T, D).
        value: (1, key-value heads, T, E).
        attention_mask: `PromptSharing.as_attention_mask`, or a mask of plain attention.
        dropout: probability that an attention weight is dropped.
        scaling: factor of the attention logits.
        sliding_window: number of positions a token attends to, itself included.
        softcap: bound of the attention logits, approached by tanh.
        s_aux: attention sinks, a logit for each head, (heads,).
        is_causal: whether plain attention without a mask is causal. Defaults to the layer's own
            attribute.
        shared_prompt: the groups of the row, where the model hands keyword arguments to its
            attention; others have them with the mask.

    Returns:
        The output, (1, T, heads, E), and None in the place of attention weights.
    """
    how: dict[str, Any] = {
        "dropout": dropout,
        "scaling": scaling,
        "softcap": softcap,
        "sinks": s_aux,
    }
    if shared_prompt is None:
        shared_prompt = getattr(attention_mask, "shared_prompt", None)
    if shared_prompt is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        # A single query, as in generation, sees all keys.
        causal = causal and attention_mask is None and query.shape[2] > 1
        return _attend(module, query, key, value, attention_mask, causal=causal, **how), None
    shared_prompt.calls += 1
    # Features that the merging of two parts lacks take one call per block.
    on_cpu = query.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    on_cpu = on_cpu and softcap is None and s_aux is None and not dropout
    on_cpu = on_cpu and value.shape[-1] <= query.shape[-1]
    outputs = []
    for span in shared_prompt.spans:
        start, prompt, lengths = span
        if on_cpu and shared_prompt.fits(prompt, lengths, sliding_window):
            group = [x[:, :, start : span.end] for x in (query, key, value)]
            outputs.append(
                _group_attention(*group, prompt=prompt, lengths=lengths, scaling=scaling)
            )
            continue
        own = slice(span.first_response, span.end)
        prompt_key, prompt_value = (x[:, :, start : span.first_response] for x in (key, value))
        window = None if sliding_window is None or prompt <= sliding_window else sliding_window
        of_prompt = _attend(
            module,
            query[:, :, start : span.first_response],
            prompt_key,
            prompt_value,
            None if window is None else shared_prompt.mask(0, prompt, window, query.device),
            causal=window is None,
            **how,
        )
        own_key, own_value = (_to_rows(x[:, :, own], lengths) for x in (key, value))
        expand = (len(lengths), -1, -1, -1)
        of_responses = _attend(
            module,
            _to_rows(query[:, :, own], lengths),
            torch.cat([prompt_key.expand(expand), own_key], dim=2),
            torch.cat([prompt_value.expand(expand), own_value], dim=2),
            shared_prompt.mask(prompt, max(lengths), sliding_window, query.device),
            causal=False,
            **how,
        )
        outputs += [of_prompt, _from_rows(of_responses, lengths)]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), None


AttentionInterface.register(SHARED_PROMPT_ATTENTION, split_attention)
AttentionMaskInterface.register(SHARED_PROMPT_ATTENTION, AttentionMaskInterface()["sdpa"])
