"""Runs that are killed and resumed, under each strategy, beside runs that are not.

All are ``mpo-lightning fit`` with the overlays of ``configs/strategy/``, on one device.
"""

import csv
import json
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.jobs import ROOT, Notes, Outcome, Row, Runner, Task

__all__ = ["tasks", "write"]

OVERLAYS = ROOT / "configs" / "strategy"
SECONDS = 150
BATCHES, KILLED_AT = 6, 4
BF16 = ["--trainer.precision=bf16-mixed", "--model.policy.dtype=bfloat16"]
NF4 = "--model.policy.quantization=nf4"
ONE = "--trainer.devices=1"
# What follows the recipe. FSDP1 has a precision of its own.
STRATEGIES: dict[str, list[str]] = {
    "single": [f"--config={OVERLAYS / 'single.yaml'}", *BF16],
    "single, nf4": [f"--config={OVERLAYS / 'single.yaml'}", *BF16, NF4],
    "FSDP2": [f"--config={OVERLAYS / 'fsdp2.yaml'}", ONE, *BF16],
    "FSDP2, nf4": [f"--config={OVERLAYS / 'fsdp2-4bit.yaml'}", ONE, *BF16],
    "FSDP1": [f"--config={OVERLAYS / 'fsdp.yaml'}", ONE],
}
# Kernels of a GPU may add in any order. So much may a resumed run differ there, relative to the
# norm of the adapter's factor that starts at zero; on a CPU not at all.
TOLERANCE = {"cuda": 0.02, "cpu": 0.0}


def tasks(folder: Path, *, tiny: bool, device: str) -> list[Task]:
    """Return a task for each strategy; with a tiny model, for one.

    Args:
        folder: where the base, the groups and the runs go.
        tiny: whether the model is to be tiny.
        device: "cuda" or "cpu".
    """
    names = ["FSDP2, nf4"] if tiny else list(STRATEGIES)
    return [partial(_task, name, folder, tiny, device) for name in names]


def _task(name: str, folder: Path, tiny: bool, device: str, runner: Runner) -> list[Row]:
    row: Row = {"part": "strategies", "strategy": name}
    own = folder / name.lower().replace(", ", "-")
    settings = {"folder": str(own), "tiny": tiny}
    made = runner.run("benchmarks.gpu.strategies:write", settings, SECONDS)
    if made.complaint():
        return [{**row, "error": made.complaint()}]

    def fit(root: str, *options: str) -> Outcome:
        arguments = [
            f"--config={own / 'recipe.yaml'}",
            *STRATEGIES[name],
            f"--trainer.accelerator={'gpu' if device == 'cuda' else 'cpu'}",
            f"--trainer.default_root_dir={own / root}",
            f"--trainer.logger.save_dir={own / root}",
            *options,
        ]
        return runner.run("benchmarks.gpu.jobs:fit", {"arguments": arguments}, SECONDS)

    kill = ["--trainer.callbacks+=benchmarks.gpu.killing.KillAtBatch"]
    kill.append(f"--trainer.callbacks.batch={KILLED_AT}")
    whole = fit("whole")
    killed = fit("killed", "--checkpoint.every_n_train_steps=1", *kill)
    resumed = fit("killed", "--checkpoint.every_n_train_steps=1", "--ckpt_path=last")
    for what, outcome, code in (
        ("The uninterrupted run", whole, 0),
        ("The run that was to be killed", killed, -signal.SIGKILL),
        ("The resumed run", resumed, 0),
    ):
        if outcome.code != code:
            how = f"exit status {outcome.code} in the place of {code}"
            return [{**row, "error": f"{what} ended with {how}.\n{outcome.log}"}]
    return [{**row, **_compare(own / "whole", own / "killed", TOLERANCE[device])}]


def _compare(whole: Path, resumed: Path, tolerance: float) -> Row:
    """Compare the adapters and the losses of two runs.

    Returns:
        ``difference``, relative to the norm of what started at zero; ``loss_difference``, the
        largest of a step; the ``losses`` of the whole run; and whether that is ``ok``.
    """
    one, other = (_adapter(root) for root in (whole, resumed))
    ups = [name for name in one if "lora_B" in name]
    norm = np.sqrt(sum(np.square(one[name]).sum() for name in ups))
    gap = np.sqrt(sum(np.square(one[name] - other[name]).sum() for name in ups))
    losses, after = _losses(whole), _losses(resumed)
    # Metrics of the killed run went with it.
    loss_gap = max(abs(a - b) for a, b in zip(losses[-len(after) :], after, strict=True))
    difference = float(gap / norm)
    complete = one.keys() == other.keys() and len(after) == BATCHES - KILLED_AT
    return {
        "difference": difference,
        "bit_for_bit": all(np.array_equal(one[name], other[name]) for name in one),
        "loss_difference": loss_gap,
        "losses": losses,
        "ok": bool(complete and np.isfinite(losses).all() and difference <= tolerance),
    }


def _adapter(root: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    (file,) = root.glob("checkpoints/last-adapter/adapter_model.safetensors")
    return dict(load_file(file))


def _losses(root: Path) -> list[float]:
    (file,) = root.rglob("metrics.csv")
    with file.open(encoding="utf-8") as lines:
        return [float(row["train/loss"]) for row in csv.DictReader(lines) if row["train/loss"]]


# --------------------------------------------------------------------------- in the processes


def write(settings: Row, notes: Notes) -> None:
    """Write a base with random weights, ragged groups and a recipe."""
    from benchmarks.workloads import Shape, build_base, make_rows, ragged_lengths, write_rows

    folder = Path(settings["folder"])
    folder.mkdir(parents=True)
    shape = Shape(layers=4, hidden=512, intermediate=1408, heads=8, vocabulary=2000)
    groups = ragged_lengths(2 * BATCHES, 6)
    if settings["tiny"]:
        shape = Shape(layers=2, hidden=64, intermediate=128, heads=4, vocabulary=200)
        groups = tuple((p // 16 + 1, tuple(r // 16 + 2 for r in rs)) for p, rs in groups)
    build_base(folder / "base", shape)
    write_rows(folder / "groups.jsonl", make_rows(groups, shape.vocabulary))
    logger = "lightning.pytorch.loggers.CSVLogger"
    recipe = {
        "trainer": {
            "max_epochs": 1,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": {"class_path": logger, "init_args": {"name": "", "version": "log"}},
        },
        "model": {
            "policy": {"base": str(folder / "base"), "lora": {"r": 8}},
            "loss": {"class_path": "mpo_lightning.losses.MPO", "init_args": {"beta": 0.5}},
            # With AdamW's own eps, gradients that are nearly zero make steps of their rounding.
            "optimizer": {
                "class_path": "torch.optim.AdamW",
                "init_args": {"lr": 0.002, "eps": 1e-4},
            },
        },
        "data": {"train": str(folder / "groups.jsonl"), "groups_per_batch": 2},
    }
    # YAML holds JSON.
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
