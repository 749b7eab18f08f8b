"""Ragged attention: its specification against torch's autograd, and kernels against it."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mpo_lightning.model.ragged import CPU, FLASH, PLAIN, Kernels, Segments, kernels_for
from tests.model import flash

PATTERNS = {
    "causal": Segments([5, 3, 3, 1], [5, 3, 3, 1], causal=True),
    "all keys": Segments([4, 9], [6, 2], causal=False),
    "after keys": Segments([3, 3, 2], [7, 7, 2], causal=True),
    "window": Segments([9, 3, 4], [9, 7, 4], causal=True, window=4),
    "window of one": Segments([3, 2], [3, 2], causal=True, window=1),
}
SCALING = 0.4


def tensors(segments: Segments, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Queries of 4 heads, keys and values of 2, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = sum(segments.queries), sum(segments.keys)
    sizes = [(queries, 4), (keys, 2), (keys, 2), (queries, 4)]
    drawn = [torch.randn(*size, 8, generator=generator, dtype=torch.float64) for size in sizes]
    return [x.to(dtype) for x in drawn]


def back(kernels: Kernels, segments: Segments, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Backward pass; the last two tensors are the output and its normaliser."""
    *heads, output, normaliser = tensors
    how: dict[str, Any] = {"segments": segments, "scaling": SCALING}
    return kernels.backward(*heads, output=output, normaliser=normaliser, **how)


def by_torch(segments: Segments, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Each sequence by itself."""
    outputs = []
    parts = (
        *(torch.split(query, segments.queries), torch.split(key, segments.keys)),
        torch.split(value, segments.keys),
    )
    for q, k, v in zip(*parts, strict=True):
        rows, columns = torch.arange(len(q))[:, None] + len(k) - len(q), torch.arange(len(k))
        seen = torch.ones(len(q), len(k), dtype=torch.bool)
        if segments.causal:
            seen = (columns <= rows) & (columns > rows - (segments.window or len(k)))
        heads = (x.transpose(0, 1) for x in (q, k, v))
        found = scaled_dot_product_attention(*heads, attn_mask=seen, scale=SCALING, enable_gqa=True)
        outputs.append(found.transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_plain_arithmetic_is_attention_with_its_gradients(name: str) -> None:
    segments = PATTERNS[name]
    query, key, value, gradient = tensors(segments)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    expected = by_torch(segments, *leaves)
    expected_gradients = torch.autograd.grad(expected, leaves, gradient)
    with torch.no_grad():
        output, normaliser = PLAIN.forward(query, key, value, segments, SCALING)
        found = back(PLAIN, segments, gradient, query, key, value, output, normaliser)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(found, expected_gradients)


@pytest.mark.parametrize("kernels", [CPU, FLASH], ids=["cpu", "flash"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_kernels_compute_what_plain_arithmetic_does(
    name: str, dtype: torch.dtype, kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also given an output and a normaliser over more keys than their own."""
    flash.emulate(monkeypatch)
    segments = PATTERNS[name]
    query, key, value, gradient = tensors(segments, dtype)
    # Slices of tensors whose heads come first, as models have them.
    query, key, value = (
        torch.cat([x, x]).transpose(0, 1).contiguous().transpose(0, 1)[len(x) :]
        for x in (query, key, value)
    )
    output, normaliser = kernels.forward(query, key, value, segments, SCALING)
    expected, expected_normaliser = PLAIN.forward(query, key, value, segments, SCALING)
    limits: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
    if dtype == torch.bfloat16:
        limits = {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(output, expected, **limits)
    torch.testing.assert_close(normaliser.to(expected_normaliser), expected_normaliser, **limits)
    # As if as much probability went to other keys, whose values were zero.
    more, half = expected_normaliser + torch.tensor(2.0).log(), expected / 2
    arguments = (gradient, query, key, value, half, more)
    torch.testing.assert_close(
        back(kernels, segments, *arguments), back(PLAIN, segments, *arguments), **limits
    )


def test_gradients_of_two_sets_of_keys_add_up() -> None:
    """A call over some of the keys, given output and normaliser over all, has its share."""
    whole = Segments([6], [9], causal=False)
    query, key, value, gradient = tensors(whole)
    output, normaliser = PLAIN.forward(query, key, value, whole, SCALING)
    expected = back(PLAIN, whole, gradient, query, key, value, output, normaliser)
    shares = [
        back(
            *(PLAIN, Segments([6], [len(key[part])], causal=False)),
            *(gradient, query, key[part], value[part], output, normaliser),
        )
        for part in (slice(4), slice(4, 9))
    ]
    torch.testing.assert_close(shares[0][0] + shares[1][0], expected[0])
    for number in (1, 2):
        both = torch.cat([shares[0][number], shares[1][number]])
        torch.testing.assert_close(both, expected[number])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["causal", "all keys", "window"])
def test_flash_operators_of_torch_take_and_return_what_is_expected(
    name: str, dtype: torch.dtype
) -> None:
    """By torch's own rules for shapes, which need no GPU."""
    pattern = PATTERNS[name]
    segments = Segments(
        *(pattern.queries, pattern.keys),
        causal=pattern.causal,
        window=pattern.window,
        device="meta",
    )
    query, key, value, gradient = (x.to("meta", dtype) for x in tensors(segments))
    output, normaliser = FLASH.forward(query, key, value, segments, SCALING)
    assert output.shape == query.shape
    assert output.dtype == dtype
    assert output.is_contiguous()
    assert normaliser.shape == (4, len(query))
    assert normaliser.dtype == torch.float32
    assert normaliser.is_contiguous()
    found = back(FLASH, segments, gradient, query, key, value, output, normaliser)
    for of_tensor, tensor in zip(found, (query, key, value), strict=True):
        assert of_tensor.shape == tensor.shape
        assert of_tensor.dtype == dtype
        assert of_tensor.is_contiguous()


def test_a_normaliser_of_another_layout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "mpo_lightning.model.ragged._flash_forward",
        lambda query, *_, **__: (query, torch.zeros(1, 4, 9), None, None, None),
    )
    segments = PATTERNS["causal"]
    query, key, value, _ = tensors(segments, torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"normaliser of torch.float32 \(1, 4, 9\)"):
        FLASH.forward(query, key, value, segments, SCALING)


def test_kernels_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, half, single = torch.device("cuda"), torch.bfloat16, torch.float32
    assert kernels_for(torch.device("cpu"), torch.float64, 512) is CPU
    assert kernels_for(torch.device("mps"), half, 64) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    assert kernels_for(gpu, half, 256) is FLASH
    assert kernels_for(gpu, torch.float16, 64) is FLASH
    assert kernels_for(gpu, single, 64) is None
    assert kernels_for(gpu, half, 264) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert kernels_for(gpu, half, 64) is None


def test_runs_are_neighbours_of_equal_lengths_and_a_thousand_queries() -> None:
    segments = Segments([3, 3, 2, 3], [3, 3, 2, 5], causal=False)
    assert list(segments.runs()) == [(2, 3, 3), (1, 2, 2), (1, 3, 5)]
    assert list(Segments([400] * 5, [9] * 5, causal=False).runs()) == [
        *[(2, 400, 9)] * 2,
        (1, 400, 9),
    ]
    assert list(Segments([2000], [9], causal=False).runs()) == [(1, 2000, 9)]
