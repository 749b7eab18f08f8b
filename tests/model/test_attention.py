"""Split attention against one call per block and against the mask of the whole row."""

from typing import Any

import pytest
import torch

from mpo_lightning.batch import GroupBatch, GroupSpan
from mpo_lightning.model import attention
from mpo_lightning.model.attention import SHARED_PROMPT_ATTENTION, PromptSharing
from mpo_lightning.model.logps import response_logps, shared_row
from tests.conftest import random_groups, tiny_model
from tests.model.architectures import SHAPE, lora_gradients, variant_model, with_trained_lora


@pytest.mark.parametrize("name", ["llama", "gpt2", "starcoder2"])
def test_responses_in_one_call_per_group_are_those_of_two_merged(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CPU responses attend to prompt and to themselves apart; elsewhere in one call."""
    model = with_trained_lora(variant_model(name))
    batch = GroupBatch.from_groups(random_groups(SHAPE))
    calls = []
    original = attention._group_attention

    def of_group(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(attention, "_group_attention", of_group)
    results = []
    for together in (False, True):
        if together:
            monkeypatch.setattr(PromptSharing, "fits", lambda *_: False)
        model.zero_grad()
        logps = response_logps(model.get_base_model(), batch, layout="shared")
        logps.square().sum().backward()
        results.append((logps.detach(), lora_gradients(model)))
    assert len(calls) == 2 * len(SHAPE)
    (apart, gradients), (one, others) = results
    torch.testing.assert_close(apart, one, rtol=1e-5, atol=1e-4)
    for key, gradient in gradients.items():
        assert (others[key] - gradient).abs().max() <= 1e-3 * gradient.abs().max(), key


def test_the_whole_rows_mask_is_the_same_attention() -> None:
    """For models whose attention cannot be split, and against the split one."""
    model = tiny_model()
    batch = GroupBatch.from_groups(random_groups(SHAPE))
    row, sharing = shared_row(batch), PromptSharing(batch.spans())
    dense = sharing.dense_mask(row.inputs["position_ids"][0], torch.float32)
    assert dense.shape == (1, 1, len(batch.tokens), len(batch.tokens))

    def compute(mask: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = model.model(
            **row.inputs, attention_mask=mask, use_cache=False
        ).last_hidden_state
        return hidden

    with torch.no_grad():
        by_mask = compute(dense)
        model.config._attn_implementation = SHARED_PROMPT_ATTENTION
        split = compute(sharing.as_attention_mask(torch.device("cpu")))
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
    sharing = PromptSharing([GroupSpan(0, 3, [2])])
    mask = sharing.mask(3, 2, 2, torch.device("cpu"))[0, 0]
    assert mask.tolist() == [[False, False, True, True, False], [False, False, False, True, True]]
