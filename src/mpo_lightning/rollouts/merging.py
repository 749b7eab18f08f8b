"""An adapter and its base become one model, the base of the next round."""

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mpo_lightning.loading import PolicyConfig, load_base
from mpo_lightning.policy import PolicyError
from mpo_lightning.rollouts.generation import ModelConfig, files_digest, put_adapter, resolve_base
from mpo_lightning.rollouts.parts import RolloutError

__all__ = ["merge"]

DESCRIPTION = "merge.json"
# How far logits may move by merging in float32, in parts of the largest.
ROUNDING = 1e-3


def merge(
    adapter: str,
    out: str,
    base: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    trust_remote_code: bool = False,
) -> Path:
    """Merge an adapter into its base, in float32, and write the whole model with its tokenizer.

    The folder is there whole or not at all. If it holds this very merge already, nothing is done.

    Args:
        adapter: folder of a LoRA adapter, such as ``last-adapter``.
        out: folder of the merged model.
        base: the model that the adapter was trained on, unquantised; the one that it names if none.
        dtype: dtype in which the merged weights are written; "auto" is that of the base. In 16 bits
            a part of the adapter's update is rounded away; how much is said.
        trust_remote_code: let a hub model run its own code.

    Raises:
        PolicyError: if the base cannot be loaded.
        RolloutError: if it is quantised, the adapter does not fit, or ``out`` holds something else.
    """
    from transformers import AutoConfig, AutoTokenizer

    named = resolve_base(ModelConfig(base=base, adapter=adapter))
    description = {
        "base": named,
        "base_files": files_digest(named),
        "adapter_files": files_digest(adapter),
        "dtype": dtype,
    }
    folder = Path(out)
    if folder.exists():
        _same_or_refuse(folder, description)
        print(f"{folder} holds this merge already")
        return folder
    try:
        settings = AutoConfig.from_pretrained(named, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(named, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise RolloutError(f"base: {named} cannot be loaded: {error}") from error
    if getattr(settings, "quantization_config", None) is not None:
        raise RolloutError(
            f"base: the weights of {named} are quantised; merged, the update would be rounded to "
            "their few values. Name the unquantised model that it was made from."
        )
    full = PolicyConfig(base=named, dtype="float32", trust_remote_code=trust_remote_code)
    try:
        model = load_base(full, torch.device("cpu"))
    except PolicyError as error:
        raise PolicyError(str(error).replace("model.policy.base", "base")) from error
    written = settings.dtype or torch.float32 if dtype == "auto" else getattr(torch, dtype)
    merged, lost = _merged(put_adapter(model, adapter), written)
    # As it was: the base's own dropout is off in what training and merging load.
    merged.config = settings
    merged.config.dtype = written
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.mkdir(parents=True)
        merged.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
        for file in partial.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        partial.rename(folder)
    except Exception as error:
        # safetensors and tokenizers tell what the system said by other exceptions.
        if not isinstance(error, OSError) and "(os error " not in str(error):
            raise
        raise RolloutError(f"out: {folder} cannot be written: {error}") from error
    finally:
        # Gone already after the rename.
        shutil.rmtree(partial, ignore_errors=True)
    rounded = f"; {lost:.1%} of the update is rounded away in {written}".replace("torch.", "")
    print(f"Merged {adapter} into {named}: {folder}{rounded if lost > 0 else ''}")
    return folder


def _same_or_refuse(folder: Path, description: dict[str, Any]) -> None:
    try:
        found = json.loads((folder / DESCRIPTION).read_bytes())
    except (OSError, ValueError):
        found = {}
    if found == description:
        return
    names = [n for n in description if found.get(n) != description[n]]
    what = f"another merge: {', '.join(names)} differ" if found else "something else"
    raise RolloutError(f"out: {folder} holds {what}. Name another folder, or remove it.")


@torch.inference_mode()
def _merged(model: Any, dtype: torch.dtype) -> tuple[Any, float]:
    """The merged model, and which part of the update its dtype rounds away.

    Raises:
        RolloutError: if the merged model computes something else.
    """
    model.eval()
    base = model.get_base_model()
    tokens = torch.arange(1, 25)[None] * 7919 % base.get_input_embeddings().weight.shape[0]
    expected = base(input_ids=tokens).logits
    before = _adapted_weights(base)
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise RolloutError(f"adapter: it cannot be merged: {error}") from error
    gap = (merged(input_ids=tokens).logits - expected).abs().max() / expected.abs().max()
    # Written so that NaN, too, is a difference.
    if not gap <= ROUNDING:
        raise RolloutError(
            f"adapter: the merged {type(merged).__name__} computes something else: logits that "
            f"differ by {float(gap):.2g} of the largest."
        )
    after = dict(merged.named_parameters())
    update, lost = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for name, weight in before.items():
        update += (after[name] - weight).double().square().sum()
        lost += (after[name].to(dtype).float() - after[name]).double().square().sum()
    share = float((lost / update).sqrt()) if update > 0 else 0.0
    return merged.to(dtype), share


def _adapted_weights(base: Any) -> dict[str, Tensor]:
    """Copies of the weights that merging changes, by the names that they have afterwards."""
    mark = ".base_layer.weight"
    return {
        f"{name.removesuffix(mark)}.weight": value.clone()
        for name, value in base.named_parameters()
        if name.endswith(mark)
    }
