"""All methods: the same data, order and number of steps, and learning rates of their own."""

from typing import Any

from mpo_lightning.studies.lab.conditions import Form
from mpo_lightning.studies.methods import METHODS, study
from tests.studies.made_up import MadeUp


def test_methods_are_trained_alike() -> None:
    runner: Any = MadeUp()
    found = study(runner, Form())
    compared = [run for run in runner.seen if run.seed < 1000]
    assert len(compared) == 10 * len(METHODS)
    first = {(run.seed, run.prompts, run.responses, run.epochs, run.judge) for run in compared}
    assert len(first) == 10
    tuning = [run for run in runner.seen if run.seed >= 1000]
    assert len(tuning) == 3 * 2 * len(METHODS)
    assert {run.lr for run in tuning} == {5e-4, 1e-3, 2e-3}
    # All rates give the same here, so the first is chosen.
    assert {entry["lr"] for entry in found.summary["learning_rates"].values()} == {5e-4}
