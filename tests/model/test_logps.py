"""Both layouts against the model's own full logits, values and gradients."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from mpo_lightning.batch import GroupBatch
from mpo_lightning.model.logps import (
    SHARED_PROMPT_MODELS,
    SPARSE_MODELS,
    Layout,
    cheapest_layout,
    exact_layouts,
    packed_rows,
    response_logps,
    separate_rows,
    shared_row,
    token_logps,
)
from tests.conftest import plain_logps, random_groups, tiny_model
from tests.model import flash
from tests.model.architecture_table import LAYOUTS as TABLE
from tests.model.architecture_table import layouts_of, models, written
from tests.model.architectures import (
    CONTINUED,
    IN_FLOAT32,
    LAYOUTS,
    SEPARATE,
    SHAPE,
    VARIANTS,
    WRAPPERS,
    lora_gradients,
    multimodal_config,
    variant_model,
    with_trained_lora,
)


def test_every_architecture_has_a_configuration() -> None:
    of_wrappers = {multimodal_config(name).get_text_config().model_type for name in WRAPPERS}
    configured = {name.split(maxsplit=1)[0] for name in VARIANTS} | of_wrappers
    assert configured == SHARED_PROMPT_MODELS


@pytest.mark.parametrize("name", sorted(VARIANTS | WRAPPERS))
def test_layouts_equal_full_logits_with_gradients(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CPU, and as on a GPU; separate rows padded and, with the attention of the row, packed."""
    model = with_trained_lora(variant_model(name))
    value_error, gradient_error = 1e-4, 1e-3
    if name not in IN_FLOAT32:
        model, value_error, gradient_error = model.double(), 1e-5, 1e-5
    causal_lm = model.get_base_model()
    batch = GroupBatch.from_groups(random_groups(SHAPE))
    weights = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results = {}
    layouts: list[tuple[Layout, str]] = [
        *(("separate", "padded"), ("shared", "on CPU"), ("shared", "in slices")),
        *(("separate", "packed"), ("shared", "on a GPU"), ("separate", "on a GPU")),
    ]
    for layout in ("plain", *layouts):
        model.zero_grad()
        if layout == "plain":
            logps = plain_logps(causal_lm, batch)
        else:
            calls = flash.emulate(monkeypatch) if layout[1] == "on a GPU" else None
            per_pass = 4 if layout[1] == "in slices" else None
            logps = response_logps(
                causal_lm, batch, layout=layout[0], chunk_size=7, responses_per_pass=per_pass
            )
            if calls is not None:
                # Masks of whole rows, and soft-caps.
                without = name.startswith("falcon") or name in {"gemma2", "vaultgemma"}
                assert bool(calls) != without
        (logps * weights * batch.valid).sum().backward()
        results[layout] = (logps.detach(), lora_gradients(model))
    expected, expected_gradients = results.pop("plain")
    assert expected.abs().max() > 10
    for layout, (logps, gradients) in results.items():
        # FlashAttention's normalisers are float32.
        single = 1e-4 if layout[1] == "on a GPU" else 0.0
        assert (logps.double() - expected).abs().max() <= max(value_error, single), layout
        for key, gradient in gradients.items():
            scale = expected_gradients[key].abs().max()
            error = (gradient - expected_gradients[key]).abs().max()
            assert error <= max(gradient_error, single) * scale, (layout, key)


@pytest.mark.parametrize("name", [*SEPARATE, "llama4_text", "mllama"])
def test_separate_rows_serve_architectures_that_cannot_share(name: str) -> None:
    """Also rows that are longer than a chunk of attention."""
    model = variant_model(name, **(SEPARATE | CONTINUED).get(name, {}))
    assert ("continued" in exact_layouts(model)) == (name not in SEPARATE)
    assert "shared" not in exact_layouts(model)
    batch = GroupBatch.from_groups(random_groups(SHAPE))
    with torch.no_grad():
        expected = plain_logps(model, batch)
        found = response_logps(model, batch, layout="separate", chunk_size=5)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["mpt"])
def test_a_model_that_never_follows_the_layout_is_refused(name: str) -> None:
    batch = GroupBatch.from_groups(random_groups(SHAPE))
    with pytest.raises(NotImplementedError, match="0 of 2 attention layers"):
        response_logps(variant_model(name, **CONTINUED[name]), batch, layout="shared")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_group_does_not_depend_on_its_neighbours(layout: Layout) -> None:
    model = tiny_model()
    batch = GroupBatch.from_groups(random_groups(SHAPE))
    with torch.no_grad():
        together = response_logps(model, batch, layout=layout)
        for row, (_, lengths) in enumerate(SHAPE):
            alone = response_logps(model, batch.select(row), layout=layout)
            torch.testing.assert_close(together[row, : len(lengths)], alone[0], rtol=0, atol=1e-4)
            assert together[row, len(lengths) :].eq(0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_permuting_responses_permutes_log_probabilities(layout: Layout) -> None:
    model = tiny_model()
    (group,) = random_groups([(9, [3, 8, 5, 1])])
    order = [2, 0, 3, 1]
    permuted = group._replace(responses=tuple(group.responses[i] for i in order))
    with torch.no_grad():
        straight = response_logps(model, GroupBatch.from_groups([group]), layout=layout)
        turned = response_logps(model, GroupBatch.from_groups([permuted]), layout=layout)
    torch.testing.assert_close(turned, straight[:, order], rtol=0, atol=1e-4)


def test_each_row_scores_exactly_the_response_tokens() -> None:
    """Examples by hand: prompt a b, responses c d and e; and a group f, g after it."""
    group, other = random_groups([(2, [2, 1]), (1, [1])])
    a, b = group.prompt.tolist()
    (c, d), (e,) = (response.tolist() for response in group.responses)
    batch = GroupBatch.from_groups([group])
    shared = shared_row(batch)
    assert shared.inputs["input_ids"].tolist() == [[a, b, c, d, e]]
    assert shared.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 2]]
    assert shared.predictors.tolist() == [1, 2, 1]
    assert shared.targets.tolist() == [c, d, e]
    separate = separate_rows(batch)
    assert separate.inputs["input_ids"].tolist() == [[a, b, c, d], [a, b, e, 0]]
    assert separate.inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert separate.predictors.tolist() == [1, 2, 5]
    assert separate.targets.tolist() == [c, d, e]
    packed = packed_rows(batch)
    assert packed.inputs["input_ids"].tolist() == [[a, b, c, d, a, b, e]]
    assert packed.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert packed.predictors.tolist() == [1, 2, 5]
    assert packed.targets.tolist() == [c, d, e]
    f, g = other.prompt.item(), other.responses[0].item()
    two = shared_row(GroupBatch.from_groups([group, other]))
    assert two.inputs["input_ids"].tolist() == [[a, b, f, c, d, e, g]]
    assert two.inputs["position_ids"].tolist() == [[0, 1, 0, 2, 3, 2, 1]]
    assert two.predictors.tolist() == [1, 3, 1, 2]
    assert two.targets.tolist() == [c, d, e, g]


@pytest.mark.parametrize("chunk_size", [1, 7, 64])
def test_token_logps_equal_full_log_softmax(chunk_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(33, 16, generator=generator, requires_grad=True)
    head = torch.nn.Linear(16, 101)
    targets = torch.randint(101, (33,), generator=generator)
    weights = torch.randn(33, generator=generator)

    def gradients(values: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad((values * weights).sum(), [hidden, *head.parameters()]))

    found = token_logps(hidden, targets, head, frozen=False, chunk_size=chunk_size)
    full = head(hidden).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found, full)
    for got, want in zip(gradients(found), gradients(full), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_sums_of_a_thousand_bf16_tokens_keep_fp32_precision() -> None:
    """The error left is that of the bf16 logits; summing in bf16 would be off by whole nats."""
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(32, 500, bias=False).bfloat16()
    hidden = torch.randn(1000, 32, generator=generator).bfloat16()
    targets = torch.randint(500, (1000,), generator=generator)
    with torch.no_grad():
        found = token_logps(hidden, targets, head, frozen=True, chunk_size=128)
        exact = head(hidden).double().log_softmax(-1).gather(1, targets[:, None]).sum()
        in_bf16 = head(hidden).log_softmax(-1).gather(1, targets[:, None]).sum()
    assert found.dtype == torch.float32
    assert abs(found.sum().double() - exact) < 0.01
    assert abs(in_bf16.double() - exact) > 1


def test_a_frozen_head_is_computed_once() -> None:
    """Its gradient is taken in the forward pass, also through a soft-cap, and nothing is saved."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(33, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    linear = torch.nn.Linear(16, 101, dtype=torch.float64).requires_grad_(False)
    targets = torch.randint(101, (33,), generator=generator)
    weights = torch.randn(33, generator=generator)
    calls = []

    def head(states: torch.Tensor) -> torch.Tensor:
        calls.append(len(states))
        return 3 * torch.tanh(linear(states) / 3)

    found = token_logps(hidden, targets, head, frozen=True, chunk_size=7)
    (gradient,) = torch.autograd.grad((found * weights).sum(), hidden)
    assert calls == [7, 7, 7, 7, 5]
    full = head(hidden).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    (expected,) = torch.autograd.grad((full * weights).sum(), hidden)
    torch.testing.assert_close(found, full)
    torch.testing.assert_close(gradient, expected)


def test_a_lora_on_the_output_head_counts() -> None:
    settings = LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    model = get_peft_model(tiny_model(), settings)
    batch = GroupBatch.from_groups(random_groups(SHAPE))
    with torch.no_grad():
        adapted = response_logps(model.get_base_model(), batch, layout="shared")
        expected = plain_logps(model.get_base_model(), batch)
        with model.disable_adapter():
            base = response_logps(model.get_base_model(), batch, layout="shared")
    torch.testing.assert_close(adapted.double(), expected, rtol=0, atol=1e-4)
    assert (adapted - base).abs().max() > 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_checkpointing_changes_nothing(layout: Layout) -> None:
    """Nor do slices with it, which share a prompt that is computed again as well."""
    batch = GroupBatch.from_groups(random_groups(SHAPE))
    gradients = []
    for checkpointing, per_pass in ((False, None), (True, None), (True, 2)):
        torch.manual_seed(0)
        model = with_trained_lora(tiny_model())
        causal_lm = model.get_base_model()
        if checkpointing:
            causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        logps = response_logps(causal_lm, batch, layout=layout, responses_per_pass=per_pass)
        logps.sum().backward()
        gradients.append(lora_gradients(model))
    expected, *others = gradients
    assert len(expected) == 2 * 7 * 2
    for key, gradient in expected.items():
        assert gradient.abs().max() > 0, key
        for other in others:
            torch.testing.assert_close(other[key], gradient, rtol=1e-5, atol=1e-5, msg=key)


def test_responses_never_see_each_other_in_the_shared_row() -> None:
    """The mask says so by position; here a changed sibling leaves a response bit for bit."""
    (group,) = random_groups([(6, [5, 5])])
    changed = group._replace(responses=(group.responses[0], group.responses[1].flip(0)))
    model = tiny_model()
    with torch.no_grad():
        first = response_logps(model, GroupBatch.from_groups([group]), layout="shared")
        second = response_logps(model, GroupBatch.from_groups([changed]), layout="shared")
    assert first[0, 0] == second[0, 0]
    assert first[0, 1] != second[0, 1]


# ------------------------------------------------------------------- slices and the layout's cost


@pytest.mark.parametrize("per_pass", [1, 2, 4, 100])
@pytest.mark.parametrize("layout", [*LAYOUTS, "auto"])
def test_slices_give_the_gradients_of_one_pass(layout: Layout, per_pass: int) -> None:
    model = with_trained_lora(tiny_model()).double()
    batch = GroupBatch.from_groups(random_groups(SHAPE))
    weights = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results = []
    for settings in ({}, {"responses_per_pass": per_pass}, {"responses_per_pass": 4, "passes": 5}):
        model.zero_grad()
        logps = response_logps(model.get_base_model(), batch, layout=layout, **settings)
        # Not linear in them, as no loss is.
        (logps.square() * weights).sum().backward()
        results.append((logps.detach(), lora_gradients(model)))
    (expected, expected_gradients), *others = results
    for logps, gradients in others:
        torch.testing.assert_close(logps, expected, rtol=1e-6, atol=1e-5)
        for key, gradient in gradients.items():
            scale = expected_gradients[key].abs().max()
            assert (gradient - expected_gradients[key]).abs().max() <= 1e-5 * scale, key


def test_slices_are_computed_again_one_at_a_time() -> None:
    """All slices but the last go twice through the model, with as many responses as asked for.

    The prompt goes with the first of them alone.
    """
    model = with_trained_lora(tiny_model())
    batch = GroupBatch.from_groups(random_groups([(7, [5] * 13)]))
    tokens: list[int] = []
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(lambda _, inputs, __: tokens.append(inputs[0].numel()))
    logps = response_logps(model.get_base_model(), batch, layout="shared", responses_per_pass=4)
    first, further, last = 7 + 4 * 5, 4 * 5, 5
    assert tokens == [first, further, further, last]
    logps.sum().backward()
    assert tokens == [first, further, further, last, further, further, first]


def test_slices_of_layers_whose_prompts_cannot_be_kept_repeat_them() -> None:
    """Such as those that compute their gradients in a backward pass of their own."""
    model = with_trained_lora(tiny_model()).train()
    batch = GroupBatch.from_groups(random_groups([(7, [5] * 3)]))
    tokens: list[int] = []
    model.get_input_embeddings().register_forward_hook(
        lambda _, inputs, __: tokens.append(inputs[0].numel())
    )
    gradients = []
    for settings in ({}, {"use_reentrant": True}):
        model.zero_grad()
        if settings:
            model.get_base_model().gradient_checkpointing_enable(settings)
            model.enable_input_require_grads()
            tokens.clear()
        logps = response_logps(model.get_base_model(), batch, layout="shared", responses_per_pass=2)
        logps.square().sum().backward()
        gradients.append(lora_gradients(model))
    assert tokens == [7 + 10, 7 + 5, 7 + 10]
    for key, gradient in gradients[0].items():
        assert (gradients[1][key] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), key


@pytest.mark.parametrize(("layout", "name"), [("shared", "llama"), ("continued", "qwen3_5_text")])
def test_dropout_is_the_same_when_a_slice_is_computed_again(layout: Any, name: str) -> None:
    """Gradients are those of the values that were given, not of another draw: by differences."""
    base = variant_model(name, **CONTINUED.get(name, {}))
    model = with_trained_lora(base, lora_dropout=0.5).train().double()
    batch = GroupBatch.from_groups(random_groups(SHAPE))
    trained = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(p.shape, generator=generator).double() for p in trained]

    def total(step: float = 0.0, seed: int = 7) -> torch.Tensor:
        torch.manual_seed(seed)
        torch._foreach_add_([p.data for p in trained], directions, alpha=step)
        values = response_logps(model.get_base_model(), batch, layout=layout, responses_per_pass=2)
        return values.square().sum()

    expected = total()
    expected.backward()
    assert abs(total(seed=8) - expected) > 1
    slope = sum((p.grad * d).sum() for p, d in zip(trained, directions, strict=True))
    step = 1e-4
    with torch.no_grad():
        difference = (total(step) - total(-2 * step)) / (2 * step)
    assert difference == pytest.approx(float(slope), rel=1e-2)


def test_auto_takes_the_layout_that_computes_fewer_tokens() -> None:
    def chosen(*shape: tuple[int, list[int]], layouts: Any = ("separate", "shared")) -> str:
        return cheapest_layout(GroupBatch.from_groups(random_groups(list(shape))), layouts)

    assert chosen((50, [10, 10])) == "shared"
    assert chosen((1, [10, 10])) == "shared"
    # A single response has nothing to share its prompt with.
    assert chosen((50, [10])) == "separate"
    # Rows would be padded to the longest.
    assert chosen((5, [10]), (40, [10])) == "shared"
    both: Any = ("separate", "continued")
    assert chosen((50, [10, 10]), layouts=both) == "continued"
    assert chosen((50, [10]), layouts=both) == "separate"
    # Prompts are padded to the longest prompt, responses to the longest response.
    assert chosen((40, [1]), (1, [40]), layouts=both) == "separate"


def test_layouts_of_a_model() -> None:
    assert exact_layouts(tiny_model()) == ["separate", "shared"]
    hybrid = variant_model("qwen3_5_text", **CONTINUED["qwen3_5_text"])
    assert exact_layouts(hybrid) == ["separate", "continued"]
    assert exact_layouts(variant_model("mamba", **SEPARATE["mamba"])) == ["separate"]
    hybrid.gradient_checkpointing_enable()
    assert exact_layouts(hybrid) == ["separate"]


@pytest.mark.parametrize("name", ["deepseek_v32", "glm_moe_dsa"])
def test_keys_that_are_chosen_among_the_whole_row_cannot_be_shared(name: str) -> None:
    """Beyond the number of keys that such a model chooses, a shared row leaves out some."""
    model = variant_model(name, **CONTINUED[name])
    assert name in SPARSE_MODELS
    assert exact_layouts(model) == ["separate", "continued"]
    batch = GroupBatch.from_groups(random_groups([(11, [9, 9, 9])]))
    with torch.no_grad():
        expected = plain_logps(model, batch)
        separate = response_logps(model, batch, layout="separate")
        torch.testing.assert_close(separate.double(), expected, rtol=0, atol=1e-3)
        shared = response_logps(model, batch, layout="shared")
    assert (shared.double() - expected).abs().max() > 0.1


def test_table_of_the_documentation_names_every_architecture_with_its_layouts() -> None:
    rows = written()
    assert [name for name, _ in rows] == list(models())
    for name, cells in rows:
        offered = [layout for layout, cell in zip(TABLE, cells, strict=True) if cell != "-"]
        assert offered == layouts_of(name), name
        assert all(float(cell) < 1e-3 for cell in cells if cell != "-"), name
