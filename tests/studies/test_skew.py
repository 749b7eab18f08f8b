"""Skewed scores: the quick form."""

from dataclasses import replace
from pathlib import Path

import pytest

from mpo_lightning.studies import skew
from tests.studies.made_up import quick


def test_skew_quick(study_worlds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The other one is skewed the other way.
    grid = replace(skew.GRID, quick_scenarios=["normal", "left"])
    monkeypatch.setattr(skew, "GRID", grid)
    summary = quick("skew", tmp_path / "out", study_worlds)
    found = {label: values["gold"]["mean"] for label, values in summary["at_1_nat"].items()}
    # The median knows the order only, and the shape leaves it.
    assert found["left: MPO median"] == pytest.approx(found["normal: MPO median"], abs=1e-6)
    assert found["left: MPO mean"] != pytest.approx(found["normal: MPO mean"], abs=1e-3)
    assert all(gold > 0.5 for gold in found.values())
    reliable = {name: values["16"]["mean"] for name, values in summary["reliability"].items()}
    # Simulated elsewhere for this setting: .92, .72 and .27.
    assert reliable["median"] == pytest.approx(0.92, abs=0.03)
    assert reliable["mean"] == pytest.approx(0.72, abs=0.03)
    assert reliable["full ranking"] == pytest.approx(0.27, abs=0.03)
