"""Responses continued from their prompts' cache, against the model's own full logits."""

import pytest
import torch

from mpo_lightning.batch import GroupBatch
from mpo_lightning.model.continuation import CONTINUED_MODELS, continued_rows
from mpo_lightning.model.logps import exact_layouts, response_logps
from tests.conftest import plain_logps, random_groups
from tests.model.architectures import (
    CONTINUED,
    CONTINUED_WRAPPERS,
    SEPARATE,
    SHAPE,
    lora_gradients,
    multimodal_config,
    variant_model,
    with_trained_lora,
)

WEIGHTS = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


def test_every_architecture_has_a_configuration() -> None:
    of_wrappers = {multimodal_config(n).get_text_config().model_type for n in CONTINUED_WRAPPERS}
    assert {name.split(maxsplit=1)[0] for name in CONTINUED} | of_wrappers == CONTINUED_MODELS


@pytest.mark.parametrize("name", [*sorted(CONTINUED | CONTINUED_WRAPPERS), "llama"])
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


@pytest.mark.parametrize("name", ["bamba", "qwen3_5_text", "llama"])
def test_responses_of_one_token_have_gradients(name: str) -> None:
    """Alone in a row it is a step of generation, in which models overwrite their states."""
    model = with_trained_lora(variant_model(name, **CONTINUED.get(name, {})))
    batch = GroupBatch.from_groups(random_groups([(5, [1, 1, 1]), (3, [1])]))
    results = []
    for layout in ("separate", "continued"):
        model.zero_grad()
        response_logps(model.get_base_model(), batch, layout=layout).square().sum().backward()
        results.append(lora_gradients(model))
    for key, gradient in results[0].items():
        assert (results[1][key] - gradient).abs().max() <= 2e-3 * gradient.abs().max() + 1e-7, key


# By how many nats responses differ at least where they continue the cache, or what happens.
REFUSED = {
    # They begin with an empty state wherever they compute several tokens.
    "jamba": 0.1,
    "zamba": 3e-4,
    "mamba": "must match the size",
    "falcon_mamba": "must match the size",
    # Keys are compressed in blocks that are counted from the padding on.
    "deepseek_v4": 0.1,
    "minimax_m3_vl_text": 0.1,
    # Their own caches do not give each response its prompt's state.
    "minimax": "must match the size",
    "xlstm": "no attribute 'reorder_cache'",
    # They return no cache; the second keeps its states in the layers.
    "openai-gpt": "past_key_values",
    "recurrent_gemma": "past_key_values",
}


@pytest.mark.parametrize("name", SEPARATE)
def test_models_that_lose_the_prompt_are_not_among_them(name: str) -> None:
    model = variant_model(name, **SEPARATE[name])
    batch = GroupBatch.from_groups(random_groups(SHAPE))
    limit = REFUSED[name]
    with torch.no_grad():
        if isinstance(limit, str):
            with pytest.raises((RuntimeError, AttributeError, KeyError), match=limit):
                response_logps(model, batch, layout="continued")
            return
        expected = plain_logps(model, batch)
        found = response_logps(model, batch, layout="continued")
    assert (found - expected).abs().max() > limit


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
