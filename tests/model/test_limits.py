"""Limits of models, as their own configurations say them, held against the models themselves."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from mpo_lightning.model.limits import limits_of
from tests.conftest import tiny_model

SIZES: dict[str, Any] = {
    **{"vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0},
    **{"bos_token_id": 0, "eos_token_id": 1},
}
OF_OPT = {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32}
SCALED = {"max_position_embeddings": 64, "rope_theta": 1e4}


def positions(model_type: str, **settings: Any) -> int | None:
    return limits_of(AutoConfig.for_model(model_type, **{**SIZES, **settings})).positions


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("gpt2", {"n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 4}),
        ("gptj", {"n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8}),
        # ALiBi, but of a fixed width.
        ("mpt", {"max_seq_len": 24, "d_model": 32, "n_layers": 2, "n_heads": 4}),
        ("opt", {**OF_OPT, "max_position_embeddings": 24}),
        ("roberta", {"is_decoder": True, "max_position_embeddings": 25, "pad_token_id": 0}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_learned_positions_end_where_the_limit_says(
    model_type: str, settings: dict[str, Any]
) -> None:
    """The model computes that many tokens, and not one more."""
    sizes = {"vocab_size": 384} if settings.keys() & {"n_embd", "d_model"} else SIZES
    model = tiny_model(AutoConfig.for_model(model_type, **{**sizes, **settings}))
    limit = limits_of(model.config).positions
    assert limit == 24
    ids = torch.arange(2, 2 + limit + 1)[None]
    assert model(input_ids=ids[:, :limit]).logits.isfinite().all()
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=ids)


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("bloom", {}),
        ("falcon", {"alibi": True}),
        ("mamba", {}),
        ("rwkv", {"context_length": 24, "attention_hidden_size": 32}),
        ("xlnet", {}),
        ("llama", {"max_position_embeddings": None}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_models_without_a_limit(model_type: str, settings: dict[str, Any]) -> None:
    config = AutoConfig.for_model(model_type)
    for name, value in settings.items():
        # Some configurations refuse None when they are made, and are saved with it all the same.
        object.__setattr__(config, name, value)
    assert limits_of(config).positions is None


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default"}, 64),
        # The stated length is the one before: Qwen 2.5's way, and that of older models.
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        ({"rope_type": "dynamic", "factor": 2.0}, 128),
        ({"rope_type": "linear", "factor": 2.0}, 128),
        # It is the extended one: Llama 3.1's way.
        (
            {
                **{"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16},
                **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
            },
            64,
        ),
    ],
    ids=str,
)
def test_scaled_positions(rope: dict[str, Any], expected: int) -> None:
    parameters = {"rope_theta": 1e4, **rope}
    found = positions("llama", max_position_embeddings=64, rope_parameters=parameters)
    assert found == expected


def test_windows_are_no_limit_and_wrappers_have_their_language_models() -> None:
    assert positions("mistral", sliding_window=8, max_position_embeddings=64) == 64
    text = AutoConfig.for_model("gemma3_text", **SIZES, head_dim=8, max_position_embeddings=128)
    # Its local layers are not scaled as its global ones are; what it states is the extended length.
    text.rope_parameters["full_attention"] = {"rope_type": "linear", "factor": 8.0}
    wrapper = AutoConfig.for_model("gemma3", text_config=text.to_dict())
    limits = limits_of(wrapper)
    assert (limits.tokens, limits.positions) == (384, 128)
