"""Statistics by chunks against numpy and scipy on all values at once."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from mpo_lightning.data.check.streaming import (
    Covariance,
    Flagged,
    Histogram,
    IntegerCounts,
    Largest,
    Moments,
    Sample,
)


def chunks(values: np.ndarray, sizes: tuple[int, ...] = (1, 0, 300, 17)) -> list[np.ndarray]:
    ends = np.cumsum(sizes)
    return np.split(values, ends[ends < len(values)])


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_moments_are_those_of_all_values(offset: float) -> None:
    values = np.random.default_rng(0).gamma(2.0, size=1000) + offset
    moments = Moments()
    for chunk in chunks(values):
        moments.add(chunk)
    assert moments.count == 1000
    assert moments.mean == pytest.approx(values.mean(), rel=1e-14)
    assert moments.std == pytest.approx(values.std(), rel=1e-9)
    assert moments.skewness == pytest.approx(scipy.stats.skew(values), rel=1e-8)
    assert moments.kurtosis == pytest.approx(scipy.stats.kurtosis(values), rel=1e-8)
    assert (moments.low, moments.high) == (values.min(), values.max())


@pytest.mark.parametrize("values", [[], [0.1, 0.1, 0.1]])
def test_moments_of_nothing_and_of_equal_values(values: list[float]) -> None:
    moments = Moments()
    moments.add(np.array(values[:1]))
    moments.add(np.array(values[1:]))
    assert moments.skewness is moments.kurtosis is None
    assert (moments.std is None) == (not values)


def test_moments_beyond_the_range_are_undefined() -> None:
    moments = Moments()
    moments.add(np.array([1e200, -1e200, 0.0]))
    moments.add(np.array([1e300]))
    assert moments.std is moments.skewness is moments.kurtosis is None


def test_correlation_is_that_of_all_pairs() -> None:
    x = np.random.default_rng(1).normal(size=1000) + 50
    y = np.square(x) + np.random.default_rng(2).normal(size=1000) * 30
    covariance = Covariance()
    for a, b in zip(chunks(x), chunks(y), strict=True):
        covariance.add(a, b)
    assert covariance.correlation == pytest.approx(np.corrcoef(x, y)[0, 1], rel=1e-12)
    constant = Covariance()
    constant.add(x, np.zeros(1000))
    assert constant.correlation is None


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1), st.floats(0, 1))
def test_integer_quantiles_are_inverted_distribution_functions(
    values: list[int], share: float
) -> None:
    counts = IntegerCounts()
    counts.add(np.array(values[::2]))
    counts.add(np.array(values[1::2], dtype=np.int64))
    assert counts.mean == pytest.approx(np.mean(values))
    # The least value that share of the values does not exceed, by its definition.
    within = [v for v in sorted(values) if sum(w <= v for w in values) >= share * len(values)]
    assert counts.quantile(share) == within[0]


@settings(max_examples=80, deadline=None)
@given(
    # Libraries may have switched subnormal numbers off.
    st.lists(st.floats(-1e9, 1e9, allow_subnormal=False), min_size=1, max_size=60),
    st.integers(2, 12),
    st.randoms(use_true_random=False),
)
def test_histogram_counts_exactly_whatever_the_order(
    values: list[float], bins: int, random: object
) -> None:
    def fill(of: list[float]) -> Histogram:
        histogram = Histogram(bins)
        for chunk in np.array_split(np.array(of), 3):
            histogram.add(chunk)
        return histogram

    rows = fill(values).rows(bins)
    assert sum(count for *_, count in rows) == len(values)
    assert len(rows) <= bins
    for low, high, count in rows:
        in_bin = [v for v in values if (v == low if low == high else low <= v < high)]
        assert count == len(in_bin)
    shuffled = list(values)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert fill(shuffled).rows(bins) == rows


def test_histogram_has_a_row_a_value_where_there_are_few() -> None:
    histogram = Histogram()
    histogram.add(np.array([1.0, 2.0, 2.0]))
    histogram.add(np.array([10.0, 1.0]))
    assert histogram.rows(3) == [(1, 1, 2), (2, 2, 2), (10, 10, 1)]
    assert histogram.rows(2) == [(0, 8, 4), (8, 16, 1)]
    assert Histogram().rows(3) == []


def test_sample_is_exact_up_to_its_size_and_uniform_beyond() -> None:
    values = np.random.default_rng(3).random(20_000)
    whole, part = Sample(), Sample(2000)
    for chunk in np.array_split(values, 7):
        whole.add(chunk)
        part.add(chunk)
    assert whole.is_exact
    assert not part.is_exact
    shares = (0.1, 0.5, 0.9)
    assert whole.quantiles(shares) == np.quantile(values, shares).tolist()
    # Four standard errors of a quantile of 2000.
    assert part.quantiles(shares) == pytest.approx(shares, abs=4 * 0.5 / np.sqrt(2000))
    assert Sample().quantiles(shares) == [None] * 3


def test_largest_values_and_their_places() -> None:
    values = np.random.default_rng(4).integers(0, 50, 400).astype(float)
    largest = Largest(60)
    places = [str(i) for i in range(400)]
    for numbers in np.array_split(np.arange(400), 9):
        largest.add(values[numbers], [places[i] for i in numbers])
    order = sorted(range(400), key=lambda i: (-values[i], i))[:60]
    assert largest.values.tolist() == [values[i] for i in order]
    assert largest.places == [places[i] for i in order]
    limit = values[order[10]]
    assert largest.above(limit) == (int((values > limit).sum()), False)
    assert largest.above(-1.0) == (60, True)


def test_flagged_counts_all_and_names_the_first() -> None:
    flagged = Flagged()
    flagged.add(np.array([False, True]), ["a", "b"])
    flagged.add(np.array([True, True, False, True]), list("cdef"), np.array([2, 1, 9, 3]))
    assert flagged == Flagged(7, ["b", "c", "d"])
