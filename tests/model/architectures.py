"""Tiny models of every architecture whose prompts are shared, and LoRA on them."""

import warnings
from copy import deepcopy
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mpo_lightning.model.loading import NOT_ADAPTED
from mpo_lightning.model.logps import SHARED_PROMPT_MODELS, Layout
from tests.conftest import tiny_model

SHAPE = [(11, [3, 1, 9]), (4, [20, 2, 7, 5]), (17, [6, 6])]
LAYOUTS: list[Layout] = ["shared", "separate"]
# What an architecture calls its sizes, and what of it needs more than them to be exercised.
EXPERTS: dict[str, Any] = {
    **{"num_experts_per_tok": 2, "num_local_experts": 4, "num_experts": 4},
    **{"n_routed_experts": 4, "moe_intermediate_size": 32},
}
WINDOW: dict[str, Any] = {
    "sliding_window": 6,
    "layer_types": ["full_attention", "sliding_attention"],
}
HEADS: dict[str, Any] = {"head_dim": 8}
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4}
# Multi-head latent attention: queries and keys of 16, values of 8.
LATENT: dict[str, Any] = {
    **{"kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8},
    **{"v_head_dim": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "num_key_value_heads": 4,
}
# Layers that use the keys and values of earlier ones.
SHARED_KEYS: dict[str, Any] = {
    **{"num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3},
    **{"num_kv_shared_layers": 2, "sliding_window": 6},
}
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {} for name in SHARED_PROMPT_MODELS & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)},
    "afmoe": {**HEADS, **EXPERTS, **WINDOW, "num_dense_layers": 1},
    "arcee": HEADS,
    "aria_text": {**HEADS, "moe_num_experts": 4, "moe_topk": 2},
    "axk1": {**EXPERTS, **LATENT},
    "beam": {**HEADS, **WINDOW},
    "cohere": {"logit_scale": 0.4},
    "cohere2": {"logit_scale": 0.4, **WINDOW},
    "cohere2_moe": {**HEADS, **EXPERTS, **WINDOW, "logit_scale": 0.4},
    "cwm": {**HEADS, **WINDOW},
    "deepseek_v2": {**EXPERTS, **LATENT},
    "deepseek_v3": {**EXPERTS, **LATENT},
    "dots1": {
        **{**HEADS, **EXPERTS, **WINDOW, "n_shared_experts": 1, "routed_scaling_factor": 1.0},
        **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    },
    "ernie4_5": HEADS,
    "ernie4_5_moe": {
        **{**EXPERTS, "moe_num_experts": 4, "moe_k": 2},
        **{"moe_layer_start_index": 1, "moe_layer_end_index": 1},
    },
    "exaone4": WINDOW,
    "exaone_moe": {**HEADS, **EXPERTS, **WINDOW, "num_shared_experts": 1},
    "flex_olmo": EXPERTS,
    "flint": {**HEADS, **EXPERTS, **WINDOW},
    "gemma2": {**HEADS, "final_logit_softcapping": 2.0, **WINDOW},
    "gemma3_text": {**HEADS, **WINDOW},
    "gemma3n_text": {
        **{**HEADS, **SHARED_KEYS, "intermediate_size": [64] * 6, "laurel_rank": 4},
        **{"vocab_size_per_layer_input": 384, "hidden_size_per_layer_input": 8},
        "activation_sparsity_pattern": [0.0] * 6,
    },
    "gemma4_text": {
        **{**HEADS, **SHARED_KEYS, "global_head_dim": 16},
        **{"vocab_size_per_layer_input": 384, "hidden_size_per_layer_input": 8},
    },
    "gemma4_text without shared keys": {
        **{**HEADS, **WINDOW, "global_head_dim": 8, "num_kv_shared_layers": 0},
        **{"vocab_size_per_layer_input": 384, "hidden_size_per_layer_input": 8},
    },
    "gemma4_unified_text": {**HEADS, **SHARED_KEYS, "global_head_dim": 16},
    "glm": HEADS,
    "glm4": HEADS,
    "glm4_moe": {**HEADS, **EXPERTS},
    "glm4_moe_lite": {**EXPERTS, **LATENT, "mlp_layer_types": ["dense", "sparse"]},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "gpt_oss": {**HEADS, **EXPERTS, **WINDOW},
    "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.3},
    "granite_swa": {"logits_scaling": 3.0, **WINDOW},
    "granitemoe": EXPERTS,
    "granitemoe_swa": {**EXPERTS, **WINDOW},
    "granitemoeshared": EXPERTS,
    "helium": HEADS,
    "hunyuan_v1_dense": HEADS,
    "hunyuan_v1_moe": {**HEADS, **EXPERTS, "moe_topk": 2},
    "hy_v3": {**HEADS, **EXPERTS},
    "hyperclovax": {"logits_scaling": 0.4},
    "internlm3": HEADS,
    "jetmoe": {"kv_channels": 8, **EXPERTS},
    "kolibri1": {**HEADS, **EXPERTS, **WINDOW},
    "laguna": {**HEADS, **EXPERTS, **WINDOW},
    "longcat_flash": {
        **{**LATENT, "num_layers": 2, "ffn_hidden_size": 32, "expert_ffn_hidden_size": 16},
        **{"n_routed_experts": 4, "zero_expert_num": 1, "moe_topk": 2, "head_dim": 8},
    },
    "mellum": {**HEADS, **EXPERTS, **WINDOW},
    "mimo_v2_flash": {**HEADS, **EXPERTS, **WINDOW, "v_head_dim": 8},
    "minicpm3": LATENT,
    "minimax_m2": {**HEADS, **EXPERTS},
    "ministral": {**HEADS, **WINDOW},
    "ministral3": HEADS,
    "mistral with a window": {"sliding_window": 8},
    "mistral4": {**EXPERTS, **LATENT},
    "mixtral": EXPERTS,
    "nanochat": {**HEADS, "final_logit_softcapping": 2.0},
    "olmo3": WINDOW,
    "olmoe": EXPERTS,
    "opt": {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64},
    "phimoe": EXPERTS,
    "qwen2 with windows on some layers": {
        "use_sliding_window": True,
        "max_window_layers": 1,
        **WINDOW,
    },
    "qwen2_moe": {"shared_expert_intermediate_size": 32, **EXPERTS},
    "qwen3": HEADS,
    "qwen3_moe": {**HEADS, **EXPERTS},
    "seed_oss": HEADS,
    "solar_open": {**HEADS, **EXPERTS},
    "starcoder2 with a window": {"sliding_window": 8},
    "vaultgemma": {**HEADS, **WINDOW},
    "youtu": LATENT,
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {**ROPE, "mrope_section": [1, 1, 2]}},
        "logit_scale": 0.4,
    },
    "ctrl": {"dff": 64},
    "dbrx": {
        **{"d_model": 32, "n_heads": 4, "n_layers": 2, "num_hidden_layers": None},
        **{"hidden_size": None, "num_attention_heads": None, "num_key_value_heads": None},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "modernbert-decoder": WINDOW,
}
LINEAR: dict[str, Any] = {
    **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8},
    **{"linear_value_head_dim": 8, "head_dim": 8, "num_hidden_layers": 4},
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
}
MAMBA: dict[str, Any] = {
    **{"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_n_groups": 1},
}
CONVOLUTIONS: dict[str, Any] = {
    **{"num_hidden_layers": 4, "layer_types": ["conv", "conv", "full_attention", "conv"]},
}
# Keys chosen among those of the row by an indexer, fewer than there are. With its many heads no two
# keys have equal scores, among which rounding would choose.
INDEXED: dict[str, Any] = {
    **{**EXPERTS, **LATENT, "index_n_heads": 16, "index_head_dim": 16, "index_topk": 8},
}
KIMI: dict[str, Any] = {
    **{**EXPERTS, **LATENT, "q_lora_rank": None, "num_hidden_layers": 4, "num_mtp_layers": 0},
    **{"linear_head_dim": 8, "linear_num_heads": 4, "layer_types": LINEAR["layer_types"]},
}
INKLING: dict[str, Any] = {
    **{**HEADS, "swa_head_dim": 8, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2},
    **{"d_rel": 4, "rel_extent": 8, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"n_shared_experts": 1, "moe_intermediate_size": 16, "sliding_window_size": 6},
    **{"layer_types": ["hybrid", "hybrid_sliding"], "mlp_layer_types": ["dense", "sparse"]},
    "unpadded_vocab_size": 380,
}
GPT_J: dict[str, Any] = {"rotary_dim": 4, "n_embd": 32, "n_head": 4, "n_layer": 2}
SCANNED: dict[str, Any] = {"state_size": 4, "expand": 2}
# Models that continue the cache of a prompt.
CONTINUED: dict[str, dict[str, Any]] = {
    "bamba": {**MAMBA, "num_hidden_layers": 4, "attn_layer_indices": [2]},
    "falcon_h1": {**HEADS, **MAMBA, "mamba_d_ssm": 64, "lm_head_multiplier": 0.5},
    "granitemoehybrid": {
        **{**MAMBA, "mamba_expand": 2, "num_local_experts": 0, "shared_intermediate_size": 32},
        **{"num_hidden_layers": 4, "layer_types": ["mamba", "mamba", "attention", "mamba"]},
        "logits_scaling": 3.0,
    },
    "llama4_text": {
        **{**HEADS, "num_local_experts": 2, "intermediate_size_mlp": 64, "num_hidden_layers": 4},
        **{"attention_chunk_size": 6, "no_rope_layers": [1, 1, 1, 0]},
        "layer_types": ["chunked_attention"] * 3 + ["full_attention"],
    },
    "lfm2": {**CONVOLUTIONS, "block_ff_dim": 48, "block_multiple_of": 8},
    "lfm2_moe": {**CONVOLUTIONS, **EXPERTS, "num_dense_layers": 1},
    "nemotron_h": {
        **{**HEADS, "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 16},
        **{"layers_block_type": ["mamba", "attention", "mamba", "mlp"], "n_groups": 1},
        "num_hidden_layers": None,
    },
    "olmo_hybrid": {"num_hidden_layers": 4, "layer_types": LINEAR["layer_types"]},
    "qwen3_5_moe_text": {**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_5_text": LINEAR,
    "qwen3_next": {**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 16},
    "axk2": INDEXED,
    "bailing_hybrid": {**KIMI, **HEADS},
    "bloom": {"n_layer": 2, "n_head": 4},
    "codegen": GPT_J,
    "deepseek_v32": INDEXED,
    "diffllama": {},
    "dots3_note_text": {
        **{**INDEXED, **HEADS, "layer_types": ["indexed_attention", "sliding_attention"]},
        **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 24},
        **{"swa_kv_lora_rank": 16, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8},
        **{"swa_v_head_dim": 8, "sliding_window": 6},
    },
    "glm_moe_dsa": INDEXED,
    "falcon": {},
    "falcon with ALiBi": {"alibi": True},
    "falcon with grouped queries": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "gpt_neo": {
        **{"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4},
        "window_size": 6,
    },
    "gpt_neox_japanese": {},
    "gptj": GPT_J,
    "hy_v4": {**INDEXED, **HEADS},
    "inkling_text": {**INKLING, "logits_mup_width_multiplier": 2.0},
    "inkling2_text": INKLING,
    "kimi_linear": KIMI,
    "lfm3": {
        **{**HEADS, "num_hidden_layers": 4, "sliding_window": 6},
        "layer_types": ["conv", "conv", "full_attention", "sliding_attention"],
    },
    "mamba2": {**SCANNED, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2},
    "qwen4_exp_text": {
        **{**LINEAR, **EXPERTS, "layer_types": ["linear_attention"] * 3 + ["indexed_attention"]},
        **{"indexer_n_heads": 16, "indexer_kv_heads": 1, "indexer_head_dim": 16},
        **{"indexer_budget": 8, "indexer_compress_ratio": 4, "hc_lowrank": 4},
        **{"ple_layer_ids": [1, 3], "ple_embed_dim": 32, "ngram_vocab_size_base": 50},
        **{"heads_per_ngram": 2, "split_ngram_parts": 1, "shared_expert_intermediate_size": 16},
    },
    "xglm": {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4},
    "zamba2": {
        **{"num_hidden_layers": 4, "layers_block_type": ["mamba", "mamba", "hybrid", "hybrid"]},
        **{"num_key_value_heads": 4, "mamba_d_state": 8, "n_mamba_heads": 8, "adapter_rank": 4},
    },
    "zaya": {
        **{**HEADS, "router_hidden_size": 8, "num_experts": 4, "moe_intermediate_size": 16},
        **{"layer_types": ["hybrid", "hybrid_sliding"], "sliding_window": 6},
    },
}
# Models that compute separate rows only.
SEPARATE: dict[str, dict[str, Any]] = {
    "deepseek_v4": {
        **{**EXPERTS, "index_n_heads": 8, "index_head_dim": 16, "num_key_value_heads": 1},
        **{"head_dim": 16, "q_lora_rank": 24, "o_groups": 2, "o_lora_rank": 8, "index_topk": 2},
        **{"sliding_window": 6, "intermediate_size": None},
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
        "compress_rates": {"heavily_compressed_attention": 8, "compressed_sparse_attention": 4},
        "mlp_layer_types": ["moe", "moe"],
    },
    "falcon_mamba": SCANNED,
    "jamba": {
        **{"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
        **{"expert_layer_offset": 1, "num_experts": 2, "num_hidden_layers": 4},
        **{"mamba_dt_rank": 4, "mamba_d_state": 8},
    },
    "mamba": SCANNED,
    "minimax": {**HEADS, **EXPERTS, "num_hidden_layers": 4, "layer_types": LINEAR["layer_types"]},
    "minimax_m3_vl_text": {
        **{**HEADS, **EXPERTS, "index_n_heads": 2, "index_head_dim": 16},
        **{"index_block_size": 4, "index_topk_blocks": 2},
        "layer_types": ["full_attention", "minimax_m3_sparse"],
    },
    "openai-gpt": {},
    "recurrent_gemma": {"lru_width": 32, "head_dim": 8, "num_hidden_layers": 3},
    "xlstm": {"hidden_size": 128, "num_heads": 2, "embedding_dim": None},
    "zamba": {
        **{"num_hidden_layers": 5, "mamba_d_state": 16, "mamba_dt_rank": 16},
        **{"layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "hybrid"]},
        **{"num_key_value_heads": 4, "attention_hidden_size": 64},
    },
}
# Multimodal models: what their language model needs, and other settings of the wrapper.
MROPE: dict[str, Any] = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
}
WRAPPERS: dict[str, dict[str, Any]] = {
    "aria": VARIANTS["aria_text"],
    "aya_vision": VARIANTS["cohere2"],
    "cohere2_vision": VARIANTS["cohere2"],
    "cohere_compass": VARIANTS["cohere_compass_text"],
    "cosmos3_edge": MROPE,
    "ernie4_5_vl_moe": {**VARIANTS["ernie4_5_moe"], **MROPE, "moe_intermediate_size": [32, 32]},
    "exaone4_5": {**WINDOW, "model_type": "exaone4"},
    "fuyu": {},
    "gemma3": VARIANTS["gemma3_text"],
    "gemma4": VARIANTS["gemma4_text"],
    "gemma4_unified": VARIANTS["gemma4_unified_text"],
    "glm4v": MROPE,
    "glm4v_moe": {**EXPERTS, **MROPE, "head_dim": 16, "n_group": 1, "topk_group": 1},
    "granite_docling": VARIANTS["granite"],
    "hunyuan_vl": {"rope_parameters": {**MROPE["rope_parameters"], "mrope_section": [1, 1, 1, 1]}},
    "hyperclovax_vision_v2": VARIANTS["hyperclovax"],
    "idefics2": {},
    "idefics3": {},
    "internvl": {},
    "kimi_k25": VARIANTS["deepseek_v3"],
    "lighton_ocr": {},
    "llava": {},
    # Unlike Granite by itself, it has no factor on its logits.
    "llava_next": {**VARIANTS["granite"], "model_type": "granite"},
    "llava_onevision": {},
    "mistral3": {"model_type": "ministral3"},
    "muse_glimmer": {},
    "paddleocr_vl": MROPE,
    "qwen2_5_vl": MROPE,
    "qwen2_vl": MROPE,
    "qwen3_vl": MROPE,
    "qwen3_vl_moe": {**EXPERTS, **MROPE},
    "smolvlm": {},
    "step3p7": {**EXPERTS, **WINDOW},
}
CONTINUED_WRAPPERS: dict[str, dict[str, Any]] = {
    "lfm2_vl": CONTINUED["lfm2"],
    "llama4": CONTINUED["llama4_text"],
    "mllama": {"cross_attention_layers": [1]},
    "qwen3_5": CONTINUED["qwen3_5_text"],
    "qwen3_5_moe": CONTINUED["qwen3_5_moe_text"],
}
# Sizes of the parts that images go through.
TOWER: dict[str, Any] = {
    **{"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "depth": 1},
    **{"num_hidden_layers": 1, "image_size": 28, "patch_size": 14, "num_heads": 2},
    "out_hidden_size": 32,
}
TOWERS: dict[str, dict[str, Any]] = {
    "gemma4_unified": {"mm_embed_dim": 16, "mm_posemb_size": 4},
    "llama4": {"vision_output_dim": 32, "projector_output_dim": 16},
    "muse_glimmer": {"projector_hidden_size": 16},
    "qwen2_vl": {"embed_dim": 16},
}
# Their kernels for experts have no float64.
IN_FLOAT32 = {n for n, s in (VARIANTS | WRAPPERS).items() if EXPERTS.items() <= s.items()}
IN_FLOAT32 |= {"aria", "aria_text", "ernie4_5_vl_moe"}
# transformers computes its softmax in float32, in which a mask's lowest float64 is infinite.
IN_FLOAT32.add("gemma2")
SIZES: dict[str, Any] = {
    **{"vocab_size": 384, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0},
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
}


def variant_model(name: str, **changes: Any) -> Any:
    """A tiny model of an architecture, or of a wrapper around one, with changed settings."""
    sizes, architecture = SIZES, name.split(maxsplit=1)[0]
    if architecture in {"gpt2", "gpt_bigcode"}:
        sizes = {key: sizes[key] for key in list(sizes)[:4]}
    settings = {**sizes, **VARIANTS.get(name, {}), **changes}
    settings = {key: value for key, value in settings.items() if value is not None}
    if name in WRAPPERS | CONTINUED_WRAPPERS:
        model = tiny_model(multimodal_config(name, **changes))
    else:
        model = tiny_model(AutoConfig.for_model(architecture, **settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases, scales and sinks that are all alike would hide what they do.
            if parameter.ndim <= 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def multimodal_config(name: str, **changes: Any) -> Any:
    """A tiny wrapper of a language model, whose settings may be changed."""
    sizes = {**SIZES, **HEADS, "max_position_embeddings": 512, "tie_word_embeddings": False}
    text = {**sizes, **(WRAPPERS | CONTINUED_WRAPPERS)[name], **changes}
    # Configurations write into what they are given.
    text = deepcopy({key: value for key, value in text.items() if value is not None})
    vision = {**TOWER, **TOWERS.get(name, {})}
    settings = {"mm_tokens_per_image": 4} if name == "gemma3" else {}
    return AutoConfig.for_model(
        name, text_config=text, vision_config=vision, tie_word_embeddings=False, **settings
    )


def lora_gradients(model: Any) -> dict[str, torch.Tensor]:
    """Gradients by name; zero for experts that no token was sent to."""
    trained = ((n, p) for n, p in model.named_parameters() if p.requires_grad)
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in trained}


def with_trained_lora(model: Any, **settings: Any) -> Any:
    """LoRA whose B is not zero, so that every gradient is alive."""
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **settings)
    excluded = {
        **NOT_ADAPTED,
        # A linear layer that returns more than its product.
        **{name: ["router"] for name in ("llama4_text", "phimoe")},
    }
    config.exclude_modules = excluded.get(model.config.get_text_config().model_type)
    with warnings.catch_warnings(), torch.random.fork_rng():
        # PEFT looks for parameters of experts by the names of other architectures.
        warnings.filterwarnings("ignore", "target_parameters=.* were set but no parameter")
        # Other weights may send a token to other experts for a difference in rounding.
        torch.manual_seed(0)
        return get_peft_model(model, config)
