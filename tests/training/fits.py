"""Short fits of MPOModule on the conftest's models, and what they leave."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import SGD
from torch.utils.data import DataLoader

from mpo_lightning import LoRA, MPOModule, PolicyConfig
from mpo_lightning.batch import GroupBatch, TokenGroup
from mpo_lightning.losses import MPO

RAGGED = [(5 + 3 * i % 7, [2 + (i * j) % 9 for j in range(1, 3 + i % 4)]) for i in range(1, 9)]


def make_module(base: str, **settings: Any) -> MPOModule:
    """A module with plain gradient descent, whose steps show the gradient."""
    lora = settings.pop("lora", LoRA(r=4))
    options: dict[str, Any] = {
        "loss": MPO(beta=0.5, alpha=1.0),
        "optimizer": lambda params: SGD(params, lr=0.05),
        "lr_scheduler": None,
    }
    torch.manual_seed(0)
    return MPOModule(policy=PolicyConfig(base=base, lora=lora), **{**options, **settings})


def make_trainer(**settings: Any) -> Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
    }
    return Trainer(**{**quiet, **settings})


def loader(groups: Sequence[TokenGroup], sizes: list[int]) -> DataLoader[GroupBatch]:
    batches, start = [], 0
    for size in sizes:
        batches.append(GroupBatch.from_groups(groups[start : start + size]))
        start += size
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def adapter(module: MPOModule) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}


class Recorder(Callback):
    """What a run logged after each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, _: Any) -> None:
        # Gradients are zeroed before a step logs: the metrics are those of the step before.
        self._record(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._record(trainer)

    def _record(self, trainer: Trainer) -> None:
        logged = {n: v.item() for n, v in trainer.callback_metrics.items() if "train" in n}
        if logged:
            self.steps.append(logged)
