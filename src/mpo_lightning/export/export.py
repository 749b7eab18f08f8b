"""Export of a checkpoint's adapter, alone or merged, for transformers, PEFT, vLLM and the hub."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mpo_lightning.checks import check_arguments
from mpo_lightning.data.tokens import GroupTokenizer, load_tokenizer
from mpo_lightning.digests import EXPORT, RECORD, SUMS, check_folder
from mpo_lightning.errors import DamagedError
from mpo_lightning.export.card import PICTURE, CardFacts, is_hub_id, model_card
from mpo_lightning.export.curves import draw, read_metrics
from mpo_lightning.export.merging import Dtype, Merged, Onto, merge
from mpo_lightning.export.trained_adapter import ExportError, TrainedAdapter, find_adapter
from mpo_lightning.files import digest_of_files, in_transformers, read_json, whole_folder
from mpo_lightning.generation.model import CONFIG, WEIGHTS, files_digest
from mpo_lightning.model.loading import PolicyConfig
from mpo_lightning.printable import printable
from mpo_lightning.quiet import without_bars

__all__ = ["export"]


def export(
    checkpoint: str,
    *,
    out: str,
    run: str = ".",
    merged: bool = False,
    base: str | None = None,
    base_name: str | None = None,
    revision: str | None = None,
    onto: Onto = "full-precision",
    dtype: Dtype = "auto",
    max_shard_size: str = "5GB",
    force: bool = False,
    trust_remote_code: bool = False,
) -> Path:
    """Write a checkpoint's adapter, or the merged model, as a folder with a model card.

    The folder is written whole or not at all. If it holds this very export already, nothing is
    done.

    Args:
        checkpoint: a ``.ckpt`` file, an adapter folder, or "last" for the run's last checkpoint.
        out: folder to write.
        run: the run's folder (trainer.default_root_dir), which "last" refers to.
        merged: write the whole model, merged in float32, instead of the adapter alone.
        base: folder or hub id of the model that the adapter was trained on, unquantised. Defaults
            to the one that the adapter names.
        base_name: hub id by which adapter and card name the base; needed for publishing where the
            base was a local folder.
        revision: branch, tag or commit of the base on the hub. Defaults to the run's.
        onto: weights of the base that a merged model is made of: its own ("full-precision"), or
            those that quantisation left in training ("dequantized").
        dtype: dtype of a merged model; "auto" is the dtype of the base. In 16 bits a part of the
            adapter's update is rounded away; the export reports how much.
        max_shard_size: largest size of a file of a merged model.
        force: overwrite another export.
        trust_remote_code: let a hub model run its own code.

    Raises:
        DamagedError: if a file of the checkpoint, its adapter, the base or the export that ``out``
            holds already is not what was written.
        ExportError: if there is no such checkpoint, its adapter cannot be merged as asked, or
            ``out`` cannot be written.
        PolicyError: if the base cannot be loaded, or the adapter does not fit it.
        DataError: if there is no tokenizer.
    """
    check_arguments(export, locals())
    for name, given, default in (
        ("dtype", dtype, "auto"),
        ("max_shard_size", max_shard_size, "5GB"),
        ("onto", onto, "full-precision"),
    ):
        if given != default and not merged:
            raise ExportError(
                "an adapter is written as it was trained. Leave it out, or write the whole model "
                "(--merged).",
                field=name,
            )
    adapter = find_adapter(checkpoint, run)
    named = _Base.of(adapter, base, base_name, revision)
    description = {
        "adapter": _digest(adapter),
        "base": named.name if merged else named.for_adapter,
        "base_files": files_digest(named.path) if merged else None,
        "revision": named.revision,
        "merged": merged,
        "onto": onto,
        "dtype": dtype,
        "max_shard_size": max_shard_size,
    }
    folder = Path(out).expanduser()
    if _is_done(folder, description, force=force):
        print(printable(f"{folder} holds this export already"))
        return folder
    tokenizer = _tokenizer(adapter, named, trust_remote_code)
    ends = _end_tokens(tokenizer, adapter)
    notes: list[str] = []
    model: Any = None
    if merged:
        config = PolicyConfig(
            base=named.path, revision=named.revision, trust_remote_code=trust_remote_code
        )
        result = merge(adapter, config, onto=onto, dtype=dtype)
        model, notes = result.model, _notes(adapter, result, onto)
        generation = model.generation_config
    else:
        generation = _generation_config(named, trust_remote_code)
    said = [*notes, *_end_with(generation, ends, named)]
    try:
        with whole_folder(folder) as partial:
            if model is not None:
                with without_bars():
                    model.save_pretrained(partial, max_shard_size=max_shard_size)
            else:
                _write_adapter(adapter, named, partial)
                if generation is not None:
                    generation.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            facts = CardFacts(
                name=folder.resolve().name,
                base=named.name,
                base_is_public=named.public,
                revision=named.revision,
                merged=merged,
                notes=notes,
                picture=_picture(adapter, partial, said),
            )
            if adapter.record is not None:
                _write_json(
                    partial / RECORD, {**adapter.record, "metrics_csv": None, "checkpoint": None}
                )
            model_card(adapter, facts).save(partial / "README.md")
            _write_json(partial / EXPORT, description)
    except OSError as error:
        raise ExportError(f"{folder} cannot be written: {error}", field="out") from error
    if not named.public:
        said.append(
            f"Its base, {named.path}, is a folder of this machine: before you publish the export, "
            "give its hub id as --base_name."
        )
    what = "Merged model" if merged else "Adapter"
    print(printable("\n".join([f"{what} in {folder}", *(f"  {line}" for line in said)])))
    return folder


def _is_done(out: Path, description: Mapping[str, Any], *, force: bool) -> bool:
    """Whether a folder holds the export of this description already; False if it may be written.

    Raises:
        DamagedError: if it holds an export that is damaged.
        ExportError: if the folder holds something that must not be overwritten.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / EXPORT).is_file() or not (out / SUMS).is_file():
        raise ExportError(
            f"{out} exists and is no export. Name another folder, or remove it.", field="out"
        )
    try:
        check_folder(out, remedy="Write it again with --force.")
        found = read_json(out / EXPORT)
    except DamagedError:
        if force:
            return False
        raise
    if found == description:
        return True
    if force:
        return False
    differing = [name for name in description if found.get(name) != description[name]]
    raise ExportError(
        f"{out} holds another export: {', '.join(differing)} differ. Name another folder, or "
        "overwrite it with --force.",
        field="out",
    )


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class _Base:
    """The base: its folder or hub id, its name in the export, and whether that is a hub id."""

    path: str
    name: str
    public: bool
    revision: str | None

    @classmethod
    def of(
        cls, adapter: TrainedAdapter, base: str | None, name: str | None, revision: str | None
    ) -> "_Base":
        path = base and os.path.expanduser(base)
        path = path or adapter.config.get("base_model_name_or_path")
        if path is None:
            raise ExportError("the adapter does not name its base: give it.", field="base")
        if name is not None and not is_hub_id(name):
            raise ExportError(f"{name} is no hub id, such as org/model.", field="base_name")
        if revision is None and base is None and adapter.record is not None:
            revision = adapter.record["base"]["revision"]
        public = name is not None or (not Path(path).exists() and is_hub_id(path))
        return cls(path, name or (path if public else Path(path).resolve().name), public, revision)

    @property
    def for_adapter(self) -> str:
        """Return what an adapter's configuration names: a hub id, or the folder's path."""
        return self.name if self.public else str(Path(self.path).resolve())


def _digest(adapter: TrainedAdapter) -> str:
    return digest_of_files(*(adapter.folder / name for name in (CONFIG, WEIGHTS)))


def _tokenizer(adapter: TrainedAdapter, base: _Base, trust_remote_code: bool) -> Any:
    """Load the tokenizer that the run left with the adapter, or else the base's."""
    own = (adapter.folder / "tokenizer_config.json").is_file()
    path = str(adapter.folder) if own else base.path
    return load_tokenizer(path, trust_remote_code=trust_remote_code)


def _end_tokens(tokenizer: Any, adapter: TrainedAdapter) -> list[int]:
    """Return the tokens with which responses ended in training."""
    data = None if adapter.record is None else adapter.record["data"]
    prompt_format: Any = "auto" if data is None else data["settings"]["prompt_format"]
    rules = GroupTokenizer.without_limit(tokenizer, prompt_format)
    return sorted({rules.end_of_turn, tokenizer.eos_token_id})


def _generation_config(base: _Base, trust_remote_code: bool) -> Any:
    """Load the base's generation settings, or make them of its configuration.

    None if neither can be read.
    """
    from transformers import AutoConfig, GenerationConfig

    try:
        return GenerationConfig.from_pretrained(base.path, revision=base.revision)
    except (OSError, ValueError):
        # Many models have none.
        pass
    name, in_file = in_transformers(base.path)
    try:
        settings = AutoConfig.from_pretrained(
            name, revision=base.revision, trust_remote_code=trust_remote_code, **in_file
        )
    except (OSError, ValueError):
        return None
    return GenerationConfig.from_model_config(settings)


def _end_with(generation: Any, ends: list[int], base: _Base) -> list[str]:
    """Add the tokens that ended responses in training to those that stop generation.

    Returns:
        What there is to report.
    """
    if generation is None:
        return [f"No generation_config.json: the base {base.path} cannot be read from here."]
    known = generation.eos_token_id
    known = [] if known is None else known if isinstance(known, list) else [known]
    new = [token for token in ends if token not in known]
    if not new:
        return []
    generation.eos_token_id = [*known, *new]
    return [
        f"generation_config.json: token {', '.join(map(str, new))} ends a response as well, as it "
        "did in training."
    ]


def _notes(adapter: TrainedAdapter, merged: Merged, onto: Onto) -> list[str]:
    """Describe how the merged model differs from the policy."""
    dtype = str(merged.dtype).removeprefix("torch.")
    notes = []
    if merged.rounded_away > 0:
        notes.append(
            f"{merged.rounded_away:.1%} of the adapter's update is rounded away in {dtype}: on a "
            f"few fixed tokens, against base and adapter in float32, {merged.from_exact}."
        )
    bits = {"nf4": "4 bits", "int8": "8 bits"}.get(adapter.quantization)
    if bits is None:
        return notes
    if onto == "full-precision":
        notes.append(
            f"This is not quite the model that was trained: the adapter was trained on the base in "
            f"{bits} ({adapter.quantization}) and is merged into its full-precision weights."
        )
    else:
        notes.append(
            f"Made of dequantised weights: the base in {bits} ({adapter.quantization}), as it was "
            f"in training, written out in {dtype}."
        )
    if merged.from_trained is None:
        notes.append("By how much they differ was not measured: bitsandbytes is not installed.")
    else:
        notes.append(f"Against the model that was trained, {merged.from_trained}.")
    if merged.base_is_known is False:
        notes.append(
            f"The base in {bits} is not bit for bit that of training: another base, or another "
            "device or version that quantises it."
        )
    return notes


def _write_adapter(adapter: TrainedAdapter, base: _Base, folder: Path) -> None:
    shutil.copyfile(adapter.folder / WEIGHTS, folder / WEIGHTS)
    own = {"base_model_name_or_path": base.for_adapter, "revision": base.revision}
    _write_json(folder / CONFIG, {**adapter.config, **own})


def _picture(adapter: TrainedAdapter, folder: Path, said: list[str]) -> bool:
    """Draw the run's metrics; return False, and add the reason to ``said``, if that fails."""
    if adapter.record is None or adapter.metrics_csv is None:
        said.append("No picture of the training: the run's metrics.csv is not to be found.")
        return False
    if find_spec("matplotlib") is None:
        said.append("No picture of the training: matplotlib is not installed.")
        return False
    try:
        rows = read_metrics(adapter.metrics_csv, steps=adapter.record["steps"])
    except (OSError, ValueError, KeyError) as error:
        said.append(f"No picture of the training: {adapter.metrics_csv} cannot be read: {error}")
        return False
    if not draw(rows, folder / PICTURE):
        said.append(f"No picture of the training: {adapter.metrics_csv} holds no values of it.")
        return False
    return True
