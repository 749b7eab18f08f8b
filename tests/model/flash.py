"""FlashAttention's operators as torch calls them, in plain arithmetic on any device."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mpo_lightning.model import attention, ragged
from mpo_lightning.model.ragged import FLASH, PLAIN, Segments


def _segments(arguments: tuple[Any, ...], sides: dict[str, int]) -> Segments:
    query_starts, key_starts, max_q, max_k, dropout, causal = arguments[:6]
    assert query_starts.dtype == key_starts.dtype == torch.int32
    queries, keys = query_starts.diff().tolist(), key_starts.diff().tolist()
    assert (max_q, max_k, dropout) == (max(queries), max(keys), 0.0)
    left, right = sides["window_size_left"], sides["window_size_right"]
    # torch.nn.attention.varlen calls only a window of (-1, 0) causal.
    assert causal == (left == -1 and right == 0)
    assert (right, left) in {(-1, -1), (0, left)}
    window = None if left == -1 else left + 1
    return Segments(queries, keys, causal=right == 0, window=window)


def forward(
    query: Tensor, key: Tensor, value: Tensor, *arguments: Any, scale: float, **sides: int
) -> tuple[Tensor, ...]:
    """Stands for ``torch.ops.aten._flash_attention_forward``."""
    assert all(tensor.is_contiguous() for tensor in (query, key, value))
    assert query.shape[2] == key.shape[2] == value.shape[2]
    *_, debug_mask = arguments
    assert debug_mask is False
    segments = _segments(arguments, sides)
    output, normaliser = PLAIN.forward(query, key, value, segments, scale)
    return output, normaliser.float(), torch.empty(2), torch.empty(0), torch.empty(0)


def backward(*arguments: Any, scale: float, **sides: int) -> tuple[Tensor, ...]:
    """Stands for ``torch.ops.aten._flash_attention_backward``."""
    tensors = arguments[:6]
    assert all(tensor.is_contiguous() for tensor in tensors)
    segments = _segments(arguments[6:], sides)
    gradient, *heads, output, normaliser = tensors
    return PLAIN.backward(
        *(gradient, *heads),
        output=output,
        normaliser=normaliser,
        segments=segments,
        scaling=scale,
    )


def emulate(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Compute attention over shared prompts as on a GPU; returns the sequences of each call."""
    calls: list[int] = []

    def counted(*arguments: Any, **settings: Any) -> tuple[Tensor, ...]:
        calls.append(len(arguments[3]) - 1)
        return forward(*arguments, **settings)

    monkeypatch.setattr(ragged, "_flash_forward", counted)
    monkeypatch.setattr(ragged, "_flash_backward", backward)
    monkeypatch.setattr(attention, "kernels_for", lambda *_: FLASH)
    return calls
