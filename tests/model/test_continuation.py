"""Responses continued from their prompts' cache, against the model's own full logits."""

import pytest
import torch

from mpo_lightning.batch import GroupBatch
from mpo_lightning.model.continuation import CONTINUED_MODELS, continued_rows
from mpo_lightning.model.logps import exact_layouts, response_logps
from tests.conftest import plain_logps, random_groups
from tests.model.architectures import (
    CONTINUED,
    SHAPE,
    lora_gradients,
    variant_model,
    with_trained_lora,
)

WEIGHTS = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


def test_every_architecture_has_a_configuration() -> None:
    assert set(CONTINUED) == CONTINUED_MODELS


@pytest.mark.parametrize("name", [*sorted(CONTINUED), "llama"])
def test_values_and_gradients_are_those_of_full_logits(name: str) -> None:
    """Of ragged groups, at once and two responses at a time."""
    model = with_trained_lora(variant_model(name, **CONTINUED.get(name, {})))
    causal_lm = model.get_base_model()
    # Llama, which shares its prompts, is a control.
    assert ("continued" in exact_layouts(causal_lm)) == (name != "llama")
    batch = GroupBatch.from_groups(random_groups(SHAPE))
    results = {}
    for per_pass in ("plain", None, 2):
        model.zero_grad()
        if per_pass == "plain":
            logps = plain_logps(causal_lm, batch).float()
        else:
            logps = response_logps(
                causal_lm, batch, layout="continued", chunk_size=7, responses_per_pass=per_pass
            )
        (logps * WEIGHTS * batch.valid).sum().backward()
        results[per_pass] = (logps.detach(), lora_gradients(model))
    expected, expected_gradients = results.pop("plain")
    assert expected.abs().max() > 10
    for per_pass, (logps, gradients) in results.items():
        assert (logps - expected).abs().max() <= 2e-4, per_pass
        for key, gradient in gradients.items():
            scale = expected_gradients[key].abs().max()
            error = (gradient - expected_gradients[key]).abs().max()
            assert error <= 2e-3 * scale + 1e-7, (per_pass, key)


def test_a_model_that_forgets_the_state_is_not_among_them() -> None:
    """Jamba computes several tokens without the state that the cache holds."""
    periods = {f"{what}_layer_period": 2 for what in ("attn", "expert")}
    offsets = {f"{what}_layer_offset": 1 for what in ("attn", "expert")}
    sizes = {"num_hidden_layers": 4, "num_experts": 2, "mamba_dt_rank": 4, "mamba_d_state": 8}
    model = variant_model("jamba", **periods, **offsets, **sizes)
    assert exact_layouts(model) == ["separate"]
    batch = GroupBatch.from_groups(random_groups(SHAPE))
    with torch.no_grad():
        expected = plain_logps(model, batch).float()
        separate = response_logps(model, batch, layout="separate")
        continued = response_logps(model, batch, layout="continued")
    assert (separate - expected).abs().max() < 1e-3
    assert (continued - expected).abs().max() > 0.1


def test_rows_of_a_small_batch_by_hand() -> None:
    one, two = random_groups([(2, [2, 1]), (1, [3])])
    batch = GroupBatch.from_groups([one, two])
    a, b = one.prompt.tolist()
    (p,) = two.prompt.tolist()
    (c, d), (e,) = (response.tolist() for response in one.responses)
    (f, g, h) = two.responses[0].tolist()
    rows = continued_rows(batch)
    assert rows.prompts["input_ids"].tolist() == [[a, b], [0, p]]
    assert rows.prompts["attention_mask"].tolist() == [[1, 1], [0, 1]]
    assert rows.prompts["position_ids"].tolist() == [[0, 1], [0, 0]]
    assert rows.owners.tolist() == [0, 0, 1]
    assert rows.responses["input_ids"].tolist() == [[c, d, 0], [e, 0, 0], [f, g, h]]
    mask = [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 1]]
    assert rows.responses["attention_mask"].tolist() == mask
    assert rows.responses["position_ids"].tolist() == [[2, 3, 4], [2, 3, 4], [1, 2, 3]]
    # Two prompts' last positions come before the responses' nine.
    assert rows.predictors.tolist() == [0, 2, 0, 1, 8, 9]
    assert rows.targets.tolist() == [c, d, e, f, g, h]
