"""Means over seeds with Student's intervals, paired t tests, and slopes; for few seeds."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from scipy import stats

__all__ = [
    "Comparison",
    "Interval",
    "holm",
    "least_squares_slope",
    "log_log_slope",
    "mean_interval",
    "paired_t_test",
]

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval.

    Attributes:
        mean: mean of the values; NaN for none.
        low: lower end; NaN for fewer than two values.
        high: upper end; NaN for fewer than two values.
        count: number of values.
    """

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        if self.count == 0:
            return "-"
        if math.isnan(self.low):
            return f"{self.mean:.3f}"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def to_json(self) -> dict[str, float | None]:
        """Return the fields by name, with null (None) where a number is NaN."""
        return {name: None if math.isnan(value) else value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Comparison:
    """A difference paired by seed.

    Attributes:
        difference: mean difference with its interval.
        p: two-sided p-value of Student's t test; NaN for fewer than two pairs.
    """

    difference: Interval
    p: float


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the mean and its 95 % Student interval."""
    count = len(values)
    if count == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = math.fsum(values) / count
    if count == 1:
        return Interval(mean, math.nan, math.nan, 1)
    reach = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * _standard_error(values, mean)
    return Interval(mean, mean - reach, mean + reach, count)


def _standard_error(values: Sequence[float], mean: float) -> float:
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def paired_t_test(first: Sequence[float], second: Sequence[float]) -> Comparison:
    """Return first minus second, paired by seed, with Student's t test of no difference.

    Where all differences are equal, p is 1 if they are zero and 0 otherwise.
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    interval = mean_interval(differences)
    if interval.count < 2:
        return Comparison(interval, math.nan)
    error = _standard_error(differences, interval.mean)
    if error == 0:
        return Comparison(interval, 1.0 if interval.mean == 0 else 0.0)
    p = 2 * float(stats.t.sf(abs(interval.mean) / error, interval.count - 1))
    return Comparison(interval, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust the p-values of several comparisons with Holm's step-down method; NaN stays NaN."""
    order = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    adjusted = [math.nan] * len(p_values)
    highest = 0.0
    for rank, (p, index) in enumerate(order):
        highest = max(highest, min(1.0, p * (len(order) - rank)))
        adjusted[index] = highest
    return adjusted


def least_squares_slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the slope of the least-squares line through the points (x, y)."""
    centre = sum(x) / len(x)
    return sum((a - centre) * b for a, b in zip(x, y, strict=True)) / sum(
        (a - centre) ** 2 for a in x
    )


def log_log_slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Return the least-squares slope of log(value) on log(size)."""
    return least_squares_slope([math.log(n) for n in sizes], [math.log(v) for v in values])
