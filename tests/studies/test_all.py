"""Every study, in both forms, on results made up here; what the plan of the studies says holds."""

import json
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mpo_lightning.commands.study import STUDIES
from mpo_lightning.studies.lab.conditions import Findings, Form
from tests.studies.made_up import MadeUp

PLAN = (Path(__file__).parents[2] / "docs" / "plan.md").read_text("utf-8")
# As the plan writes what is expected.
SIGNS = {
    "none": "level",
    "none at beta 0.1, + at beta 1": "level at .1, + at 1",
    "-": "\N{MINUS SIGN}",
}
# Worlds of choosing learning rates, and of trying losses before the plan was written.
TUNING, TRIED = {900, 901}, {9000, 9001}


def study(name: str, form: Form, *, reaches: bool = True) -> tuple[Findings, MadeUp]:
    runner: Any = MadeUp(reaches=reaches)
    found: Findings = import_module(f"mpo_lightning.studies.{name}").study(runner, form)
    json.dumps(found.summary, allow_nan=False)
    assert all(found.tables.values())
    assert all(len(row) == len(found.shown[0]) for row in found.shown)
    return found, runner


@pytest.mark.parametrize("name", STUDIES)
def test_full_form_is_that_of_the_plan(name: str, tmp_path: Path) -> None:
    found, runner = study(name, Form())
    section = PLAN.split(f"| `{name}`, ")[1].split("\n| `")[0].split("\n\n")[0].splitlines()
    seeds = {task.seed for task in runner.asked} - (TUNING if name == "methods" else set())
    first = import_module(f"mpo_lightning.studies.{name}").FIRST_SEED
    assert seeds == set(range(first, first + int(section[0].split(" | ")[0])))
    assert not seeds & (TUNING | TRIED)
    assert {run.loss.beta for run in runner.seen} == {0.1, 1.0}
    # Each contrast at both betas, which are together or apart.
    named = found.summary["contrasts"]
    expected = [line.split(" | ")[-2] for line in section]
    signs = [SIGNS.get(row["expected"], row["expected"]) for row in named]
    assert signs in (2 * expected, [sign for sign in expected for _ in range(2)])
    assert {row["worlds"] for row in named} == {len(seeds)}
    # Figures are slow to write; drawing them runs their code.
    for draw in found.figures.values():
        draw().savefig(tmp_path / "figure.png", dpi=20)


def test_no_two_studies_share_a_world() -> None:
    first = sorted(import_module(f"mpo_lightning.studies.{n}").FIRST_SEED for n in STUDIES)
    assert len(set(first)) == len(STUDIES)
    assert min(after - before for before, after in pairwise(first)) > 100


@pytest.mark.parametrize("name", STUDIES)
def test_full_form_of_runs_that_do_not_get_there(name: str) -> None:
    found, _ = study(name, Form(seeds=2), reaches=False)
    assert {row["worlds"] for row in found.summary["contrasts"]} == {0}


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("reaches", [True, False])
def test_quick_form(name: str, reaches: bool) -> None:
    _, runner = study(name, Form(quick=True), reaches=reaches)
    # Of no full form.
    assert {task.seed for task in runner.asked} <= {0, 1}
    # A converged optimum of the other beta is the second place of reading of `responses`.
    betas = {0.1, 1.0} if name == "responses" else {0.1}
    assert {run.loss.beta for run in runner.seen} == betas
