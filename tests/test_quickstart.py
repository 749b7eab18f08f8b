"""The quick start: W-MPO raises the gold score of a real small model."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mpo_lightning.cli import main
from mpo_lightning.toy.__main__ import main as toy

ROOT = Path(__file__).parent.parent


def commands(seed: int) -> list[list[str]]:
    """The commands of `make quickstart` that run a program of the package."""
    found = subprocess.run(
        ["make", "-n", "-B", "-C", ROOT, "-o", ".venv/.ready", "quickstart", f"SEED={seed}"],
        capture_output=True,
        text=True,
        check=True,
        # Those of a make that runs the tests would count here, too.
        env={**os.environ, "MAKEFLAGS": ""},
    ).stdout.replace("\\\n", " ")
    # As the shell does the arithmetic of seeds.
    text = found.replace(f"$(({seed} + 1))", str(seed + 1))
    return [shlex.split(line) for line in text.splitlines() if line.startswith(".venv/bin/")]


@pytest.fixture
def folder(toy_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a world and the configurations."""
    monkeypatch.setattr(sys, "argv", ["mpo-lightning"])
    monkeypatch.chdir(tmp_path)
    shutil.copytree(toy_world, "quickstart")
    Path("configs").symlink_to(ROOT / "configs")
    return tmp_path


def test_training_raises_gold_on_held_out_prompts(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    seed = 0
    build, *others = commands(seed)
    assert build[1:4] == ["-m", "mpo_lightning.toy", "build"]
    assert len(others) == 8
    for program, *args in others:
        if program.endswith("mpo-lightning"):
            main(args)
        else:
            assert args[:2] == ["-m", "mpo_lightning.toy"]
            toy(args[2:])
    run = folder / "quickstart" / "run"
    comparison = json.loads((run / "report" / "comparison.json").read_text(encoding="utf-8"))
    assert comparison["prompts"] == 64
    assert comparison["score_difference"]["low"] > 0.5
    assert comparison["win_rate"]["low"] > 0.6
    shown = capsys.readouterr().out
    row = next(line for line in shown.splitlines() if line.startswith(f"| {seed} | "))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2] == f"{comparison['policy']['score']:.2f}"
    assert 0 < float(cells[5]) < 5
    assert all(10 < float(cell) < 25 for cell in cells[6:])
    assert (run / "quickstart.png").stat().st_size > 10_000
    assert str(run / "checkpoints" / "last-adapter") in shown
    assert {"metrics.csv", "samples.jsonl"} <= {path.name for path in run.iterdir()}
    # A run as it should be is not warned of.
    assert "Training health after 64 steps: no warnings." in caplog.text
