"""The quick form of every study, through the command."""

import csv
import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mpo_lightning.cli import main
from mpo_lightning.commands.study import STUDIES
from mpo_lightning.studies.lab.advice import LABELLED
from tests.studies.made_up import quick


def rows_of(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def golds(summary: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Gold at the primary divergence of every condition that a run has come to."""
    measures = summary["measures"]
    for label, values in measures.get("0.5", measures).items():
        if values["gold"]["count"]:
            yield label, values["gold"]["mean"]


@pytest.mark.parametrize("name", [name for name in STUDIES if name != "levels"])
def test_quick_form(name: str, study_worlds: Path, tmp_path: Path) -> None:
    check_form(name, quick(name, tmp_path / "out", study_worlds), tmp_path / "out")


def check_form(name: str, summary: dict[str, Any], out: Path) -> None:
    """Check what every study writes, and what is its own."""
    found = dict(golds(summary))
    assert found
    assert all(gold > 0.1 for gold in found.values())
    rows = rows_of(out / "runs.csv.gz")
    assert {row["seed"] for row in rows} == {"0"}
    points = rows_of(out / "trajectories.csv.gz")
    assert {row["condition"] for row in points} == {row["condition"] for row in rows}
    for figure in out.glob("*.png"):
        assert figure.stat().st_size > 5000
    header, rule, *lines = (out / "table.md").read_text("utf-8").splitlines()
    assert lines
    assert header.count("|") == rule.count("|")
    check = CHECKS.get(name)
    if check is not None:
        check(summary, found)


def check_responses(summary: dict[str, Any], found: dict[str, float]) -> None:
    slopes = {kind: slope["mean"] for kind, slope in summary["sample_bias_slopes"].items()}
    assert -0.55 < slopes["acceptable"] < -0.45
    assert -0.6 < slopes["chosen"] < -0.4
    few, many = (found[f"beta 0.1: MPO, {size}"] for size in ("640 x 2", "128 x 10"))
    assert few == pytest.approx(many, abs=0.2)
    assert len(summary["policy_bias"]) == 3


def check_correlation(summary: dict[str, Any], found: dict[str, float]) -> None:
    # MPO sees the same in copies of two responses as in the two.
    copies, two = (found[f"{name}, beta 0.1: MPO"] for name in ("5 copies of 2", "2 responses"))
    assert copies == pytest.approx(two, abs=2e-3)
    assert set(summary["capacity"]) == {"additive", "product"}


def check_skew(summary: dict[str, Any], found: dict[str, float]) -> None:
    # The median knows the order only, and the shape leaves it.
    left, normal = (
        {rule: found[f"{shape}, beta 0.1: MPO {rule}"] for rule in ("median", "mean")}
        for shape in ("left", "normal")
    )
    assert left["median"] == pytest.approx(normal["median"], abs=1e-6)
    assert left["mean"] != pytest.approx(normal["mean"], abs=1e-3)


def check_calibration(summary: dict[str, Any], found: dict[str, float]) -> None:
    # A scale that data check sees without labels, and with them.
    said = summary["checks"]["exp"]
    assert {"skewed-scores", "scale-varies", "weight-dominance"} <= said["none"]["warnings"].keys()
    assert [of["methods"] for of in said.values()] == [{"MPO median": 1}] * len(LABELLED)
    (row,) = summary["following"]
    median, plain, as_it_is = (
        found[f"exp, beta 0.1: {method}"] for method in ("MPO median", "MPO", "W-MPO 1 per score")
    )
    assert row["as_it_is"]["mean"] == pytest.approx(as_it_is)
    for name, other in (("plain", plain), ("as_it_is", as_it_is)):
        less = row[f"48 labels less {name}"]
        assert less["difference"]["mean"] == pytest.approx(median - other)
    # The remedies mend what weights per score do here.
    assert min(median, plain) > as_it_is + 0.05


def check_scaling(summary: dict[str, Any], found: dict[str, float]) -> None:
    assert found["beta 0.1: n=32"] > 0.4
    assert set(summary["step_ms"]) == {"64 at a time"}


CHECKS = {
    "calibration": check_calibration,
    "responses": check_responses,
    "correlation": check_correlation,
    "skew": check_skew,
    "scaling": check_scaling,
}


def test_quick_form_of_levels_does_nothing_twice(
    study_worlds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    summary = quick("levels", out, study_worlds)
    check_form("levels", summary, out)
    assert "3 runs made now" in capsys.readouterr().out
    # Again: nothing is left to do. One result lost: that one is made, and the same is found.
    quick("levels", out, study_worlds)
    assert "0 runs made now" in capsys.readouterr().out
    next(iter(sorted((out / "runs").iterdir()))).unlink()
    again = quick("levels", out, study_worlds)
    assert "\n1 runs made now" in capsys.readouterr().out
    # To rounding: the least squares that draw the grammar may differ in their last bits.
    assert dict(golds(again)) == pytest.approx(dict(golds(summary)), rel=1e-6)
    with pytest.raises(SystemExit, match="is of levels, not of methods"):
        main(["study", "methods", "--out", str(out)])
