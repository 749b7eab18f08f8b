"""Build the policy: load the base model, quantise it, put fresh LoRA adapters on it, shard it.

The reference is the base itself, so only LoRA weights may be trained, and a run starts from fresh
adapters: a base that is an adapter folder is refused.
"""

import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from safetensors import SafetensorError
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from mpo_lightning.batch import ModelLimits
from mpo_lightning.checks import check_settings
from mpo_lightning.digests import check_folder
from mpo_lightning.files import in_transformers
from mpo_lightning.model.attention import SHARED_PROMPT_ATTENTION
from mpo_lightning.model.continuation import CONTINUED_MODELS
from mpo_lightning.model.decoder import text_decoder
from mpo_lightning.model.limits import limits_of
from mpo_lightning.model.logps import (
    SHARED_PROMPT_MODELS,
    SPARSE_MODELS,
    Layout,
    exact_layouts,
)
from mpo_lightning.model.policy import Policy, PolicyError, decoder_layers
from mpo_lightning.quiet import without_bars

__all__ = [
    "LoRA",
    "PolicyConfig",
    "Quantization",
    "auto_class",
    "base_limits",
    "build_policy",
    "fix_bitsandbytes_modes",
    "load_base",
    "quantised_arguments",
    "refuse_unshardable",
    "warn_if_slow",
]

Quantization = Literal["none", "nf4", "int8"]

# Linear layers that "all-linear" leaves out, by model type: recurrent layers compute with these
# weights past their adapters (some of which PEFT refuses), and PEFT has none for weights in blocks.
# Zamba 2's are adapters of its own in layers that share an MLP, of which each uses one.
NOT_ADAPTED = {
    **{name: ["out_proj"] for name in ("falcon_h1", "mamba2", "nemotron_h")},
    **{name: ["dt_proj", "out_proj"] for name in ("falcon_mamba", "mamba")},
    "gemma3n_text": ["correction_coefs"],
    "jamba": ["dt_proj"],
    "deepseek_v4": ["o_a_proj"],
    "zamba2": ["0", "1"],
}
# Modules that images alone go through, by the type of models without a language model of its own.
IMAGES_ALONE = {
    "git": ("image_encoder", "visual_projection"),
    "phi4_multimodal": ("embed_tokens_extend",),
}


if TYPE_CHECKING:
    # A model that is loaded, too; of which settings files know nothing.
    Base: TypeAlias = Any
else:
    Base = str


@dataclass(kw_only=True)
class LoRA:
    """Settings of the LoRA adapter (arXiv 2106.09685), with PEFT's names and meaning.

    Args:
        r: rank.
        lora_alpha: scale; the update is ``lora_alpha / r`` times ``B A``.
        lora_dropout: dropout on the adapter's input in training; the reference has none.
        target_modules: names of the linear layers to adapt, or "all-linear" (all but the head,
            the routers of experts and parts that would get no gradient). Of a multimodal model only
            the language model is adapted.
        exclude_modules: names of layers to leave out; "experts" leaves out fused experts.
        use_rslora: scale by ``lora_alpha / sqrt(r)`` instead (arXiv 2312.03732).
        use_dora: weight-decomposed LoRA (arXiv 2402.09353).
    """

    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    exclude_modules: list[str] | None = None
    use_rslora: bool = False
    use_dora: bool = False

    def __post_init__(self) -> None:
        check_settings(self)
        if self.r < 1:
            raise ValueError(f"LoRA: r must be at least 1, got {self.r}.")
        if self.lora_alpha <= 0:
            raise ValueError(f"LoRA: lora_alpha must be > 0, got {self.lora_alpha}.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"LoRA: lora_dropout must be in [0, 1), got {self.lora_dropout}.")


@dataclass(kw_only=True)
class PolicyConfig:
    """Settings of the model that is trained.

    Args:
        base: folder or hub id of a causal language model, in safetensors; or a file in GGUF
            (``.gguf``), or its folder, which is dequantised as it is read. In Python also a model
            that is loaded, which the adapter is put on in place.
        lora: settings of the adapter.
        dtype: dtype of the base weights; "auto" is the one they are stored in. Adapters of 16-bit
            models are kept in float32.
        quantization: keep the base's linear layers in fewer bits (bitsandbytes): "nf4" is 4-bit
            NormalFloat with double quantisation (arXiv 2305.14314), "int8" is LLM.int8()
            (arXiv 2208.07339). All other weights keep ``dtype``, in which quantised layers compute.
        gradient_checkpointing: save memory by computing activations again in the backward pass.
        compile: compile the decoder layers (`torch.compile`); the first steps take long. Not
            together with gradient_checkpointing, nor with a sharded policy.
        fast_linear: on CPU, compute float32 linear layers with the faster of oneDNN and MKL, and
            plain LoRA together with its layer. No effect on other devices.
        recompute_gated_mlps: save memory by computing elementwise products of gated MLPs again in
            the backward pass, on any device. No effect with compile.
        attn_implementation: transformers' attention implementation, with model.layout: separate or
            continued. Defaults to transformers' choice. A shared prompt has an attention of its
            own.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: let a hub model run its own code.
        random_init: draw random weights from the base's configuration, for tests and benchmarks.
    """

    base: Base
    lora: LoRA = field(default_factory=LoRA)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Quantization = "none"
    gradient_checkpointing: bool = False
    compile: bool = False
    fast_linear: bool = True
    recompute_gated_mlps: bool = True
    attn_implementation: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    random_init: bool = False

    def __post_init__(self) -> None:
        # A model that is loaded is no setting: settings are compared, copied and recorded.
        self.loaded: Any = None
        if not isinstance(self.base, str | os.PathLike | None):
            self.loaded, self.base = self.base, _name_of_loaded(self.base)
        check_settings(self)
        self.base = os.path.expanduser(str(self.base))
        if self.loaded is not None and (self.quantization != "none" or self.random_init):
            raise ValueError(
                "model.policy: a loaded model keeps its weights. Name its folder or hub id as "
                "base for quantization or random_init."
            )
        if self.compile and self.gradient_checkpointing:
            raise ValueError(
                "model.policy: compile and gradient_checkpointing exclude each other: a "
                "checkpointed layer would be computed as if it were not compiled. Choose one."
            )
        if self.quantization != "none" and self.random_init:
            raise ValueError(
                "model.policy: quantization and random_init exclude each other: weights are "
                "quantised as they are read from a file."
            )


def build_policy(
    config: PolicyConfig,
    layout: Layout,
    responses_per_pass: int | None = None,
    *,
    device: torch.device | str = "cpu",
    mesh: Any = None,
    flat_storage: bool = False,
) -> Policy:
    """Load the base and put fresh adapters on it.

    Args:
        config: the base and the adapter.
        layout: "shared", "continued" or "separate"; "auto" is the cheapest for each batch among
            those in which the architecture computes the same.
        responses_per_pass: responses that go through the model at a time. Defaults to all of a
            batch.
        device: device on which the policy will compute.
        mesh: one-dimensional device mesh of the processes between which the policy is sharded
            (FSDP2). Only the first of them reads a base that is not quantised, and sends the
            others their shards.
        flat_storage: whether the parameters will be flattened together (FSDP1); quantised weights
            are then stored in the dtype of the others.

    Raises:
        PolicyError: if the base is not a model or cannot be quantised, the adapter matches no
            layer, or the architecture does not support the layout.
    """
    load = _Loader(config, layout, responses_per_pass, torch.device(device), flat_storage)
    if mesh is None or mesh.size() == 1 or config.quantization != "none":
        policy = load()
        if mesh is not None:
            policy.shard(mesh)
        return policy
    return _in_shards(load, mesh)


def refuse_unshardable(config: PolicyConfig, mesh: Any, *, precision: str) -> None:
    """Refuse settings that do not work with a strategy that shards the model.

    Args:
        config: the policy.
        mesh: device mesh of FSDP2; None under FSDP1.
        precision: the trainer's precision.

    Raises:
        PolicyError: if the strategy would split layers between processes, or does not work with
            compiled layers or with the base's quantisation.
    """
    if mesh is not None and mesh["tensor_parallel"].size() > 1:
        raise PolicyError(
            "ModelParallelStrategy splits layers between processes, each of which would see the "
            "same data. Set data_parallel_size to the number of processes and "
            "tensor_parallel_size to 1, or use mpo_lightning.strategy.FSDP2."
        )
    if config.loaded is not None:
        raise PolicyError(
            "a loaded model is not divided between processes. Name its folder or hub id.",
            field="base",
        )
    if config.compile:
        raise PolicyError(
            "it does not work together with a sharded policy. Set it to false.", field="compile"
        )
    if config.quantization == "int8":
        raise PolicyError("int8 weights cannot be sharded. Use nf4, or DDP.", field="quantization")
    whole_dtype = (precision, config.dtype) == ("bf16-true", "bfloat16")
    if mesh is None and config.quantization == "nf4" and not whole_dtype:
        raise PolicyError(
            "FSDP1 stores 4-bit weights together with the others, so all must be of one dtype: "
            "set trainer.precision: bf16-true and model.policy.dtype: bfloat16, or use FSDP2 or "
            "DDP."
        )


@dataclass(frozen=True)
class _Loader:
    """Loads the whole policy with these settings."""

    config: PolicyConfig
    layout: Layout
    responses_per_pass: int | None
    device: torch.device
    flat_storage: bool

    def __call__(self, *, empty: bool = False) -> Policy:
        """Return the policy; ``empty`` leaves its weights out (meta tensors)."""
        from mpo_lightning.model.fast_linear import use_fast_linear
        from mpo_lightning.model.gated_mlp import recompute_gated_mlps

        config = self.config
        if empty:
            settings, kwargs = _settings_of_base(config)
            with torch.device("meta"):
                base = _from_settings(config, settings, kwargs)
        else:
            base = load_base(config, self.device, flat_storage=self.flat_storage)
        if config.gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        chosen = _choose_layout(base, self.layout, config.attn_implementation)
        language = text_decoder(base).config
        if config.attn_implementation is None and language.model_type in SHARED_PROMPT_MODELS:
            # Separate rows then follow one another without padding, too.
            language._attn_implementation = SHARED_PROMPT_ATTENTION
        with torch.device("meta") if empty else nullcontext():
            model = _add_lora(base, config.lora)
        if config.fast_linear and self.device.type == "cpu":
            use_fast_linear(model)
        if config.compile:
            for layer in decoder_layers(base):
                # Compiled once, for batches of any lengths.
                layer.compile(dynamic=True)
        elif config.recompute_gated_mlps:
            recompute_gated_mlps(model)
        # transformers loads models in eval mode, and Lightning keeps the mode that it finds.
        model.train()
        return Policy(model, layout=chosen, responses_per_pass=self.responses_per_pass)


def _in_shards(load: _Loader, mesh: Any) -> Policy:
    """Return the policy sharded over processes; only the first one ever holds all of it."""
    from torch.distributed import broadcast, broadcast_object_list
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    first = int(mesh.mesh.flatten()[0])
    group = mesh.get_group()
    whole = load() if torch.distributed.get_rank() == first else None
    policy = load(empty=True)
    shared: list[Any] = [None]
    if whole is not None:
        weights = whole.state_dict()
        whole.record_fingerprint()
        shared = [
            {
                "dtypes": {name: value.dtype for name, value in weights.items()},
                "fingerprint": whole.fingerprint(),
                "random": torch.get_rng_state(),
            }
        ]
    else:
        weights = {}
    broadcast_object_list(shared, src=first, group=group)
    of_first: dict[str, Any] = shared[0]
    for name, parameter in policy.named_parameters():
        # Some architectures keep a few weights in another dtype.
        parameter.data = parameter.data.to(of_first["dtypes"][name])
    policy.shard(mesh)
    policy.to_empty(device=load.device)
    policy.causal_lm.tie_weights()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(policy, weights, options=options)
    # Buffers outside the state dict, such as rotary frequencies.
    buffers = dict(whole.named_buffers()) if whole is not None else {}
    for name, buffer in policy.named_buffers():
        if whole is not None:
            buffer.copy_(buffers[name])
        broadcast(buffer, src=first, group=group)
    # Only the first process drew fresh adapters: bring the others to the same random state.
    torch.set_rng_state(of_first["random"])
    policy.record_fingerprint(of_first["fingerprint"])
    return policy


def _choose_layout(base: Any, layout: Layout, attn_implementation: str | None) -> Layout:
    """Return the layout that is wanted, or "separate" where the model has no other.

    Raises:
        PolicyError: if the model does not compute the same in the layout that is wanted.
    """
    layouts, model_type = exact_layouts(base), text_decoder(base).config.model_type
    if layout == "separate":
        return "separate"
    if layout not in ("auto", *layouts):
        able = {"shared": SHARED_PROMPT_MODELS, "continued": CONTINUED_MODELS}
        listed = ", ".join(sorted(able[layout]))
        why = f"{model_type} is not among the architectures that can ({listed})"
        if model_type in SPARSE_MODELS and layout == "shared":
            why = f"{model_type} chooses the keys that it attends to among those of the whole row"
        elif model_type in CONTINUED_MODELS and layout == "continued":
            why = "gradient_checkpointing drops the cache (responses_per_pass saves memory, too)"
        raise PolicyError(f"model.layout is {layout}, but {why}. Set it to auto.")
    if layouts == ["separate"]:
        rank_zero_info(f"Layout: separate rows, since {model_type} models cannot share a prompt.")
        return "separate"
    shares = layout == "shared" or (layout == "auto" and "shared" in layouts)
    if attn_implementation is not None and shares:
        raise PolicyError(
            f"{attn_implementation} has no effect on a shared prompt, which has an attention of "
            "its own. Set model.layout: separate, or leave it out.",
            field="attn_implementation",
        )
    if layout == "auto":
        how = "shared" if shares else "computed once and its cache continued"
        rank_zero_info(f"Layout: a group's prompt is {how} where that computes fewer tokens.")
    return layout


def base_limits(config: PolicyConfig) -> ModelLimits:
    """Return the limits of the base, without loading its weights.

    Raises:
        PolicyError: if the base is an adapter, or a folder without a model.
    """
    return limits_of(_read_settings(config))


def _read_settings(config: PolicyConfig) -> Any:
    """Return the base's configuration.

    Raises:
        PolicyError: if the base is an adapter, a folder without a model, or no language model.
    """
    from transformers import AutoConfig

    if config.loaded is not None:
        return _language_model(config, config.loaded.config)
    folder = Path(config.base)
    if (folder / "adapter_config.json").is_file():
        raise PolicyError(
            f"{folder} is an adapter, not a model. The reference of a trained adapter is not its "
            "base: merge it (mpo-lightning export --merged) and name the merged folder.",
            field="base",
        )
    check_folder(folder, large=False)
    name, in_file = _name_of_base(config)
    if folder.is_dir() and not in_file and not (folder / "config.json").is_file():
        raise PolicyError(
            f"{folder} holds neither config.json nor one file in GGUF, so it is not a model's "
            "folder.",
            field="base",
        )
    arguments = _hub_arguments(config) | in_file
    settings = _loaded(config, lambda: AutoConfig.from_pretrained(name, **arguments))
    return _language_model(config, settings)


def _language_model(config: PolicyConfig, settings: Any) -> Any:
    """Return the configuration of a base, if it is a language model's.

    Raises:
        PolicyError: if it is not.
    """
    why = _why_no_language_model(settings)
    if why is not None:
        raise PolicyError(
            f"{config.base} ({settings.model_type}) {why}. Name a causal language model, or a "
            "multimodal one around it (a class of AutoModelForImageTextToText).",
            field="base",
        )
    return settings


def _why_no_language_model(settings: Any) -> str | None:
    """Say why a model does not continue a text from left to right, or None if it does."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING,
    )

    kind, text = type(settings), settings.get_text_config()
    if getattr(settings, "is_encoder_decoder", False):
        return "reads the prompt in an encoder of its own"
    masked = kind in MODEL_FOR_MASKED_LM_MAPPING and not getattr(settings, "is_decoder", False)
    if masked or getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        return "reads a text in both directions"
    own_code = "AutoModelForCausalLM" in (getattr(settings, "auto_map", None) or {})
    known = kind in MODEL_FOR_CAUSAL_LM_MAPPING or kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return None if known or own_code else "is not a model that answers a text in text"


def _hub_arguments(config: PolicyConfig) -> dict[str, Any]:
    return {"revision": config.revision, "trust_remote_code": config.trust_remote_code}


def _settings_of_base(config: PolicyConfig) -> tuple[Any, dict[str, Any]]:
    """Return the base's configuration and the arguments with which it is loaded."""
    settings = _read_settings(config)
    _switch_off_dropout(settings)
    attention = config.attn_implementation
    if getattr(settings.get_text_config(), "attn_logit_softcapping", None):
        # transformers 5.17 chooses SDPA for Gemma 2, which leaves the soft-cap out in silence.
        attention = attention or "eager"
    return settings, {
        "dtype": config.dtype,
        "attn_implementation": attention,
        **_hub_arguments(config),
    }


def _name_of_base(config: PolicyConfig) -> tuple[str, dict[str, str]]:
    """Return the hub id or absolute folder, and the file in it if the base is in GGUF.

    Exported adapters name their base by the folder.
    """
    name, in_file = in_transformers(config.base)
    return (str(Path(name).resolve()) if Path(name).is_dir() else name), in_file


def _loaded(config: PolicyConfig, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise PolicyError(
            f"{config.base} cannot be loaded as a causal language model: {error}", field="base"
        ) from error


def auto_class(settings: Any) -> Any:
    """Return the class that loads a base whole, not a multimodal one's language model alone."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    multimodal = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(settings), None)
    if multimodal in (None, MODEL_FOR_CAUSAL_LM_MAPPING.get(type(settings), None)):
        return AutoModelForCausalLM
    return AutoModelForImageTextToText


def _dtype(config: PolicyConfig, settings: Any) -> torch.dtype:
    """Return the dtype of the weights that are not quantised."""
    dtype: torch.dtype = (
        settings.dtype or torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype)
    )
    return dtype


def _from_settings(config: PolicyConfig, settings: Any, kwargs: dict[str, Any]) -> Any:
    """Return a base made without reading weights: random ones, or none on the meta device."""
    how = {name: value for name, value in kwargs.items() if name != "revision"}
    return auto_class(settings).from_config(settings, **how | {"dtype": _dtype(config, settings)})


def load_base(config: PolicyConfig, device: torch.device, *, flat_storage: bool = False) -> Any:
    """Load the base in the configured precision, without adapters.

    Args:
        config: the base; settings of the adapter are ignored.
        device: device of a quantised base; others stay on the CPU.
        flat_storage: see `build_policy`.

    Raises:
        DamagedError: if one of its files is not what was written.
        PolicyError: if the base is not a model, lacks weights or cannot be quantised.
    """
    if config.loaded is None:
        check_folder(Path(config.base))
    settings, kwargs = _settings_of_base(config)
    warn_if_slow(_dtype(config, settings), device)
    if config.loaded is not None:
        return _adopted(config)
    if config.random_init:
        return _loaded(config, lambda: _from_settings(config, settings, kwargs))
    if config.quantization != "none":
        quantised = quantised_arguments(config, settings, device, flat_storage=flat_storage)
        if config.quantization == "nf4":
            storage = quantised["quantization_config"].bnb_4bit_quant_storage
            _refuse_unpackable(config, settings, kwargs, storage)
        kwargs |= quantised
    name, in_file = _name_of_base(config)
    # A file in GGUF is dequantised as it is read.
    how: dict[str, Any] = {**in_file} if in_file else {"use_safetensors": True}
    with without_bars():
        model, loaded = _loaded(
            config,
            lambda: auto_class(settings).from_pretrained(
                name, config=settings, output_loading_info=True, **how, **kwargs
            ),
        )
    if in_file:
        # The weights are plain ones now; and adapters name the file, one of a folder's perhaps.
        model.hf_quantizer.remove_quantization_config(model)
        model.name_or_path = str(Path(name, in_file["gguf_file"]))
    absent = sorted([*loaded["missing_keys"], *(str(key) for key in loaded["mismatched_keys"])])
    if absent:
        raise PolicyError(
            f"{config.base} lacks {len(absent)} weights of {type(model).__name__} "
            f"(first: {absent[:3]}); they would be random.",
            field="base",
        )
    fix_bitsandbytes_modes(model)
    experts = fused_experts(model)
    if config.quantization != "none" and experts:
        size = sum(weight.nbytes for weight in experts.values()) / 2**20
        kinds = ", ".join(sorted(set(map(_kind, experts))))
        rank_zero_info(
            f"Quantization: {config.quantization} leaves {size:,.1f} MiB as they were, the fused "
            f"experts ({kinds}): bitsandbytes quantises linear layers only."
        )
    return model


def _name_of_loaded(model: Any) -> str:
    """Return the name that a loaded base was loaded by, or its class.

    Raises:
        PolicyError: if it is no transformers model, or has adapters.
    """
    from transformers import PreTrainedModel

    kind = type(model).__name__
    peft = getattr(model, "peft_config", {})
    if peft or any("lora_" in name for name, _ in getattr(model, "named_parameters", list)()):
        names = ("r", "lora_alpha", "target_modules")
        of_first = next(iter(peft.values()), None)
        given = {name: getattr(of_first, name) for name in names if hasattr(of_first, name)}
        lora = ", ".join(
            f"{name}={sorted(value) if isinstance(value, set) else value!r}"
            for name, value in given.items()
        )
        raise PolicyError(
            f"{kind} has adapters already. For fresh ones give the model without them and their "
            f"settings: PolicyConfig(base=..., lora=LoRA({lora})). What was trained is merged "
            "first, and is the reference then: base=model.merge_and_unload().",
            field="base",
        )
    if not isinstance(model, PreTrainedModel):
        raise PolicyError(
            f"{kind} is neither a folder, nor a hub id, nor a transformers model.", field="base"
        )
    return model.name_or_path or kind


def _adopted(config: PolicyConfig) -> Any:
    """Return a base that was loaded already, in the configured precision and without dropout."""
    model = config.loaded
    if config.dtype != "auto":
        model.to(getattr(torch, config.dtype))
    if config.attn_implementation is not None:
        model.set_attn_implementation(config.attn_implementation)
    # Its layers have copied the configuration, in which dropout is off by now.
    for module in model.modules():
        for name, value in vars(module).items():
            of_layer = name == "p" and isinstance(module, _DropoutNd)
            if isinstance(value, float) and (of_layer or "drop" in name):
                setattr(module, name, 0.0)
    fix_bitsandbytes_modes(model)
    return model


def warn_if_slow(dtype: torch.dtype, device: torch.device) -> None:
    """Warn of a dtype in which a CPU computes without instructions for it.

    oneDNN has no matrix product for it then, and torch's own was 60 to 90 times slower than
    float32's (512 x 512 x 1536, one core of a Xeon that was held to AVX2).
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return
    mkldnn = torch.ops.mkldnn
    supported = {
        torch.bfloat16: mkldnn._is_mkldnn_bf16_supported,
        torch.float16: mkldnn._is_mkldnn_fp16_supported,
    }
    if device.type == "cpu" and dtype in supported and not supported[dtype]():
        name = str(dtype).removeprefix("torch.")
        rank_zero_warn(
            f"This CPU has no instructions for {name}, in which matrices are multiplied up to a "
            "hundred times slower than in float32. Set dtype: float32 (model.policy.dtype), and "
            "leave trainer.precision out."
        )


def quantised_arguments(
    config: PolicyConfig, settings: Any, device: torch.device, *, flat_storage: bool = False
) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` for a base in fewer bits.

    Raises:
        PolicyError: if bitsandbytes is missing, or the base is quantised already.
    """
    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise PolicyError(
            f"{config.quantization} needs bitsandbytes: pip install bitsandbytes "
            "(or mpo-lightning[quantization]).",
            field="quantization",
        )
    if getattr(settings, "quantization_config", None) is not None:
        raise PolicyError(
            f"{config.base} is quantised already. Leave this setting at none to use it as it is, "
            "or name the unquantised model.",
            field="quantization",
        )
    dtype = _dtype(config, settings)
    where = {"": str(device)}
    if config.quantization == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": where}
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        # bitsandbytes would compute in float32, whatever the model's dtype.
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype if flat_storage else torch.uint8,
    )
    return {"quantization_config": four_bit, "device_map": where}


def _refuse_unpackable(
    config: PolicyConfig, settings: Any, kwargs: dict[str, Any], storage: torch.dtype
) -> None:
    """Check that every layer's 4-bit weights fill whole elements of the storage dtype.

    Raises:
        PolicyError: naming the first layer whose weights do not.
    """
    with torch.device("meta"):
        empty = _from_settings(config, settings, kwargs)
    head, packed = empty.get_output_embeddings(), 2 * storage.itemsize
    for name, module in empty.named_modules():
        # The head is not quantised.
        linear = isinstance(module, nn.Linear) and module is not head
        if linear and module.weight.numel() % packed:
            raise PolicyError(
                f"nf4 does not fit {config.base}: its {name} holds {module.out_features} x "
                f"{module.in_features} weights, which cannot be packed by {packed} into {storage}. "
                "Use int8 or none.",
                field="quantization",
            )


def fix_bitsandbytes_modes(base: Any) -> None:
    """Make bitsandbytes' layers compute the same in training and evaluation mode, on CPU.

    Seen with bitsandbytes 0.50.2: in the first evaluation pass, on processors with AVX512_BF16, its
    4-bit layers repack their weights into other numbers, and every later gradient is wrong. Its
    8-bit layers multiply integers in evaluation mode only, so that a fresh policy would differ from
    its reference.
    """
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        if type(module).__name__ == "Linear8bitLt":
            # Without dropout the mode has no other meaning: stay in training mode.
            module.train()
            module.train = partial(_keep_mode, module)


def _keep_mode(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def _switch_off_dropout(settings: Any) -> None:
    """Set the base's own dropout to zero, so that log-ratios to the reference start at 0."""
    names = [
        name
        for name, value in settings.to_dict().items()
        if isinstance(value, float) and value > 0 and "drop" in name
    ]
    for name in names:
        setattr(settings, name, 0.0)
    if names:
        rank_zero_info(f"The base model's own dropout is off: {', '.join(names)}.")


def _add_lora(base: Any, lora: LoRA) -> Any:
    """Put fresh adapters on the language model, and say on which layers.

    Raises:
        PolicyError: if the targets match no layer, or a layer cannot be adapted as asked.
    """
    from peft import LoraConfig, get_peft_model
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    towers, routers = _towers(base), _routers(base)
    # The choice of the keys that a token attends to has no gradient.
    indexers = [name for name, _ in base.named_modules() if name.endswith(".indexer")]
    # These are adapted only if they are named.
    all_linear = str(lora.target_modules).lower() == "all-linear"
    left_out = [*routers, *indexers] if all_linear else []
    passed_by = NOT_ADAPTED.get(text_decoder(base).config.model_type)
    if all_linear and passed_by:
        lora = replace(lora, exclude_modules=[*(lora.exclude_modules or []), *passed_by])
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=lora.target_modules,
        exclude_modules=_excluded(lora, towers, left_out),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        bias="none",
    )
    linear = sorted(
        {n.rpartition(".")[2] for n, m in base.named_modules() if isinstance(m, nn.Linear)}
    )
    # Before the layers are wrapped.
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    try:
        # PEFT does this, too: names of experts become those of fused experts.
        convert_peft_config_for_transformers(settings, base, None)
        _choose_parameters(settings, base, lora, left_out)
        asked = settings.target_modules
        with warnings.catch_warnings():
            # Such a head is refused below.
            warnings.filterwarnings("ignore", ".*tie_word_embeddings")
            model = get_peft_model(base, settings)
    except PolicyError:
        raise
    except ValueError as error:
        raise PolicyError(
            f"{lora.target_modules} cannot be adapted: {error} "
            f"Linear layers of this model: {', '.join(linear)}.",
            field="lora.target_modules",
        ) from error
    if isinstance(lora.target_modules, list):
        targeted = model.targeted_module_names
        unmatched = [
            target
            for target in lora.target_modules
            if target in asked
            and not any(name == target or name.endswith(f".{target}") for name in targeted)
        ]
        if unmatched:
            raise PolicyError(
                f"{unmatched} match no layer. Linear layers of this model: {', '.join(linear)}.",
                field="lora.target_modules",
            )
    ends = {base.get_input_embeddings(): embedding, base.get_output_embeddings(): head}
    adapted = [name for name, m in base.named_modules() if ends.get(m, m) is not m]
    if tied and adapted:
        raise PolicyError(
            f"{', '.join(adapted)} cannot be adapted: the embedding and the head of this model are "
            "one matrix (tie_word_embeddings), and a merged adapter of one would change the other. "
            f"Leave it out: exclude_modules: [{', '.join(n.rpartition('.')[2] for n in adapted)}].",
            field="lora.target_modules",
        )
    other = [n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
    if other:
        raise PolicyError(
            f"{other[:3]} would be trained beside the adapters, and switching the adapters off "
            "would not restore them."
        )
    if towers and not isinstance(settings.target_modules, str):
        # Names of layers that the towers alone have.
        settings.target_modules = {
            target
            for target in settings.target_modules
            if any(f".{name}".endswith(f".{target}") for name in model.targeted_module_names)
        }
    # Of the copies of a sharded policy, one is loaded.
    if not any(parameter.is_meta for parameter in base.parameters()):
        rank_zero_info(_adapted(model, {"routers": routers, "indexers": indexers}, towers))
        if routers and getattr(base.config.get_text_config(), "output_router_logits", False):
            rank_zero_info(
                "Routers: their auxiliary loss (output_router_logits in the model's configuration) "
                "is not added: a loss sees log-probabilities of responses only."
            )
    return model


def _towers(base: Any) -> list[str]:
    """Return the parts of a multimodal model that no text passes through, by name."""
    decoder = text_decoder(base)
    if decoder.config is base.config:
        alone = IMAGES_ALONE.get(base.config.model_type, ())
        return [name for name, _ in base.named_modules() if name.rpartition(".")[2] in alone]
    language = (decoder, base.get_output_embeddings())
    kept = [f"{name}." for name, module in base.named_modules() if module in language]
    # Layers that attend to an image alone (Mllama).
    crossed = getattr(decoder.config, "cross_attention_layers", None) or ()
    towers = [f"{kept[0]}layers.{number}" for number in crossed]
    for name, module in base.named_modules():
        inside = any(f"{name}.".startswith(part) for part in (*kept, *(f"{t}." for t in towers)))
        around = any(part.startswith(f"{name}.") for part in kept)
        if name and not inside and not around and any(True for _ in module.parameters()):
            towers.append(name)
    return towers


def _routers(base: Any) -> list[str]:
    """Return the modules that choose a token's experts, by name."""
    settings = text_decoder(base).config
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    if not any(getattr(settings, name, None) for name in names):
        return []
    own = {"gate", "router", "shared_expert_gate"}
    found = [name for name, _ in base.named_modules() if name.rpartition(".")[2] in own]
    return [n for n in found if not any(n.startswith(f"{other}.") for other in found)]


def _excluded(lora: LoRA, towers: list[str], left_out: list[str]) -> str | list[str] | None:
    """Return what PEFT is to leave out: names, or an expression that holds also parts by name."""
    names = lora.exclude_modules or []
    parts = [rf"{re.escape(tower)}(\..*)?" for tower in towers]
    parts += [rf"(.*\.)?{re.escape(part)}(\..*)?" for part in left_out]
    if not parts:
        return names or None
    return "|".join([*(rf"(.*\.)?{re.escape(name)}" for name in names), *parts])


def _choose_parameters(settings: Any, base: Any, lora: LoRA, parts: list[str]) -> None:
    """Leave excluded experts and other parts out of the parameters that are adapted beside layers.

    Raises:
        PolicyError: for settings that such parameters do not have.
    """
    if not settings.target_parameters:
        return
    left_out = [*(lora.exclude_modules or []), *parts]
    found: dict[str, list[str]] = {
        target: [n for n, _ in base.named_parameters() if n.endswith(f".{target}")]
        for target in settings.target_parameters
    }
    settings.target_parameters = sorted(
        target
        for target, names in found.items()
        if names and not all(any(f".{part}." in f".{n}." for part in left_out) for n in names)
    )
    adapted = [name for target in settings.target_parameters for name in found[target]]
    for patterns in (settings.rank_pattern, settings.alpha_pattern):
        for pattern in [p for p in patterns if not any(re.fullmatch(p, n) for n in adapted)]:
            del patterns[pattern]
    kinds = sorted(set(map(_kind, adapted)))
    for name, asked in (
        ("lora_dropout", lora.lora_dropout > 0),
        ("use_dora", lora.use_dora),
    ):
        if asked and kinds:
            others = ", ".join(sorted({n.rpartition(".")[2] for n in settings.target_modules}))
            raise PolicyError(
                f"the experts of this model are fused into one weight ({', '.join(kinds)}), and an "
                f"adapter of it has no {name}. Leave it out, or the experts: exclude_modules: "
                f"[experts], which leaves {others}.",
                field=f"lora.{name}",
            )


def _adapted(model: Any, left_out: dict[str, list[str]], towers: Iterable[str]) -> str:
    """Say which layers are adapted, by kind and rank, and what might be thought so and is not."""
    from peft.tuners.lora import LoraLayer, ParamWrapper

    base = model.get_base_model()
    kinds: dict[int, Counter[str]] = {}
    adapted: set[str] = set()
    for wrapped, module in base.named_modules():
        if isinstance(module, LoraLayer):
            # Several weights of one module are wrapped one around the other.
            name = wrapped.replace(".base_layer", "")
            kind = name.rpartition(".")[2]
            if isinstance(module, ParamWrapper):
                name, kind = (f"{each}.{module.parameter_name}" for each in (name, kind))
            adapted.add(name)
            (rank,) = module.r.values()
            kinds.setdefault(rank, Counter())[kind] += 1
    parts = [
        f"rank {rank} on {', '.join(f'{count} {kind}' for kind, count in of_rank.items())}"
        for rank, of_rank in sorted(kinds.items())
    ]
    for what, names in {"fused experts": fused_experts(base), **left_out}.items():
        without = (n for n in names if not any(f"{a}.".startswith(f"{n}.") for a in adapted))
        if left := Counter(map(_kind, without)):
            parts.append(f"none on the {what} ({', '.join(f'{n} {k}' for k, n in left.items())})")
    if towers:
        parts.append(f"none on {', '.join(towers)}, which no text passes through")
    return f"Adapters: {'; '.join(parts)}."


def _kind(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def fused_experts(model: Any) -> dict[str, nn.Parameter]:
    """Return the weights that hold all experts of a layer, by their names without adapters."""
    return {
        name.replace(".base_layer", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and "experts" in name and "lora_" not in name
    }
