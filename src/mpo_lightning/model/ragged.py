"""Ragged attention: sequences of any lengths one after the other, without padding.

This is all that attention over shared prompts needs of a device: a forward pass that returns the
output and the log of each query's normaliser, and a backward pass that takes both back. Given an
output and a normaliser over *more* keys than the call has, the backward pass computes the share of
the call's keys in the gradients: so attention over two sets of keys can be computed apart.

`ragged_attention` and `ragged_attention_backward` say in plain arithmetic what is computed, in any
dtype. `kernels_for` returns the kernels of a device that compute the same: on CPU those under
``scaled_dot_product_attention``, on CUDA those under ``torch.nn.attention.varlen``
(FlashAttention-2, arXiv 2307.08691; or FlashAttention-3 or 4 once
``torch.nn.attention.activate_flash_attention_impl`` has made them torch's). torch's own autograd of
these functions ignores the gradient of the normaliser.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import groupby
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = [
    "PLAIN",
    "Kernels",
    "Segments",
    "kernels_for",
    "ragged_attention",
    "ragged_attention_backward",
]


class Segments:
    """Sequences of queries, and of the keys that each attends to.

    Args:
        queries: number of queries of each sequence, at least one.
        keys: number of keys of each sequence, at least one.
        causal: whether a query sees no keys after its own place. The last query of a sequence has
            the place of its last key.
        window: number of keys that a query sees, up to its own place, if causal. Defaults to all.
        device: device of the tensors that kernels read.
    """

    def __init__(
        self,
        queries: Sequence[int],
        keys: Sequence[int],
        *,
        causal: bool,
        window: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.queries, self.keys = list(queries), list(keys)
        self.causal, self.window = causal, window
        self.device = device
        self._masks: dict[tuple[int, int, torch.dtype], Tensor | None] = {}

    @cached_property
    def query_starts(self) -> Tensor:
        """First query of each sequence, and the number of all queries, int32 (N + 1,)."""
        return self._starts(self.queries)

    @cached_property
    def key_starts(self) -> Tensor:
        """First key of each sequence, and the number of all keys, int32 (N + 1,)."""
        return self._starts(self.keys)

    def _starts(self, lengths: list[int]) -> Tensor:
        return torch.tensor([0, *lengths]).cumsum(0).to(self.device, torch.int32)

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """Yield runs of sequences with equal lengths: their number, queries and keys.

        A run has at most about a thousand queries: what is computed of it is copied.
        """
        for (queries, keys), run in groupby(zip(self.queries, self.keys, strict=True)):
            left, most = len(list(run)), max(1, 1024 // queries)
            while left:
                yield min(left, most), queries, keys
                left -= min(left, most)

    def allowed(self, queries: int, keys: int) -> Tensor | None:
        """Return which keys of a sequence its queries see, bool (queries, keys); None for all."""
        if not self.causal:
            return None
        places = torch.arange(keys - queries, keys, device=self.device)[:, None]
        key_places = torch.arange(keys, device=self.device)[None]
        seen = key_places <= places
        if self.window is not None:
            seen &= key_places > places - self.window
        return seen

    def mask(self, queries: int, keys: int, dtype: torch.dtype) -> Tensor | None:
        """Return the same as numbers to add to the logits; None for a causal square or all."""
        key = (queries, keys, dtype)
        if key not in self._masks:
            self._masks[key] = None
            square = queries == keys and (self.window is None or keys <= self.window)
            seen = self.allowed(queries, keys)
            if seen is not None and not square:
                mask = torch.zeros(seen.shape, dtype=dtype, device=self.device)
                self._masks[key] = mask.masked_fill_(~seen, -torch.inf)
        return self._masks[key]


class Backward(Protocol):
    """Backward pass of ragged attention, see `ragged_attention_backward`."""

    def __call__(
        self,
        gradient: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        output: Tensor,
        normaliser: Tensor,
        segments: Segments,
        scaling: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of queries, keys and values."""


class Kernels(NamedTuple):
    """A forward and a backward pass of ragged attention.

    Attributes:
        forward: see `ragged_attention`.
        backward: see `ragged_attention_backward`.
    """

    forward: Callable[[Tensor, Tensor, Tensor, Segments, float], tuple[Tensor, Tensor]]
    backward: Backward


def _sequences(
    segments: Segments, of_queries: Sequence[Tensor], of_keys: Sequence[Tensor]
) -> Iterator[tuple[list[Tensor], list[Tensor], Tensor | None]]:
    """Yield each sequence's part of tensors over queries and over keys, and what it sees."""
    parts = [torch.split(x, segments.queries) for x in of_queries]
    key_parts = [torch.split(x, segments.keys) for x in of_keys]
    for number, (queries, keys) in enumerate(zip(segments.queries, segments.keys, strict=True)):
        seen = segments.allowed(queries, keys)
        yield [part[number] for part in parts], [part[number] for part in key_parts], seen


def _logits(query: Tensor, key: Tensor, scaling: float, seen: Tensor | None) -> Tensor:
    """Return (heads, queries, keys)."""
    logits = scaling * torch.einsum("qhd,khd->hqk", query, key)
    return logits if seen is None else logits.masked_fill(~seen, -torch.inf)


def ragged_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float
) -> tuple[Tensor, Tensor]:
    """Compute the attention of each sequence in plain arithmetic.

    Args:
        query: queries of all sequences, one after the other, (Q, heads, D).
        key: their keys, (K, key-value heads, D). Each key-value head serves as many consecutive
            heads of the queries.
        value: their values, (K, key-value heads, D).
        segments: lengths of the sequences, and which keys are seen.
        scaling: factor of the attention logits.

    Returns:
        The output, (Q, heads, D) in the dtype of the queries, and the log of the sum of each
        query's exponentiated logits, (heads, Q) in float32 or wider.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    copies = query.shape[1] // key.shape[1]
    outputs, normalisers = [], []
    keys = [x.to(wide).repeat_interleave(copies, dim=1) for x in (key, value)]
    for (q,), (k, v), seen in _sequences(segments, [query.to(wide)], keys):
        logits = _logits(q, k, scaling, seen)
        normalisers.append(logits.logsumexp(-1))
        outputs.append(torch.einsum("hqk,khd->qhd", logits.softmax(-1), v))
    return torch.cat(outputs).to(query.dtype), torch.cat(normalisers, dim=1)


def ragged_attention_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    output: Tensor,
    normaliser: Tensor,
    segments: Segments,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of queries, keys and values in plain arithmetic.

    Args:
        gradient: gradient of the output, (Q, heads, D).
        query: as in `ragged_attention`; so are ``key``, ``value``, ``segments``, ``scaling``.
        key: see there.
        value: see there.
        output: output over all keys that the queries see, in this call or others, (Q, heads, D).
        normaliser: log of the normaliser over all these keys, (heads, Q).
        segments: see there.
        scaling: see there.

    Returns:
        Three gradients, each in the shape and dtype of its tensor: all of those of the keys and
        values, and the share of this call's keys in those of the queries.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    copies = query.shape[1] // key.shape[1]
    of_queries = [x.to(wide) for x in (gradient, query, output, normaliser.t())]
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    keys = [x.to(wide).repeat_interleave(copies, dim=1) for x in (key, value)]
    for (g, q, o, n), (k, v), seen in _sequences(segments, of_queries, keys):
        weights = (_logits(q, k, scaling, seen) - n.t()[..., None]).exp()
        slope = torch.einsum("qhd,khd->hqk", g, v) - (g * o).sum(-1).t()[..., None]
        of_logits = weights * slope * scaling
        of_key, of_value = (
            torch.einsum("hqk,qhd->khd", by, x).view(len(k), -1, copies, k.shape[2]).sum(2)
            for by, x in ((of_logits, q), (weights, g))
        )
        found.append((torch.einsum("hqk,khd->qhd", of_logits, k), of_key, of_value))
    of_query, of_keys, of_values = (torch.cat(parts) for parts in zip(*found, strict=True))
    return of_query.to(query.dtype), of_keys.to(key.dtype), of_values.to(value.dtype)


PLAIN = Kernels(ragged_attention, ragged_attention_backward)


def _runs(
    segments: Segments, of_queries: Sequence[Tensor], of_keys: Sequence[Tensor]
) -> Iterator[tuple[list[Tensor], list[Tensor], tuple[int, int]]]:
    """Yield the part of each run, (sequences, heads, length, D), and its numbers of both."""
    query, key = 0, 0
    for count, queries, keys in segments.runs():
        rows, key_rows = count * queries, count * keys
        yield (
            [_in_rows(x[query : query + rows], count) for x in of_queries],
            [_in_rows(x[key : key + key_rows], count) for x in of_keys],
            (queries, keys),
        )
        query, key = query + rows, key + key_rows


def _in_rows(part: Tensor, count: int) -> Tensor:
    return part.view(count, -1, *part.shape[1:]).transpose(1, 2)


def _cpu_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float
) -> tuple[Tensor, Tensor]:
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output = query.new_empty(query.shape)
    wide = torch.promote_types(query.dtype, torch.float32)
    normaliser = query.new_empty((*query.shape[:2], 1), dtype=wide)
    for (q, o, n), (k, v), sizes in _runs(segments, [query, output, normaliser], [key, value]):
        mask = segments.mask(*sizes, query.dtype)
        causal = segments.causal and mask is None
        of_run, of_normaliser = attend(q, k, v, 0.0, causal, attn_mask=mask, scale=scaling)
        o.copy_(of_run)
        n.copy_(of_normaliser[..., None])
    return output, normaliser[..., 0].t()


def _cpu_attention_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    output: Tensor,
    normaliser: Tensor,
    segments: Segments,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    dtype = query.dtype
    # In 16 bits the kernel is several times slower than in float32.
    gradient, query, key, value, output = (
        x.to(normaliser.dtype) for x in (gradient, query, key, value, output)
    )
    found = tuple(x.new_empty(x.shape) for x in (query, key, value))
    of_queries = [gradient, query, output, normaliser.t()[..., None], found[0]]
    for (g, q, o, n, *to_query), (k, v, *to_keys), sizes in _runs(
        segments, of_queries, [key, value, *found[1:]]
    ):
        mask = segments.mask(*sizes, query.dtype)
        causal = segments.causal and mask is None
        of_run = attend_backward(
            g, q, k, v, o, n[..., 0].contiguous(), 0.0, causal, attn_mask=mask, scale=scaling
        )
        for to, part in zip((*to_query, *to_keys), of_run, strict=True):
            to.copy_(part)
    of_query, of_key, of_value = (x.to(dtype) for x in found)
    return of_query, of_key, of_value


_flash_forward = torch.ops.aten._flash_attention_forward
_flash_backward = torch.ops.aten._flash_attention_backward


def _flash_arguments(segments: Segments) -> tuple[list[object], bool, dict[str, int]]:
    """Return the lengths, whether attention is plainly causal, and the window, as torch wants."""
    left = -1 if segments.window is None else segments.window - 1
    lengths = [
        *(segments.query_starts, segments.key_starts),
        *(max(segments.queries), max(segments.keys)),
    ]
    sides = {"window_size_left": left, "window_size_right": 0 if segments.causal else -1}
    return lengths, segments.causal and segments.window is None, sides


def _flash_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float
) -> tuple[Tensor, Tensor]:
    lengths, causal, sides = _flash_arguments(segments)
    query, key, value = (x.contiguous() for x in (query, key, value))
    output, normaliser, *_ = _flash_forward(
        query, key, value, *lengths, 0.0, causal, False, scale=scaling, **sides
    )
    expected = (query.shape[1], query.shape[0])
    if normaliser.shape != expected or normaliser.dtype != torch.float32:
        raise RuntimeError(
            f"torch {torch.__version__}: its flash attention returns a normaliser of "
            f"{normaliser.dtype} {tuple(normaliser.shape)}, not of float32 {expected}."
        )
    return output, normaliser


def _flash_attention_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    output: Tensor,
    normaliser: Tensor,
    segments: Segments,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    lengths, causal, sides = _flash_arguments(segments)
    tensors = (gradient, query, key, value, output, normaliser)
    # Without dropout no random numbers are drawn.
    state = torch.zeros(2, dtype=torch.uint64, device=query.device)
    of_query, of_key, of_value = _flash_backward(
        *(x.contiguous() for x in tensors),
        *lengths,
        0.0,
        causal,
        state,
        torch.empty(0, device=query.device),
        scale=scaling,
        **sides,
    )
    return of_query, of_key, of_value


CPU = Kernels(_cpu_attention, _cpu_attention_backward)
FLASH = Kernels(_flash_attention, _flash_attention_backward)


def kernels_for(device: torch.device, dtype: torch.dtype, size: int) -> Kernels | None:
    """Return the kernels of a device for tensors of a dtype and heads of a size.

    None where there are none: of a GPU for float32, for heads beyond 256, and of GPUs older than
    NVIDIA's Ampere.
    """
    if device.type == "cpu":
        return CPU
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    able = torch.cuda.get_device_capability(device) >= (8, 0)
    able = able and torch.backends.cuda.is_flash_attention_available()
    return FLASH if able and dtype in {torch.float16, torch.bfloat16} and size <= 256 else None
