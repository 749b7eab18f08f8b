"""Multi-Preference Optimization for PyTorch Lightning.

Importing the package loads nothing: each public name is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpo_lightning.callbacks.health import TrainingHealth
    from mpo_lightning.callbacks.progress import RunProgressBar
    from mpo_lightning.callbacks.samples import Samples
    from mpo_lightning.data.datamodule import PreferenceDataModule
    from mpo_lightning.model.loading import LoRA, PolicyConfig
    from mpo_lightning.training.loggers import run_loggers
    from mpo_lightning.training.module import MPOModule

__all__ = [
    "LoRA",
    "MPOModule",
    "PolicyConfig",
    "PreferenceDataModule",
    "RunProgressBar",
    "Samples",
    "TrainingHealth",
    "run_loggers",
]

_HOMES = {
    "LoRA": "mpo_lightning.model.loading",
    "MPOModule": "mpo_lightning.training.module",
    "PolicyConfig": "mpo_lightning.model.loading",
    "PreferenceDataModule": "mpo_lightning.data.datamodule",
    "RunProgressBar": "mpo_lightning.callbacks.progress",
    "Samples": "mpo_lightning.callbacks.samples",
    "TrainingHealth": "mpo_lightning.callbacks.health",
    "run_loggers": "mpo_lightning.training.loggers",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
