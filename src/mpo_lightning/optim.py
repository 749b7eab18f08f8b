"""Learning-rate schedules that need to know how long the run is."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["RunSchedule", "WarmupCosine"]


class RunSchedule(ABC):
    """A schedule over the whole run, by optimizer steps."""

    @abstractmethod
    def __call__(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        """The scheduler of an optimizer in a run of so many optimizer steps."""


@dataclass(frozen=True, kw_only=True)
class WarmupCosine(RunSchedule):
    """Linear warm-up from zero, then half a cosine down to zero.

    Args:
        warmup: share of the run that warms up, in [0, 1).
    """

    warmup: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < 1:
            raise ValueError(f"WarmupCosine: warmup must be in [0, 1), got {self.warmup}.")

    def __call__(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        """The scheduler, to be stepped after each optimizer step."""
        from transformers import get_cosine_schedule_with_warmup

        scheduler: LRScheduler = get_cosine_schedule_with_warmup(
            optimizer, round(self.warmup * total_steps), total_steps
        )
        return scheduler
