"""The statistics against scipy, and by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from mpo_lightning.studies.lab.statistics import (
    Interval,
    compare,
    holm,
    log_log_slope,
    mean_interval,
    t_cdf,
)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 9, 10, 31, 100])
def test_t_distribution(freedom: int) -> None:
    for value in (-40.0, -2.5, -0.3, 0.0, 0.7, 1.9, 4.0, 12.0):
        assert t_cdf(value, freedom) == pytest.approx(stats.t.cdf(value, freedom), abs=1e-12)


@pytest.mark.parametrize("count", [2, 3, 10, 25])
def test_mean_interval(count: int) -> None:
    values = np.random.default_rng(count).normal(3, 2, count)
    found = mean_interval(values.tolist())
    error = stats.sem(values)
    low, high = stats.t.interval(0.95, count - 1, loc=values.mean(), scale=error)
    assert (found.mean, found.low, found.high) == pytest.approx((values.mean(), low, high))
    assert found.count == count


def test_intervals_of_few_values() -> None:
    assert str(mean_interval([])) == "-"
    assert math.isnan(mean_interval([]).mean)
    one = mean_interval([2.5])
    assert (one.mean, one.count) == (2.5, 1)
    assert math.isnan(one.low)
    assert str(one) == "2.500"
    assert mean_interval([1.0, 1.0, 1.0]) == Interval(1.0, 1.0, 1.0, 3)


def test_compare_is_the_paired_t_test() -> None:
    generator = np.random.default_rng(0)
    first, second = generator.normal(0.4, 1, 12), generator.normal(0, 1, 12)
    found = compare(first.tolist(), second.tolist())
    expected = stats.ttest_rel(first, second)
    assert found.p == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval(0.95)
    assert (found.difference.low, found.difference.high) == pytest.approx(tuple(interval))
    assert compare([1.0, 2.0], [1.0, 2.0]).p == 1
    assert compare([1.5, 2.5], [1.0, 2.0]).p == 0
    assert math.isnan(compare([1.0], [0.0]).p)
    with pytest.raises(ValueError, match="argument 2"):
        compare([1.0, 2.0], [1.0])


def test_holm_by_hand() -> None:
    # .01 x 4, .03 x 3, then .04 x 2 = .08 must not be less than .09, and 1 x .5.
    assert holm([0.03, 0.01, 0.5, 0.04]) == pytest.approx([0.09, 0.04, 0.5, 0.09])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    found = holm([0.02, math.nan, 0.3])
    assert found[::2] == pytest.approx([0.04, 0.3])
    assert math.isnan(found[1])
    assert holm([]) == []


def test_slope() -> None:
    sizes = [2, 3, 5, 10, 40]
    assert log_log_slope(sizes, [7 * n**-0.5 for n in sizes]) == pytest.approx(-0.5)
    noisy = np.random.default_rng(0).uniform(1, 2, 5).tolist()
    expected = stats.linregress(np.log(sizes), np.log(noisy)).slope
    assert log_log_slope(sizes, noisy) == pytest.approx(expected)
