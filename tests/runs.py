"""Runs through the command line, as users start them, and what they leave."""

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests import processes

ROOT = Path(__file__).parent.parent
STRATEGIES = ROOT / "configs" / "strategy"
Rows = list[dict[str, float]]

# The overlays as they are shipped, with what makes them run on two CPU processes.
TWO = ["--trainer.devices=2"]
OVERLAYS: dict[str, list[str]] = {
    "single": [f"--config={STRATEGIES / 'single.yaml'}"],
    "ddp": [f"--config={STRATEGIES / 'ddp.yaml'}", *TWO],
    "fsdp2": [f"--config={STRATEGIES / 'fsdp2.yaml'}", *TWO],
    "fsdp2-4bit": [f"--config={STRATEGIES / 'fsdp2-4bit.yaml'}", *TWO],
}


SAVE_EACH_STEP = ["--checkpoint.every_n_train_steps=1"]
GO_ON = ["--ckpt_path=last"]


def of_two(strategy: str) -> list[str]:
    """Two processes, with 2 batches to an optimizer step."""
    return [*OVERLAYS[strategy], "--trainer.accumulate_grad_batches=2"]


def write_recipe(folder: Path, base: str, train: str, **changes: Any) -> Path:
    """A recipe as a user writes one; ``changes`` are sections to update."""
    recipe: dict[str, Any] = {
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 2,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
        },
        "model": {
            "policy": {"base": base, "lora": {"r": 4}},
            "loss": {
                "class_path": "mpo_lightning.losses.MPO",
                "init_args": {"beta": 0.5, "alpha": 1.0},
            },
            # With AdamW's own eps, gradients that are nearly zero make steps of their rounding.
            "optimizer": {
                "class_path": "torch.optim.AdamW",
                "init_args": {"lr": 0.01, "eps": 1e-4},
            },
        },
        "data": {"train": train, "groups_per_batch": 2},
    }
    for section, values in changes.items():
        recipe.setdefault(section, {}).update(values)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


# The command as users start it, with everything still to be imported.
AS_USERS = [sys.executable]


def fit(
    recipe: Path,
    root: Path,
    *options: str,
    check: bool = True,
    launcher: list[str] | None = None,
    nodes: int = 1,
    file_size: int | None = None,
) -> subprocess.CompletedProcess[str]:
    """``mpo-lightning fit`` in a process of its own, everything it writes below ``root``.

    Args:
        recipe: the configuration.
        root: the folder to write to.
        options: more of the command line.
        check: whether it must succeed.
        launcher: what starts Python; without it, processes are forked with the libraries loaded.
        nodes: how many machines the forked processes believe to be on, with one device each where
            there is more than one.
        file_size: the most bytes that a file of a forked process may come to have.
    """
    logger = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(root), "name": "", "version": ""},
    }
    root.mkdir(exist_ok=True)
    overlay = root / "where.yaml"
    trainer = {"default_root_dir": str(root), "logger": logger}
    overlay.write_text(yaml.safe_dump({"trainer": trainer}), encoding="utf-8")
    arguments = ["fit", "--config", str(recipe), "--config", str(overlay), *options]
    if launcher is None:
        devices = 2 if "--trainer.devices=2" in options else 1
        result = processes.run(
            processes.command_line,
            arguments,
            processes=nodes * devices,
            per_node=devices,
            file_size=file_size,
        )
    else:
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        result = subprocess.run(
            [*launcher, "-m", "mpo_lightning", *arguments],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env={**os.environ, "PYTHONPATH": path},
        )
    if check:
        assert result.returncode == 0, result.stderr[-3000:]
    return result


def metrics(root: Path) -> Rows:
    """What a run logged, without the clock and the memory."""
    with (root / "metrics.csv").open(encoding="utf-8") as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    return [{k: v for k, v in row.items() if not k.startswith("system/")} for row in rows]


def adapter(root: Path) -> dict[str, torch.Tensor]:
    """The last checkpoint's adapter."""
    return load_file(root / "checkpoints" / "last-adapter" / "adapter_model.safetensors")


def assert_same_adapter(found: Path, expected: Path, tolerance: float = 0.0) -> None:
    """The same weights, to the last bit where there is no tolerance."""
    one, other = adapter(found), adapter(expected)
    assert one.keys() == other.keys()
    for name, weight in other.items():
        if tolerance == 0:
            assert torch.equal(one[name], weight), name
        else:
            torch.testing.assert_close(one[name], weight, rtol=tolerance, atol=tolerance, msg=name)


def assert_same_metrics(
    found: Rows, expected: Rows, tolerance: float = 0.0, *, order: bool = True
) -> None:
    """The same metrics; the order of nearly equal rewards (rounding) only where asked for."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        names = [
            name
            for name in other
            if order or not name.endswith(("accuracy", "kendall_tau", "top1"))
        ]
        assert one.keys() == other.keys()
        left, right = ({name: row[name] for name in names} for row in (one, other))
        if tolerance == 0:
            assert left == right
        else:
            # Log-ratios are differences of sums that float32 rounds by some 1e-6.
            approximately = pytest.approx(right, rel=tolerance, abs=tolerance + 1e-5)
            assert left == approximately
