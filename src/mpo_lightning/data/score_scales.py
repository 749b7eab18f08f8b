"""Which responses of a group are kept, and scores brought to one scale."""

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
    """Places of the responses that a group keeps, in the order of the row.

    Args:
        scores: of the group's responses.
        limit: how many to keep at most.
        keep: "first" keeps the first as given; "balanced" keeps as many that score above the
            group's mean as others (one more of those above if the limit is odd), each side's first,
            and fills up from the other side where one has too few; "extremes" keeps the highest and
            the lowest, leaving the middle out (of five with limit 4 the median, as in the paper's
            on-policy recipe). Among equal scores the first as given count as higher.
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
    """Ranks from 0, equal values sharing the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: Floats = ((ends - counts + ends - 1) / 2)[place]
    return ranks


def normalize_scores(
    scores: Floats, counts: NDArray[np.int64], how: Normalization, over: Scale
) -> Floats:
    """Scores of groups on one scale, float64, in the order given.

    Neither changes which of two responses of a group scores higher; with "rank" the group's mean,
    and so its chosen set, may be another.

    Args:
        scores: of all responses, group after group.
        counts: responses of each group.
        how: "z-score" is (score - mean) / standard deviation (population form), zero where all are
            equal; "rank" is the rank over the highest rank, 0 the lowest and 1 the highest, equal
            scores sharing the mean of theirs, 0.5 where all are equal.
        over: what mean, deviation and ranks are taken over: each group, or all of the source.
    """
    if how == "none" or not len(scores):
        return scores
    if over == "source":
        counts = np.array([len(scores)])
    starts = np.cumsum(counts) - counts
    if how == "z-score":
        # Centred and brought to one size first: squares of large or small numbers would be lost.
        centred = scores - np.repeat(np.add.reduceat(scores, starts) / counts, counts)
        equal = np.minimum.reduceat(scores, starts) == np.maximum.reduceat(scores, starts)
        largest = np.where(equal, np.inf, np.maximum.reduceat(np.abs(centred), starts))
        scaled = centred / np.repeat(largest, counts)
        std = np.where(equal, 1.0, np.sqrt(np.add.reduceat(scaled**2, starts) / counts))
        result: Floats = scaled / np.repeat(std, counts)
        return result
    # One scale for all groups: what distinguishes them goes first.
    owner = np.repeat(np.arange(len(counts)), counts)
    _, value = np.unique(scores, return_inverse=True)
    ranks = _average_ranks((owner * (value.max() + 1) + value).astype(np.float64))
    within = ranks - np.repeat(starts, counts)
    highest = np.repeat(counts - 1, counts)
    return np.where(highest > 0, within / np.maximum(highest, 1), 0.5)
