"""The quick start: W-MPO raises the gold score of a real small model, at each of three seeds."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from mpo_lightning.cli import main
from mpo_lightning.toy.__main__ import main as toy

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_training_raises_gold_on_held_out_prompts(
    toy_world: Path,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(sys, "argv", ["mpo-lightning"])
    # The configuration names its files from where the user stands.
    monkeypatch.chdir(toy_world.parent)
    run = toy_world / f"run-{seed}"
    # As configured, elsewhere.
    loggers = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["trainer"]["logger"]
    for logger in loggers:
        logger["init_args"]["save_dir"] = str(run)
    main(
        [
            *["fit", "--config", str(CONFIG), f"--seed_everything={seed}"],
            *[f"--data.seed={seed}", f"--trainer.default_root_dir={run}"],
            *[f"--trainer.logger={json.dumps(loggers)}", "--trainer.enable_progress_bar=false"],
        ]
    )
    toy(
        [
            *["report", "--world", str(toy_world), "--seed", str(seed), "--out", str(run)],
            *["--adapter", str(run / "checkpoints" / "last-adapter")],
            *["--metrics", str(run / "metrics.csv")],
        ]
    )
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert report["gold_gain"]["low"] > 0.5
    assert report["win_rate"]["low"] > 0.6
    assert 0 < report["kl"]["mean"] < 5
    assert (run / "quickstart.png").stat().st_size > 10_000
    shown = capsys.readouterr().out
    assert "mean gold score" in shown
    assert str(run / "checkpoints" / "last-adapter") in shown
    assert {"metrics.csv", "samples.jsonl"} <= {path.name for path in run.iterdir()}
    # A run as it should be is not warned of.
    assert "Training health after 64 steps: no warnings." in caplog.text
