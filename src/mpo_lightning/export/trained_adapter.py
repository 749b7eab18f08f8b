"""Adapter that a run has left, with the record of its training."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mpo_lightning.errors import ResumeError, UserError
from mpo_lightning.files import RECORD
from mpo_lightning.training.checkpoint import adapter_folder, reading
from mpo_lightning.training.record import Record

__all__ = ["CONFIG", "WEIGHTS", "ExportError", "TrainedAdapter", "find_adapter"]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


class ExportError(UserError, ValueError):
    """An export that is not possible as asked; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class TrainedAdapter:
    """An adapter's folder, read.

    Attributes:
        folder: the folder.
        config: PEFT's ``adapter_config.json``.
        record: record of the training; None if the folder has none.
        metrics_csv: metrics that its run has logged; None if the file is not found.
    """

    folder: Path
    config: dict[str, Any]
    record: Record | None
    metrics_csv: Path | None

    @property
    def quantization(self) -> str:
        """Quantisation of the base in training: "none", "nf4" or "int8"; "none" without record."""
        return "none" if self.record is None else str(self.record["base"]["quantization"])


def find_adapter(checkpoint: str, run: str = ".") -> TrainedAdapter:
    """Find the adapter of a checkpoint.

    Args:
        checkpoint: a ``.ckpt`` file, an adapter folder, or "last" for the run's last checkpoint.
        run: the run's folder, ``trainer.default_root_dir``.

    Raises:
        ExportError: if there is none, or a checkpoint and the folder beside it differ.
    """
    path = Path(run, "checkpoints", "last.ckpt") if checkpoint == "last" else Path(checkpoint)
    path = path.expanduser()
    if path.is_dir():
        folder = path
    elif path.is_file():
        folder = adapter_folder(path)
        _same_or_refuse(path, folder)
    else:
        found = sorted(each.name for each in path.parent.glob("*.ckpt"))
        there = f" There: {', '.join(found)}." if found else ""
        raise ExportError(
            f"{path} does not exist.{there} Name a .ckpt file or an adapter folder, or last and "
            "the run's folder (--run).",
            field="checkpoint",
        )
    if not (folder / CONFIG).is_file():
        raise ExportError(
            f"{folder} holds no {CONFIG}, so it is no adapter's folder. Those of a run lie in its "
            "folder checkpoints.",
            field="checkpoint",
        )
    if not (folder / WEIGHTS).is_file():
        raise ExportError(
            f"{folder} holds no {WEIGHTS}. Pickled weights (adapter_model.bin) are not loaded.",
            field="checkpoint",
        )
    recorded = (folder / RECORD).is_file()
    record = json.loads((folder / RECORD).read_text(encoding="utf-8")) if recorded else None
    metrics = folder / record["metrics_csv"] if record and record["metrics_csv"] else None
    return TrainedAdapter(
        folder=folder,
        config=json.loads((folder / CONFIG).read_text(encoding="utf-8")),
        record=record,
        metrics_csv=metrics if metrics is not None and metrics.is_file() else None,
    )


def _same_or_refuse(checkpoint: Path, folder: Path) -> None:
    """Refuse a folder with other weights than the checkpoint file.

    A run that is killed while it saves may leave a folder that is newer than the file.
    """
    if not (folder / WEIGHTS).is_file():
        raise ExportError(
            f"beside {checkpoint} there is no {folder.name} with its adapter. Copy that along, or "
            "resume from the checkpoint (--ckpt_path), which writes it again.",
            field="checkpoint",
        )
    try:
        with reading(checkpoint):
            held = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)
        weights = {
            name.removeprefix("policy.model.").replace(".default", ""): value
            for name, value in held["state_dict"].items()
        }
        stored = load_file(folder / WEIGHTS)
    except ResumeError as error:
        raise ExportError(str(error), field="checkpoint") from error
    except (OSError, KeyError, SafetensorError) as error:
        raise ExportError(f"{checkpoint} cannot be read: {error}", field="checkpoint") from error
    same = weights.keys() == stored.keys() and all(
        torch.equal(value, stored[name]) for name, value in weights.items()
    )
    if not same:
        raise ExportError(
            f"{checkpoint} and the adapter in {folder.name} beside it are not of the same moment: "
            "a run was killed while it saved. Name the folder to export its adapter, or resume "
            "from the checkpoint first (--ckpt_path last).",
            field="checkpoint",
        )
