"""Comparison of scores with trusted labels: second opinions on some of the scored responses.

    comparison = compare_with_trusted(scores, gold, columns={"length": lengths})  # (G, N) each
    comparison.tau, comparison.best_shortfall, comparison.columns

All but the sizes of differences is by order alone: a response's *place* is the share of others of
its group that it beats, equal ones half. So a judge's scale, and the shape of its scores, is no
fault here. What varies independently are prompts; the bootstrap resamples them.

Shapes: ``G`` groups have ``R`` labelled responses together, ``P`` prompts. Sums over resampled
prompts have ``S`` rows, the first of which is the sample itself.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Any

import numpy as np

from mpo_lightning.checks import plain
from mpo_lightning.data.check.report import (
    ColumnBias,
    Comparison,
    Contrast,
    DifferenceBin,
    Estimate,
    PlaceBin,
)
from mpo_lightning.data.check.statistics import Bools, Floats, Integers
from mpo_lightning.data.groups import DataError
from mpo_lightning.data.score_scales import normalize_scores

__all__ = ["FEWEST_PROMPTS", "LEAST_BIAS", "LEAST_SPARED", "LOW_TAU", "compare_with_trusted"]

# Limits of warnings, and what should be noticed.
LOW_TAU, TARGET_TAU = 0.3, 0.2
LEAST_SPARED, TARGET_SPARED = 0.3, 0.0
LEAST_BIAS, TARGET_BIAS = 0.05, 0.2
# Of an interval, and of all contrasts together.
ERROR = 0.05
POWER = 0.8
# Fewer prompts give no interval.
FEWEST_PROMPTS = 5
# Labels that a text of a column needs, and texts that are told apart.
FEWEST_LABELS, TEXTS = 10, 8
# Bins of differences.
QUANTILES = (0.25, 0.5, 0.75)
PLACES = ("worst", "lower", "upper", "best")
# Prompts that are resampled one by one; more are resampled in as many bundles.
BUNDLES = 2000
# Pairs that are computed at a time.
BLOCK = 1 << 20


def compare_with_trusted(
    scores: Any,
    trusted: Any,
    groups: Any = None,
    columns: Mapping[str, Any] | None = None,
    *,
    prompts: Any = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Comparison:
    """Compare scores with trusted labels.

    All arguments are arrays, tensors or lists of one shape, with an entry a response.

    Args:
        scores: scores of whole groups: (G, N), a row a group, or in any order with ``groups``.
        trusted: trusted score, on a scale of its own; NaN where there is no label.
        groups: number or name of the response's group.
        columns: for each name numbers, such as lengths, or texts, such as writers; NaN or None
            where there is no value.
        prompts: number or name of the prompt, where several groups have the same one. Defaults to
            the groups.
        resamples: number of bootstrap samples.
        seed: seed of their draws.

    Raises:
        DataError: if shapes differ, a score is not finite, or no group has two labels.
    """
    labelled = _Labelled.read(scores, trusted, groups, columns or {}, prompts)
    return _Comparer(labelled, _Resamples.draw(labelled.prompts, resamples, seed))()


# ------------------------------------------------------------------------------------- the labels


def _places(values: Floats, counts: Integers) -> Floats:
    """Share of the others of its group that each value beats, equal ones half."""
    return normalize_scores(values, counts.astype(np.int64), "rank", "group")


@dataclass(frozen=True)
class _Labelled:
    """The labelled responses of all groups that have two or more, group after group.

    Attributes:
        counts: number of each group's, (G,).
        prompts: number of its prompt, (G,).
        scores: (R,).
        trusted: (R,).
        whole: place of the score in the whole group, (R,).
        bins: number in `PLACES`, (R,); -1 where all scores of the group are equal.
        columns: numbers, float64, or texts, (R,).
        alone: labels that are the only one of their group.
    """

    counts: Integers
    prompts: Integers
    scores: Floats
    trusted: Floats
    whole: Floats
    bins: Integers
    columns: dict[str, Any]
    alone: int

    @classmethod
    def read(
        cls, scores: Any, trusted: Any, groups: Any, columns: Mapping[str, Any], prompts: Any
    ) -> "_Labelled":
        given: dict[str, Any] = {"scores": _numbers(scores, "scores")}
        shape = given["scores"].shape
        given["trusted"] = _numbers(trusted, "trusted", missing=True)
        if groups is None:
            if len(shape) != 2:
                raise DataError(f"scores of shape {shape}: give groups, or scores of shape (G, N).")
            groups = np.repeat(np.arange(shape[0])[:, None], shape[1], axis=1)
        given["groups"] = _array(groups)
        given["prompts"] = given["groups"] if prompts is None else _array(prompts)
        named = {f"columns[{name!r}]": _column(values) for name, values in columns.items()}
        for name, values in (given | named).items():
            if values.shape != shape:
                raise DataError(f"{name} has the shape {values.shape}, scores has {shape}.")
        _, of_group = np.unique(given["groups"].ravel(), return_inverse=True)
        order = np.argsort(of_group, kind="stable")
        of_group = of_group[order]
        flat = {name: values.ravel()[order] for name, values in (given | named).items()}
        counts = np.bincount(of_group)
        whole = _places(flat["scores"], counts)
        bins = _bins(flat["scores"], whole, counts)

        has = ~np.isnan(flat["trusted"])
        labels = np.bincount(of_group, has).astype(np.int64)
        used = has & (labels > 1)[of_group]
        if not used.any():
            raise DataError("trusted: no group has two labels: compare responses of one prompt.")
        kept = labels[labels > 1]
        first = np.cumsum(kept) - kept
        _, prompt = np.unique(flat["prompts"][used][first], return_inverse=True)
        return cls(
            counts=kept,
            prompts=prompt,
            scores=flat["scores"][used],
            trusted=flat["trusted"][used],
            whole=whole[used],
            bins=bins[used],
            columns={name: flat[f"columns[{name!r}]"][used] for name in columns},
            alone=int((labels == 1).sum()),
        )

    @cached_property
    def starts(self) -> Integers:
        return np.cumsum(self.counts) - self.counts

    @cached_property
    def different(self) -> Integers:
        """Number of different scores of the group that a response belongs to, (R,)."""
        owner = np.repeat(np.arange(len(self.counts)), self.counts)
        values, number = np.unique(self.scores, return_inverse=True)
        pairs = np.unique(owner * len(values) + number)
        result: Integers = np.bincount(pairs // len(values))[owner]
        return result

    def sums(self, values: Floats) -> Floats:
        """Sum over each group's responses, (R,) to (G,)."""
        result: Floats = np.add.reduceat(values.astype(np.float64), self.starts)
        return result

    def centred(self, values: Floats) -> Floats:
        """Subtract the group's mean, (R,)."""
        result: Floats = values - np.repeat(self.sums(values) / self.counts, self.counts)
        return result

    def places(self, values: Floats) -> Floats:
        """Place among the labelled responses of the group, (R,)."""
        return _places(values, self.counts)

    def blocks(self) -> Iterator[tuple[Integers, Integers]]:
        """Yield numbers of groups of one size m, (B,), and of their responses, (B, m)."""
        for size in np.unique(self.counts).tolist():
            groups = np.flatnonzero(self.counts == size)
            step = max(BLOCK // size**2, 1)
            for block in np.split(groups, range(step, len(groups), step)):
                yield block, self.starts[block][:, None] + np.arange(size)


def _array(values: Any) -> Any:
    return values if isinstance(values, np.ndarray) else np.asarray(plain(values))


def _numbers(values: Any, name: str, *, missing: bool = False) -> Floats:
    try:
        result: Floats = _array(values).astype(np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name}: expected numbers, one for each response ({error}).") from error
    bad = np.isinf(result) if missing else ~np.isfinite(result)
    if bad.any():
        raise DataError(f"{name}: found {result[bad][0]:g}; expected finite numbers.")
    return result


def _column(values: Any) -> Any:
    """Numbers as float64, NaN where missing; anything else as texts, None where missing."""
    if isinstance(values, np.ndarray) and values.dtype.kind in "biuf":
        return values.astype(np.float64)
    array = np.asarray(plain(values), dtype=object)
    known = [value for value in array.flat if value is not None]
    if all(isinstance(value, int | float) for value in known):
        return array.astype(np.float64)
    # A data frame has NaN where a text is missing.
    texts = [
        None if value is None or (isinstance(value, float) and math.isnan(value)) else str(value)
        for value in array.flat
    ]
    return np.array([*texts, None], dtype=object)[:-1].reshape(array.shape)


def _bins(scores: Floats, places: Floats, counts: Integers) -> Integers:
    starts = np.cumsum(counts) - counts
    high = np.repeat(np.maximum.reduceat(scores, starts), counts)
    low = np.repeat(np.minimum.reduceat(scores, starts), counts)
    bins = np.where(places >= 0.5, PLACES.index("upper"), PLACES.index("lower"))
    bins = np.where(scores == low, PLACES.index("worst"), bins)
    bins = np.where(scores == high, PLACES.index("best"), bins)
    return np.where(low == high, -1, bins)


# ------------------------------------------------------------------------------------- resampling


def _students_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's distribution, by its expansion (Abramowitz and Stegun 26.7.5)."""
    z = NormalDist().inv_cdf(probability)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return float(sum(term / degrees**power for power, term in enumerate(terms)))


@dataclass(frozen=True)
class _Resamples:
    """Bootstrap samples of the prompts.

    Attributes:
        prompts: number of each group's prompt, or bundle of prompts, (G,).
        weights: how often each one is in each sample, (S, P); the first row is all ones.
    """

    prompts: Integers
    weights: Floats

    @classmethod
    def draw(cls, prompts: Integers, resamples: int, seed: int) -> "_Resamples":
        prompts = prompts % BUNDLES
        count = int(prompts.max()) + 1
        draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), resamples)
        return cls(prompts, np.concatenate([np.ones((1, count)), draws]))

    def sums(self, values: Floats) -> Floats:
        """Sum a value of each group, (G,), over each sample, (S,)."""
        count = self.weights.shape[1]
        result: Floats = self.weights @ np.bincount(self.prompts, values, count)
        return result

    def contributing(self, values: Floats) -> int:
        """Number of prompts with a group whose value, (G,), is not zero."""
        return len(np.unique(self.prompts[values != 0]))

    def std(self, values: Floats) -> float:
        """Standard error of a statistic, (S,), of which some samples may lack a value."""
        others = values[1:][np.isfinite(values[1:])]
        count = self.weights.shape[1]
        if len(others) < 2 or count < 2:
            return math.nan
        # The bootstrap's variance is that of a population of these prompts.
        return float(others.std(ddof=1)) * math.sqrt(count / (count - 1))

    def reach(self, values: Floats, prompts: int, error: float) -> float:
        """Half width of the interval of a statistic, (S,), that errs so often on each side.

        Student's quantile times the bootstrap's standard error; NaN for too few ``prompts``.
        """
        if prompts < FEWEST_PROMPTS:
            return math.nan
        return _students_quantile(1 - error, prompts - 1) * self.std(values)


def _known(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _quotient(above: Floats, below: Floats) -> Floats:
    result: Floats = np.divide(
        above, below, out=np.full_like(above, np.nan), where=np.abs(below) > 1e-12
    )
    return result


# ------------------------------------------------------------------------------------- statistics


@dataclass(frozen=True)
class _Pairs:
    """Pairs of a group's labelled responses with different scores.

    Attributes:
        groups: group of each pair.
        differences: difference in score, > 0.
        agree: 1 where the trusted labels agree with the order, 0.5 where they are equal, or 0.
        bins: number of the bin of differences.
    """

    groups: Integers
    differences: Floats
    agree: Floats
    bins: Integers


class _Comparer:
    def __init__(self, labelled: _Labelled, samples: _Resamples) -> None:
        self.labelled, self.samples = labelled, samples
        self.judged = labelled.centred(labelled.places(labelled.scores))
        self.trusted = labelled.centred(labelled.places(labelled.trusted))
        self.effects = [
            (name, text, values)
            for name, column in labelled.columns.items()
            for text, values in self._effects(column)
        ]
        # Four kinds of warnings besides those on columns.
        self.error = ERROR / (4 + len(self.effects))

    def __call__(self) -> Comparison:
        labelled = self.labelled
        self._compare_pairs()
        tau = self._mean(self.taus, ~np.isnan(self.taus))
        differences, spared = self._differences()
        return Comparison(
            prompts=int(labelled.prompts.max()) + 1,
            groups=len(labelled.counts),
            labels=len(labelled.scores),
            alone=labelled.alone,
            tests=4 + len(self.effects),
            tau=self._estimate(*tau, -1.0, 1.0),
            order=self._contrast(*tau, limit=LOW_TAU, target=TARGET_TAU),
            differences=differences,
            spared=spared,
            places=[self._place(number) for number in range(len(PLACES))],
            best_shortfall=self._end(PLACES.index("best"), -1),
            worst_excess=self._end(PLACES.index("worst"), 1),
            columns=[self._bias(*effect) for effect in self.effects],
        )

    # Estimates from a statistic of each sample, (S,), and the number of prompts that it is of.

    def _estimate(self, values: Floats, prompts: int, low: float, high: float) -> Estimate:
        value = float(values[0])
        reach = self.samples.reach(values, prompts, ERROR / 2)
        ends = [max(low, value - reach), min(high, value + reach)]
        if reach == 0 and value in (low, high):
            # Where all prompts agree the bootstrap has no width: the exact binomial bound has.
            width = (high - low) * (1 - (ERROR / 2) ** (1 / prompts))
            ends = [max(low, value - width), min(high, value + width)]
        if math.isnan(reach):
            ends = [math.nan, math.nan]
        return Estimate(value=_known(value), low=_known(ends[0]), high=_known(ends[1]))

    def _contrast(
        self,
        values: Floats,
        prompts: int,
        *more: Floats,
        limit: float,
        target: float,
        sides: int = 1,
    ) -> Contrast:
        """Return the contrast of a statistic.

        Args:
            values: the statistic, (S,).
            prompts: number of prompts that it is of.
            more: the statistic under other assumptions; the interval covers them all.
            limit: that of the warning.
            target: value that should be noticed: below the limit, where low values are warned of.
            sides: 2 if both signs are.
        """
        every = (values, *more)
        error = self.error / sides
        reach = [self.samples.reach(each, prompts, error) for each in every]
        widest = max(reach)
        power = NormalDist().inv_cdf(POWER) * max(map(self.samples.std, every))
        if target < limit:
            noticeable, distance = limit - widest - power, limit - target
        else:
            # It must be told from zero, and exceed the limit.
            noticeable, distance = max(limit, widest) + power, target
        if widest == 0:
            # Where all prompts agree nothing is known of how much they vary.
            noticeable = widest = math.nan
        needed = len(self.labelled.scores) * ((widest + power) / distance) ** 2
        return Contrast(
            value=_known(values[0]),
            low=_known(min(each[0] - size for each, size in zip(every, reach, strict=True))),
            high=_known(max(each[0] + size for each, size in zip(every, reach, strict=True))),
            noticeable=_known(noticeable),
            needed=math.ceil(needed) if math.isfinite(needed) else None,
            target=target,
        )

    def _mean(self, values: Floats, known: Bools) -> tuple[Floats, int]:
        """Mean over groups of a value of each, (G,), where it is known."""
        count = known.astype(np.float64)
        sums = self.samples.sums(np.where(known, values, 0.0))
        return _quotient(sums, self.samples.sums(count)), self.samples.contributing(count)

    def _share(self, groups: Integers, agree: Floats) -> tuple[Floats, int]:
        """Mean of values that belong to groups of these numbers."""
        size = len(self.labelled.counts)
        count = np.bincount(groups, minlength=size).astype(np.float64)
        sums = self.samples.sums(np.bincount(groups, agree, size).astype(np.float64))
        return _quotient(sums, self.samples.sums(count)), self.samples.contributing(count)

    # Order and sizes of differences.

    def _compare_pairs(self) -> None:
        """Compute tau-b of each group, (G,), all pairs, and each response's share of agreement."""
        labelled = self.labelled
        self.taus = np.full(len(labelled.counts), np.nan)
        # Of each response: its pairs with different scores, and the sum of their agreement.
        self.paired, self.agreed = np.zeros((2, len(labelled.scores)))
        parts = []
        for groups, slots in labelled.blocks():
            scores, trusted = labelled.scores[slots], labelled.trusted[slots]
            # Beyond the range of float64 the largest number of it.
            with np.errstate(over="ignore"):
                difference, other = (
                    np.nan_to_num(values[:, :, None] - values[:, None, :])
                    for values in (scores, trusted)
                )
            judged = np.sign(difference)
            both = judged * np.sign(other)
            ordered = np.abs(judged)
            varies = [
                (values[:, :, None] != values[:, None, :]).sum((1, 2))
                for values in (scores, trusted)
            ]
            size = np.sqrt(varies[0].astype(np.float64) * varies[1])
            self.taus[groups] = _quotient(both.sum((1, 2)), size)
            agree = (1 + both) / 2
            self.paired[slots], self.agreed[slots] = ordered.sum(2), (ordered * agree).sum(2)
            above = judged > 0
            parts.append((groups[np.nonzero(above)[0]], difference[above], agree[above]))
        of_groups, differences, agree = (np.concatenate(each) for each in zip(*parts, strict=True))
        edges = np.quantile(differences, QUANTILES) if len(differences) else np.zeros(0)
        bins = np.digitize(differences, np.unique(edges))
        _, bins = np.unique(bins, return_inverse=True)
        self.pairs = _Pairs(of_groups, differences, agree, bins)

    def _differences(self) -> tuple[list[DifferenceBin], Contrast]:
        pairs, found = self.pairs, []
        last = int(pairs.bins.max(initial=-1))
        for number in range(last + 1):
            of_bin = pairs.bins == number
            share = self._share(pairs.groups[of_bin], pairs.agree[of_bin])
            found.append(
                DifferenceBin(
                    low=float(pairs.differences[of_bin].min()),
                    high=float(pairs.differences[of_bin].max()),
                    pairs=int(of_bin.sum()),
                    agree=self._estimate(*share, 0.0, 1.0),
                )
            )
        large = pairs.bins == last
        top, rest = (
            self._share(pairs.groups[which], pairs.agree[which]) for which in (large, ~large)
        )
        spared = self._contrast(
            1 - _quotient(1 - top[0], 1 - rest[0]),
            min(top[1], rest[1]),
            limit=LEAST_SPARED,
            target=TARGET_SPARED,
        )
        return found, spared

    # Places.

    def _place(self, number: int) -> PlaceBin:
        labelled = self.labelled
        within = (labelled.bins == number).astype(np.float64)
        counts = labelled.sums(within)
        places = self.trusted + 0.5
        place = _quotient(
            self.samples.sums(labelled.sums(within * places)), self.samples.sums(counts)
        )
        agree = _quotient(
            self.samples.sums(labelled.sums(within * self.agreed)),
            self.samples.sums(labelled.sums(within * self.paired)),
        )
        prompts = self.samples.contributing(counts)
        return PlaceBin(
            name=PLACES[number],
            labels=int(within.sum()),
            place=self._estimate(place, prompts, 0.0, 1.0),
            agree=self._estimate(agree, prompts, 0.0, 1.0),
        )

    def _products(self, x: Floats, y: Floats) -> Floats:
        """Sum of products of the responses, (R,), over each sample, (S,)."""
        return self.samples.sums(self.labelled.sums(x * y))

    def _end(self, number: int, sign: int) -> Contrast:
        """Deviation of the trusted place at an end of the scores from the line of the others.

        The coefficient of the end's indicator in the least squares of the trusted place on it and
        on the score's place in the whole group, all centred within groups, over the groups of three
        different scores or more: of two each is an end.
        """
        labelled, product = self.labelled, self._products
        several = labelled.different >= 3
        place = np.where(several, labelled.centred(labelled.whole), 0.0)
        is_end = (labelled.bins == number).astype(np.float64)
        end = np.where(several, labelled.centred(is_end), 0.0)
        xx, xe, ee = product(place, place), product(place, end), product(end, end)
        determinant = xx * ee - xe * xe
        deviation = _quotient(
            xx * product(end, self.trusted) - xe * product(place, self.trusted),
            np.where(determinant > 1e-3 * xx * ee, determinant, 0.0),
        )
        prompts = self.samples.contributing(labelled.sums(end * end))
        return self._contrast(sign * deviation, prompts, limit=LEAST_BIAS, target=TARGET_BIAS)

    # Columns.

    def _effects(self, column: Any) -> list[tuple[str | None, Floats]]:
        """List what is set against what in a column: a text, and the centred variable, (R,)."""
        labelled = self.labelled
        numeric = column.dtype == np.float64
        missing = np.isnan(column) if numeric else column == None  # noqa: E711 (each entry)
        whole = np.repeat(labelled.sums(missing) == 0, labelled.counts)

        def variable(values: Floats) -> Floats:
            return np.where(whole, labelled.centred(values), 0.0)

        if numeric:
            found = [(None, variable(labelled.places(np.where(missing, 0.0, column))))]
        else:
            counts = Counter(column[whole].tolist())
            texts = [text for text, count in counts.most_common(TEXTS) if count >= FEWEST_LABELS]
            # Of two texts one is the other's opposite.
            texts = texts[:1] if len(counts) == 2 else texts
            found = [(text, variable((column == text).astype(np.float64))) for text in texts]
        return [(text, values) for text, values in found if values.any()]

    def _bias(self, name: str, text: str | None, values: Floats) -> ColumnBias:
        product, column = self._products, self.labelled.columns[name]
        size = product(values, values)
        judged = _quotient(product(self.judged, values), size)
        trusted = _quotient(product(self.trusted, values), size)
        spread = np.sqrt(product(self.judged, self.judged) * product(self.trusted, self.trusted))
        alike = _quotient(product(self.judged, self.trusted), spread)
        # What the column has to do with quality shows in noisy scores by as much less as they are
        # noisier than the labels: by nothing, or, if the labels are exact, by the correlation.
        at_most = judged - np.clip(np.nan_to_num(alike), 0.0, 1.0) * trusted
        prompts = self.samples.contributing(self.labelled.sums(values * values))
        of_text = ~np.isnan(column) if text is None else column == text
        return ColumnBias(
            column=name,
            value=text,
            labels=int(of_text.sum()),
            judged=self._estimate(judged, prompts, -1.0, 1.0),
            trusted=self._estimate(trusted, prompts, -1.0, 1.0),
            beyond=self._contrast(
                judged - trusted, prompts, at_most, limit=LEAST_BIAS, target=TARGET_BIAS, sides=2
            ),
        )
