"""Statistics of an array of numbers, exact to rounding; float64 throughout."""

import math

import numpy as np
from numpy.typing import NDArray

from mpo_lightning.data.check.report import Lengths, Quantiles, Summary

__all__ = [
    "Bools",
    "Floats",
    "Integers",
    "correlation",
    "histogram",
    "length_summary",
    "mean",
    "quantiles",
    "summary",
]

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Integers = NDArray[np.integer]


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def mean(values: Floats | Integers) -> float | None:
    """Mean; None where there are no values."""
    return float(values.mean()) if len(values) else None


def summary(values: Floats) -> Summary:
    """Mean, central moments (population form) and range; None beyond the range of float64."""
    if not len(values):
        return Summary(count=0)
    low, high, centre = values.min(), values.max(), values.mean()
    centred = values - centre
    square = centred * centred
    variance = square.mean()
    varies = low != high and 0 < variance < math.inf
    return Summary(
        count=len(values),
        mean=_finite(centre),
        std=_finite(variance**0.5),
        skewness=_finite((square * centred).mean() / variance**1.5) if varies else None,
        kurtosis=_finite((square * square).mean() / variance**2 - 3.0) if varies else None,
        low=float(low),
        high=float(high),
    )


def length_summary(values: Integers) -> Lengths:
    """Mean and quantiles; a quantile is the least value that this share does not exceed."""
    ordered = np.sort(values)

    def quantile(share: float) -> int | None:
        place = max(math.ceil(share * len(ordered)) - 1, 0)
        return int(ordered[place]) if len(ordered) else None

    low, p5, median, p95, p99, high = map(quantile, (0.0, 0.05, 0.5, 0.95, 0.99, 1.0))
    return Lengths(len(ordered), mean(ordered), low, p5, median, p95, p99, high)


def quantiles(values: Floats) -> Quantiles:
    """Quantiles, linear between neighbours."""
    if not len(values):
        return Quantiles(count=0)
    p10, median, p90 = np.quantile(values, (0.1, 0.5, 0.9)).tolist()
    return Quantiles(count=len(values), p10=p10, median=median, p90=p90)


def correlation(x: Floats, y: Floats) -> float | None:
    """Pearson's correlation; None where one of the two does not vary."""
    return _finite(np.corrcoef(x, y)[0, 1]) if len(x) else None


def histogram(values: Floats, bins: int = 16) -> list[tuple[float, float, int]]:
    """``(from, to, count)`` in ascending order, no more than ``bins`` of them.

    Where there are no more different values than that, each is a row with ``from == to``.
    Otherwise a row counts the values with ``from <= value < to``; the rows are equally wide, by the
    least power of two that suffices, and begin at multiples of it.
    """
    if not len(values):
        return []
    different, counts = np.unique(values, return_counts=True)
    if len(different) <= bins:
        return [
            (value, value, count)
            for value, count in zip(different.tolist(), counts.tolist(), strict=True)
        ]
    low, high = float(different[0]), float(different[-1])
    # Wide enough for whole numbers of 41 bits to count the rows, and for a width that is not zero.
    exponent = max(math.frexp(max(-low, high))[1] - 41, -1000)
    while math.floor(math.ldexp(high, -exponent)) - math.floor(math.ldexp(low, -exponent)) >= bins:
        exponent += 1
    rows = np.floor(np.ldexp(different, -exponent)).astype(np.int64)
    first, width = int(rows[0]), math.ldexp(1.0, exponent)
    in_rows = np.bincount(rows - first, counts).astype(np.int64).tolist()
    return [
        (row * width, (row + 1) * width, count) for row, count in enumerate(in_rows, start=first)
    ]
