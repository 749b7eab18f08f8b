"""What is exported: the adapter that a run has left, and what its checkpoint says of it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mpo_lightning.errors import UserError
from mpo_lightning.files import RECORD
from mpo_lightning.training.checkpoint import adapter_folder
from mpo_lightning.training.record import Record

__all__ = ["CONFIG", "WEIGHTS", "ExportError", "TrainedAdapter", "find_adapter"]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


class ExportError(UserError, ValueError):
    """What cannot be exported as asked; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class TrainedAdapter:
    """An adapter's folder.

    Attributes:
        folder: where it lies.
        config: what PEFT has in ``adapter_config.json``.
        record: how it was trained; none if the folder does not say.
        metrics_csv: what its run has logged, where that is still to be found.
    """

    folder: Path
    config: dict[str, Any]
    record: Record | None
    metrics_csv: Path | None

    @property
    def quantization(self) -> str:
        """Bits of the base in training: "none", "nf4" or "int8"; "none" if nothing is said."""
        return "none" if self.record is None else str(self.record["base"]["quantization"])


def find_adapter(checkpoint: str, run: str = ".") -> TrainedAdapter:
    """The adapter of a checkpoint.

    Args:
        checkpoint: a ``.ckpt`` file, an adapter folder, or "last" for the run's last checkpoint.
        run: the run's folder, ``trainer.default_root_dir``.

    Raises:
        ExportError: if there is none, or a checkpoint and the folder beside it differ.
    """
    path = Path(run) / "checkpoints" / "last.ckpt" if checkpoint == "last" else Path(checkpoint)
    if path.is_dir():
        folder = path
    elif path.is_file():
        folder = adapter_folder(path)
        _same_or_refuse(path, folder)
    else:
        found = sorted(each.name for each in path.parent.glob("*.ckpt"))
        there = f" There: {', '.join(found)}." if found else ""
        raise ExportError(
            f"checkpoint: {path} does not exist.{there} Name a .ckpt file or an adapter folder, or "
            "last and the run's folder (--run)."
        )
    if not (folder / CONFIG).is_file():
        raise ExportError(
            f"checkpoint: {folder} holds no {CONFIG}, so it is no adapter's folder. Those of a run "
            "lie in its folder checkpoints."
        )
    record = _read_record(folder)
    way = None if record is None else record["metrics_csv"]
    metrics = None if way is None else folder / way
    return TrainedAdapter(
        folder=folder,
        config=json.loads((folder / CONFIG).read_text(encoding="utf-8")),
        record=record,
        metrics_csv=metrics if metrics is not None and metrics.is_file() else None,
    )


def _read_record(folder: Path) -> Record | None:
    path = folder / RECORD
    if not path.is_file():
        return None
    record: Record = json.loads(path.read_text(encoding="utf-8"))
    return record


def _same_or_refuse(checkpoint: Path, folder: Path) -> None:
    """A run that is killed while it saves may leave a folder that is newer than the file."""
    if not (folder / WEIGHTS).is_file():
        raise ExportError(
            f"checkpoint: beside {checkpoint} there is no {folder.name} with its adapter. Copy "
            "that along, or go on from the checkpoint (--ckpt_path), which writes it again."
        )
    try:
        held = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)
        weights = {
            name.removeprefix("policy.model.").replace(".default", ""): value
            for name, value in held["state_dict"].items()
        }
        stored = load_file(folder / WEIGHTS)
    except (OSError, RuntimeError, KeyError, ValueError, SafetensorError) as error:
        raise ExportError(f"checkpoint: {checkpoint} cannot be read: {error}") from error
    same = weights.keys() == stored.keys() and all(
        torch.equal(value, stored[name]) for name, value in weights.items()
    )
    if not same:
        raise ExportError(
            f"checkpoint: {checkpoint} and the adapter in {folder.name} beside it are not of the "
            "same moment: a run was killed while it saved. Name the folder to export its adapter, "
            "or go on from the checkpoint first (--ckpt_path last)."
        )
