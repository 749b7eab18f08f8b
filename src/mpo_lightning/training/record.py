"""Training record: how an adapter was trained, as plain values in its checkpoint.

It holds no paths, so that it may be published with the adapter.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.optim import Optimizer

from mpo_lightning.digests import RECORD
from mpo_lightning.files import public_name

__all__ = [
    "Record",
    "describe",
    "formula",
    "package_versions",
    "training_record",
    "write_record",
]

PACKAGES = ("mpo-lightning", "torch", "lightning", "transformers", "peft")

Record = dict[str, Any]


def describe(value: Any) -> Any:
    """Convert a setting to JSON values: a dataclass to class and fields, a callable to its name."""
    described: Any
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool | int | str | None):
        described = value
    elif isinstance(value, float):
        described = value if math.isfinite(value) else str(value)
    elif isinstance(value, Mapping):
        described = {str(name): describe(each) for name, each in value.items()}
    elif isinstance(value, list | tuple):
        described = [describe(each) for each in value]
    elif is_dataclass(value) and not isinstance(value, type):
        settings = {field.name: describe(getattr(value, field.name)) for field in fields(value)}
        described = {"class": _class_name(type(value)), "settings": settings}
    else:
        described = _class_name(value if isinstance(value, type) else type(value))
    return described


def formula(loss: Any) -> dict[str, Any] | None:
    """Equation, symbols and papers of a loss; None for a class that does not state its own.

    An inherited equation may be that of another loss.
    """
    if "latex" not in vars(type(loss)):
        return None
    names = ("title", "latex", "symbols", "arxiv")
    return {name: describe(getattr(loss, name)) for name in names}


def _class_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def package_versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Return the versions of installed packages by name."""
    return {name: version(name) for name in packages}


def training_record(
    trainer: Trainer,
    *,
    data: Record | None,
    base: Mapping[str, Any],
    loss: Any,
    schedule: Any,
    settings: Mapping[str, Any],
    earlier_metrics: Mapping[str, Any],
) -> Record:
    """Return the record of a run, in values that `torch.load(..., weights_only=True)` reads.

    Args:
        trainer: the run's trainer.
        data: record of the data module; None if it has none.
        base: name of the base model, how it was loaded, and its identity.
        loss: the loss.
        schedule: schedule of the learning rate.
        settings: other settings of the module.
        earlier_metrics: metrics in the checkpoint from which the run was resumed.
    """
    optimizer = trainer.optimizers[0] if trainer.optimizers else None
    precision: Any = trainer.precision
    return {
        "steps": trainer.global_step,
        "base": describe(base) | {"name": public_name(base["name"])},
        "loss": describe(loss),
        "formula": formula(loss),
        "optimizer": None if optimizer is None else _optimizer(optimizer),
        "schedule": _schedule(trainer, schedule),
        "module": describe(settings),
        "trainer": {
            "max_epochs": trainer.max_epochs,
            "max_steps": trainer.max_steps,
            "precision": str(precision),
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "gradient_clip_val": trainer.gradient_clip_val,
            "strategy": type(trainer.strategy).__name__,
            "processes": trainer.world_size,
            "device": _device_name(trainer.strategy.root_device),
            "seed_everything": os.environ.get("PL_GLOBAL_SEED"),
        },
        "data": data,
        "metrics": dict(earlier_metrics)
        | {name: describe(value) for name, value in trainer.callback_metrics.items()},
        "versions": package_versions(),
    }


def _schedule(trainer: Trainer, schedule: Any) -> Any:
    """Return a schedule with its settings; for a torch scheduler, only the class."""
    if schedule is None or is_dataclass(schedule):
        return describe(schedule)
    made = [_class_name(type(each.scheduler)) for each in trainer.lr_scheduler_configs]
    return made[0] if made else None


def _optimizer(optimizer: Optimizer) -> dict[str, Any]:
    return {"class": _class_name(type(optimizer)), "settings": describe(optimizer.defaults)}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def write_record(folder: Path, record: Record, trainer: Trainer, checkpoint: str) -> None:
    """Write a record into an adapter's folder.

    With it go the relative path of the run's metrics.csv and the seal of the checkpoint.
    """
    logs = [logger.log_dir for logger in trainer.loggers if isinstance(logger, CSVLogger)]
    path = os.path.relpath(Path(logs[0]) / "metrics.csv", folder) if logs else None
    content = {**record, "metrics_csv": path, "checkpoint": checkpoint}
    (folder / RECORD).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
