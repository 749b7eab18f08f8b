"""Attention over shared prompts against masks: of each group, and of the whole row."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpo_lightning.batch import GroupBatch
from mpo_lightning.model import attention
from mpo_lightning.model.attention import (
    SHARED_PROMPT_ATTENTION,
    PromptSharing,
    split_attention,
)
from mpo_lightning.model.logps import response_logps, shared_row
from tests.conftest import random_groups, tiny_model
from tests.model import flash
from tests.model.architectures import SHAPE, lora_gradients, variant_model, with_trained_lora

GROUPS = ([11, 4, 17], [[3, 1, 9], [20, 2, 7, 5], [6, 6]])
ROWS = ([14, 3, 9], [[], [], []])


class Layer(nn.Module):
    """Attention layer of four heads, two of keys and values."""

    is_causal = True
    num_key_value_groups = 2


def whole_row_mask(sharing: PromptSharing) -> Tensor:
    """Which token of the row attends to which, bool (1, 1, T, T): what the attention is to be."""
    group = [*range(len(sharing.prompts)), *(group for group, _ in sharing.of_responses)]
    part = [*([0] * len(sharing.prompts)), *range(1, len(sharing.of_responses) + 1)]
    lengths = torch.tensor(sharing.own.queries)
    groups, parts = (torch.tensor(x).repeat_interleave(lengths) for x in (group, part))
    allowed = (groups[:, None] == groups) & ((parts == 0) | (parts[:, None] == parts))
    return allowed.tril()[None, None]


def by_mask(
    sharing: PromptSharing, tensors: list[Tensor], window: int | None, sinks: Tensor | None
) -> Tensor:
    """Attention of the whole row in plain arithmetic, (1, T, 4, E)."""
    query, key, value = tensors
    key, value = (x.repeat_interleave(2, dim=1) for x in (key, value))
    positions = sharing.positions()
    seen = whole_row_mask(sharing)[0, 0]
    if window is not None:
        seen = seen & (positions > positions[:, None] - window)
    logits = (query @ key.transpose(2, 3) * query.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
    if sinks is not None:
        column = sinks.view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, column], dim=-1)
    weights = logits.softmax(-1)[..., : key.shape[2]]
    return (weights @ value).transpose(1, 2)


@pytest.mark.parametrize("on_gpu", [False, True], ids=["cpu", "flash"])
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("window", [None, 40, 21, 6, 1], ids=str)
@pytest.mark.parametrize("sizes", [(8, 8), (16, 8), (8, 12)], ids=str)
@pytest.mark.parametrize("groups", [GROUPS, ROWS, ([5], [[4, 4]])], ids=["groups", "rows", "one"])
def test_a_row_is_attention_under_its_mask(
    *,
    groups: Any,
    sizes: tuple[int, int],
    window: int | None,
    sinks: bool,
    on_gpu: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Values and gradients, in float64."""
    if on_gpu:
        flash.emulate(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    sharing = PromptSharing(*groups)
    total = sum(sharing.own.queries)
    shapes = [(1, 4, total, sizes[0]), (1, 2, total, sizes[0]), (1, 2, total, sizes[1])]
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64) for s in [*shapes, (4,)]]
    leaves = [x.requires_grad_() for x in drawn[: 4 if sinks else 3]]
    gradient = torch.randn(1, total, 4, sizes[1], generator=generator, dtype=torch.float64)

    def split(query: Tensor, key: Tensor, value: Tensor, of_heads: Tensor | None = None) -> Tensor:
        return split_attention(
            *(Layer(), query, key, value, sharing.as_attention_mask()),
            sliding_window=window,
            s_aux=of_heads,
        )[0]

    def dense(query: Tensor, key: Tensor, value: Tensor, of_heads: Tensor | None = None) -> Tensor:
        return by_mask(sharing, [query, key, value], window, of_heads)

    def results(compute: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        output = compute(*leaves)
        return output.detach(), *torch.autograd.grad(output, leaves, gradient)

    # FlashAttention's normalisers are float32.
    limits = {"rtol": 1e-5, "atol": 1e-6} if on_gpu else {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(results(split), results(dense), **limits)
    assert sharing.calls == 1


@pytest.mark.parametrize("kernels", ["cpu", "flash", "masks"])
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("window", [None, 10, 1], ids=str)
def test_a_row_continues_the_prompt_of_an_earlier_one(
    *, window: int | None, sinks: bool, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rows are the attention of one: values and gradients, in float64."""
    if kernels == "flash":
        flash.emulate(monkeypatch)
    if kernels == "masks":
        monkeypatch.setattr(attention, "kernels_for", lambda *_: None)
    whole = PromptSharing(*GROUPS)
    total = sum(whole.own.queries)
    parts = torch.arange(total).split(whole.own.queries)
    # The second row has but one group, which began before it and goes on.
    rows = [
        (PromptSharing([11, 4], [[3, 1, 9], [20]]), [0, 1, 3, 4, 5, 6]),
        (PromptSharing([4], [[2, 7]], begun=True), [7, 8]),
        (PromptSharing([4, 17], [[5], [6, 6]], begun=True), [2, 9, 10, 11]),
    ]
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 4, total, 8), (1, 2, total, 8), (1, 2, total, 8), (4,)]
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    leaves = [x.requires_grad_() for x in drawn[: 4 if sinks else 3]]
    gradient = torch.randn(1, total, 4, 8, generator=generator, dtype=torch.float64)
    of_heads = leaves[3] if sinks else None

    layer, found, earlier = Layer(), [], None
    places = [torch.cat([parts[number] for number in numbers]) for _, numbers in rows]
    for (sharing, _), at in zip(rows, places, strict=True):
        one = sharing.for_pass(earlier, keep=earlier is None)
        heads = [x[:, :, at] for x in leaves[:3]]
        how = {"sliding_window": window, "s_aux": of_heads, "shared_prompt": one}
        found.append(split_attention(layer, *heads, None, **how)[0])
        earlier = one.kept or earlier
        assert sharing.kept is None
    output = torch.cat(found, dim=1)[:, torch.cat(places).argsort()]
    expected = by_mask(whole, leaves[:3], window, of_heads)
    results = [(x.detach(), *torch.autograd.grad(x, leaves, gradient)) for x in (output, expected)]
    limits = {"rtol": 1e-5, "atol": 1e-6} if kernels == "flash" else {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(*results, **limits)


def test_a_row_takes_two_calls_for_any_number_of_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one where a window ends within a prompt."""
    calls = flash.emulate(monkeypatch)
    sharing = PromptSharing(*GROUPS)
    total = sum(sharing.own.queries)
    heads = [torch.randn(1, count, total, 8) for count in (4, 2, 2)]
    split_attention(Layer(), *heads, None, shared_prompt=sharing)
    assert calls == [3 + 9, 3]
    split_attention(Layer(), *heads, None, shared_prompt=sharing, sliding_window=8)
    assert calls[2:] == [3 + 9]


@pytest.mark.parametrize("name", ["llama", "gpt2", "starcoder2 with a window", "gpt_oss"])
def test_groups_one_by_one_are_the_row(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On devices without kernels for what a model has."""
    model = with_trained_lora(variant_model(name))
    batch = GroupBatch.from_groups(random_groups(SHAPE))
    calls = []
    original = attention._by_groups

    def by_groups(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(attention, "_by_groups", by_groups)
    results = []
    for kernels in (True, False):
        if not kernels:
            monkeypatch.setattr(attention, "kernels_for", lambda *_: None)
        model.zero_grad()
        logps = response_logps(model.get_base_model(), batch, layout="shared")
        logps.square().sum().backward()
        results.append((logps.detach(), lora_gradients(model)))
    assert len(calls) == 2
    (row, gradients), (one_by_one, others) = results
    torch.testing.assert_close(row, one_by_one, rtol=1e-5, atol=1e-4)
    for key, gradient in gradients.items():
        assert (others[key] - gradient).abs().max() <= 1e-3 * gradient.abs().max(), key


@pytest.mark.parametrize(
    ("settings", "lacking"),
    [
        ({"softcap": 5.0}, "logit soft-caps"),
        ({"dropout": 0.5}, "attention dropout"),
        ({}, "torch.float32 and heads of 8 on this device (cpu)"),
    ],
    ids=["softcap", "dropout", "device"],
)
def test_log_says_once_what_kernels_lack(
    settings: Any,
    lacking: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    attention._say_once.cache_clear()
    if not settings:
        monkeypatch.setattr(attention, "kernels_for", lambda *_: None)
    sharing = PromptSharing([3], [[2, 1]])
    heads = [torch.randn(1, count, 6, 8) for count in (4, 2, 2)]
    for _ in range(2):
        split_attention(Layer(), *heads, None, shared_prompt=sharing, **settings)
    (record,) = caplog.records
    assert record.message.endswith(f"group by group, since no kernel has {lacking}.")


def test_autocast_computes_in_its_dtype() -> None:
    sharing = PromptSharing([3], [[2, 1]])
    query, key, value = (torch.randn(1, count, 6, 8) for count in (4, 2, 2))
    with torch.autocast("cpu", torch.bfloat16):
        # Rotary embeddings are float32.
        output, _ = split_attention(
            Layer(), query, key, value.bfloat16(), None, shared_prompt=sharing
        )
    assert output.dtype == torch.bfloat16
    expected, _ = split_attention(Layer(), query, key, value, None, shared_prompt=sharing)
    torch.testing.assert_close(output.float(), expected, rtol=2e-2, atol=2e-2)


def test_the_whole_rows_mask_is_the_same_attention() -> None:
    model = tiny_model()
    batch = GroupBatch.from_groups(random_groups(SHAPE))
    row = shared_row(batch)
    sharing = row.sharing
    assert sharing is not None
    dense = whole_row_mask(sharing)
    assert dense.shape == (1, 1, len(batch.tokens), len(batch.tokens))

    def compute(mask: Tensor) -> Tensor:
        hidden: Tensor = model.model(
            **row.inputs, attention_mask=mask, use_cache=False
        ).last_hidden_state
        return hidden

    with torch.no_grad():
        by_mask = compute(dense)
        model.config._attn_implementation = SHARED_PROMPT_ATTENTION
        split = compute(sharing.as_attention_mask())
    assert sharing.calls == model.config.num_hidden_layers
    torch.testing.assert_close(split, by_mask, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "gemma3_text", "gpt_oss", "mistral with a window"]
)
def test_the_model_still_generates_and_masks_padding_after_a_shared_pass(name: str) -> None:
    """What the model computes by itself is as it was under its own attention."""
    model = variant_model(name)
    ids = torch.arange(5, 25)[None].repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}

    def compute() -> tuple[torch.Tensor, torch.Tensor]:
        logits = model(ids, attention_mask=mask).logits
        return logits[mask.bool()], model.generate(ids[:1], **options)

    with torch.no_grad():
        logits, tokens = compute()
        response_logps(model, GroupBatch.from_groups(random_groups(SHAPE)), layout="shared")
        assert model.config._attn_implementation == SHARED_PROMPT_ATTENTION
        logits_after, tokens_after = compute()
    torch.testing.assert_close(logits_after, logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(tokens_after, tokens)


def test_window_is_measured_in_positions() -> None:
    mask = PromptSharing([3], [[2]]).mask(3, 2, 2)[0, 0]
    assert mask.tolist() == [[False, False, True, True, False], [False, False, False, True, True]]


def test_row_of_two_groups_by_hand() -> None:
    sharing = PromptSharing([3, 2], [[2, 1], [1]])
    assert sharing.positions().tolist() == [0, 1, 2, 0, 1, 3, 4, 3, 2]
    assert sharing.own.queries == sharing.own.keys == [3, 2, 2, 1, 1]
    over = sharing.over_prompts
    assert over is not None
    assert (over.queries, over.keys) == ([3, 1], [3, 2])
    assert [sharing.reaches(window) for window in (None, 5, 4)] == [True, True, False]
    places, segments = sharing.windowed(3)
    assert places.tolist() == [0, 1, 2, 3, 4, 1, 2, 5, 6, 1, 2, 7, 3, 4, 8]
    assert (segments.queries, segments.keys) == ([3, 2, 2, 1, 1], [3, 2, 4, 3, 3])
