"""What a resumed run needs beyond weights and counters, so that it goes on as if never stopped.

Everything in a checkpoint is plain: `torch.load(..., weights_only=True)` reads it.
"""

import random
from copy import deepcopy
from typing import Any

import numpy as np
import torch
import torch.distributed
from lightning.pytorch import Trainer

__all__ = [
    "Boundary",
    "ResumeError",
    "compare",
    "of_all_processes",
    "random_state",
    "restore_random_state",
]

RandomState = dict[str, Any]


class ResumeError(ValueError):
    """A checkpoint that this run must not go on from; the message says what differs."""


class Boundary:
    """A run between two optimizer steps: its place, and the state of its random numbers.

    Nothing else changes inside an accumulation window but gradients, so that the boundary before a
    window and the weights of now are a whole checkpoint; the window's batches are computed again.

    Attributes:
        loops: state of Lightning's loops.
        random: state of this process's random numbers.
    """

    def __init__(self, loops: dict[str, Any], random: RandomState) -> None:
        self.loops = loops
        self.random = random

    @classmethod
    def here(cls, trainer: Trainer) -> "Boundary":
        """Where a trainer stands now."""
        return cls(deepcopy(trainer.fit_loop.state_dict()), random_state())


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


def compare(what: str, found: dict[str, Any], expected: dict[str, Any], remedy: str) -> None:
    """Refuse a checkpoint that was written with something else.

    Args:
        what: what the entries describe, for the message.
        found: of the checkpoint.
        expected: of this run.
        remedy: what to do.

    Raises:
        ResumeError: naming the first entry that differs.
    """
    for name, value in expected.items():
        if found.get(name) != value:
            raise ResumeError(
                f"The checkpoint was written with another {what}: its {name} is "
                f"{_short(found.get(name))}, but here {_short(value)}. {remedy}"
            )


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}..." if isinstance(value, str) and len(text) > 40 else text
