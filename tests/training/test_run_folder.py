"""Two fits do not write into one folder, and a fit that was killed leaves no lock."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from mpo_lightning.errors import CheckpointError
from tests.conftest import random_groups
from tests.training.fits import RAGGED, loader, make_module, make_trainer

# What another fit does, in a process of its own.
OTHER = """
import fcntl, sys, time
with open(sys.argv[1], "a+") as file:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    file.truncate(0)
    file.write("process 7 on elsewhere")
    file.flush()
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def other(folder: Path, seconds: float) -> list[str]:
    return [
        sys.executable,
        "-c",
        OTHER,
        str(folder.with_name(f".{folder.name}.lock")),
        str(seconds),
    ]


class TryAnother(Callback):
    """While a run trains, another process tries to hold its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.error = ""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        done = subprocess.run(other(self.folder, 0), capture_output=True, text=True, check=False)
        self.error = done.stderr


def fit_into(base: str, folder: Path, *callbacks: Any) -> None:
    trainer = make_trainer(
        callbacks=[ModelCheckpoint(dirpath=folder), *callbacks], enable_checkpointing=True
    )
    trainer.fit(make_module(base), loader(random_groups(RAGGED), [4, 4]))


def test_one_fit_at_a_time(base: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    during = TryAnother(folder)
    fit_into(base, folder, during)
    assert "BlockingIOError" in during.error
    # It has ended: the lock is free, although its process lives.
    with subprocess.Popen(other(folder, 60), stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            with pytest.raises(CheckpointError, match=r"another fit .* \(process 7 on elsewhere\)"):
                fit_into(base, folder)
            fit_into(base, tmp_path / "another")
        finally:
            holder.kill()
    fit_into(base, folder)


def test_fit_that_fails_frees_its_folder(base: str, tmp_path: Path) -> None:
    class Fails(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit_into(base, tmp_path, Fails())
    subprocess.run(other(tmp_path, 0), check=True)


def test_folder_that_cannot_be_made_is_refused_before_anything_is_loaded(
    base: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file/checkpoints: checkpoints cannot be written"):
        fit_into(base, tmp_path / "file" / "checkpoints")
