"""The statistics against published numbers, numpy, and by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from mpo_lightning.studies.lab.statistics import (
    Interval,
    detectable,
    holm,
    log_log_slope,
    mean_interval,
    paired_t_test,
    wilcoxon,
)

# Student's sleep data of 1908, as R's `sleep` has them: hours of sleep gained with two drugs.
SLEEP = (
    [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0],
    [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4],
)


# 97.5 % quantiles of Student's t, from printed tables.
@pytest.mark.parametrize(
    ("count", "quantile"), [(2, 12.7062), (3, 4.3027), (10, 2.2622), (25, 2.0639)]
)
def test_mean_interval(count: int, quantile: float) -> None:
    values = np.random.default_rng(count).normal(3, 2, count)
    found = mean_interval(values.tolist())
    reach = quantile * values.std(ddof=1) / count**0.5
    assert found.mean == pytest.approx(values.mean())
    assert (found.mean - found.low, found.high - found.mean) == pytest.approx(
        (reach, reach), rel=1e-4
    )
    assert found.count == count


def test_intervals_of_few_values() -> None:
    assert str(mean_interval([])) == "-"
    assert math.isnan(mean_interval([]).mean)
    one = mean_interval([2.5])
    assert (one.mean, one.count) == (2.5, 1)
    assert math.isnan(one.low)
    assert str(one) == "2.500"
    assert one.to_json() == {"mean": 2.5, "low": None, "high": None, "count": 1}
    assert mean_interval([1.0, 1.0, 1.0]) == Interval(1.0, 1.0, 1.0, 3)


def test_paired_t_test_of_students_own_data() -> None:
    found = paired_t_test([a - b for a, b in zip(*SLEEP, strict=True)])
    # R: t.test(extra ~ group, data = sleep, paired = TRUE)
    assert found.p == pytest.approx(0.002833, abs=5e-7)
    assert (found.difference.low, found.difference.high) == pytest.approx(
        (-2.4598858, -0.7001142), abs=1e-7
    )


def test_paired_t_test_of_equal_differences() -> None:
    assert paired_t_test([0.0, 0.0]).p == 1
    assert paired_t_test([0.5, 0.5]).p == 0
    assert math.isnan(paired_t_test([1.0]).p)


def test_wilcoxon() -> None:
    # Exact by hand: all 2 ** 6 signs are equally likely, and both extremes have rank sums as far.
    values = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert wilcoxon(values) == pytest.approx(2 / 64)
    # One extreme world hides the others from the t test, and counts by its rank here.
    assert wilcoxon([*values[:-1], 60.0]) == wilcoxon(values)
    assert paired_t_test([*values[:-1], 60.0]).p > 0.3
    assert paired_t_test(values).p < 0.01
    assert wilcoxon([0.0, 0.0, 0.0]) == 1
    assert math.isnan(wilcoxon([1.0]))


@pytest.mark.parametrize(("count", "tests"), [(10, 1), (16, 1), (16, 14)])
def test_detectable_is_found_four_times_in_five(count: int, tests: int) -> None:
    values = np.random.default_rng(count).normal(0.3, 2, count)
    found = detectable(values.tolist(), tests=tests)
    # Power of the two-sided test at that difference, by the noncentral t distribution.
    far = found / (values.std(ddof=1) / count**0.5)
    at = stats.t.ppf(1 - 0.025 / tests, count - 1)
    power = stats.nct.sf(at, count - 1, far) + stats.nct.cdf(-at, count - 1, far)
    assert power == pytest.approx(0.8, abs=0.03)
    assert math.isnan(detectable([1.0]))


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
    noisy = np.random.default_rng(0).uniform(1, 2, 5)
    expected = np.polyfit(np.log(sizes), np.log(noisy), 1)[0]
    assert log_log_slope(sizes, noisy.tolist()) == pytest.approx(expected)
