"""Loading of a base model with an adapter, for generation."""

import os
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from mpo_lightning.checks import check_settings
from mpo_lightning.data.tokens import GroupTokenizer, PromptFormat, load_tokenizer
from mpo_lightning.digests import AGAIN, RECORD, check_folder
from mpo_lightning.errors import DamagedError, RolloutError, fields_below
from mpo_lightning.files import digest_of_files, other_save, read_json
from mpo_lightning.generation.generate import ModelSampler, Sampling
from mpo_lightning.model.loading import PolicyConfig, Quantization, load_base
from mpo_lightning.model.policy import PolicyError, require_finite
from mpo_lightning.printable import printable

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "ModelConfig",
    "check_adapter",
    "choose_device",
    "files_digest",
    "load_group_tokenizer",
    "load_model",
    "load_sampler",
    "model_identity",
    "policy_config",
    "put_adapter",
    "resolve_base",
    "trained_date",
]

# Files of an adapter.
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Model that generates, and how it is loaded.

    Args:
        base: folder or hub id of a causal language model, in safetensors. Defaults to the base that
            the adapter names.
        adapter: folder of a LoRA adapter for it, such as ``last-adapter``.
        tokenizer: folder or hub id of the tokenizer. Defaults to the base's.
        dtype: dtype of the base weights; "auto" is the one they are stored in.
        quantization: quantise the linear layers as in training: "none", "nf4" or "int8".
        device: "auto" is this process's GPU if there is one, else the CPU.
        prompt_format: format as in training: "chat", "text", or "auto", which is chat where the
            tokenizer has a template.
        chat_template_kwargs: arguments of the chat template, such as ``enable_thinking``, for all
            prompts; a row's own go before.
        date: date and time that the chat template gets if it asks for one, in ISO 8601. Defaults to
            that of the adapter's training, or the present; an output that is continued keeps its
            own.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: let a hub model run its own code.
    """

    base: str | None = None
    adapter: str | None = None
    tokenizer: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Quantization = "none"
    device: str = "auto"
    prompt_format: PromptFormat = "auto"
    chat_template_kwargs: dict[str, Any] | None = None
    date: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_settings(self)
        for name in ("base", "adapter", "tokenizer"):
            path = getattr(self, name)
            object.__setattr__(self, name, path and os.path.expanduser(path))


def choose_device(name: str) -> torch.device:
    """Return the device of a name; "auto" is this process's GPU if there is one, else the CPU."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def resolve_base(config: ModelConfig) -> str:
    """Return the base: the one that is named, or the adapter's own.

    Raises:
        RolloutError: if neither is named, or the adapter's folder holds no adapter.
    """
    base = config.base or (config.adapter and _base_of_adapter(config.adapter))
    if base is None:
        raise RolloutError("model.base: name a model's folder or hub id.")
    return base


def _same_place(one: str, other: str) -> bool:
    return one == other or Path(one).resolve() == Path(other).resolve()


def check_adapter(folder: Path) -> dict[str, Any]:
    """Check the files of an adapter's folder, from wherever it comes, and return its configuration.

    Says so if the folder is of another save than the checkpoint beside it.

    Raises:
        DamagedError: if one of them is not what was written, cannot be read, or holds NaN.
        PolicyError: if it is no adapter's folder.
    """
    check_folder(folder)
    differing = other_save(folder)
    if not (folder / CONFIG).is_file():
        why = differing or f"{folder} holds no {CONFIG}, so it is no adapter's folder."
        raise PolicyError(why, field="adapter")
    if not (folder / WEIGHTS).is_file():
        raise PolicyError(
            f"{folder} holds no {WEIGHTS}. Pickled weights (adapter_model.bin) are not loaded.",
            field="adapter",
        )
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise DamagedError(folder / WEIGHTS, f"cannot be read ({error})", AGAIN) from error
    require_finite(folder / WEIGHTS, weights)
    if differing:
        rank_zero_warn(differing)
    return read_json(folder / CONFIG)


def _base_of_adapter(adapter: str) -> str | None:
    if not (Path(adapter) / CONFIG).is_file():
        raise RolloutError(
            f"model.adapter: {adapter} holds no {CONFIG}, so it is no adapter's folder."
        )
    named: str | None = read_json(Path(adapter) / CONFIG).get("base_model_name_or_path")
    return named


def _check_adapter_of(config: ModelConfig) -> None:
    if config.adapter is not None:
        with fields_below("model"):
            check_adapter(Path(config.adapter))


def policy_config(config: ModelConfig) -> PolicyConfig:
    """Return the settings of the base as those of a policy."""
    return PolicyConfig(
        base=resolve_base(config),
        dtype=config.dtype,
        quantization=config.quantization,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )


def load_model(config: ModelConfig) -> Any:
    """Load the model with its adapter, in evaluation mode, on its device.

    Raises:
        DamagedError: if a file of the base or the adapter is not what was written.
        PolicyError: if the base cannot be loaded, or the adapter does not fit it.
    """
    device = choose_device(config.device)
    _check_adapter_of(config)
    settings = policy_config(config)
    with fields_below("model"):
        model = load_base(settings, device)
    if config.adapter is not None:
        named = _base_of_adapter(config.adapter)
        if named is not None and not _same_place(named, settings.base):
            print(
                printable(
                    f"The adapter {config.adapter} names {named} as its base; it is loaded on "
                    f"{settings.base}."
                )
            )
        with fields_below("model"):
            model = put_adapter(model, config.adapter).get_base_model()
    # bitsandbytes has placed quantised weights on their device.
    if config.quantization == "none":
        model = model.to(device)
    return model.eval()


def put_adapter(model: Any, adapter: str) -> Any:
    """Load an adapter on a model, and check that no weight is missing.

    Raises:
        PolicyError: if the adapter's weights do not fit the model.
    """
    from peft import PeftModel, get_peft_model_state_dict

    def refuse(why: str) -> PolicyError:
        return PolicyError(
            f"{adapter} does not fit {type(model).__name__} of {model.name_or_path}: {why}",
            field="adapter",
        )

    try:
        adapted = PeftModel.from_pretrained(model, adapter)
        with safe_open(str(Path(adapter) / WEIGHTS), "pt") as weights:
            stored = set(weights.keys())
    except (ValueError, RuntimeError, OSError, KeyError, TypeError) as error:
        raise refuse(str(error)[:300]) from error
    # PEFT ignores weights that fit nowhere, and leaves missing ones at their initial values.
    wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if stored != wanted:
        differing = sorted(stored ^ wanted)
        raise refuse(f"{len(differing)} weights are in one of the two only, such as {differing[0]}")
    return adapted


def load_group_tokenizer(config: ModelConfig) -> GroupTokenizer:
    """Load the tokenizer, with the rules of training.

    Raises:
        DataError: if there is none, or it lacks the template that the prompt format needs.
    """
    path = config.tokenizer or resolve_base(config)
    with fields_below("model"):
        tokenizer = load_tokenizer(path, trust_remote_code=config.trust_remote_code)
        return GroupTokenizer.without_limit(
            tokenizer,
            config.prompt_format,
            template_arguments=config.chat_template_kwargs or {},
            date=config.date or trained_date(config),
        )


def trained_date(config: ModelConfig) -> str | None:
    """Return the date that the chat template got in the adapter's training, if it asked."""
    path = None if config.adapter is None else Path(config.adapter) / RECORD
    if path is None or not path.is_file():
        return None
    data = read_json(path).get("data") or {}
    date: str | None = data.get("settings", {}).get("date")
    return date


def load_sampler(
    config: ModelConfig, sampling: Sampling, *, responses_per_batch: int = 64
) -> ModelSampler:
    """Load a sampler.

    Raises:
        PolicyError: if the model cannot be loaded, or the adapter does not fit.
        DataError: if the tokenizer cannot be loaded.
        RolloutError: if no base is named.
    """
    return ModelSampler(
        load_model(config),
        load_group_tokenizer(config),
        sampling,
        responses_per_batch=responses_per_batch,
    )


def model_identity(config: ModelConfig) -> dict[str, Any]:
    """Return everything that a model's answers depend on: names, and digests of folders.

    Raises:
        DamagedError: if a file of the adapter is not what was written.
        PolicyError: if the adapter's folder holds none.
        RolloutError: if no base is named.
    """
    _check_adapter_of(config)
    base = resolve_base(config)
    no_matter = {"device", "trust_remote_code"}
    return {
        **{name: value for name, value in vars(config).items() if name not in no_matter},
        "base": base,
        "base_files": files_digest(base),
        "adapter_files": None if config.adapter is None else files_digest(config.adapter),
    }


def files_digest(folder: str) -> str | None:
    """Return a digest of a model's file, or the files in its folder; None for a hub id."""
    path = Path(folder)
    if path.is_file():
        return digest_of_files(path)
    if not path.is_dir():
        return None
    files = sorted(
        p
        for p in path.iterdir()
        if p.suffix in {".safetensors", ".gguf", ".json", ".jinja"} and p.name != RECORD
    )
    content = blake2b(digest_size=16)
    for file in files:
        content.update(f"{file.name} {digest_of_files(file)}\n".encode())
    return content.hexdigest()
