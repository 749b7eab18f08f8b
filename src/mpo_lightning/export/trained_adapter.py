"""Adapter that a run has left, with the record of its training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpo_lightning.digests import RECORD, check_seal
from mpo_lightning.errors import UserError
from mpo_lightning.files import adapter_folder, other_save, read_json
from mpo_lightning.generation.model import check_adapter
from mpo_lightning.model.policy import PolicyError
from mpo_lightning.training.record import Record

__all__ = ["ExportError", "TrainedAdapter", "find_adapter"]


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
        DamagedError: if one of their files is not what was written.
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
    try:
        config = check_adapter(folder)
    except PolicyError as error:
        error.field = "checkpoint"
        raise
    record = read_json(folder / RECORD) if (folder / RECORD).is_file() else None
    metrics = folder / record["metrics_csv"] if record and record["metrics_csv"] else None
    return TrainedAdapter(
        folder=folder,
        config=config,
        record=record,
        metrics_csv=metrics if metrics is not None and metrics.is_file() else None,
    )


def _same_or_refuse(checkpoint: Path, folder: Path) -> None:
    """Refuse a folder of another save than the checkpoint file.

    A run that is killed while it saves may leave a folder that is newer than the file.
    """
    check_seal(checkpoint, remedy="Name another checkpoint, or an adapter's folder.")
    if not folder.is_dir():
        raise ExportError(
            f"beside {checkpoint} there is no {folder.name} with its adapter. Copy that along, or "
            "resume from the checkpoint (--ckpt_path), which writes it again.",
            field="checkpoint",
        )
    differing = other_save(folder)
    if differing:
        raise ExportError(f"{differing} Name the folder to export its adapter.", field="checkpoint")
