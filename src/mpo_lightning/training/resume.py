"""State for an exact resume, beyond weights and counters: random numbers and safe positions.

All values are plain: `torch.load(..., weights_only=True)` reads them.
"""

import random
from copy import deepcopy
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from mpo_lightning.errors import CheckpointError
from mpo_lightning.optim import RunSchedule, at_step, optimizer_steps

__all__ = [
    "RunState",
    "of_all_processes",
    "random_state",
    "restore_random_state",
]

RandomState = dict[str, Any]


class _Boundary(NamedTuple):
    """Lightning's loops and this process's random state between two optimizer steps."""

    loops: dict[str, Any]
    random: RandomState


class RunState:
    """Position of a run, for checkpoints that resume exactly.

    Lightning's loops say which batch comes next; this class adds the random state. In the middle of
    an accumulation window, pending gradients are in no checkpoint, and in the middle of a
    validation its sums are not; but nothing else has changed since the end of the last optimizer
    step, the *boundary*. So a checkpoint made there holds loops and random state of the boundary
    with the current weights, and the batches since then are computed again.

    Attributes:
        validating: whether a validation has begun and not ended.
    """

    def __init__(self) -> None:
        self.validating = False
        self._accumulating = False
        self._updating = False
        self._boundary: _Boundary | None = None
        # Random state of the checkpoint that is resumed, until the first batch.
        self._resumed: RandomState | None = None
        # Optimizer steps of the run that wrote the checkpoint, and those that it has done with its
        # epochs and batches, until training starts.
        self._earlier: tuple[int | None, tuple[int, int, int]] | None = None

    def begin(self, trainer: Trainer) -> None:
        """Start training."""
        self.validating = self._accumulating = self._updating = False
        if self._resumed is None:
            self._boundary = _here(trainer)

    def follow_schedule(
        self, trainer: Trainer, schedule: RunSchedule | None, length: int | None
    ) -> int | None:
        """Return the optimizer steps of the run, which decide the schedule of a resumed one.

        Args:
            trainer: the run's trainer.
            schedule: the schedule; None for a constant rate.
            length: optimizer steps of a run with these settings from its beginning.
        """
        (before, done), self._earlier = self._earlier or (None, (0, 0, 0)), None
        if before is None or before == length:
            return length
        now = None if length is None else optimizer_steps(trainer, done)
        _follow_new_length(trainer, schedule, before=before, now=now)
        return now

    def before_batch(self) -> None:
        """Restore the random state of the checkpoint before the first batch of a resumed run."""
        if self._resumed is not None:
            # Not earlier: loaders and first checks draw random numbers, too.
            restore_random_state(self._resumed)
            self._resumed = None

    def accumulates(self) -> None:
        """Record that gradients are being accumulated, which checkpoints do not contain."""
        self._accumulating = True

    def before_update(self) -> None:
        """Record that the optimizer is changing the weights."""
        self._updating = True

    def after_update(self) -> None:
        """Record that all weights are changed, and no gradients pending."""
        self._accumulating = self._updating = False

    def after_batch(self, trainer: Trainer) -> None:
        """Record the boundary, if no gradients are pending after a training batch."""
        if not self._accumulating:
            self._boundary = _here(trainer)

    def save(self, checkpoint: dict[str, Any], length: int | None) -> None:
        """Add to Lightning's checkpoint the state for an exact resume; all processes call this.

        Args:
            checkpoint: Lightning's checkpoint.
            length: optimizer steps of the run, if its schedule was told them.

        Raises:
            CheckpointError: while the optimizer changes the weights.
        """
        if self._updating:
            raise CheckpointError(
                "Nothing is saved in the middle of an optimizer step; the previous checkpoint is "
                "intact."
            )
        checkpoint["schedule_steps"] = length
        loops = checkpoint["loops"]["fit_loop"]
        epochs = loops["epoch_progress"]["current"]
        # Lightning counts an epoch that ends before its last batch (trainer.max_steps) as complete.
        ended = epochs["processed"] == epochs["started"] > 0
        cut = ended and not loops["epoch_loop.batch_progress"]["is_last_batch"]
        inside = self._accumulating or self.validating or cut
        if inside and self._boundary is not None:
            checkpoint["loops"]["fit_loop"] = deepcopy(self._boundary.loops)
            checkpoint["random"] = of_all_processes(self._boundary.random)
        else:
            checkpoint["random"] = of_all_processes(random_state())

    def load(self, checkpoint: dict[str, Any], trainer: Trainer) -> None:
        """Restore what `save` added; warn if the number of processes has changed."""
        self._earlier = checkpoint["schedule_steps"], _position(checkpoint)
        states = checkpoint["random"]
        if len(states) != trainer.world_size:
            rank_zero_warn(
                f"The checkpoint was written by {len(states)} processes, but this run has "
                f"{trainer.world_size}: dropout draws other numbers than in an uninterrupted run."
            )
            return
        self._resumed = states[trainer.global_rank]
        self._boundary = _Boundary(deepcopy(checkpoint["loops"]["fit_loop"]), self._resumed)


def _here(trainer: Trainer) -> _Boundary:
    return _Boundary(deepcopy(trainer.fit_loop.state_dict()), random_state())


def _follow_new_length(
    trainer: Trainer, schedule: RunSchedule | None, *, before: int, now: int | None
) -> None:
    """Bring the learning rate of a resumed run to where a run of its length has it, and warn.

    A schedule that does not depend on the length of the run is left alone.

    Args:
        trainer: the trainer, with optimizer and scheduler as they were restored.
        schedule: the schedule; None for a constant rate.
        before: optimizer steps of the run that wrote the checkpoint.
        now: optimizer steps of this run, if the schedule knows them.
    """
    (optimizer,) = trainer.optimizers
    groups = optimizer.param_groups
    restored = groups[0]["lr"]
    if schedule is None or now is None:
        rates = [group.get("initial_lr", group["lr"]) for group in groups]
        changed = rates[0] != restored
        how = f"this one has no schedule: the rate is {rates[0]:.3g}"
    else:
        (config,) = trainer.lr_scheduler_configs
        step, shorter = config.scheduler.last_epoch, min(before, now)
        then, here = (at_step(schedule, steps, optimizer, shorter)[1] for steps in (before, now))
        changed = then != here
        state, of_steps = at_step(schedule, now, optimizer, min(step, now))
        # A scheduler keeps the length with which it was made.
        config.scheduler = schedule(optimizer, now)
        config.scheduler.load_state_dict(state.state_dict())
        rates = of_steps[-1]
        how = f"this one has {now}: after step {step} the rate is {rates[0]:.3g}"
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
    if changed:
        rank_zero_warn(
            "The learning rate does not go on as it began: the checkpoint is of a run of "
            f"{before} optimizer steps, whose schedule it follows, and {how}, where it was "
            f"{restored:.3g}. For the schedule of the checkpoint give trainer.max_epochs, "
            "trainer.max_steps, trainer.accumulate_grad_batches, the number of devices and "
            "model.lr_scheduler the values that the run began with."
        )


def _position(checkpoint: dict[str, Any]) -> tuple[int, int, int]:
    """Return a checkpoint's optimizer steps, whole epochs, and batches of the epoch after them."""
    loops = checkpoint["loops"]["fit_loop"]
    epochs, batches = loops["epoch_progress"]["current"], loops["epoch_loop.batch_progress"]
    if epochs["started"] == epochs["processed"]:
        done = (epochs["processed"], 0)
    elif batches["is_last_batch"]:
        done = (epochs["processed"] + 1, 0)
    else:
        done = (epochs["processed"], batches["current"]["processed"])
    return (checkpoint["global_step"], *done)


def random_state() -> RandomState:
    """Return the state of this process's random number generators."""
    version, internal, gauss = random.getstate()
    numpy: dict[str, Any] = np.random.get_state(legacy=False)
    state: RandomState = {
        "python": [version, list(internal), gauss],
        "numpy": [
            numpy["bit_generator"],
            torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
            int(numpy["state"]["pos"]),
            int(numpy["has_gauss"]),
            float(numpy["gauss"]),
        ],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: RandomState) -> None:
    """Restore the state of this process's random number generators."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, key, place, has_gauss, cached = state["numpy"]
    np.random.set_state((name, key.numpy().astype(np.uint32), place, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def of_all_processes(value: Any) -> list[Any]:
    """Gather a value from every process, in the order of their ranks."""
    if not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
