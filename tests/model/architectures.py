"""Tiny models of every architecture whose prompts are shared, and LoRA on them."""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig

from mpo_lightning.model.logps import SHARED_PROMPT_MODELS, Layout
from tests.conftest import tiny_model

SHAPE = [(11, [3, 1, 9]), (4, [20, 2, 7, 5]), (17, [6, 6])]
LAYOUTS: list[Layout] = ["shared", "separate"]
# What an architecture calls its sizes, and what of it needs more than them to be exercised.
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "num_local_experts": 4, "num_experts": 4}
WINDOW: dict[str, Any] = {
    "sliding_window": 6,
    "layer_types": ["full_attention", "sliding_attention"],
}
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {} for name in SHARED_PROMPT_MODELS},
    "arcee": {"head_dim": 8},
    "cohere": {"logit_scale": 0.4},
    "cohere2": {"logit_scale": 0.4, **WINDOW},
    "ernie4_5": {"head_dim": 8},
    "exaone4": WINDOW,
    "falcon": {},
    "falcon with grouped queries": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 2.0, **WINDOW},
    "gemma3_text": {"head_dim": 8, **WINDOW},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "glm4_moe": {"head_dim": 8, "moe_intermediate_size": 32, "n_routed_experts": 4, **EXPERTS},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "gpt_oss": {"head_dim": 8, **EXPERTS, **WINDOW},
    "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.3},
    "granitemoe": EXPERTS,
    "helium": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "mistral with a window": {"sliding_window": 8},
    "mixtral": EXPERTS,
    "olmo3": WINDOW,
    "olmoe": EXPERTS,
    "opt": {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64},
    "qwen2 with windows on some layers": {
        "use_sliding_window": True,
        "max_window_layers": 1,
        **WINDOW,
    },
    "qwen2_moe": {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, **EXPERTS},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {"head_dim": 8, "moe_intermediate_size": 32, **EXPERTS},
    "seed_oss": {"head_dim": 8},
    "starcoder2 with a window": {"sliding_window": 8},
}
# Their kernels for experts have no float64.
IN_FLOAT32 = {"glm4_moe", "gpt_oss", "granitemoe", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"}


def variant_model(name: str, **changes: Any) -> Any:
    sizes = {
        **{"vocab_size": 384, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0},
        **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2},
    }
    architecture = name.split(maxsplit=1)[0]
    if architecture in {"gpt2", "gpt_bigcode"}:
        sizes = {key: sizes[key] for key in list(sizes)[:4]}
    settings = {**sizes, **VARIANTS.get(name, {}), **changes}
    return tiny_model(AutoConfig.for_model(architecture, **settings))


def lora_gradients(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def with_trained_lora(model: Any, **settings: Any) -> Any:
    """LoRA whose B is not zero, so that every gradient is alive."""
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **settings)
    return get_peft_model(model, config)
