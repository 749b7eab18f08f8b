"""What a resumed run needs beyond weights and counters, so that it goes on as if never stopped.

Everything in a checkpoint is plain: `torch.load(..., weights_only=True)` reads it.
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

__all__ = [
    "RunState",
    "of_all_processes",
    "random_state",
    "restore_random_state",
]

RandomState = dict[str, Any]


class _Boundary(NamedTuple):
    """A run between two optimizer steps: Lightning's loops and this process's random numbers."""

    loops: dict[str, Any]
    random: RandomState


class RunState:
    """Where a run stands, for checkpoints from which it goes on as if it had never stopped.

    Lightning's loops say which batch comes next, and this adds the state of random numbers. Inside
    an accumulation window gradients are held that no checkpoint has, and inside a validation sums;
    but nothing else has changed since the end of the last optimizer step, the *boundary*. So a
    checkpoint from there holds the boundary's loops and random numbers with the weights of now, and
    the batches since are computed again.

    Attributes:
        validating: whether a validation has begun and not come to its result.
    """

    def __init__(self) -> None:
        self.validating = False
        self._accumulating = False
        self._updating = False
        self._boundary: _Boundary | None = None
        # Of a checkpoint, until the first batch.
        self._resumed: RandomState | None = None

    def begin(self, trainer: Trainer) -> None:
        """Training starts."""
        self.validating = self._accumulating = self._updating = False
        if self._resumed is None:
            self._boundary = _here(trainer)

    def before_batch(self) -> None:
        """A training batch comes: let random numbers go on where the run that is resumed was."""
        if self._resumed is not None:
            # Only now: making the loaders and the first checks drew some, too.
            restore_random_state(self._resumed)
            self._resumed = None

    def accumulates(self) -> None:
        """There will be gradients that no checkpoint has."""
        self._accumulating = True

    def before_update(self) -> None:
        """The optimizer is about to change the weights, one after the other."""
        self._updating = True

    def after_update(self) -> None:
        """All weights are changed, and no gradient is left over."""
        self._accumulating = self._updating = False

    def after_batch(self, trainer: Trainer) -> None:
        """A training batch is done."""
        if not self._accumulating:
            self._boundary = _here(trainer)

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Add what a checkpoint of Lightning's lacks; all processes call this.

        Raises:
            CheckpointError: while some weights may be updated and others not.
        """
        if self._updating:
            raise CheckpointError(
                "Nothing is saved in the middle of an optimizer step; the checkpoint before it "
                "still stands."
            )
        loops = checkpoint["loops"]["fit_loop"]
        epochs = loops["epoch_progress"]["current"]
        # An epoch that was ended before its last batch, by trainer.max_steps say, counts as done
        # for Lightning.
        ended = epochs["processed"] == epochs["started"] > 0
        cut = ended and not loops["epoch_loop.batch_progress"]["is_last_batch"]
        inside = self._accumulating or self.validating or cut
        if inside and self._boundary is not None:
            checkpoint["loops"]["fit_loop"] = deepcopy(self._boundary.loops)
            checkpoint["random"] = of_all_processes(self._boundary.random)
        else:
            checkpoint["random"] = of_all_processes(random_state())

    def load(self, checkpoint: dict[str, Any], trainer: Trainer) -> None:
        """Take over what `save` added; said where it does not fit the number of processes."""
        states = checkpoint["random"]
        if len(states) != trainer.world_size:
            rank_zero_warn(
                f"The checkpoint was written by {len(states)} processes, here are "
                f"{trainer.world_size}: what dropout draws is another than without the stop."
            )
            return
        self._resumed = states[trainer.global_rank]
        self._boundary = _Boundary(deepcopy(checkpoint["loops"]["fit_loop"]), self._resumed)


def _here(trainer: Trainer) -> _Boundary:
    return _Boundary(deepcopy(trainer.fit_loop.state_dict()), random_state())


def random_state() -> RandomState:
    """State of all random numbers of this process."""
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
    """Let random numbers go on from a state."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, key, place, has_gauss, cached = state["numpy"]
    np.random.set_state((name, key.numpy().astype(np.uint32), place, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def of_all_processes(value: Any) -> list[Any]:
    """What each process gives, in the order of their ranks."""
    if not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
