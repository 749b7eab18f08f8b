"""Partition rules: which responses of a group are chosen, which rejected, which neither.

A rule maps ``(scores, valid)``, each (B, N), to two disjoint bool (B, N): the chosen and the
rejected set. Every chosen response scores higher than every rejected one. Rules see values of
scores, not their order in the group: equal scores share their set. A group in which either set is
empty has no contrast. Definitions are in docs/mathematics.md, "Partition rules".
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from mpo_lightning.losses.checks import require, require_number
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
    """A rule that splits groups; subclass it for a rule of your own."""

    @abstractmethod
    def __call__(self, scores: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen and rejected set of each group, bool (B, N) each, disjoint, none on padding."""


def _above(difference: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """What lies above a threshold of the group's own, and the rest.

    Many ties at the top can leave nothing above a threshold that some lie below: then those at the
    threshold are chosen. So every group with unequal scores has a contrast.
    """
    above, below = valid & (difference > 0), valid & (difference < 0)
    at_top = ~above.any(1, keepdim=True) & below.any(1, keepdim=True)
    chosen = torch.where(at_top, valid & ~below, above)
    return chosen, valid & ~chosen


def _ascending(scores: Tensor, valid: Tensor) -> Tensor:
    """Scores of each group from low to high, float64 (B, N), infinite after the last."""
    return scores.double().masked_fill(~valid, torch.inf).sort(1).values


@dataclass(frozen=True, kw_only=True)
class AboveMean(Partition):
    """Above the group's mean score against the rest: the paper's rule (arXiv 2412.04628)."""

    def __call__(self, scores: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen and rejected set, bool (B, N) each; all-equal scores choose nothing."""
        chosen = deviations(scores, valid) > 0
        return chosen, valid & ~chosen


@dataclass(frozen=True, kw_only=True)
class AboveQuantile(Partition):
    """Above a quantile of the group's scores, the median unless set, against the rest.

    The threshold is the score at place ``floor(quantile * (n - 1))``, counted from 0 at the lowest,
    so always one of the scores: nothing is interpolated. At 0.5 what lies above it is what lies
    above the median. Where nothing does and scores differ, those at the threshold are chosen.

    Args:
        quantile: from 0 (all but the lowest are chosen) to below 1.
    """

    quantile: float = 0.5

    def __post_init__(self) -> None:
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

    A group that lies on one side of it altogether has no contrast.

    Args:
        threshold: in score units.
    """

    threshold: float

    def __post_init__(self) -> None:
        require_number(self, "threshold", "a finite number", low=-torch.inf)

    def __call__(self, scores: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen and rejected set, bool (B, N) each."""
        chosen = valid & (scores.double() > self.threshold)
        return chosen, valid & ~chosen


@dataclass(frozen=True, kw_only=True)
class AboveTrimmedMean(Partition):
    """Above the mean of the scores without the extremes, against the rest.

    ``floor(trim * n)`` scores at each end are left out of the mean; their responses are still
    chosen or rejected. Where nothing lies above it and scores differ, those at it are chosen.

    Args:
        trim: part of the responses left out at each end, from 0 (the mean) to below 0.5.
    """

    trim: float = 0.2

    def __post_init__(self) -> None:
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

    Ties: a response that scores as the k-th best is chosen too, as the k-th worst rejected too, so
    that sets may hold more than k. Where the k-th best and the k-th worst score the same, responses
    of that score are in neither set, unless one set would be empty: then they are that set.

    Args:
        k: responses on either side, >= 1.
    """

    k: int = 2

    def __post_init__(self) -> None:
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
    """The best-scored response, or those that tie for it, against all others."""

    def __call__(self, scores: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen and rejected set, bool (B, N) each; all-equal scores reject nothing."""
        values = scores.double().masked_fill(~valid, -torch.inf)
        chosen = valid & (values == values.amax(1, keepdim=True))
        return chosen, valid & ~chosen
