"""Commands that have nothing to do."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mpo_lightning.cli import main
from tests.conftest import example_rows


@pytest.mark.parametrize(
    "command",
    [
        "fit --data.train max_steps=0",
        "fit --data.train limit_train_batches=0",
        "validate --data.val limit_val_batches=0",
        "test --data.test limit_test_batches=0",
        "predict --data.predict limit_predict_batches=0",
    ],
)
def test_a_run_without_a_batch_is_an_error(
    command: str,
    base: str,
    write_jsonl: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["mpo-lightning"])
    monkeypatch.chdir(tmp_path)
    name, data, limit = command.split()
    settings = ["accelerator=cpu", "enable_progress_bar=false", "logger=false", limit]
    with pytest.raises(SystemExit, match=f"error: {name} has done nothing: the trainer's limits"):
        main(
            [
                *[name, data, write_jsonl(example_rows(2)), "--model.policy.base", base],
                *(f"--trainer.{setting}" for setting in settings),
            ]
        )
