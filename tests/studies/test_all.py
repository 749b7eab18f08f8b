"""Every study, in both forms, on results made up here."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from mpo_lightning.commands.study import STUDIES
from mpo_lightning.studies.lab.conditions import Findings, Form
from tests.studies.made_up import MadeUp


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("reaches", [True, False])
@pytest.mark.parametrize("quick_form", [True, False])
def test_both_forms_on_made_up_results(
    name: str, reaches: bool, quick_form: bool, tmp_path: Path
) -> None:
    runner: Any = MadeUp(reaches=reaches)
    form = Form(quick=quick_form)
    found: Findings = import_module(f"mpo_lightning.studies.{name}").study(runner, form)
    json.dumps(found.summary, allow_nan=False)
    for rows in found.tables.values():
        assert rows
    seeds = {run.seed for run in runner.seen if run.seed < 1000}
    assert len(seeds) >= (1 if quick_form else 4)
    assert all(len(row) == len(found.shown[0]) for row in found.shown)
    if reaches and not quick_form:
        # Figures are slow to write; drawing them runs their code.
        for draw in found.figures.values():
            draw().savefig(tmp_path / "figure.png", dpi=20)
