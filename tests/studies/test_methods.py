"""All methods: the same data, order and number of steps, and learning rates of their own."""

from typing import Any

import pytest
from scipy import stats

from mpo_lightning.studies.lab.conditions import Findings, Form
from mpo_lightning.studies.methods import METHODS, TUNING_SEEDS, study
from tests.studies.made_up import MadeUp

WORLDS = 3


@pytest.fixture(scope="module")
def made() -> tuple[Findings, MadeUp]:
    runner: Any = MadeUp()
    return study(runner, Form(seeds=WORLDS)), runner


def test_methods_are_trained_alike(made: tuple[Findings, MadeUp]) -> None:
    found, runner = made
    compared = [run for run in runner.seen if run.seed not in TUNING_SEEDS]
    assert len(compared) == WORLDS * 2 * len(METHODS)
    # To the end, whatever the divergence; each with 1,280 responses.
    assert {run.until for run in compared} == {None}
    assert {run.prompts * run.responses for run in compared} == {1280}
    alike = {
        (run.seed, run.responses, run.epochs, run.judge, run.sampling)
        for run in compared
        if run.responses == 10
    }
    assert len(alike) == WORLDS
    assert sum(run.responses == 2 for run in compared) == WORLDS * 2
    tuning = [run for run in runner.seen if run.seed in TUNING_SEEDS]
    assert len(tuning) == 3 * 2 * 2 * len(METHODS)
    assert {run.lr for run in tuning} == {5e-4, 1e-3, 2e-3}
    # All rates give the same here, so the first is chosen.
    assert {entry["lr"] for entry in found.summary["learning_rates"].values()} == {5e-4}
    assert {run.lr for run in compared} == {5e-4}


def test_maps_are_held_beside_gold(made: tuple[Findings, MadeUp]) -> None:
    summary = made[0].summary
    maps, near = summary["maps"], summary["measures"]["0.25"]
    for beta in ("0.1", "1"):
        names = [f"beta {beta}: {method}" for method in METHODS]
        expected = stats.pearsonr(
            [maps[name]["snr"]["mean"] for name in names],
            [near[name]["gold"]["mean"] for name in names],
        )
        predicted = summary["predicted"][f"beta {beta}"]
        assert predicted["methods"] == len(METHODS)
        assert predicted["pearson"] == pytest.approx(expected.statistic)
