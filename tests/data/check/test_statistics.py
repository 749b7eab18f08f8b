"""Statistics of arrays against scipy, and against their definitions."""

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from mpo_lightning.data.check.statistics import (
    correlation,
    histogram,
    length_summary,
    quantiles,
    summary,
)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_moments_are_those_of_scipy(offset: float) -> None:
    values = np.random.default_rng(0).gamma(2.0, size=1000) + offset
    found = summary(values)
    assert found.count == 1000
    assert found.mean == pytest.approx(math.fsum(values) / 1000, rel=1e-14)
    assert found.std == pytest.approx(scipy.stats.tstd(values, ddof=0), rel=1e-9)
    assert found.skewness == pytest.approx(scipy.stats.skew(values), rel=1e-8)
    assert found.kurtosis == pytest.approx(scipy.stats.kurtosis(values), rel=1e-8)
    assert (found.low, found.high) == (min(values), max(values))


@pytest.mark.parametrize("values", [[], [0.1, 0.1, 0.1]])
def test_moments_of_nothing_and_of_equal_values(values: list[float]) -> None:
    found = summary(np.array(values))
    assert found.skewness is found.kurtosis is None
    assert (found.std is None) == (not values)


def test_moments_beyond_the_range_are_undefined() -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        found = summary(np.array([1e200, -1e200, 0.0, 1e300]))
    assert found.std is found.skewness is found.kurtosis is None
    assert found.mean == 2.5e299


def test_correlation_is_that_of_scipy() -> None:
    x = np.random.default_rng(1).normal(size=1000) + 50
    y = np.square(x) + np.random.default_rng(2).normal(size=1000) * 30
    assert correlation(x, y) == pytest.approx(scipy.stats.pearsonr(x, y).statistic, rel=1e-12)
    with np.errstate(invalid="ignore"):
        assert correlation(x, np.zeros(1000)) is None
    assert correlation(np.zeros(0), np.zeros(0)) is None


@settings(max_examples=50)
@given(st.lists(st.integers(0, 40), min_size=1))
def test_quantiles_of_lengths_are_values_that_occur(values: list[int]) -> None:
    found = length_summary(np.array(values))
    assert (found.count, found.mean) == (len(values), pytest.approx(sum(values) / len(values)))
    for share, quantile in (
        (0.0, found.low),
        (0.05, found.p5),
        (0.5, found.median),
        (0.95, found.p95),
        (0.99, found.p99),
        (1.0, found.high),
    ):
        # The least value that this share of the values does not exceed, by its definition.
        enough = (v for v in sorted(values) if sum(w <= v for w in values) >= share * len(values))
        assert quantile == next(enough)


def test_quantiles_are_linear_between_neighbours() -> None:
    found = quantiles(np.array([4.0, 1.0, 2.0]))
    assert (found.p10, found.median, found.p90) == pytest.approx((1.2, 2.0, 3.6))
    assert quantiles(np.zeros(0)).median is None


@settings(max_examples=80)
@given(
    # Libraries may have switched subnormal numbers off.
    st.lists(st.floats(-1e9, 1e9, allow_subnormal=False), min_size=1, max_size=60),
    st.integers(2, 12),
)
def test_histogram_counts_exactly_in_the_narrowest_rows(values: list[float], bins: int) -> None:
    rows = histogram(np.array(values), bins)
    assert sum(count for *_, count in rows) == len(values)
    assert len(rows) <= bins
    for low, high, count in rows:
        assert count == sum(v == low if low == high else low <= v < high for v in values)
    if rows[0][0] == rows[0][1]:
        assert [low for low, *_ in rows] == sorted(set(values))
    else:
        assert len(set(values)) > bins
        width = rows[0][1] - rows[0][0]
        assert math.frexp(width)[0] == 0.5
        assert {high - low for low, high, _ in rows} == {width}
        # Rows half as wide would be too many, or do not tell values of 41 bits apart.
        finer = math.floor(max(values) / width * 2) - math.floor(min(values) / width * 2) + 1
        assert finer > bins or max(map(abs, values)) / width >= 2**40


def test_histogram_has_a_row_a_value_where_there_are_few() -> None:
    values = np.array([1.0, 2.0, 2.0, 10.0, 1.0])
    assert histogram(values, 3) == [(1, 1, 2), (2, 2, 2), (10, 10, 1)]
    assert histogram(values, 2) == [(0, 8, 4), (8, 16, 1)]
    assert histogram(np.zeros(0)) == []
