"""Partition rules: rules that split a group into a chosen set, a rejected set and the rest.

A rule maps ``(scores, valid)``, each (B, N), to two disjoint bool (B, N): the chosen and the
rejected set. Every chosen response scores higher than every rejected one. Rules depend on the
scores, not on the order of the responses: equal scores are in the same set. A group in which either
set is empty has no contrast. Definitions are in docs/mathematics.md, "Partition rules".
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from mpo_lightning.checks import check_settings, require, require_number
from mpo_lightning.losses.scores import deviations, without_rounding

__all__ = [
    "AboveMean",
    "AboveQuantile",
    "AboveThreshold",
    "AboveTrimmedMean",
    "BestRest",
    "Partition",
    "TopBottom",
]


@dataclass(frozen=True, kw_only=True)
class Partition(ABC):
    """Base of the rules that split groups; subclass it for a rule of your own."""

    def __post_init__(self) -> None:
        check_settings(self)

    @abstractmethod
    def __call__(self, scores: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen and rejected set, bool (B, N) each, disjoint, False on padding."""


def _above(difference: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Responses above a threshold computed from their group, and the rest; bool (B, N) each.

    With ties at the top it can be that nothing lies above the threshold and something below: then
    the responses at the threshold are chosen. So every group with unequal scores has a contrast.

    Args:
        difference: score minus threshold, (B, N).
        valid: bool (B, N).
    """
    above, below = valid & (difference > 0), valid & (difference < 0)
    at_top = ~above.any(1, keepdim=True) & below.any(1, keepdim=True)
    chosen = torch.where(at_top, valid & ~below, above)
    return chosen, valid & ~chosen


def _ascending(scores: Tensor, valid: Tensor) -> Tensor:
    """Scores of each group in ascending order, float64 (B, N); padding follows as infinity."""
    return scores.double().masked_fill(~valid, torch.inf).sort(1).values


@dataclass(frozen=True, kw_only=True)
class AboveMean(Partition):
    """Above the group's mean score against the rest: the paper's rule (arXiv 2412.04628).

    Examples:
        >>> scores = torch.tensor([[9.0, 7.0, 7.0, 4.0, 2.0, 1.0]])  # their mean is 5
        >>> chosen, rejected = AboveMean()(scores, torch.ones(1, 6, dtype=torch.bool))
        >>> chosen.int()
        tensor([[1, 1, 1, 0, 0, 0]], dtype=torch.int32)
    """

    def __call__(self, scores: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen and rejected set, bool (B, N) each; all-equal scores choose nothing."""
        chosen = deviations(scores, valid) > 0
        return chosen, valid & ~chosen


@dataclass(frozen=True, kw_only=True)
class AboveQuantile(Partition):
    """Above a quantile of the group's scores against the rest.

    The threshold is the score at place ``floor(quantile * (n - 1))``, counted from 0 at the lowest,
    so always one of the scores: nothing is interpolated. At 0.5 the chosen are those above the
    median. If no score lies above the threshold and scores differ, those at it are chosen.

    Args:
        quantile: from 0 (all but the lowest are chosen) to below 1. Defaults to the median.
    """

    quantile: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self, "quantile", "a number >= 0 and < 1", low=0, high=1, open_high=True)

    def __call__(self, scores: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen and rejected set, bool (B, N) each; all-equal scores choose nothing."""
        # 0.29 * 100 is a little less than 29.
        place = (self.quantile * (valid.sum(1, keepdim=True) - 1).double() + 1e-9).floor()
        threshold = _ascending(scores, valid).gather(1, place.long().clamp(min=0))
        return _above(torch.where(valid, scores.double() - threshold, 0.0), valid)


@dataclass(frozen=True, kw_only=True)
class AboveThreshold(Partition):
    """Above a score that is the same for all groups, against the rest.

    A group with all its scores on one side of it has no contrast.

    Args:
        threshold: lower bound of the chosen scores, exclusive, in score units.
    """

    threshold: float

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self, "threshold", "a finite number", low=-torch.inf)

    def __call__(self, scores: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen and rejected set, bool (B, N) each."""
        chosen = valid & (scores.double() > self.threshold)
        return chosen, valid & ~chosen


@dataclass(frozen=True, kw_only=True)
class AboveTrimmedMean(Partition):
    """Above the mean of the scores without the extremes, against the rest.

    ``floor(trim * n)`` scores at each end are left out of the mean; their responses are still
    chosen or rejected. If no score lies above the mean and scores differ, those at it are chosen.

    Args:
        trim: share of the responses left out at each end, from 0 (the mean) to below 0.5.
    """

    trim: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self, "trim", "a number >= 0 and < 0.5", low=0, high=0.5, open_high=True)

    def __call__(self, scores: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen and rejected set, bool (B, N) each; all-equal scores choose nothing."""
        n = valid.sum(1, keepdim=True)
        left_out = (self.trim * n.double() + 1e-9).floor().clamp(max=(n - 1).div(2).floor())
        place = torch.arange(valid.shape[1], device=valid.device)
        kept = (place >= left_out) & (place < n - left_out)
        sums = torch.where(kept, _ascending(scores, valid), 0.0).sum(1, keepdim=True)
        difference = torch.where(valid, scores.double() - sums / kept.sum(1, keepdim=True), 0.0)
        return _above(without_rounding(difference, scores, valid), valid)


@dataclass(frozen=True, kw_only=True)
class TopBottom(Partition):
    """The k best against the k worst; the middle is in neither set.

    With k = 2 and five responses this is the paper's on-policy recipe: the median-scored one is
    dropped. Groups of fewer than 2k responses use half their number, rounded down.

    Ties: every response with the score of the k-th best is chosen, every one with the score of the
    k-th worst is rejected, so that sets may hold more than k. If these two scores are equal,
    responses of that score are in neither set, unless one set would be empty: then they are that
    set.

    Args:
        k: number of responses in each set, >= 1.
    """

    k: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "k", isinstance(self.k, int) and self.k >= 1, "a whole number >= 1")

    def __call__(self, scores: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen and rejected set, bool (B, N) each; all-equal scores choose nothing."""
        n = valid.sum(1, keepdim=True)
        k = (n // 2).clamp(max=self.k)
        ascending, values = _ascending(scores, valid), scores.double()
        kth_worst = ascending.gather(1, (k - 1).clamp(min=0))
        kth_best = ascending.gather(1, (n - k).clamp(min=0, max=valid.shape[1] - 1))
        between = (valid & (values == kth_best)) & (kth_best == kth_worst)
        top = valid & (values >= kth_best) & ~between
        bottom = valid & (values <= kth_worst) & ~between
        without_top, without_bottom = ~top.any(1, keepdim=True), ~bottom.any(1, keepdim=True)
        chosen = top | (between & without_top & ~without_bottom)
        rejected = bottom | (between & without_bottom & ~without_top)
        return chosen & (k > 0), rejected & (k > 0)


@dataclass(frozen=True, kw_only=True)
class BestRest(Partition):
    """The best-scored response, or all that tie for it, against the others."""

    def __call__(self, scores: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen and rejected set, bool (B, N) each; all-equal scores reject nothing."""
        values = scores.double().masked_fill(~valid, -torch.inf)
        chosen = valid & (values == values.amax(1, keepdim=True))
        return chosen, valid & ~chosen
