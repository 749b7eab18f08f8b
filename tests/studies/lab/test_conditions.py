"""Contrasts: differences of differences paired by world, and what Holm's method is over."""

from functools import partial
from math import sqrt
from typing import Any

import numpy as np
import pytest

from mpo_lightning.losses import MPO
from mpo_lightning.studies.lab.conditions import (
    END,
    Condition,
    Contrast,
    RunOutcome,
    contrasts,
    differences,
    estimates,
    paired,
    run_tables,
)
from mpo_lightning.studies.lab.statistics import detectable, holm, paired_t_test, wilcoxon
from mpo_lightning.studies.lab.training import TrainingRun
from tests.studies.made_up import CONSTANT

SEEDS = range(6)
VALUES = {
    label: np.random.default_rng(number).normal(number, 0.5, len(SEEDS))
    for number, label in enumerate(("a", "b", "c", "d"))
}


def outcome(label: str, seed: int, gold: float, reach: float = 1.0) -> RunOutcome:
    """Gold is linear in the root of the divergence: at 0.5 nat it is the gold given."""
    trajectory = [
        {
            **dict.fromkeys((*CONSTANT, "bias"), 0.5),
            "step": float(step),
            "kl": reach * step**2 / 16,
            "gold": gold * step / 4 * sqrt(2 * reach),
        }
        for step in range(5)
    ]
    result: dict[str, Any] = {"trajectory": trajectory, "groups": 8, "dropped": 0, "seconds": 1.0}
    condition = Condition(label, partial(TrainingRun, loss=MPO(beta=0.1)), {"method": label})
    return RunOutcome(condition, seed, result)


@pytest.fixture
def outcomes() -> list[RunOutcome]:
    made = [outcome(n, seed, of[seed]) for n, of in VALUES.items() for seed in SEEDS]
    # A run of d that does not come to 0.5 nat.
    return [*made, outcome("a", 6, 5.0), outcome("d", 6, 5.0, reach=0.4)]


def test_contrasts(outcomes: list[RunOutcome]) -> None:
    named = [
        Contrast("one", ("b",), ("a",), "+"),
        Contrast("interaction", ("d", "a"), ("c", "b"), "none"),
    ]
    found = contrasts(outcomes, named)
    expected = [VALUES["b"] - VALUES["a"], VALUES["d"] + VALUES["a"] - VALUES["c"] - VALUES["b"]]
    tests = [paired_t_test(values.tolist()) for values in expected]
    for row, values, test in zip(found, expected, tests, strict=True):
        assert row["difference"]["mean"] == pytest.approx(values.mean())
        assert (row["difference"]["count"], row["worlds"]) == (6, 6)
        assert row["won"] == (values > 0).sum()
        assert row["p"] == pytest.approx(test.p)
        assert row["p_wilcoxon"] == pytest.approx(wilcoxon(values.tolist()))
        assert row["detectable"] == pytest.approx(detectable(values.tolist()))
        assert row["detectable_after_holm"] == pytest.approx(detectable(values.tolist(), tests=2))
    # Over the contrasts that were named, and nothing else.
    assert [row["p_holm"] for row in found] == pytest.approx(holm([test.p for test in tests]))
    (alone,) = contrasts(outcomes, named[1:])
    assert alone["p_holm"] == alone["p"] == found[1]["p"]


def test_worlds_that_did_not_get_there_are_left_out(outcomes: list[RunOutcome]) -> None:
    assert set(paired(outcomes, ("d",), ("a",))) == set(SEEDS)
    assert set(paired(outcomes, ("d",), ("a",), where=END)) == {*SEEDS, 6}
    assert estimates(outcomes)["d"]["gold"].count == 6
    (row,) = differences(outcomes, [("d", "a")])
    assert "p" not in row
    assert row["worlds"] == 6
    assert row["difference"]["mean"] == pytest.approx((VALUES["d"] - VALUES["a"]).mean())


def test_a_reader_can_compute_readings_from_the_trajectories(outcomes: list[RunOutcome]) -> None:
    tables = run_tables(outcomes)
    rows = {(row["condition"], row["seed"], row["at"]): row for row in tables["runs"]}
    points = [r for r in tables["trajectories"] if (r["condition"], r["seed"]) == ("b", 3)]
    root, gold = [sqrt(point["kl"]) for point in points], [point["gold"] for point in points]
    read = rows["b", 3, 0.5]
    assert read["gold"] == pytest.approx(np.interp(sqrt(0.5), root, gold), rel=1e-5)
    assert read["method"] == "b"
    assert (rows["d", 6, 0.5]["reached"], rows["d", 6, 0.5]["gold"]) == (False, "")
    assert rows["d", 6, END]["kl"] == 0.4
