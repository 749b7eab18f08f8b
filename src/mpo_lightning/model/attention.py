"""Attention with prefix sharing: the responses of a group share the computation of its prompt.

A batch is one flat row: the prompts of its groups one after the other, then all responses. A
response attends to its group's prompt and to itself, causally, exactly as it would alone after the
prompt. Two calls of ragged attention compute this, for any number of groups: everything over
itself, and the responses of each group over its prompt. They are merged by their normalisers, as
FlashAttention merges blocks (arXiv 2205.14135, section 3.1). Nothing is padded, keys and values are
not copied, and there is no mask of the whole row. Where a sliding window ends within the prompt of
some response, one call has for each response the keys that its window reaches.

Responses of a group may be in several rows, one after the other. The first row has the prompt, and
keeps its keys and values for the others.

The function is registered with transformers under `SHARED_PROMPT_ATTENTION`. A `PromptSharing`
reaches it as a keyword argument, or as an attribute of the attention mask, which every architecture
passes on to its layers. Called without one, the function computes plain attention, so that the
model generates and evaluates as before.

What the kernels of a device lack (see `kernels_for`, and logit soft-caps and attention dropout on
any device) is computed group by group with masks: slower and as exact. The log says so once.
"""

from collections.abc import Sequence
from copy import copy
from functools import cache, cached_property
from typing import Any, Self

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface

from mpo_lightning.model.ragged import Kernels, Segments, kernels_for

__all__ = ["SHARED_PROMPT_ATTENTION", "KeysAndValues", "PromptSharing"]

SHARED_PROMPT_ATTENTION = "mpo_shared_prompt"
# Of one prompt in each attention layer, (1, key-value heads, P, D) and (1, key-value heads, P, E).
KeysAndValues = dict[nn.Module, tuple[Tensor, Tensor]]


class PromptSharing:
    """Groups of a flat row whose responses share their prompt: all prompts, then all responses.

    Args:
        prompts: tokens of each group's prompt.
        responses: tokens of each response of each group, or none of any group: rows of their own.
        device: device of the row.
        begun: whether the first prompt is in an earlier row, not in this one.

    Attributes:
        calls: number of attention layers that used this object. A model that does not call the
            registered function would silently compute something else.
        earlier: keys and values of the first prompt, if it is in an earlier row.
        kept: keys and values of the last prompt, layer by layer; None where they are not wanted.
    """

    def __init__(
        self,
        prompts: Sequence[int],
        responses: Sequence[Sequence[int]],
        device: torch.device | str = "cpu",
        *,
        begun: bool = False,
    ) -> None:
        self.prompts, self.responses = list(prompts), [list(lengths) for lengths in responses]
        self.device = device
        self.in_row = self.prompts[begun:]
        self.calls = 0
        self.earlier: KeysAndValues = {}
        self.kept: KeysAndValues | None = None
        # Each prompt and each response over itself.
        lengths = [*self.in_row, *(length for _, length in self.of_responses)]
        self.own = Segments(lengths, lengths, causal=True, device=device)
        # The responses of each group over its prompt; None without responses.
        self.over_prompts: Segments | None = None
        if self.of_responses:
            queries = [sum(lengths) for lengths in self.responses]
            self.over_prompts = Segments(queries, self.prompts, causal=False, device=device)
        self._windowed: dict[int, tuple[Tensor, Segments]] = {}
        self._masks: dict[tuple[int, int, int | None], Tensor] = {}

    @cached_property
    def of_responses(self) -> list[tuple[int, int]]:
        """Group and length of each response, in the order of the row."""
        return [(group, n) for group, lengths in enumerate(self.responses) for n in lengths]

    def for_pass(self, earlier: KeysAndValues | None = None, *, keep: bool = False) -> Self:
        """Return a copy for one pass through the model, which has the same index tensors."""
        own = copy(self)
        own.calls, own.earlier, own.kept = 0, earlier or {}, {} if keep else None
        return own

    def positions(self) -> Tensor:
        """Return each token's position, long (T,): every response continues its prompt."""
        parts = [torch.arange(prompt) for prompt in self.in_row]
        for group, length in self.of_responses:
            parts.append(torch.arange(length) + self.prompts[group])
        return torch.cat(parts).to(self.device)

    def reaches(self, window: int | None) -> bool:
        """Whether every token sees its whole prompt and response, given a sliding window."""
        if window is None:
            return True
        groups = zip(self.prompts, self.responses, strict=True)
        return all(prompt + max(lengths, default=0) <= window for prompt, lengths in groups)

    def windowed(self, window: int) -> tuple[Tensor, Segments]:
        """Return the keys of each prompt and response under a sliding window, and their lengths.

        Keys of a response are those of the prompt that its first token sees, and its own: long
        (K,), places in the row, behind the first prompt if that is in an earlier row.
        """
        if window not in self._windowed:
            starts = [sum(self.prompts[:group]) for group in range(len(self.prompts))]
            queries, keys = [*self.in_row], [*self.in_row]
            at = sum(self.prompts)
            places = [torch.arange(at - sum(self.in_row), at)]
            for group, length in self.of_responses:
                seen = min(self.prompts[group], window - 1)
                end = starts[group] + self.prompts[group]
                places += [torch.arange(end - seen, end), torch.arange(at, at + length)]
                queries.append(length)
                keys.append(seen + length)
                at += length
            segments = Segments(queries, keys, causal=True, window=window, device=self.device)
            self._windowed[window] = torch.cat(places).to(self.device), segments
        return self._windowed[window]

    def as_attention_mask(self) -> Tensor:
        """Return a mask of one element, bool (1, 1, 1, 1), that carries this object.

        transformers passes a four-dimensional mask on unchanged. Without one it would take
        positions that restart for packed documents, and build a mask of the whole row.
        """
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)
        mask.shared_prompt = self  # type: ignore[attr-defined]
        return mask

    def mask(self, prompt: int, length: int, window: int | None) -> Tensor:
        """Return which keys a response's tokens attend to, bool (1, 1, length, prompt + length).

        Keys are the prompt's and then the response's own tokens, so a key's index is its position,
        and a sliding window means what it means to the model.
        """
        key = (prompt, length, window)
        if key not in self._masks:
            keys = prompt + length
            segments = Segments([length], [keys], causal=True, window=window, device=self.device)
            allowed = segments.allowed(length, keys)
            assert allowed is not None
            self._masks[key] = allowed[None, None]
        return self._masks[key]


def _to_rows(flat: Tensor, lengths: Sequence[int]) -> Tensor:
    """Split (1, H, sum of lengths, D) into (n, H, longest, D), padded at each row's end."""
    rows = torch.split(flat[0].transpose(0, 1), list(lengths))
    return pad_sequence(list(rows), batch_first=True).transpose(1, 2)


def _from_rows(rows: Tensor, lengths: Sequence[int]) -> Tensor:
    """Join (n, longest, H, D) into (1, sum of lengths, H, D)."""
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


class _RaggedAttention(torch.autograd.Function):
    """Attention of a whole row: each sequence over its own keys, and its end over prompts.

    The two parts are merged by their normalisers. The backward pass of each part is that of the
    kernel, which recomputes attention weights from the normaliser: given the merged normaliser and
    output, it computes its keys' share of the gradients of the whole attention. Attention sinks
    (GPT-OSS), a logit per head that takes probability mass and contributes no value, are one more
    term of the normaliser.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 (autograd passes them by position)
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        own: Segments,
        over: Segments | None,
        scaling: float,
        kernels: Kernels,
    ) -> Tensor:
        before, end = _places_of_prompts(query, key, over)
        start = end - before
        output, normaliser = kernels.forward(query, key[before:], value[before:], own, scaling)
        if over is not None:
            of_prompt, of_keys = kernels.forward(
                query[start:], key[:end], value[:end], over, scaling
            )
            part = normaliser[:, start:]
            both = torch.logaddexp(part, of_keys)
            merged = output[start:] * (part - both).exp_().t()[..., None]
            merged.addcmul_(of_prompt, (of_keys - both).exp_().t()[..., None])
            output[start:] = merged
            part.copy_(both)
        if sinks is not None:
            all_of_it = torch.logaddexp(normaliser, sinks.to(normaliser.dtype)[:, None])
            output *= (normaliser - all_of_it).exp_().t()[..., None]
            normaliser = all_of_it
        ctx.save_for_backward(query, key, value, sinks, output, normaliser)
        ctx.own, ctx.over, ctx.scaling, ctx.kernels = own, over, scaling, kernels
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        query, key, value, sinks, output, normaliser = ctx.saved_tensors
        (gradient,) = gradients
        backward, scaling = ctx.kernels.backward, ctx.scaling
        before, end = _places_of_prompts(query, key, ctx.over)
        start = end - before
        of_query, of_key, of_value = backward(
            *(gradient, query, key[before:], value[before:]),
            output=output,
            normaliser=normaliser,
            segments=ctx.own,
            scaling=scaling,
        )
        if ctx.over is not None:
            of_responses, *of_prompts = backward(
                *(gradient[start:], query[start:], key[:end], value[:end]),
                output=output[start:],
                normaliser=normaliser[:, start:],
                segments=ctx.over,
                scaling=scaling,
            )
            of_query[start:] += of_responses
            if before:
                of_key, of_value = (
                    nn.functional.pad(x, (0, 0, 0, 0, before, 0)) for x in (of_key, of_value)
                )
            of_key[:end] += of_prompts[0]
            of_value[:end] += of_prompts[1]
        of_sinks = None
        if ctx.needs_input_grad[3]:
            taken = (sinks.to(normaliser.dtype)[:, None] - normaliser).exp_()
            products = (gradient * output).sum(-1, dtype=normaliser.dtype).t()
            of_sinks = -(taken * products).sum(1).to(sinks.dtype)
        return of_query, of_key, of_value, of_sinks, None, None, None, None


def _places_of_prompts(query: Tensor, key: Tensor, over: Segments | None) -> tuple[int, int]:
    """Return the number of keys that come before the row, and the end of all prompts' keys."""
    return (0, 0) if over is None else (len(key) - len(query), sum(over.keys))


def _ragged(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    sharing: PromptSharing,
    window: int | None,
    sinks: Tensor | None,
    scaling: float,
    kernels: Kernels,
) -> Tensor:
    """Compute the attention of a row by kernels, (1, heads, T, D) to (1, T, heads, E)."""
    size = value.shape[-1]
    # Kernels want equal sizes, which multi-head latent attention has not, of whole 16 bytes.
    wanted = max(query.shape[-1], size)
    wanted += -wanted % 8 if query.device.type == "cuda" else 0
    query, key, value = (
        nn.functional.pad(x[0].transpose(0, 1), (0, wanted - x.shape[-1]))
        if x.shape[-1] != wanted
        else x[0].transpose(0, 1)
        for x in (query, key, value)
    )
    own, over = sharing.own, sharing.over_prompts
    if not sharing.reaches(window):
        assert window is not None
        places, own = sharing.windowed(window)
        key, value, over = key[places], value[places], None
    output: Tensor = _RaggedAttention.apply(query, key, value, sinks, own, over, scaling, kernels)  # type: ignore[no-untyped-call]
    return output[None, ..., :size]


def _by_groups(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    sharing: PromptSharing,
    window: int | None,
    **how: Any,
) -> Tensor:
    """Compute the attention of a row group by group, (1, heads, T, D) to (1, T, heads, E).

    The responses of a group have copies of its prompt's keys and values, and are padded to the
    longest.
    """
    of_prompts: list[Tensor] = []
    of_responses: list[Tensor] = []
    start, end = 0, sum(sharing.prompts)
    before = end - sum(sharing.in_row)
    for prompt, lengths in zip(sharing.prompts, sharing.responses, strict=True):
        at = slice(start, start + prompt)
        prompt_key, prompt_value = key[:, :, at], value[:, :, at]
        if start >= before:
            whole = window is None or prompt <= window
            mask = None if whole else sharing.mask(0, prompt, window)
            prompt_query = query[:, :, start - before : at.stop - before]
            of_prompts.append(
                _attend(module, prompt_query, prompt_key, prompt_value, mask, causal=whole, **how)
            )
        start += prompt
        if not lengths:
            continue
        own = slice(end, end + sum(lengths))
        own_key, own_value = (_to_rows(x[:, :, own], lengths) for x in (key, value))
        expand = (len(lengths), -1, -1, -1)
        rows = _attend(
            module,
            _to_rows(query[:, :, own.start - before : own.stop - before], lengths),
            torch.cat([prompt_key.expand(expand), own_key], dim=2),
            torch.cat([prompt_value.expand(expand), own_value], dim=2),
            sharing.mask(prompt, max(lengths), window),
            causal=False,
            **how,
        )
        of_responses.append(_from_rows(rows, lengths))
        end = own.stop
    return torch.cat([*of_prompts, *of_responses], dim=1)


@cache
def _say_once(line: str) -> None:
    rank_zero_info(line)


# Index tensors differ from batch to batch, so every batch would be compiled anew.
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
    if shared_prompt.earlier:
        of_prompt = shared_prompt.earlier[module]
        key, value = (torch.cat(x, dim=2) for x in zip(of_prompt, (key, value), strict=True))
    if shared_prompt.kept is not None:
        end = sum(shared_prompt.prompts)
        last = slice(end - shared_prompt.prompts[-1], end)
        # A view would keep the whole row.
        shared_prompt.kept[module] = key[:, :, last].clone(), value[:, :, last].clone()
    device = query.device.type
    if torch.is_autocast_enabled(device):
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    lacking = "logit soft-caps" if softcap is not None else "attention dropout" if dropout else None
    size = max(query.shape[-1], value.shape[-1])
    kernels = kernels_for(query.device, query.dtype, size)
    where: dict[str, Any] = {"sharing": shared_prompt, "window": sliding_window}
    if lacking is None and kernels is not None:
        factor = query.shape[-1] ** -0.5 if scaling is None else scaling
        output = _ragged(query, key, value, sinks=s_aux, scaling=factor, kernels=kernels, **where)
        return output, None
    lacking = lacking or f"{query.dtype} and heads of {size} on this device ({device})"
    _say_once(f"Attention over shared prompts: group by group, since no kernel has {lacking}.")
    return _by_groups(module, query, key, value, **where, **how), None


AttentionInterface.register(SHARED_PROMPT_ATTENTION, split_attention)
AttentionMaskInterface.register(SHARED_PROMPT_ATTENTION, AttentionMaskInterface()["sdpa"])
