"""Deviations, weights, order and levels of scores, in float64 and exact on ties.

Shapes: ``B`` groups, ``N`` response slots. ``scores`` float (B, N), higher is better; ``valid``
bool (B, N), True where the slot holds a response. Padding may hold anything, NaN included.
"""

from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "AlphaUnit",
    "Deviation",
    "binned",
    "deviation_log_weights",
    "deviations",
    "differs",
    "ordered_pairs",
    "without_rounding",
]

Deviation = Literal["absolute", "signed"]
AlphaUnit = Literal["score", "std"]


def without_rounding(difference: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
    """Differences of scores from a computed threshold, (B, N), zero where they are rounding errors.

    Three scores of 0.1 do not average to 0.1 exactly. A difference within a few units in the last
    place of the group's largest score counts as a rounding error.
    """
    size = torch.where(valid, scores.double(), 0.0).abs().amax(1, keepdim=True)
    rounding = 8 * torch.finfo(torch.float64).eps * size
    return torch.where(valid & (difference.abs() > rounding), difference, 0.0)


def deviations(scores: Tensor, valid: Tensor) -> Tensor:
    """Score minus the group's mean score, float64 (B, N); zero on padding.

    A difference within rounding error of the mean is zero too: 0.2 is the mean of 0.1, 0.2 and 0.3.

    Examples:
        >>> scores = torch.tensor([[0.1, 0.2, 0.3], [5.0, 1.0, torch.nan]], dtype=torch.float64)
        >>> deviations(scores, valid=~scores.isnan())
        tensor([[-0.1000,  0.0000,  0.1000],
                [ 2.0000, -2.0000,  0.0000]], dtype=torch.float64)
    """
    values = torch.where(valid, scores.double(), 0.0)
    mean = values.sum(1, keepdim=True) / valid.sum(1, keepdim=True)
    return without_rounding(values - mean, scores, valid)


def ordered_pairs(scores: Tensor, valid: Tensor) -> Tensor:
    """Pairs of unequal scores, bool (B, N, N): True at (i, j) where i scores higher than j.

    Examples:
        >>> scores = torch.tensor([[2.0, 1.0, 2.0]])
        >>> ordered_pairs(scores, valid=torch.ones(1, 3, dtype=torch.bool)).nonzero().tolist()
        [[0, 0, 1], [0, 2, 1]]
    """
    values = scores.double()
    both = valid[:, :, None] & valid[:, None, :]
    return both & (values[:, :, None] > values[:, None, :])


def differs(scores: Tensor, valid: Tensor) -> Tensor:
    """Return which groups have scores that are not all equal, bool (B,)."""
    values = scores.double()
    high = values.masked_fill(~valid, -torch.inf).amax(1)
    return high > values.masked_fill(~valid, torch.inf).amin(1)


def binned(scores: Tensor, valid: Tensor, levels: int | None) -> Tensor:
    """Ordinal levels, float64 (B, N): the scores, or bins of equal width over the group's range.

    Args:
        scores: (B, N).
        valid: bool (B, N).
        levels: number of bins, numbered 0 (lowest) to ``levels - 1``; a score on the border of two
            bins belongs to the upper one. None returns the scores.
    """
    values = scores.double()
    if levels is None:
        return values
    low = values.masked_fill(~valid, torch.inf).amin(1, keepdim=True)
    high = values.masked_fill(~valid, -torch.inf).amax(1, keepdim=True)
    part = (values - low) / torch.where(high > low, high - low, 1.0)
    # A score on a border must not fall below it by a rounding error.
    return (part * levels + 1e-9).floor().clamp(max=levels - 1)


def deviation_log_weights(
    scores: Tensor,
    valid: Tensor,
    *,
    alpha: float,
    power: float = 1.0,
    deviation: Deviation = "absolute",
    alpha_unit: AlphaUnit = "score",
) -> Tensor:
    """Log-weights of W-MPO: ``alpha * |S_i - mean S| ** power``, float64 (B, N), zero on padding.

    Args:
        scores: (B, N).
        valid: bool (B, N).
        alpha: strength, >= 0. Its unit is 1 / score ** power for ``alpha_unit="score"``.
        power: exponent of the deviation; 0 gives all responses of a group the same weight, which is
            MPO (with absolute deviations).
        deviation: "absolute" raises outliers on both sides; "signed" keeps the deviation's sign.
        alpha_unit: "std" divides deviations by the group's (population) standard deviation first.

    Examples:
        >>> scores = torch.tensor([[6.0, 2.0, 1.0]])  # their mean is 3
        >>> deviation_log_weights(scores, torch.ones(1, 3, dtype=torch.bool), alpha=0.5)
        tensor([[1.5000, 0.5000, 1.0000]], dtype=torch.float64)
    """
    delta = deviations(scores, valid)
    if alpha_unit == "std":
        std = (delta.square().sum(1, keepdim=True) / valid.sum(1, keepdim=True)).sqrt()
        delta = delta / torch.where(std > 0, std, 1.0)
    size = delta.abs() ** power
    if deviation == "signed":
        size = delta.sign() * size
    return torch.where(valid, alpha * size, 0.0)
