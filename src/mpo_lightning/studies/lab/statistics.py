"""Means over seeds with Student's intervals, paired tests, power, and slopes; for few seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from scipy import stats

__all__ = [
    "Comparison",
    "Interval",
    "detectable",
    "holm",
    "least_squares_slope",
    "log_log_slope",
    "mean_interval",
    "paired_t_test",
    "wilcoxon",
]

LEVEL = 0.95
POWER = 0.8


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

    def signed(self) -> str:
        """Return the interval as text, each number with its sign."""
        if self.count == 0:
            return "-"
        if math.isnan(self.low):
            return f"{self.mean:+.3f}"
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"

    @classmethod
    def from_json(cls, values: Mapping[str, float | None]) -> "Interval":
        """Make the interval of what `to_json` returned."""
        mean, low, high = (
            math.nan if values[name] is None else float(values[name] or 0)
            for name in ("mean", "low", "high")
        )
        return cls(mean, low, high, int(values["count"] or 0))

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


def paired_t_test(differences: Sequence[float]) -> Comparison:
    """Return the mean of differences paired by seed, with Student's t test of no difference.

    Where all differences are equal, p is 1 if they are zero and 0 otherwise.
    """
    interval = mean_interval(differences)
    if interval.count < 2:
        return Comparison(interval, math.nan)
    error = _standard_error(differences, interval.mean)
    if error == 0:
        return Comparison(interval, 1.0 if interval.mean == 0 else 0.0)
    p = 2 * float(stats.t.sf(abs(interval.mean) / error, interval.count - 1))
    return Comparison(interval, p)


def wilcoxon(differences: Sequence[float]) -> float:
    """Return the two-sided p-value of Wilcoxon's signed-rank test; NaN for fewer than two pairs.

    It minds one extreme world less than the t test. Differences of zero say nothing; if all are, p
    is 1.
    """
    if len(differences) < 2:
        return math.nan
    if not any(differences):
        return 1.0
    return float(stats.wilcoxon(differences).pvalue)


def detectable(differences: Sequence[float], *, tests: int = 1) -> float:
    """Return the true difference that a t test of as many pairs would show with probability 0.8.

    Args:
        differences: the differences, for their standard deviation; fewer than two give NaN.
        tests: number of tests among which this one has to stand, by Bonferroni's bound, which is
            Holm's for the smallest p-value.
    """
    count = len(differences)
    if count < 2:
        return math.nan
    mean = math.fsum(differences) / count
    at = float(stats.t.ppf(1 - (1 - LEVEL) / 2 / tests, count - 1))
    return (at + float(stats.t.ppf(POWER, count - 1))) * _standard_error(differences, mean)


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
