"""Statistics of values that come in chunks and are not kept; float64 throughout.

Counts, extremes, moments and correlations are exact (to rounding). Quantiles of `IntegerCounts`
are exact; those of a `Sample` are exact up to its size, and estimates beyond.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Covariance",
    "Flagged",
    "Histogram",
    "IntegerCounts",
    "Largest",
    "Moments",
    "Sample",
]

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Integers = NDArray[np.int64]


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


@dataclass
class Moments:
    """Mean and central moments (population form) of all values.

    Chunks are merged by the pairwise formulas of Pébay (SAND2008-6212), which do not cancel.
    Moments beyond the range of float64 count as undefined.

    Attributes:
        count: number of values.
        mean: their mean.
        m2: sum of squared deviations from the mean; m3 and m4 of their third and fourth powers.
        low: the smallest.
        high: the largest.
    """

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0
    m3: float = 0.0
    m4: float = 0.0
    low: float = math.inf
    high: float = -math.inf

    def add(self, values: Floats) -> None:
        """Take in a chunk, (k,)."""
        if not len(values):
            return
        with np.errstate(over="ignore", invalid="ignore"):
            mean = float(values.mean())
            centred = values - mean
            square = centred * centred
            self._merge(
                len(values),
                mean,
                (
                    float(square.sum()),
                    float((square * centred).sum()),
                    float((square * square).sum()),
                ),
            )
        self.low = min(self.low, float(values.min()))
        self.high = max(self.high, float(values.max()))

    def _merge(self, count: int, mean: float, moments: tuple[float, float, float]) -> None:
        m2, m3, m4 = moments
        # numpy's numbers overflow to infinity where Python's own raise.
        a, b = np.float64(self.count), np.float64(count)
        n, delta = a + b, np.float64(mean - self.mean)
        self.m4 = float(
            self.m4
            + m4
            + delta**4 * a * b * (a * a - a * b + b * b) / n**3
            + 6 * delta**2 * (a * a * m2 + b * b * self.m2) / n**2
            + 4 * delta * (a * m3 - b * self.m3) / n
        )
        self.m3 = float(
            self.m3
            + m3
            + delta**3 * a * b * (a - b) / n**2
            + 3 * delta * (a * m2 - b * self.m2) / n
        )
        self.m2 = float(self.m2 + m2 + delta**2 * a * b / n)
        self.mean = float(self.mean + delta * b / n)
        self.count += count

    @property
    def std(self) -> float | None:
        """Standard deviation."""
        return _finite((self.m2 / self.count) ** 0.5) if self.count else None

    @property
    def skewness(self) -> float | None:
        """Third standardised moment; positive where the long tail is above the mean."""
        return self._standardised(self.m3, 1.5)

    @property
    def kurtosis(self) -> float | None:
        """Fourth standardised moment minus 3: zero for a normal distribution."""
        value = self._standardised(self.m4, 2.0)
        return None if value is None else value - 3.0

    def _standardised(self, moment: float, power: float) -> float | None:
        if not self.count or self.low == self.high or not 0 < self.m2 < math.inf:
            return None
        return _finite(float(moment / self.count / np.float64(self.m2 / self.count) ** power))


@dataclass
class Covariance:
    """Pearson's correlation of pairs of values."""

    count: int = 0
    mean_x: float = 0.0
    mean_y: float = 0.0
    xx: float = 0.0
    yy: float = 0.0
    xy: float = 0.0

    def add(self, x: Floats, y: Floats) -> None:
        """Take in a chunk of pairs, (k,) each."""
        if not len(x):
            return
        with np.errstate(over="ignore", invalid="ignore"):
            mean_x, mean_y = x.mean(), y.mean()
            n = self.count + len(x)
            share = self.count * len(x) / n
            dx, dy = mean_x - self.mean_x, mean_y - self.mean_y
            self.xx += float(np.square(x - mean_x).sum() + dx * dx * share)
            self.yy += float(np.square(y - mean_y).sum() + dy * dy * share)
            self.xy += float(((x - mean_x) * (y - mean_y)).sum() + dx * dy * share)
            self.mean_x += float(dx * len(x) / n)
            self.mean_y += float(dy * len(x) / n)
        self.count = n

    @property
    def correlation(self) -> float | None:
        """The correlation; None where one of the two does not vary."""
        if not (0 < self.xx < math.inf and 0 < self.yy < math.inf):
            return None
        return _finite(self.xy / math.sqrt(self.xx) / math.sqrt(self.yy))


@dataclass
class IntegerCounts:
    """How often each whole number occurs; memory grows with how many different ones there are."""

    counts: Counter[int] = field(default_factory=Counter)

    def add(self, values: Integers) -> None:
        """Take in a chunk, (k,)."""
        different, counts = np.unique(values, return_counts=True)
        for value, count in zip(different.tolist(), counts.tolist(), strict=True):
            self.counts[value] += count

    @property
    def total(self) -> int:
        """Number of values."""
        return self.counts.total()

    @property
    def mean(self) -> float | None:
        """Their mean."""
        whole = sum(value * count for value, count in self.counts.items())
        return whole / self.total if self.total else None

    def quantile(self, share: float) -> int | None:
        """The smallest value that at least this share of the values does not exceed."""
        rest = math.ceil(share * self.total)
        for value in sorted(self.counts):
            rest -= self.counts[value]
            if rest <= 0:
                return value
        return None


class Histogram:
    """Counts of each value while there are few, and counts in bins of equal width.

    The width is a power of two that doubles as the range of values grows; edges are its multiples.
    It is the least for which no more than ``bins`` bins span the values: so the order of the values
    does not matter, and every count is exact.

    Args:
        bins: number of bins at most, and of values that are counted each.
    """

    def __init__(self, bins: int = 512) -> None:
        self.bins = bins
        self.exponent: int | None = None
        self.counts: Counter[int] = Counter()
        self.values: Counter[float] | None = Counter()

    def add(self, values: Floats) -> None:
        """Take in a chunk, (k,)."""
        if not len(values):
            return
        self._add_values(values)
        largest = float(np.abs(values).max())
        # So fine that whole numbers of 41 bits count the bins; not so fine that the width is zero.
        least = max(math.frexp(largest)[1] - 41, -1000) if largest else -1000
        if self.exponent is None:
            self.exponent = least
        self._widen(least - self.exponent)
        indices = np.floor(np.ldexp(values, -self.exponent)).astype(np.int64)
        different, counts = np.unique(indices, return_counts=True)
        ends = [int(different[0]), int(different[-1])]
        if self.counts:
            ends = [min(ends[0], *self.counts), max(ends[1], *self.counts)]
        shift = _shift_to_span(ends[0], ends[1], self.bins)
        self._widen(shift)
        for index, count in zip((different >> shift).tolist(), counts.tolist(), strict=True):
            self.counts[index] += count

    def _add_values(self, values: Floats) -> None:
        if self.values is None:
            return
        different, counts = np.unique(values, return_counts=True)
        for value, count in zip(different.tolist(), counts.tolist(), strict=True):
            self.values[value] += count
        if len(self.values) > self.bins:
            self.values = None

    def _widen(self, shift: int) -> None:
        assert self.exponent is not None
        if shift > 0:
            wider: Counter[int] = Counter()
            for index, count in self.counts.items():
                wider[index >> shift] += count
            self.counts, self.exponent = wider, self.exponent + shift

    def rows(self, limit: int) -> list[tuple[float, float, int]]:
        """``(from, to, count)`` in ascending order, at most so many.

        Where there are no more different values than that, each is a row with ``from == to``.
        Otherwise a row counts the values with ``from <= value < to``.
        """
        if self.exponent is None:
            return []
        if self.values is not None and len(self.values) <= limit:
            return [(value, value, self.values[value]) for value in sorted(self.values)]
        shift = _shift_to_span(min(self.counts), max(self.counts), limit)
        joined: Counter[int] = Counter()
        for index, count in self.counts.items():
            joined[index >> shift] += count
        width = math.ldexp(1.0, self.exponent + shift)
        span = range(min(joined), max(joined) + 1)
        return [(i * width, (i + 1) * width, joined[i]) for i in span]


def _shift_to_span(low: int, high: int, bins: int) -> int:
    """By how many bits to shift whole numbers so that no more than ``bins`` span them."""
    shift = 0
    while (high >> shift) - (low >> shift) >= bins:
        shift += 1
    return shift


class Sample:
    """A uniform sample of values: all of them while there are no more than its size.

    Args:
        size: number of values that are kept.
        seed: of the draw.
    """

    def __init__(self, size: int = 65_536, seed: int = 0) -> None:
        self.size = size
        self.seen = 0
        self._random = np.random.default_rng(seed)
        self._keys: Floats = np.empty(0)
        self._values: Floats = np.empty(0)

    def add(self, values: Floats) -> None:
        """Take in a chunk, (k,)."""
        self.seen += len(values)
        # The values with the smallest of random keys.
        self._keys = np.concatenate([self._keys, self._random.random(len(values))])
        self._values = np.concatenate([self._values, values])
        if len(self._keys) > self.size:
            kept = np.argpartition(self._keys, self.size)[: self.size]
            self._keys, self._values = self._keys[kept], self._values[kept]

    @property
    def is_exact(self) -> bool:
        """Whether nothing has been left out."""
        return self.seen <= self.size

    def quantiles(self, shares: Sequence[float]) -> list[float | None]:
        """Quantiles, linear between neighbours; None where there are no values."""
        if not len(self._values):
            return [None] * len(shares)
        return [float(value) for value in np.quantile(self._values, shares)]


class Largest:
    """The largest values, and where they are.

    Args:
        size: number of values that are kept.
    """

    def __init__(self, size: int = 1000) -> None:
        self.size = size
        self.values: Floats = np.empty(0)
        self.places: list[str] = []

    def add(self, values: Floats, places: Sequence[str]) -> None:
        """Take in a chunk: values (k,), none negative, and a place for each."""
        floor = self.values[-1] if len(self.values) >= self.size else -1.0
        picked = np.flatnonzero(values > floor)
        if not len(picked):
            return
        merged = np.concatenate([self.values, values[picked]])
        # Stable: of equal values the first.
        order = np.argsort(-merged, kind="stable")[: self.size]
        old = len(self.values)
        self.places = [
            self.places[i] if i < old else places[picked[i - old]] for i in order.tolist()
        ]
        self.values = merged[order]

    def above(self, limit: float) -> tuple[int, bool]:
        """How many exceed a limit, and whether there may be more that were not kept."""
        count = int((self.values > limit).sum())
        return count, count == self.size


@dataclass
class Flagged:
    """A count with its first rows.

    Attributes:
        count: how many.
        rows: the first three places.
    """

    count: int = 0
    rows: list[str] = field(default_factory=list)

    def add(self, flags: Bools, places: Sequence[str], counts: Integers | None = None) -> None:
        """Take in a chunk: flags (k,) of places, and what each counts for (1 if none)."""
        self.count += int(flags.sum() if counts is None else counts[flags].sum())
        if len(self.rows) < 3:
            first = np.flatnonzero(flags)[: 3 - len(self.rows)]
            self.rows += [places[i] for i in first.tolist()]
