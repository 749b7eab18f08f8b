"""What ``validate`` and ``test`` tell: one table, and a file with settings and checkpoint."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from mpo_lightning.cli import main
from mpo_lightning.training.metrics import METRIC_NAMES
from tests.conftest import example_rows


def test_validate_and_test(
    base: str,
    tmp_path: Path,
    write_jsonl: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["mpo-lightning"])
    root = tmp_path / "run"
    recipe = {
        "trainer": {
            "accelerator": "cpu",
            "default_root_dir": str(root),
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": str(root), "name": "", "version": ""},
            },
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "model": {"policy": {"base": base, "lora": {"r": 2}}},
        "data": {"test": write_jsonl(example_rows(5)), "groups_per_batch": 2},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    # Of the training that was there before.
    root.mkdir()
    (root / "metrics.csv").write_text("step,train/loss\n1,0.5\n")
    main(["test", "--config", str(path)])
    shown = capsys.readouterr().out
    report = json.loads((root / "test-base.json").read_text(encoding="utf-8"))
    assert report["groups"] == 5
    assert report["checkpoint"] is None
    assert report["settings"]["model"]["policy"]["base"] == base
    assert set(report["metrics"]) == set(METRIC_NAMES)
    # A fresh adapter: every reward is zero, every pair ties.
    assert report["metrics"]["rewards/accuracy"] == 0.5
    assert re.search(r"  pairs in order +0\.5000  higher  test/rewards/accuracy", shown)
    for name in METRIC_NAMES:
        # Once: Lightning's own table is not there beside it.
        assert shown.count(f"test/{name}\n") + shown.count(f"test/{name} ") == 1, name
    assert "no checkpoint, a fresh adapter, 5 groups" in shown
    assert f"Wrote {root / 'test-base.json'}\n" in shown
    with pytest.raises(SystemExit) as stopped:
        main(["test", "--config", str(path), "--verbose=true"])
    assert stopped.value.code == 2

    # The same data as validation data: the same numbers, under val/.
    validate = ["validate", "--config", str(path), f"--data.val={recipe['data']['test']}"]  # type: ignore[index]
    for replaced in ("", " (the one that was there is replaced)"):
        main(validate)
        shown = capsys.readouterr().out
        assert f"Wrote {root / 'validate-base.json'}{replaced}\n" in shown
    again = json.loads((root / "validate-base.json").read_text(encoding="utf-8"))
    assert again["metrics"] == pytest.approx(report["metrics"])
    assert [p.name for p in root.glob(".*")] == []
    assert (root / "metrics.csv").read_text() == "step,train/loss\n1,0.5\n"
