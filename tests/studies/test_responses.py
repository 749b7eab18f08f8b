"""The number of responses: slopes of made-up bias, and the quick form through the command."""

import csv
from pathlib import Path
from typing import Any

import pytest

from mpo_lightning.cli import main
from mpo_lightning.studies.lab.conditions import Form
from mpo_lightning.studies.responses import study
from tests.studies.made_up import MadeUp, quick


def test_slopes_of_made_up_bias() -> None:
    runner: Any = MadeUp()
    found = study(runner, Form(seeds=1))
    assert found.summary["sample_bias_slope"] == pytest.approx(-0.5)
    slopes = found.summary["policy_bias_slopes"]
    assert slopes["MPO, prompts fixed, 1 nat"]["mean"] == pytest.approx(-0.5)
    fits = found.summary["policy_bias_floors"]["MPO, prompts fixed, 1 nat"]
    assert fits["mean"] == pytest.approx(0, abs=1e-6)


def test_responses_quick(
    study_worlds: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # With all methods it runs on made-up results above.
    monkeypatch.setattr("mpo_lightning.studies.responses.QUICK_COMPARED", ("MPO",))
    out = tmp_path / "out"
    summary = quick("responses", out, study_worlds)
    assert -0.55 < summary["sample_bias_slope"] < -0.45
    assert -0.6 < summary["sample_bias_slopes"]["chosen"]["mean"] < -0.4
    gold = {label: values["gold"] for label, values in summary["at_1_nat"].items()}
    # Five times the data.
    more, less = gold["MPO, n=10, prompts fixed"], gold["MPO, n=2, prompts fixed"]
    assert more["mean"] > less["mean"] + 0.05
    with (out / "runs.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["seed"] for row in rows} == {"0"}
    assert len(rows) == 3 * len(summary["at_1_nat"])
    header, rule, *lines = (out / "table.md").read_text(encoding="utf-8").splitlines()
    assert header == "| bias of | at | log-log slope | floor |"
    assert rule == "| --- | --- | --- | --- |"
    slope = summary["policy_bias_slopes"]["MPO, prompts fixed, 1 nat"]["mean"]
    assert f"| policy: MPO, prompts fixed | 1 nat | {slope:.3f} |" in "\n".join(lines)
    assert all((out / f"{name}.png").stat().st_size > 5000 for name in ("gold", "policy_bias"))
    assert "5 runs made now" in capsys.readouterr().out
    # Again: nothing is left to do. One result lost: that one is made, and the same is found.
    quick("responses", out, study_worlds)
    assert "0 runs made now" in capsys.readouterr().out
    next(iter(sorted((out / "runs").iterdir()))).unlink()
    again = quick("responses", out, study_worlds)
    assert "\n1 runs made now" in capsys.readouterr().out
    # To rounding: the least squares that draw the grammar may differ in their last bits.
    for label, values in again["at_1_nat"].items():
        for measure, found in values.items():
            expected = summary["at_1_nat"][label][measure]["mean"]
            assert found["mean"] == pytest.approx(expected, rel=1e-6), (label, measure)
    with pytest.raises(SystemExit, match="is of responses, not of methods"):
        main(["study", "methods", "--out", str(out)])
