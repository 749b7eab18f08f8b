"""Attention over a flat row of groups in which the responses of a group share its prompt.

The row is ``prompt, y1, ..., yn`` of one group after another. A response attends to its group's
prompt and to itself, causally, as it would alone behind the prompt; so the prompt is computed once,
exactly. The attention is *split*: causal attention over each prompt, and for the n responses one
batched call with keys ``[prompt | own]``. No mask of the whole row is ever built.

The function is registered with transformers under `SHARED_PROMPT_ATTENTION`. A model that is set to
it computes plain ``sdpa`` attention whenever it is called without a `PromptSharing`: it generates
and evaluates as before.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface

__all__ = ["SHARED_PROMPT_ATTENTION", "PromptSharing"]

SHARED_PROMPT_ATTENTION = "mpo_shared_prompt"


@dataclass
class PromptSharing:
    """Where the prompts and responses of a flat row lie.

    Attributes:
        prompt_lengths: tokens of each group's prompt.
        response_lengths: tokens of each group's responses.
        calls: how often an attention layer used this object; a model whose attention never asks
            would compute something else in silence.
    """

    prompt_lengths: Sequence[int]
    response_lengths: Sequence[Sequence[int]]
    calls: int = 0
    _masks: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict)

    def groups(self) -> Iterator[tuple[int, int, Sequence[int]]]:
        """Each group's first token, prompt length and response lengths."""
        start = 0
        for prompt, responses in zip(self.prompt_lengths, self.response_lengths, strict=True):
            yield start, prompt, responses
            start += prompt + sum(responses)

    def positions(self, device: torch.device) -> Tensor:
        """Position of each token, long (T,): every response continues where its prompt ends."""
        parts = []
        for _, prompt, responses in self.groups():
            parts.append(torch.arange(prompt))
            parts += [torch.arange(prompt, prompt + length) for length in responses]
        return torch.cat(parts).to(device)

    def mask(self, prompt: int, length: int, window: int | None, device: torch.device) -> Tensor:
        """Bool (1, 1, length, prompt + length): what a response's tokens may attend to.

        Keys are the prompt and then the response's own tokens, so a key's index is its position and
        a sliding window is measured as the model measures it.
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
    """(1, H, sum of lengths, D) to (n, H, longest, D), padded at the end of each row."""
    heads, size = flat.shape[1], flat.shape[3]
    if len(set(lengths)) == 1:
        return flat[0].view(heads, len(lengths), lengths[0], size).transpose(0, 1)
    rows = torch.split(flat[0].transpose(0, 1), list(lengths))
    return pad_sequence(list(rows), batch_first=True).transpose(1, 2)


def _from_rows(rows: Tensor, lengths: Sequence[int]) -> Tensor:
    """(n, longest, H, D) to (1, sum of lengths, H, D)."""
    if len(set(lengths)) == 1:
        return rows.flatten(0, 1)[None]
    return torch.cat([row[:length] for row, length in zip(rows, lengths, strict=True)])[None]


def split_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    shared_prompt: PromptSharing | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers: split where there is a `PromptSharing`, sdpa elsewhere.

    Args:
        module: the attention layer.
        query: (1, heads, T, D).
        key: (1, key-value heads, T, D).
        value: as key.
        attention_mask: of plain attention; with a `PromptSharing` that says who attends to whom.
        shared_prompt: where the groups lie.
        dropout: probability that an attention weight is dropped.
        scaling: factor of the attention logits.
        sliding_window: how many positions back a token attends, itself included.
        others: what the model passes besides; what would change the result is refused.

    Returns:
        (1, T, heads, D) and None, as transformers wants it.

    Raises:
        NotImplementedError: for logit soft-caps and attention sinks.
    """
    sdpa = AttentionInterface()["sdpa"]
    if shared_prompt is None:
        others |= {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window}
        output: tuple[Tensor, None] = sdpa(module, query, key, value, attention_mask, **others)
        return output
    for name in ("softcap", "s_aux"):
        if others.get(name) is not None:
            raise NotImplementedError(
                f"{type(module).__name__} uses {name!r}, which the shared layout does not have. "
                "Set model.layout: separate."
            )
    shared_prompt.calls += 1
    outputs = []
    for start, prompt, lengths in shared_prompt.groups():
        own = slice(start + prompt, start + prompt + sum(lengths))
        prompt_key, prompt_value = (x[:, :, start : start + prompt] for x in (key, value))
        window = None if sliding_window is None or prompt <= sliding_window else sliding_window
        of_prompt, _ = sdpa(
            module,
            query[:, :, start : start + prompt],
            prompt_key,
            prompt_value,
            None if window is None else shared_prompt.mask(0, prompt, window, query.device),
            dropout=dropout,
            scaling=scaling,
            is_causal=window is None,
        )
        own_key, own_value = (_to_rows(x[:, :, own], lengths) for x in (key, value))
        expand = (len(lengths), -1, -1, -1)
        of_responses, _ = sdpa(
            module,
            _to_rows(query[:, :, own], lengths),
            torch.cat([prompt_key.expand(expand), own_key], dim=2),
            torch.cat([prompt_value.expand(expand), own_value], dim=2),
            shared_prompt.mask(prompt, max(lengths), sliding_window, query.device),
            dropout=dropout,
            scaling=scaling,
            is_causal=False,
        )
        outputs += [of_prompt, _from_rows(of_responses, lengths)]
    return torch.cat(outputs, dim=1), None


AttentionInterface.register(SHARED_PROMPT_ATTENTION, split_attention)
AttentionMaskInterface.register(SHARED_PROMPT_ATTENTION, AttentionMaskInterface()["sdpa"])
