"""Selection of a group's responses, and normalisation of scores."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["Keep", "Normalization", "Scale", "normalize_scores", "select_responses"]

Keep = Literal["first", "balanced", "extremes"]
Normalization = Literal["none", "z-score", "rank"]
Scale = Literal["group", "source"]

Floats = NDArray[np.float64]


def select_responses(scores: Sequence[float], limit: int, keep: Keep) -> list[int]:
    """Return the positions of the responses to keep, in the order of the row.

    Args:
        scores: scores of the group's responses.
        limit: largest number of responses to keep.
        keep: "first" keeps the first as given; "balanced" keeps as many that score above the
            group's mean as others (one more of those above if the limit is odd), the first of each
            side, and more of the other side where one has too few; "extremes" keeps the highest and
            the lowest and leaves out the middle (the median of five with limit 4, as in the paper's
            on-policy recipe). Of equal scores, earlier ones count as higher.
    """
    places = list(range(len(scores)))
    if len(places) <= limit:
        return places
    if keep == "first":
        return places[:limit]
    high, low = limit - limit // 2, limit // 2
    if keep == "extremes":
        order = sorted(places, key=lambda place: (-scores[place], place))
        return sorted(order[:high] + order[len(order) - low :])
    mean = sum(scores) / len(scores)
    above = [place for place in places if scores[place] > mean]
    others = [place for place in places if scores[place] <= mean]
    high = min(max(high, limit - len(others)), len(above))
    return sorted(above[:high] + others[: limit - high])


def _average_ranks(values: Floats) -> Floats:
    """Return ranks from 0; equal values get the mean of their ranks."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: Floats = ((ends - counts + ends - 1) / 2)[place]
    return ranks


def normalize_scores(
    scores: Floats, counts: NDArray[np.int64], how: Normalization, over: Scale
) -> Floats:
    """Return scores on one scale, float64, in the order given.

    The order of a group's scores stays the same; "rank" may change which of them are above their
    mean, and so the chosen set.

    Args:
        scores: scores of all responses, group after group.
        counts: number of responses of each group.
        how: "z-score" is (score - mean) / standard deviation (of the population), zero where all
            are equal; "rank" is the rank divided by the highest rank, from 0 for the lowest to 1
            for the highest; equal scores get the mean of their ranks, 0.5 where all are equal.
        over: scope of mean, deviation and ranks: each group, or the whole source.
    """
    if how == "none" or not len(scores):
        return scores
    if over == "source":
        counts = np.array([len(scores)])
    starts = np.cumsum(counts) - counts
    if how == "z-score":
        # Centred and scaled first: squares of large numbers overflow, of small ones they vanish.
        centred = scores - np.repeat(np.add.reduceat(scores, starts) / counts, counts)
        equal = np.minimum.reduceat(scores, starts) == np.maximum.reduceat(scores, starts)
        largest = np.where(equal, np.inf, np.maximum.reduceat(np.abs(centred), starts))
        scaled = centred / np.repeat(largest, counts)
        std = np.where(equal, 1.0, np.sqrt(np.add.reduceat(scaled**2, starts) / counts))
        result: Floats = scaled / np.repeat(std, counts)
        return result
    # Rank all scores at once, by group and then by score.
    owner = np.repeat(np.arange(len(counts)), counts)
    _, value = np.unique(scores, return_inverse=True)
    ranks = _average_ranks((owner * (value.max() + 1) + value).astype(np.float64))
    within = ranks - np.repeat(starts, counts)
    highest = np.repeat(counts - 1, counts)
    return np.where(highest > 0, within / np.maximum(highest, 1), 0.5)
