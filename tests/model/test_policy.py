"""The policy and the reference that it contains."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    BloomConfig,
    GPT2Config,
)

from mpo_lightning.batch import GroupBatch
from mpo_lightning.model.attention import PromptSharing
from mpo_lightning.model.loading import LoRA, PolicyConfig, build_policy
from mpo_lightning.model.policy import Policy, PolicyError, decoder_layers
from tests.conftest import plain_logps, random_groups, tiny_config, tiny_model
from tests.model.architectures import CONTINUED, SEPARATE, variant_model, with_trained_lora


def make(base: str, layout: Any = "auto", **settings: Any) -> Policy:
    lora = LoRA(**{key: settings.pop(key) for key in list(settings) if hasattr(LoRA, key)})
    return build_policy(PolicyConfig(base=base, lora=lora, **settings), layout)


def shake(policy: Policy) -> None:
    """Change everything that is trained."""
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.fixture
def base_logps(base: str, ragged_batch: GroupBatch) -> torch.Tensor:
    with torch.no_grad():
        return plain_logps(AutoModelForCausalLM.from_pretrained(base), ragged_batch).float()


@pytest.mark.parametrize("layout", ["shared", "separate"])
@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"use_dora": True},
        {"use_rslora": True},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["embed_tokens", "down_proj"]},
    ],
    ids=str,
)
def test_reference_is_the_base_whatever_was_trained(
    base: str, ragged_batch: GroupBatch, base_logps: torch.Tensor, layout: str, lora: dict[str, Any]
) -> None:
    policy = make(base, layout, **lora)
    assert policy.training
    with torch.no_grad():
        torch.testing.assert_close(policy(ragged_batch), base_logps, rtol=0, atol=1e-4)
    before = policy.reference(ragged_batch)
    shake(policy)
    after = policy.reference(ragged_batch)
    assert torch.equal(before, after)
    torch.testing.assert_close(after, base_logps, rtol=0, atol=1e-4)
    with torch.no_grad():
        assert (policy(ragged_batch) - after).abs().max() > 0.1


def test_fresh_adapter_gives_log_ratios_of_exactly_zero(
    base: str, ragged_batch: GroupBatch
) -> None:
    policy = make(base, lora_dropout=0.5)
    assert policy.is_untrained()
    assert torch.equal(policy(ragged_batch).detach(), policy.reference(ragged_batch))
    shake(policy)
    assert not policy.is_untrained()


def test_reference_has_no_dropout_and_restores_modes(base: str, ragged_batch: GroupBatch) -> None:
    policy = make(base, lora_dropout=0.5)
    shake(policy)
    policy.causal_lm.model.layers[0].eval()
    # Randomness of the base itself that only training mode has, whatever its name.
    policy.causal_lm.model.layers[1].self_attn.attention_dropout = 0.5
    modes = [module.training for module in policy.modules()]
    trainable = [parameter.requires_grad for parameter in policy.parameters()]
    first, second = policy.reference(ragged_batch), policy.reference(ragged_batch)
    assert torch.equal(first, second)
    assert not torch.equal(policy(ragged_batch), policy(ragged_batch)), "dropout was not on"
    assert [module.training for module in policy.modules()] == modes
    assert [parameter.requires_grad for parameter in policy.parameters()] == trainable


def test_adapters_and_modes_come_back_after_an_error(base: str, ragged_batch: GroupBatch) -> None:
    policy = make(base)
    shake(policy)
    before = policy(ragged_batch).detach()
    broken = ragged_batch.to("cpu")
    broken.tokens = torch.full_like(ragged_batch.tokens, 10**6)
    with pytest.raises(IndexError):
        policy.reference(broken)
    assert policy.training
    assert all(p.requires_grad for n, p in policy.named_parameters() if "lora_" in n)
    assert torch.equal(policy(ragged_batch).detach(), before)


@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_every_adapter_weight_learns_under_gradient_checkpointing(
    base: str, ragged_batch: GroupBatch, layout: str
) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        policy = make(base, layout, gradient_checkpointing=checkpointing)
        shake(policy)
        calls = []
        policy.causal_lm.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))  # noqa: B023
        policy(ragged_batch).sum().backward()
        assert len(calls) == (2 if checkpointing else 1), "the backward pass computes again, or not"
        gradients.append({n: p.grad for n, p in policy.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert gradient is not None
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient)


def gradients_of(policy: Policy, batch: GroupBatch) -> dict[str, torch.Tensor]:
    policy.zero_grad()
    policy(batch).square().sum().backward()
    return {n: p.grad.clone() for n, p in policy.named_parameters() if p.requires_grad}


def assert_same_gradients(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-4
) -> None:
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        assert (found[name] - gradient).abs().max() <= tolerance * gradient.abs().max(), name


def test_compiled_layers_compute_the_same_whatever_the_lengths(
    base: str, ragged_batch: GroupBatch
) -> None:
    policies = []
    for compile in (False, True):
        torch.manual_seed(0)
        policies.append(make(base, compile=compile))
        shake(policies[-1])
    policy, compiled = policies
    other = GroupBatch.from_groups(random_groups([(3, [4, 4, 4]), (8, [2])], seed=5))
    for batch in (ragged_batch, other):
        torch.testing.assert_close(compiled.reference(batch), policy.reference(batch))
        torch.testing.assert_close(compiled(batch), policy(batch), rtol=1e-5, atol=1e-4)
        assert_same_gradients(gradients_of(compiled, batch), gradients_of(policy, batch))
    assert counters["stats"]["unique_graphs"] > 0
    graphs = counters["stats"]["unique_graphs"]
    gradients_of(compiled, ragged_batch.select(1))
    assert counters["stats"]["unique_graphs"] == graphs, "another length was compiled anew"


def own_layers(policy: Policy) -> set[str]:
    """Classes of this package among the policy's layers, and classes whose forward it replaced."""
    modules = list(policy.model.modules())
    ours = {type(m).__name__ for m in modules if type(m).__module__.startswith("mpo_lightning")}
    return ours | {type(m).__name__ for m in modules if "forward" in vars(m)}


def test_layers_of_this_package_are_installed_where_they_act(base: str) -> None:
    assert own_layers(make(base)) == {"FastLinear", "FastLoraLinear", "LlamaMLP"}
    # Adapters are float32 all the same.
    half = make(base, dtype="bfloat16")
    assert own_layers(half) == {"FastLinear", "LlamaMLP"}
    assert {type(m).__name__ for m in decoder_layers(half.causal_lm)[0].mlp.children()} == {
        "Linear",
        "SiLUActivation",
    }
    elsewhere = build_policy(PolicyConfig(base=base), "auto", device="cuda")
    assert own_layers(elsewhere) == {"LlamaMLP"}
    # Compiled layers choose what they compute again; the head is not compiled.
    assert "LlamaMLP" not in own_layers(make(base, compile=True))


def test_layers_of_this_package_can_be_left_out(base: str, ragged_batch: GroupBatch) -> None:
    """What is left are the classes of torch, PEFT and transformers, and the same numbers."""
    results = []
    for fast, lean in ((True, True), (True, False), (False, True), (False, False)):
        torch.manual_seed(0)
        policy = make(base, fast_linear=fast, recompute_gated_mlps=lean)
        expected = {"FastLinear", "FastLoraLinear"} if fast else set()
        assert own_layers(policy) == expected | ({"LlamaMLP"} if lean else set())
        shake(policy)
        gradients = gradients_of(policy, ragged_batch)
        results.append((policy(ragged_batch), policy.reference(ragged_batch), gradients))
    plain, plain_reference, plain_gradients = results.pop()
    for logps, reference, gradients in results:
        torch.testing.assert_close(logps, plain, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(reference, plain_reference, rtol=1e-5, atol=1e-4)
        assert_same_gradients(gradients, plain_gradients)


def test_compile_and_gradient_checkpointing_exclude_each_other(base: str) -> None:
    with pytest.raises(ValueError, match=r"compile and gradient_checkpointing exclude"):
        make(base, compile=True, gradient_checkpointing=True)


@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_four_bit_bases_work_with_every_saving(
    ragged_batch: GroupBatch, tmp_path: Path, layout: Any
) -> None:
    """The same 4-bit weights: checkpointed, in slices, compiled, all as in one pass."""
    tiny_model(tiny_config(hidden_size=64, num_attention_heads=4)).save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")

    def policy(**options: Any) -> Policy:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings)
        layers = [m for m in model.modules() if isinstance(m, Linear4bit)]
        assert len(layers) == 2 * 7
        for layer in layers:
            # An evaluation pass would repack the weights for a kernel without gradients.
            layer.support_avx512bf16_for_cpu = False
        if options.pop("checkpointing", False):
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if options.pop("compiled", False):
            for layer in decoder_layers(model):
                layer.compile(dynamic=True, backend="aot_eager")
        lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        result = Policy(get_peft_model(model, lora), layout=layout, **options)
        return result.train()

    plain = policy()
    expected = gradients_of(plain, ragged_batch)
    reference = plain.reference(ragged_batch)
    full = plain_logps(plain.causal_lm, ragged_batch).float()
    torch.testing.assert_close(plain(ragged_batch), full, rtol=0, atol=1e-3)
    for options in ({"checkpointing": True}, {"responses_per_pass": 2}, {"compiled": True}):
        other = policy(**options)
        torch.testing.assert_close(other.reference(ragged_batch), reference, rtol=0, atol=1e-3)
        assert_same_gradients(gradients_of(other, ragged_batch), expected, 1e-3)


def test_a_four_bit_hybrid_continues_its_prompts(ragged_batch: GroupBatch, tmp_path: Path) -> None:
    """Values are those of its own full logits, gradients those of separate rows."""
    sizes = {"hidden_size": 64, "intermediate_size": 64}
    variant_model("qwen3_5_text", **CONTINUED["qwen3_5_text"], **sizes).save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings)
    layers = [m for m in model.modules() if isinstance(m, Linear4bit)]
    assert len(layers) > 4 * 3
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    policy = Policy(get_peft_model(model, lora), layout="separate").train()
    expected = gradients_of(policy, ragged_batch)
    full = plain_logps(policy.causal_lm, ragged_batch).float()
    for per_pass in (None, 2):
        policy.layout, policy.responses_per_pass = "continued", per_pass
        torch.testing.assert_close(policy(ragged_batch), full, rtol=0, atol=1e-3)
        assert_same_gradients(gradients_of(policy, ragged_batch), expected, 1e-3)


def test_only_adapters_are_trained_and_in_float32(base: str, ragged_batch: GroupBatch) -> None:
    policy = make(base, dtype="bfloat16")
    assert all(module.training for module in policy.modules())
    trained = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert policy.causal_lm.dtype == torch.bfloat16
    assert policy(ragged_batch).dtype == torch.float32
    policy.check(ragged_batch)


def test_layout_is_chosen_by_architecture(base: str, tmp_path: Path) -> None:
    assert make(base).layout == "auto"
    assert make(base, "separate").layout == "separate"
    config = BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=384)
    tiny_model(config).save_pretrained(tmp_path / "bloom")
    assert make(str(tmp_path / "bloom")).layout == "auto"
    with pytest.raises(PolicyError, match="bloom is not among.*llama"):
        make(str(tmp_path / "bloom"), "shared")
    variant_model("mamba", **SEPARATE["mamba"]).save_pretrained(tmp_path / "mamba")
    assert make(str(tmp_path / "mamba")).layout == "separate"
    with pytest.raises(PolicyError, match="mamba is not among.*bamba"):
        make(str(tmp_path / "mamba"), "continued")


def test_the_bases_own_dropout_is_off(tmp_path: Path, ragged_batch: GroupBatch) -> None:
    """GPT-2 has 0.1 everywhere by default: the policy would differ from its reference at step 0."""
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=384, attn_pdrop=0.3)
    tiny_model(config).save_pretrained(tmp_path)
    policy = make(str(tmp_path))
    assert policy.training
    assert torch.equal(policy(ragged_batch).detach(), policy.reference(ragged_batch))


def test_random_weights_from_a_configuration(tmp_path: Path, ragged_batch: GroupBatch) -> None:
    tiny_config().save_pretrained(tmp_path)
    policy = make(str(tmp_path), random_init=True)
    assert policy.causal_lm.dtype == torch.float32
    policy.check(ragged_batch)


# ------------------------------------------------------------------------- the first-batch check


@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_check_accepts_what_is_right(base: str, ragged_batch: GroupBatch, layout: str) -> None:
    policy = make(base, layout)
    shake(policy)
    policy.check(ragged_batch)
    assert policy.training


def test_check_stops_wrong_positions(
    base: str, ragged_batch: GroupBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positions that run on through a packed row are the classic silent mistake."""
    policy = make(base)
    monkeypatch.setattr(
        PromptSharing,
        "positions",
        lambda self: torch.arange(sum(self.own.queries)),
    )
    with pytest.raises(PolicyError, match=r"LlamaForCausalLM.*nats over.*layout: separate"):
        policy.check(ragged_batch)


def test_products_in_fewer_bits_may_differ_by_more(base: str) -> None:
    """As Lightning advises for GPUs: torch.set_float32_matmul_precision("high")."""
    policy, lengths = make(base), torch.tensor([4, 400])
    exact = policy.tolerance(lengths)
    assert (exact < 0.05).all()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert policy.precision() == "float32, products in bf16"
        rounded = policy.tolerance(lengths)
        assert (rounded > 100 * exact).all()
        # A right one of 4 tokens was seen to differ by 0.48 in bfloat16.
        assert rounded[0] > 0.5
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(policy.tolerance(lengths), exact)


def test_check_stops_a_model_that_needs_an_image(tmp_path: Path, ragged_batch: GroupBatch) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    layers: dict[str, Any] = {"num_hidden_layers": 1, **sizes}
    text: dict[str, Any] = {
        "vocab_size": 384,
        "ffn_dim": 16,
        "word_embed_proj_dim": 16,
        "model_type": "opt",
    }
    config = AutoConfig.for_model(
        "blip-2",
        text_config={**layers, **text},
        vision_config={**layers, "image_size": 28, "patch_size": 14},
        qformer_config={**layers, "encoder_hidden_size": 16},
    )
    config.save_pretrained(tmp_path)
    policy = build_policy(PolicyConfig(base=str(tmp_path), random_init=True), "auto")
    expected = (
        "base: Blip2ForConditionalGeneration does not compute token ids alone: .*pixel_values"
    )
    with pytest.raises(PolicyError, match=expected):
        policy.check(ragged_batch)


def test_check_stops_a_model_that_gives_nan(base: str, ragged_batch: GroupBatch) -> None:
    policy = make(base)
    with torch.no_grad():
        policy.causal_lm.model.norm.weight.fill_(torch.nan)
    with pytest.raises(PolicyError, match="log-probability nan"):
        policy.check(ragged_batch)


def test_check_stops_a_model_that_looks_ahead(ragged_batch: GroupBatch) -> None:
    """Rows of prompt and response agree with each other; a row without its last token does not."""
    ahead = variant_model("gemma3_text", use_bidirectional_attention=True)
    policy = Policy(with_trained_lora(ahead), layout="separate")
    with pytest.raises(PolicyError, match=r"in separate rows, but .* by the model's own logits"):
        policy.check(ragged_batch)


# ---------------------------------------------------------------------------------- bad settings


def test_adapter_folder_is_refused_as_a_base(base: str, tmp_path: Path) -> None:
    make(base).save_adapter(tmp_path)
    with pytest.raises(PolicyError, match="is an adapter, not a model.*merge"):
        make(str(tmp_path))


def test_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"neither config\.json"):
        make(str(tmp_path))


def test_base_that_is_nowhere_is_refused() -> None:
    with pytest.raises(PolicyError, match=r"^base: no/such-model cannot be loaded"):
        make("no/such-model")


def test_weights_that_would_be_random_are_refused(base: str, tmp_path: Path) -> None:
    for file in Path(base).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(Path(base) / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PolicyError, match="lacks 1 weights.*up_proj"):
        make(str(tmp_path))


@pytest.mark.parametrize("targets", [["nothing"], ["q_proj", "nothing"], "nothing"])
def test_lora_targets_that_match_nothing_are_refused(base: str, targets: Any) -> None:
    with pytest.raises(PolicyError, match="target_modules.*nothing.*q_proj"):
        make(base, target_modules=targets)


@pytest.mark.parametrize(
    ("targets", "excluded"),
    [
        (["q_proj", "lm_head"], "lm_head"),
        (".*(lm_head|v_proj)", "lm_head"),
        (["embed_tokens"], "embed_tokens"),
    ],
)
def test_an_adapter_on_one_end_of_a_tied_model_is_refused(
    tmp_path: Path, targets: Any, excluded: str
) -> None:
    """Merged, it would change the other end as well."""
    tiny_model(tiny_config(tie_word_embeddings=True)).save_pretrained(tmp_path)
    with pytest.raises(
        PolicyError, match=rf"(?s){excluded}.*tie_word_embeddings.*exclude_modules: \[{excluded}\]"
    ):
        make(str(tmp_path), target_modules=targets)
    left = make(str(tmp_path), target_modules="all-linear", exclude_modules=[excluded])
    assert left.is_untrained()


def test_an_adapter_on_the_embedding_alone_is_untrained_until_it_is_trained(base: str) -> None:
    policy = make(base, target_modules=["embed_tokens"])
    assert policy.is_untrained()
    shake(policy)
    assert not policy.is_untrained()


@pytest.mark.parametrize(
    ("field", "value"), [("r", 0), ("lora_alpha", 0), ("lora_dropout", 1.0), ("lora_dropout", -0.1)]
)
def test_lora_settings_are_checked(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"LoRA: {field}"):
        LoRA(**{field: value})


def test_saved_adapter_loads_in_peft_and_gives_the_same_logits(base: str, tmp_path: Path) -> None:
    policy = make(base)
    shake(policy)
    policy.save_adapter(tmp_path)
    named = json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(Path(base).resolve())
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(named), tmp_path)
    ids = torch.arange(2, 40)[None]
    policy.eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, policy.causal_lm(ids).logits)


def test_weights_that_changed_in_sharding_are_found(base: str) -> None:
    """What is remembered of the whole policy holds its shards to account, whatever was trained."""
    policy = make(base)
    policy.record_fingerprint()
    shake(policy)
    policy.check_shards()
    with torch.no_grad():
        weight = policy.causal_lm.model.layers[1].self_attn.v_proj.base_layer.weight
        weight.copy_(weight.roll(1, 0))
    with pytest.raises(PolicyError, match=r"once sharded.*Train it on one device or with DDP"):
        policy.check_shards()
