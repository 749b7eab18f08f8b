"""Bases in fewer bits: what they compute, and that nothing corrupts or pretends."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from lightning.pytorch import Trainer
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, OPTConfig

import mpo_lightning.model.loading
from mpo_lightning import LoRA, MPOModule, PolicyConfig, PreferenceDataModule
from mpo_lightning.batch import GroupBatch
from mpo_lightning.losses import MPO
from mpo_lightning.model.loading import auto_class, base_limits, build_policy, load_base
from mpo_lightning.model.policy import Policy, PolicyError
from tests.conftest import (
    example_rows,
    plain_logps,
    random_groups,
    tiny_config,
    tiny_model,
)
from tests.model.architectures import CONTINUED, SEPARATE, multimodal_config, variant_model

LAYERS = {"nf4": Linear4bit, "int8": Linear8bitLt}


def quantised(base: str, quantization: Any) -> Any:
    """The base as transformers loads it in fewer bits."""
    settings = {
        "nf4": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
        "int8": BitsAndBytesConfig(load_in_8bit=True),
    }[quantization]
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=settings, device_map={"": "cpu"}
    )
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    # In training 8-bit layers multiply their dequantised weights, on CPU.
    return model.train()


@pytest.mark.parametrize("layout", ["shared", "separate"])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_reference_is_the_base_in_so_many_bits(
    base: str, ragged_batch: GroupBatch, quantization: Any, layout: Any
) -> None:
    policy = build_policy(PolicyConfig(base=base, quantization=quantization), layout)
    layers = [m for m in policy.modules() if isinstance(m, LAYERS[quantization])]
    assert len(layers) == 2 * 7
    found = policy.reference(ragged_batch)
    with torch.no_grad():
        expected = plain_logps(quantised(base, quantization), ragged_batch).float()
        whole = plain_logps(AutoModelForCausalLM.from_pretrained(base), ragged_batch).float()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    # It is another model than the unquantised one, and near it.
    assert (found - whole).abs().max() > 1e-2
    assert (found - whole).abs().max() < 10
    assert (policy(ragged_batch) - found).abs().max() == 0


def test_bytes_by_dtype_are_told(base: str) -> None:
    """Two layers of 10240 weights each in half a byte; head, embedding and adapters in four."""
    told = {
        kind: build_policy(PolicyConfig(base=base, quantization=kind, lora=LoRA(r=4)), "auto")
        for kind in ("none", "nf4", "int8")
    }
    linear = (
        sum(
            m.in_features * m.out_features
            for m in told["none"].modules()
            if isinstance(m, torch.nn.Linear) and m.weight.requires_grad is False
        )
        - 384 * 32
    )
    sizes = {kind: policy.describe() for kind, policy in told.items()}
    assert f"{linear / 2 / 2**20:,.1f} MiB 4-bit," in sizes["nf4"]
    assert f"{linear / 2**20:,.1f} MiB 8-bit," in sizes["int8"]
    four = sum(p.nbytes for p in told["nf4"].parameters() if p.dtype == torch.uint8)
    assert four == linear / 2
    assert sizes["none"].endswith("of it trained")
    assert "bit" not in sizes["none"]


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("validation", ["in the middle", "sanity check"])
def test_validation_leaves_gradients_alone(
    base: str, write_jsonl: Callable[..., str], quantization: Any, validation: str
) -> None:
    """Bitsandbytes repacks 4-bit weights in an evaluation pass on CPU if it may (lossy)."""
    data = write_jsonl(example_rows(8))
    adapters = []
    for val in (None, data):
        torch.manual_seed(0)
        module = MPOModule(
            policy=PolicyConfig(base=base, lora=LoRA(r=4), quantization=quantization),
            loss=MPO(beta=0.5),
            optimizer=lambda params: torch.optim.SGD(params, lr=0.05),
            lr_scheduler=None,
        )
        files = PreferenceDataModule(tokenizer=base, train=data, val=val, groups_per_batch=2)
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=2,
            val_check_interval=1 if validation == "in the middle" else None,
            num_sanity_val_steps=2 if validation == "sanity check" else 0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, files)
        adapters.append({n: p.detach() for n, p in module.named_parameters() if p.requires_grad})
    for name, weight in adapters[0].items():
        assert torch.equal(adapters[1][name], weight), name
    assert any(weight.abs().max() > 1e-3 for n, weight in adapters[0].items() if "lora_B" in n)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_gradients_are_those_of_the_dequantised_base(
    base: str, ragged_batch: GroupBatch, quantization: Any
) -> None:
    """Against LoRA on a plain model that holds the rounded weights."""
    torch.manual_seed(0)
    policy = build_policy(PolicyConfig(base=base, quantization=quantization), "shared")
    plain = AutoModelForCausalLM.from_pretrained(base)
    plain.load_state_dict(
        {
            name.replace(".base_layer", ""): value
            for name, value in dequantised(policy).items()
            if "lora" not in name
        }
    )
    torch.manual_seed(0)
    expected = build_policy(PolicyConfig(base=base), "shared")
    expected.causal_lm.load_state_dict(dequantised(policy), strict=False)
    for one in (policy, expected):
        with torch.no_grad():
            for name, parameter in one.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
        one(ragged_batch).square().sum().backward()
    gradients = dict(expected.named_parameters())
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            gap = (parameter.grad - gradients[name].grad).norm() / gradients[name].grad.norm()
            assert gap < 1e-4, (name, gap)


def dequantised(policy: Any) -> dict[str, torch.Tensor]:
    """All frozen weights of a policy in float32."""
    from bitsandbytes.functional import dequantize_4bit

    weights = {}
    for name, module in policy.causal_lm.named_modules():
        if isinstance(module, Linear4bit):
            weights[f"{name}.weight"] = dequantize_4bit(
                module.weight.data, module.weight.quant_state
            ).float()
        elif isinstance(module, Linear8bitLt):
            scale = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
            weights[f"{name}.weight"] = module.weight.data.float() * scale[:, None] / 127
    for name, parameter in policy.causal_lm.named_parameters():
        if name not in weights and parameter.is_floating_point():
            weights[name] = parameter.detach()
    return weights


def test_storage_that_can_be_flattened_holds_the_same_weights(
    base: str, ragged_batch: GroupBatch
) -> None:
    """FSDP1 flattens 4-bit weights together with bfloat16 ones."""
    config = PolicyConfig(base=base, quantization="nf4", dtype="bfloat16")
    plain = build_policy(config, "shared")
    flat = build_policy(config, "shared", flat_storage=True)
    assert {p.dtype for p in flat.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert torch.equal(flat.reference(ragged_batch), plain.reference(ragged_batch))


# ------------------------------------------------------------------------------------- refusals


def test_missing_bitsandbytes_is_named(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpo_lightning.model.loading, "find_spec", lambda name: None)
    with pytest.raises(PolicyError, match="needs bitsandbytes: pip install bitsandbytes"):
        build_policy(PolicyConfig(base=base, quantization="nf4"), "auto")


def test_quantised_base_is_used_as_it_is_and_not_twice(base: str, tmp_path: Path) -> None:
    quantised(base, "nf4").save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).quantization_config
    with pytest.raises(PolicyError, match="is quantised already"):
        build_policy(PolicyConfig(base=str(tmp_path), quantization="int8"), "auto")
    policy = build_policy(PolicyConfig(base=str(tmp_path)), "auto")
    layers = [m for m in policy.modules() if isinstance(m, Linear4bit)]
    assert len(layers) == 14
    # Repacked in an evaluation pass, they would give wrong gradients afterwards.
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_random_weights_cannot_be_quantised(base: str) -> None:
    with pytest.raises(ValueError, match="quantization and random_init exclude each other"):
        PolicyConfig(base=base, quantization="nf4", random_init=True)


def test_widths_that_do_not_fill_blocks_compute_the_same(tmp_path: Path) -> None:
    """40 * 52 weights are no whole number of blocks of 64."""
    config = tiny_config(hidden_size=40, intermediate_size=52, head_dim=10)
    tiny_model(config).save_pretrained(tmp_path)
    batch = GroupBatch.from_groups(random_groups([(5, [3, 4]), (7, [2, 6])]))
    policy = build_policy(PolicyConfig(base=str(tmp_path), quantization="nf4"), "shared")
    with torch.no_grad():
        expected = plain_logps(quantised(str(tmp_path), "nf4"), batch).float()
    torch.testing.assert_close(policy.reference(batch), expected, rtol=1e-4, atol=1e-4)


def test_weights_that_cannot_be_packed_are_refused(tmp_path: Path) -> None:
    config = OPTConfig(
        vocab_size=384,
        hidden_size=33,
        ffn_dim=51,
        num_hidden_layers=1,
        num_attention_heads=3,
        max_position_embeddings=64,
        word_embed_proj_dim=33,
    )
    tiny_model(config).save_pretrained(tmp_path)
    with pytest.raises(PolicyError, match=r"holds 33 x 33 weights, which cannot be packed by 2"):
        build_policy(PolicyConfig(base=str(tmp_path), quantization="nf4"), "auto")


# -------------------------------------------------------------------------------------- security


def test_pickled_weights_are_refused(base: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(PolicyError, match="cannot be loaded as a causal language model"):
        build_policy(PolicyConfig(base=str(tmp_path)), "auto")


def test_code_that_comes_with_a_model_is_not_run(base: str, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    model = AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(tmp_path)
    (tmp_path / "modeling_own.py").write_text(f"open({str(ran)!r}, 'w').write('yes')\n")
    file = tmp_path / "config.json"
    own = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"}
    config = {**json.loads(file.read_text()), "model_type": "own", "auto_map": own}
    file.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(PolicyError, match="trust_remote_code"):
        build_policy(PolicyConfig(base=str(tmp_path)), "auto")
    assert not ran.exists()


# --------------------------------------------------------------------------- what is adapted


def saved(folder: Path, config: Any) -> str:
    tiny_model(config).save_pretrained(folder)
    return str(folder)


def adapted(
    base: str, caplog: pytest.LogCaptureFixture, **settings: Any
) -> tuple[Policy, set[str], str]:
    """A policy, the modules that its adapters are on, and what was said of them."""
    caplog.clear()
    lora = LoRA(**{key: settings.pop(key) for key in list(settings) if hasattr(LoRA, key)})
    policy = build_policy(PolicyConfig(base=base, lora=lora, **settings), "auto")
    names = {n.partition(".lora_")[0] for n, p in policy.named_parameters() if p.requires_grad}
    (line,) = [r.message for r in caplog.records if r.message.startswith("Adapters: ")]
    return policy, names, line


@pytest.mark.parametrize(
    ("name", "towers"),
    [
        ("gemma3", "model.vision_tower, model.multi_modal_projector"),
        ("llava", "model.vision_tower, model.multi_modal_projector"),
        ("mistral3", "model.vision_tower, model.multi_modal_projector"),
        ("qwen2_5_vl", "model.visual"),
    ],
)
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ".*(q|v)_proj"], ids=str)
def test_only_the_language_model_of_a_wrapper_is_adapted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, towers: str, targets: Any
) -> None:
    """And plain PEFT loads the adapter on the same base."""
    caplog.set_level("INFO")
    base = saved(tmp_path / "base", multimodal_config(name))
    policy, names, line = adapted(base, caplog, target_modules=targets, r=4)
    assert len(names) == 2 * (7 if targets == "all-linear" else 2)
    assert all(".language_model.layers." in each for each in names)
    assert line.startswith("Adapters: rank 4 on 2 q_proj, 2 ")
    assert line.endswith(f"; none on {towers}, which no text passes through.")
    policy(GroupBatch.from_groups(random_groups([(5, [3, 1])]))).sum().backward()
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                # Every weight that is trained is used: DDP refuses others.
                assert parameter.grad is not None
                parameter.add_(0.1 * torch.randn_like(parameter))
        policy.save_adapter(tmp_path / "adapter")
        config = AutoConfig.from_pretrained(base)
        plain = auto_class(config).from_pretrained(base)
        loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
        ids = torch.arange(2, 40)[None]
        expected = policy.eval().causal_lm(input_ids=ids).logits
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected)
    stored = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert not {"fc1", "out_proj", "proj", "qkv"} & set(stored["target_modules"])


@pytest.mark.parametrize(
    ("name", "settings", "why"),
    [
        ("t5", {}, "reads the prompt in an encoder of its own"),
        ("whisper", {}, "reads the prompt in an encoder of its own"),
        ("bert", {}, "reads a text in both directions"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "reads a text in both directions"),
        ("paligemma", {}, "reads a text in both directions"),
        ("vit", {}, "is not a model that answers a text in text"),
        ("qwen2_5_omni", {}, "is not a model that answers a text in text"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_language_model_is_refused_in_one_line(
    tmp_path: Path, name: str, settings: dict[str, Any], why: str
) -> None:
    """Before any weight is read."""
    AutoConfig.for_model(name, **settings).save_pretrained(tmp_path)
    with pytest.raises(PolicyError) as caught:
        base_limits(PolicyConfig(base=str(tmp_path)))
    assert str(caught.value) == (
        f"base: {tmp_path} ({name}) {why}. Name a causal language model, or a multimodal one "
        "around it (a class of AutoModelForImageTextToText)."
    )


def test_bases_are_loaded_whole() -> None:
    """Though transformers has a causal language model for a part of them."""
    for name, kind in {
        "gemma3": "AutoModelForCausalLM",
        "llama4": "AutoModelForImageTextToText",
        "qwen3_5": "AutoModelForImageTextToText",
    }.items():
        config = multimodal_config(name)
        assert auto_class(config).__name__ == kind
        assert type(tiny_model(config)).__name__.endswith("ForConditionalGeneration")


EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_experts": 4}


def experts_config(name: str) -> Any:
    settings = {**tiny_config(pad_token_id=0).to_dict(), **EXPERTS, "head_dim": 8}
    kept = {k: v for k, v in settings.items() if k not in {"model_type", "architectures"}}
    kept |= {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    return AutoConfig.for_model(name, **kept, layer_types=["full_attention", "full_attention"])


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        (
            "qwen3_moe",
            {},
            "rank 4 on 2 q_proj, 2 k_proj, 2 v_proj, 2 o_proj, 2 experts.down_proj; "
            "rank 8 on 2 experts.gate_up_proj; none on the routers (2 mlp.gate).",
        ),
        (
            "mixtral",
            {},
            "rank 4 on 2 q_proj, 2 k_proj, 2 v_proj, 2 o_proj, 2 experts.down_proj; "
            "rank 8 on 2 experts.gate_up_proj; none on the routers (2 mlp.gate).",
        ),
        # PEFT finds no adapters for these experts by the names of layers.
        (
            "gpt_oss",
            {},
            "rank 4 on 2 q_proj, 2 k_proj, 2 v_proj, 2 o_proj; none on the fused experts "
            "(2 experts.gate_up_proj, 2 experts.down_proj); none on the routers (2 mlp.router).",
        ),
        (
            "qwen3_moe",
            {"exclude_modules": ["experts"], "lora_dropout": 0.1},
            "rank 4 on 2 q_proj, 2 k_proj, 2 v_proj, 2 o_proj; none on the fused experts "
            "(2 experts.gate_up_proj, 2 experts.down_proj); none on the routers (2 mlp.gate).",
        ),
        (
            "qwen3_moe",
            {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj", "gate"]},
            "rank 4 on 2 q_proj, 2 experts.down_proj, 2 gate.weight; "
            "rank 8 on 2 experts.gate_up_proj.",
        ),
        # The same, beside experts that are layers; one of its routers is a layer, too.
        (
            "qwen2_moe",
            {"exclude_modules": ["o_proj"]},
            "rank 4 on 2 q_proj, 2 k_proj, 2 v_proj, 2 gate_proj, 2 up_proj, 2 down_proj; "
            "none on the fused experts (2 experts.gate_up_proj, 2 experts.down_proj); "
            "none on the routers (2 mlp.gate, 2 mlp.shared_expert_gate).",
        ),
    ],
    ids=str,
)
def test_what_is_adapted_of_a_mixture_of_experts_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, settings: dict[str, Any], said: str
) -> None:
    caplog.set_level("INFO")
    base = saved(tmp_path / "base", experts_config(name))
    policy, names, line = adapted(base, caplog, r=4, **settings)
    assert line == f"Adapters: {said}"
    assert any(n.endswith(".gate") for n in names) == ("gate.weight" in said)
    assert policy.is_untrained()
    batch = GroupBatch.from_groups(random_groups([(5, [3, 1])]))
    assert torch.equal(policy.eval()(batch), policy.reference(batch))
    policy.save_adapter(tmp_path / "adapter")
    stored = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert sorted(stored["rank_pattern"].values()) == ([8] if "rank 8" in said else [])


@pytest.mark.parametrize("asked", [False, True])
def test_routers_have_no_auxiliary_loss_which_is_said_where_one_is_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, asked: bool
) -> None:
    caplog.set_level("INFO")
    config = experts_config("mixtral")
    config.update({"output_router_logits": asked, "router_aux_loss_coef": 0.5})
    policy, _, _ = adapted(saved(tmp_path / "base", config), caplog)
    assert ("their auxiliary loss" in caplog.text) == asked
    policy.check(GroupBatch.from_groups(random_groups([(5, [3, 1])])))


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("setting", [{"lora_dropout": 0.05}, {"use_dora": True}], ids=str)
def test_what_fused_experts_have_not_is_refused_by_the_users_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, setting: dict[str, Any]
) -> None:
    base = saved(tmp_path / "base", experts_config(name))
    (field,) = setting
    with pytest.raises(
        PolicyError,
        match=rf"^lora\.{field}: the experts .*experts.gate_up_proj.* no {field}.*"
        r"exclude_modules: \[experts\], which leaves k_proj, o_proj, q_proj, v_proj\.$",
    ):
        adapted(base, caplog, **setting)


def test_half_of_a_fused_weight_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = saved(tmp_path / "base", experts_config("qwen3_moe"))
    with pytest.raises(PolicyError, match="target_modules.*gate_proj without also.*up_proj"):
        adapted(base, caplog, target_modules=["q_proj", "gate_proj"])


def test_what_quantisation_leaves_of_experts_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    base = saved(tmp_path / "base", experts_config("qwen3_moe"))
    policy, _, _ = adapted(base, caplog, quantization="nf4")
    experts = sum(
        p.nbytes for n, p in policy.named_parameters() if p.ndim == 3 and "lora_" not in n
    )
    assert experts == 2 * 4 * 3 * 32 * 32 * 4
    assert (
        f"Quantization: nf4 leaves {experts / 2**20:,.1f} MiB as they were, the fused experts "
        "(experts.down_proj, experts.gate_up_proj)" in caplog.text
    )


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        *[(name, "out_proj") for name in ("falcon_h1", "mamba", "mamba2", "nemotron_h")],
        ("jamba", "dt_proj"),
        ("deepseek_v4", "o_a_proj"),
        ("zamba2", "adapter_list"),
        *[(name, "indexer") for name in ("deepseek_v32", "minimax_m3_vl_text", "qwen4_exp_text")],
    ],
)
def test_every_adapter_has_a_gradient(
    name: str, left_out: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Layers whose weights are used past their adapters, or without a gradient, have none."""
    caplog.set_level("INFO")
    settings = {**CONTINUED, **SEPARATE}[name]
    variant_model(name, **settings).save_pretrained(tmp_path)
    policy, names, line = adapted(str(tmp_path), caplog)
    assert not any(left_out in part for part in names)
    indexers = [n for n, _ in policy.causal_lm.named_modules() if n.endswith(".indexer")]
    assert ("none on the indexers" in line) == bool(indexers)
    batch = GroupBatch.from_groups(random_groups([(7, [5, 3])]))
    policy(batch).sum().backward()
    for key, parameter in policy.named_parameters():
        if "lora_B" in key:
            assert parameter.grad is not None, key
            assert parameter.grad.abs().max() > 0, key
    policy.check(batch)


@pytest.mark.parametrize("name", ["gemma3n_text", "llama4_text", "mllama", "modernbert-decoder"])
def test_every_adapter_learns_what_full_logits_teach_it(name: str, tmp_path: Path) -> None:
    """Layers that would have no gradient have no adapter, and a head has several."""
    settings = (SEPARATE | CONTINUED).get(name, {})
    variant_model(name, **settings).save_pretrained(tmp_path)
    policy = build_policy(PolicyConfig(base=str(tmp_path), lora=LoRA(r=4)), "separate")
    trained = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    batch = GroupBatch.from_groups(random_groups([(7, [5, 3])]))
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    found = torch.autograd.grad(policy(batch).sum(), list(trained.values()))
    full = plain_logps(policy.causal_lm, batch).sum()
    expected = torch.autograd.grad(full, list(trained.values()))
    for key, one, other in zip(trained, found, expected, strict=True):
        assert (one - other).abs().max() <= 1e-3 * other.abs().max(), key


def test_soft_cap_of_attention_is_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older transformers choose SDPA for Gemma 2, which knows no soft-cap."""
    from transformers.models.gemma2.modeling_gemma2 import Gemma2PreTrainedModel

    variant_model("gemma2", attn_logit_softcapping=0.1).save_pretrained(tmp_path)
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")(ids)
        monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", True)
        base = load_base(PolicyConfig(base=str(tmp_path)), torch.device("cpu"))
        torch.testing.assert_close(base(ids).logits, plain.logits)
