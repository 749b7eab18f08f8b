"""Means over seeds with intervals, paired comparisons, and slopes; for small numbers of seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Comparison", "Interval", "compare", "holm", "log_log_slope", "mean_interval", "t_cdf"]

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval.

    Attributes:
        mean: of the values.
        low: lower end; NaN for a single value.
        high: upper end.
        count: how many values.
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


@dataclass(frozen=True)
class Comparison:
    """A paired difference over seeds.

    Attributes:
        difference: mean difference with its interval.
        p: two-sided, of Student's t; NaN for fewer than two pairs.
    """

    difference: Interval
    p: float


def t_cdf(value: float, freedom: int) -> float:
    """Distribution function of Student's t for a whole number of degrees of freedom.

    The finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    angle = math.atan(value / math.sqrt(freedom))
    cosine = math.cos(angle)
    term = cosine if freedom % 2 else 1.0
    total, number = (0.0 if freedom == 1 else term), freedom % 2 + 2
    while number < freedom:
        term *= cosine**2 * (number - 1) / number
        total += term
        number += 2
    inside = (
        2 / math.pi * (angle + math.sin(angle) * total) if freedom % 2 else math.sin(angle) * total
    )
    return (1 + inside) / 2


def _t_quantile(probability: float, freedom: int) -> float:
    low, high = 0.0, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        if t_cdf(middle, freedom) < probability:
            low = middle
        else:
            high = middle
    return low


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % Student interval."""
    count = len(values)
    if count == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = math.fsum(values) / count
    if count == 1:
        return Interval(mean, math.nan, math.nan, 1)
    error = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (count - 1) / count)
    reach = _t_quantile((1 + LEVEL) / 2, count - 1) * error
    return Interval(mean, mean - reach, mean + reach, count)


def compare(first: Sequence[float], second: Sequence[float]) -> Comparison:
    """First minus second, paired by seed; the p-value of no difference."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    interval = mean_interval(differences)
    count = len(differences)
    if count < 2:
        return Comparison(interval, math.nan)
    error = math.sqrt(math.fsum((d - interval.mean) ** 2 for d in differences) / (count - 1))
    if error == 0:
        return Comparison(interval, 1.0 if interval.mean == 0 else 0.0)
    size = abs(interval.mean) / error * math.sqrt(count)
    return Comparison(interval, 2 * (1 - t_cdf(size, count - 1)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of several comparisons' p-values; NaN is no comparison."""
    order = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    adjusted = [math.nan] * len(p_values)
    highest = 0.0
    for rank, (p, index) in enumerate(order):
        highest = max(highest, min(1.0, p * (len(order) - rank)))
        adjusted[index] = highest
    return adjusted


def log_log_slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Least-squares slope of log(value) on log(size)."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    centre = sum(x) / len(x)
    return sum((a - centre) * b for a, b in zip(x, y, strict=True)) / sum(
        (a - centre) ** 2 for a in x
    )
