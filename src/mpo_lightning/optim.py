"""Learning-rate schedules over the whole run, whose length in optimizer steps they are given."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mpo_lightning.checks import check_settings
from mpo_lightning.errors import UserError

__all__ = ["RunSchedule", "WarmupCosine"]


class RunSchedule(ABC):
    """Base of the schedules over the whole run; subclass it for a schedule of your own."""

    @abstractmethod
    def __call__(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        """Return the scheduler for a run.

        Args:
            optimizer: the optimizer whose learning rates it sets.
            total_steps: number of optimizer steps of the run.
        """


@dataclass(frozen=True, kw_only=True)
class WarmupCosine(RunSchedule):
    """Linear warm-up from zero, then half a cosine down to zero.

    Args:
        warmup: share of the run's optimizer steps that warm up, in [0, 1).
    """

    warmup: float = 0.1

    def __post_init__(self) -> None:
        check_settings(self)
        if not 0 <= self.warmup < 1:
            raise ValueError(f"WarmupCosine: warmup must be in [0, 1), got {self.warmup}.")

    def __call__(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        """Return the scheduler; its ``step`` is to be called after each optimizer step."""
        from transformers import get_cosine_schedule_with_warmup

        scheduler: LRScheduler = get_cosine_schedule_with_warmup(
            optimizer, round(self.warmup * total_steps), total_steps
        )
        return scheduler


def at_step(
    schedule: RunSchedule, total_steps: int, optimizer: Optimizer, step: int
) -> tuple[LRScheduler, list[list[float]]]:
    """Return a schedule as it is after some steps of a run, and its rates until then.

    Args:
        schedule: the schedule.
        total_steps: number of optimizer steps of the run.
        optimizer: the run's optimizer, whose first rates are taken; it is left alone.
        step: number of steps.

    Returns:
        The scheduler of an optimizer without weights, and the learning rates of all parameter
        groups at each step from 0 to ``step``.
    """
    groups = [
        {"params": [torch.zeros(1)], "lr": group.get("initial_lr", group["lr"])}
        for group in optimizer.param_groups
    ]
    # Some schedules change the momentum, too.
    copy = SGD(groups, momentum=0.9)
    scheduler = schedule(copy, total_steps)
    rates = [[group["lr"] for group in copy.param_groups]]
    for _ in range(step):
        copy.step()
        scheduler.step()
        rates.append([group["lr"] for group in copy.param_groups])
    return scheduler, rates


def optimizer_steps(trainer: Trainer, done: tuple[int, int, int] = (0, 0, 0)) -> int:
    """Number of optimizer steps of the whole run.

    With a data module `trainer.estimated_stepping_batches` is avoided: it makes the training loader
    before a checkpoint is restored, and a resumed run would start from that loader
    (pytorch-lightning#20550).

    Args:
        trainer: the run's trainer.
        done: optimizer steps, epochs, and batches of the epoch after them that a run has behind it,
            perhaps with other settings.

    Raises:
        UserError: if the run has no end that is known.
    """
    data = getattr(trainer, "datamodule", None)
    if data is None or trainer.max_epochs in (None, -1):
        estimated = trainer.estimated_stepping_batches
        if not 0 <= estimated < math.inf:
            raise UserError(
                "The schedule needs the length of the run: set trainer.max_steps, or "
                "trainer.max_epochs where the data have a length; or set model.lr_scheduler to "
                "null for a constant rate."
            )
        if trainer.max_epochs in (None, -1) or math.isinf(trainer.num_training_batches):
            return int(estimated)
        batches = int(trainer.num_training_batches)
    else:
        batches = len(data.train_dataloader())
        limit = trainer.limit_train_batches
        if isinstance(limit, int):
            batches = min(batches, limit)
        elif limit is not None:
            batches = int(batches * limit)
    steps, epochs, beyond = done
    for epoch in range(epochs, int(trainer.max_epochs or 1)):
        steps += math.ceil(batches / _window(trainer, epoch))
    steps -= beyond // _window(trainer, epochs)
    return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)


def _window(trainer: Trainer, epoch: int) -> int:
    """Return the batches of an optimizer step in an epoch, which a callback may decide."""
    for callback in getattr(trainer, "callbacks", []):
        if isinstance(callback, GradientAccumulationScheduler):
            return callback.get_accumulate_grad_batches(epoch)
    return int(trainer.accumulate_grad_batches)
