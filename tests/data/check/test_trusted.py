"""Statistics of scores against trusted labels, each against an independent computation."""

import math
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from mpo_lightning.data.check.report import Comparison
from mpo_lightning.data.check.trusted import _students_quantile, compare_with_trusted
from mpo_lightning.data.check.warnings import find_trusted_warnings
from mpo_lightning.data.groups import DataError


@pytest.fixture(scope="module")
def ragged() -> dict[str, Any]:
    """Groups of 1 to 9 responses in any order, with ties, of which some are labelled."""
    draw = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), draw.integers(1, 10, 40))
    draw.shuffle(groups)
    quality = draw.standard_normal(len(groups))
    scores = np.round(quality + draw.standard_normal(len(groups)), 1)
    trusted = np.round(2 * quality)
    trusted[draw.random(len(groups)) < 0.3] = np.nan
    scores[groups == 3] = 1.0
    lengths = draw.integers(1, 50, len(groups)).astype(float)
    writers = draw.choice(["a", "b", "c"], len(groups))
    return {
        "scores": scores,
        "trusted": trusted,
        "groups": groups,
        "columns": {"length": lengths, "writer": writers.tolist()},
    }


@pytest.fixture(scope="module")
def found(ragged: dict[str, Any]) -> Comparison:
    return compare_with_trusted(**ragged)


def place(values: Any, value: float) -> float:
    """Share of the others that a value beats."""
    values = np.asarray(values)
    return float(((values < value).sum() + ((values == value).sum() - 1) / 2) / (len(values) - 1))


class Table:
    """The labelled responses, one row each, with a dummy for each group."""

    def __init__(self, ragged: dict[str, Any]) -> None:
        scores, trusted, groups = (ragged[name] for name in ("scores", "trusted", "groups"))
        lengths, writers = ragged["columns"].values()
        rows = []
        for group in np.unique(groups):
            whole = np.flatnonzero(groups == group)
            labelled = whole[~np.isnan(trusted[whole])]
            if len(labelled) < 2:
                continue
            for i in labelled:
                rows.append(
                    (
                        i,
                        group,
                        place(scores[labelled], scores[i]),
                        place(trusted[labelled], trusted[i]),
                        place(scores[whole], scores[i]),
                        scores[i] == scores[whole].max() > scores[whole].min(),
                        scores[i] == scores[whole].min() < scores[whole].max(),
                        place(lengths[labelled], lengths[i]),
                        writers[i] == "b",
                    )
                )
        columns = np.array(rows, dtype=float).T
        self.index, self.group = columns[:2].astype(int)
        self.judged, self.trusted, self.whole, self.best, self.worst = columns[2:7]
        self.length, self.writer = columns[7:]

    def coefficient(self, y: Any, *x: Any, least: int = 1) -> float:
        """Least squares of y on the last of x, the others, and an intercept for each group.

        Groups of fewer than ``least`` different scores are left out.
        """
        rows = [len(set(self.judged[self.group == group])) >= least for group in self.group]
        dummies = (self.group[:, None] == np.unique(self.group)).astype(float)
        design = np.column_stack([dummies, *x])[rows]
        return float(np.linalg.lstsq(design, y[rows], rcond=None)[0][-1])


@pytest.fixture(scope="module")
def table(ragged: dict[str, Any]) -> Table:
    return Table(ragged)


def test_counts(ragged: dict[str, Any], found: Comparison, table: Table) -> None:
    labels = [(~np.isnan(ragged["trusted"][ragged["groups"] == g])).sum() for g in range(40)]
    assert found.labels == len(table.index) == sum(n for n in labels if n > 1)
    assert found.groups == found.prompts == sum(n > 1 for n in labels)
    assert found.alone == labels.count(1) > 0
    assert found.tests == 4 + 1 + 3 == 4 + len(found.columns)


def test_tau_is_scipys_of_each_group(
    ragged: dict[str, Any], found: Comparison, table: Table
) -> None:
    taus = []
    for group in np.unique(table.group):
        members = table.index[table.group == group]
        tau = stats.kendalltau(ragged["scores"][members], ragged["trusted"][members]).statistic
        if not math.isnan(tau):
            taus.append(tau)
    assert len(taus) < found.groups
    assert found.tau.value == pytest.approx(np.mean(taus))
    # Of a mean over prompts the bootstrap's interval is about Student's.
    expected = stats.t.interval(0.95, len(taus) - 1, np.mean(taus), stats.sem(taus))
    assert (found.tau.low, found.tau.high) == pytest.approx(expected, abs=0.02)
    assert found.order.value == found.tau.value
    assert found.order.low < found.tau.low


def test_agreement_by_difference_and_by_place(
    ragged: dict[str, Any], found: Comparison, table: Table
) -> None:
    scores, trusted = ragged["scores"], ragged["trusted"]
    pairs = []
    of_end: dict[str, list[float]] = {"best": [], "worst": []}
    for group in np.unique(table.group):
        (rows,) = np.nonzero(table.group == group)
        for a, b in combinations(rows, 2):
            difference = scores[table.index[a]] - scores[table.index[b]]
            if difference == 0:
                continue
            order = np.sign(difference * (trusted[table.index[a]] - trusted[table.index[b]]))
            pairs.append((abs(difference), (1 + order) / 2))
            for row in (a, b):
                for name, agree in of_end.items():
                    if getattr(table, name)[row]:
                        agree.append((1 + order) / 2)
    assert sum(bin.pairs for bin in found.differences) == len(pairs)
    assert len(found.differences) == 4
    for bin in found.differences:
        agree = [right for size, right in pairs if bin.low <= size <= bin.high]
        assert bin.pairs == len(agree)
        assert bin.agree.value == pytest.approx(np.mean(agree))
    largest = found.differences[-1].low
    wrong, others = (
        np.mean([1 - right for size, right in pairs if (size >= largest) == large])
        for large in (True, False)
    )
    assert found.spared.value == pytest.approx(1 - wrong / others)
    places = {bin.name: bin for bin in found.places}
    assert list(places) == ["worst", "lower", "upper", "best"]
    for name, agree in of_end.items():
        within = getattr(table, name) == 1
        assert places[name].labels == within.sum()
        assert places[name].place.value == pytest.approx(table.trusted[within].mean())
        assert places[name].agree.value == pytest.approx(np.mean(agree))
    upper = (table.whole >= 0.5) & (table.best == 0) & (table.worst == 0)
    upper &= np.array([len(set(scores[ragged["groups"] == g])) > 1 for g in table.group])
    assert places["upper"].labels == upper.sum()


def test_contrasts_are_least_squares_with_an_intercept_for_each_group(
    found: Comparison, table: Table
) -> None:
    best = table.coefficient(table.trusted, table.whole, table.best, least=3)
    assert found.best_shortfall.value == pytest.approx(-best)
    worst = table.coefficient(table.trusted, table.whole, table.worst, least=3)
    assert found.worst_excess.value == pytest.approx(worst)
    columns = {(column.column, column.value): column for column in found.columns}
    for key, values in ((("length", None), table.length), (("writer", "b"), table.writer)):
        judged = table.coefficient(table.judged, values)
        trusted = table.coefficient(table.trusted, values)
        assert columns[key].judged.value == pytest.approx(judged)
        assert columns[key].trusted.value == pytest.approx(trusted)
        assert columns[key].beyond.value == pytest.approx(judged - trusted)
    assert columns["writer", "b"].labels == table.writer.sum()


def test_only_the_order_of_scores_counts_but_for_sizes_of_differences(
    ragged: dict[str, Any], found: Comparison
) -> None:
    other = compare_with_trusted(
        **{
            **ragged,
            "scores": np.exp(3 * ragged["scores"]),
            "trusted": 7 - 1 / (4 + ragged["trusted"] - np.nanmin(ragged["trusted"])),
        }
    )
    for name in ("tau", "order", "places", "best_shortfall", "worst_excess", "columns"):
        assert getattr(other, name) == getattr(found, name)
    assert other.differences != found.differences


def test_groups_as_rows_of_a_tensor() -> None:
    draw = torch.Generator().manual_seed(1)
    gold = torch.randn(12, 6, generator=draw, dtype=torch.float64)
    scores = gold + torch.randn(12, 6, generator=draw, dtype=torch.float64)
    columns = {"longer": torch.rand(12, 6, generator=draw) > 0.5}
    rows = compare_with_trusted(scores, gold, columns=columns)
    order = torch.randperm(72, generator=draw)
    names = [f"prompt {i:02}" for i in range(12) for _ in range(6)]
    flat = compare_with_trusted(
        scores.flatten()[order].tolist(),
        gold.flatten()[order],
        [names[i] for i in order.tolist()],
        {"longer": columns["longer"].flatten()[order]},
    )
    assert flat.tau.low == pytest.approx(rows.tau.low)
    assert flat.columns[0].beyond.high == pytest.approx(rows.columns[0].beyond.high)


def test_groups_of_one_prompt_are_resampled_together() -> None:
    """Each prompt three times over is no more knowledge: the intervals stay as wide."""
    draw = np.random.default_rng(2)
    gold = draw.standard_normal((20, 5))
    scores = gold + draw.standard_normal((20, 5))
    once = compare_with_trusted(scores, gold)
    prompts = np.repeat(np.tile(np.arange(20), 3)[:, None], 5, axis=1)
    arguments = np.tile(scores, (3, 1)), np.tile(gold, (3, 1))
    thrice = compare_with_trusted(*arguments, prompts=prompts)
    assert (thrice.prompts, thrice.groups) == (20, 60)
    assert (thrice.order.low, thrice.order.high) == (once.order.low, once.order.high)
    assert thrice.order.noticeable == once.order.noticeable
    apart = compare_with_trusted(*arguments)
    assert apart.order.high - apart.order.low < 0.7 * (once.order.high - once.order.low)


@pytest.mark.parametrize("degrees", [4, 5, 9, 30, 200])
def test_students_quantile(degrees: int) -> None:
    for probability in (0.975, 0.99, 0.9975):
        exact = stats.t.ppf(probability, degrees)
        assert _students_quantile(probability, degrees) == pytest.approx(exact, rel=0.02)


def test_agreement_without_exception_still_has_an_interval() -> None:
    scores = np.tile(np.arange(4.0), (10, 1))
    found = compare_with_trusted(scores, scores)
    # If a share p of prompts were so, ten of ten would be with probability p ** 10.
    assert found.tau.low == pytest.approx(1 - 2 * (1 - 0.025**0.1))
    assert found.tau.high == 1
    assert found.differences[-1].agree.low == pytest.approx(0.025**0.1)
    assert found.order.low == found.order.high == 1
    assert found.order.noticeable is found.order.needed is None
    # Nothing is left to be spared.
    assert found.spared.value is None
    assert not find_trusted_warnings(found)


def test_too_few_prompts_have_no_intervals_and_one_warning() -> None:
    scores = np.tile(np.arange(4.0), (4, 1))
    found = compare_with_trusted(scores, -scores, columns={"x": scores})
    assert found.tau.value == -1
    assert found.tau.low is found.order.low is found.order.noticeable is found.order.needed is None
    (warning,) = find_trusted_warnings(found)
    assert warning.name == "few-trusted-labels"


def test_what_labels_do_not_determine_has_no_value() -> None:
    """Of pairs the end is all there is; scores of one value have no pairs; columns may be empty."""
    draw = np.random.default_rng(3)
    pairs = compare_with_trusted(draw.random((20, 2)), draw.random((20, 2)))
    assert pairs.best_shortfall.value is pairs.best_shortfall.noticeable is None
    assert pairs.tau.value is not None
    # Nor do two scores in groups of several sizes.
    groups = np.repeat(np.arange(30), draw.integers(2, 9, 30))
    gold = draw.standard_normal(len(groups))
    liked = compare_with_trusted(gold + draw.standard_normal(len(gold)) > 0, gold, groups)
    assert liked.best_shortfall.value is liked.worst_excess.value is liked.spared.value is None
    assert liked.tau.value is not None
    columns = {"same": np.ones((20, 3)), "none": [[None] * 3] * 20, "rare": [["a", "b", "b"]] * 20}
    columns["rare"] = [["b", "b", "a"]] * 5 + [["b", "b", "b"]] * 15
    equal = compare_with_trusted(np.ones((20, 3)), draw.random((20, 3)), columns=columns)
    assert equal.tau.value is equal.spared.value is equal.best_shortfall.value is None
    assert equal.differences == []
    assert [(column.column, column.value) for column in equal.columns] == [("rare", "b")]
    assert not find_trusted_warnings(equal)


def test_scores_at_the_ends_of_the_range() -> None:
    scores = np.array([[1.7e308, -1.7e308, 0.0], [5e-324, 0.0, 1e-310]] * 5)
    found = compare_with_trusted(scores, scores)
    assert found.tau.value == 1
    assert found.differences[-1].high == np.finfo(np.float64).max


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"scores": [1.0, 2.0, 3.0], "groups": [0, 0, 0]},
            r"trusted has the shape \(1, 3\), scores has \(3,\)",
        ),
        (
            {"scores": [1.0, 2.0, 3.0], "trusted": [1.0, 2.0, 3.0]},
            "give groups, or scores of shape",
        ),
        ({"scores": [[1.0, math.nan, 3.0]]}, "scores: found nan; expected finite numbers"),
        ({"scores": [[1.0, "high", 3.0]]}, "scores: expected numbers"),
        ({"trusted": [[1.0, math.inf, 3.0]]}, "trusted: found inf"),
        ({"trusted": [[1.0, math.nan, math.nan]]}, "no group has two labels"),
        ({"columns": {"x": [1, 2]}}, r"columns\['x'\] has the shape \(2,\)"),
        ({"prompts": [1, 2]}, "prompts has the shape"),
    ],
    ids=lambda value: value.split(",")[0] if isinstance(value, str) else "",
)
def test_wrong_arguments(changes: dict[str, Any], message: str) -> None:
    arguments = {"scores": [[1.0, 2.0, 3.0]], "trusted": [[1.0, 2.0, 3.0]], **changes}
    with pytest.raises(DataError, match=message):
        compare_with_trusted(**arguments)
