"""Which responses are kept, and scores on one scale, against plain loops and SciPy."""

import statistics
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mpo_lightning.data.score_scales import normalize_scores, select_responses

GROUPS = st.lists(
    st.lists(
        st.integers(-3, 3).map(lambda n: n / 4) | st.floats(-1e6, 1e6, allow_subnormal=False),
        min_size=1,
        max_size=7,
    ),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize(
    ("scores", "limit", "keep", "places"),
    [
        # The paper's on-policy recipe: of five the middle one is left out.
        ([5, 1, 3, 4, 2], 4, "extremes", [0, 1, 3, 4]),
        ([5, 1, 3, 4, 2], 3, "extremes", [0, 1, 3]),
        ([5, 1, 3, 4, 2], 2, "extremes", [0, 1]),
        ([1, 1, 1, 1], 2, "extremes", [0, 3]),
        ([5, 1, 3, 4, 2], 2, "first", [0, 1]),
        ([5, 1, 3, 4, 2], 9, "first", [0, 1, 2, 3, 4]),
        ([1, 2, 9, 3, 8], 2, "balanced", [0, 2]),
        ([1, 2, 9, 3, 8], 3, "balanced", [0, 2, 4]),
        # One above the mean: the others fill up.
        ([1, 2, 90, 3, 8], 4, "balanced", [0, 1, 2, 3]),
        # One not above it.
        ([9, 9, 9, 9, 1], 4, "balanced", [0, 1, 2, 4]),
        ([2, 2, 2, 2], 3, "balanced", [0, 1, 2]),
    ],
)
def test_kept_responses(scores: list[float], limit: int, keep: str, places: list[int]) -> None:
    assert select_responses(scores, limit, keep) == places


@given(scores=st.lists(st.integers(0, 4), min_size=1, max_size=9), limit=st.integers(2, 9))
@pytest.mark.parametrize("keep", ["first", "balanced", "extremes"])
def test_as_many_as_wanted_in_order_and_with_their_contrast(
    keep: str, scores: list[int], limit: int
) -> None:
    places = select_responses(scores, limit, keep)
    assert len(places) == min(limit, len(scores))
    assert places == sorted(set(places))
    if keep != "first" and len(set(scores)) > 1:
        assert len({scores[place] for place in places}) > 1


def z_score(values: list[float]) -> list[float]:
    if len(set(values)) == 1:
        return [0.0] * len(values)
    # In exact fractions.
    mean, std = statistics.mean(map(Fraction, values)), statistics.pstdev(map(Fraction, values))
    return [float((Fraction(value) - mean) / Fraction(std)) for value in values]


def rank(values: list[float]) -> list[float]:
    if len(values) == 1:
        return [0.5]
    return list((stats.rankdata(values) - 1) / (len(values) - 1))


@settings(max_examples=60)
@given(groups=GROUPS)
@pytest.mark.parametrize("over", ["group", "source"])
@pytest.mark.parametrize(("how", "plain"), [("z-score", z_score), ("rank", rank)])
def test_scales_are_those_of_plain_loops(how, plain, over, groups) -> None:  # type: ignore[no-untyped-def]
    flat = np.array([score for group in groups for score in group], dtype=np.float64)
    counts = np.array([len(group) for group in groups])
    found = normalize_scores(flat, counts, how, over)
    parts = groups if over == "group" else [list(flat)]
    expected = [value for part in parts for value in plain(part)]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    # Equal stays equal, and the order of a group stays.
    start = 0
    for group in groups:
        mine = found[start : start + len(group)]
        start += len(group)
        for i, first in enumerate(group):
            for j, second in enumerate(group):
                assert not (first == second and mine[i] != mine[j])
                assert not (first > second and mine[i] < mine[j])


def test_none_leaves_scores_as_they_are() -> None:
    scores = np.array([0.1, 0.2, 7.0])
    assert normalize_scores(scores, np.array([2, 1]), "none", "source") is scores
