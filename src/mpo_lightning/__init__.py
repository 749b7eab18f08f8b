"""Multi-Preference Optimization for PyTorch Lightning.

Importing the package loads nothing: each public name is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpo_lightning.data.datamodule import PreferenceDataModule
    from mpo_lightning.loading import LoRA, PolicyConfig
    from mpo_lightning.module import MPOModule

__all__ = ["LoRA", "MPOModule", "PolicyConfig", "PreferenceDataModule"]

_HOMES = {
    "LoRA": "mpo_lightning.loading",
    "MPOModule": "mpo_lightning.module",
    "PolicyConfig": "mpo_lightning.loading",
    "PreferenceDataModule": "mpo_lightning.data.datamodule",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
