"""What tests of the studies share: made-up results, the quick form, equal trajectories."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch

from mpo_lightning.cli import main
from mpo_lightning.studies.lab.training import TrainingRun

CONSTANT = ("ideal_gold", "gold_of_all", "win_rate", "acceptable_bias", "distance", "rarity")
CONSTANT += ("outside", "effective_chosen", "chosen_shift", "rejected_shift")
# Gaps of the attributes that all draws share, and those by which draws differ at n = 1.
SHARED = 0.05 * torch.randn(16, generator=torch.Generator().manual_seed(0))
DRAWN = 0.2 * torch.randn(4, 16, generator=torch.Generator().manual_seed(1))


class MadeUp:
    """A runner that trains nothing: a run's gold depends on its seed and what it is."""

    def __init__(self, *, reaches: bool = True) -> None:
        self.reaches = reaches
        self.asked: list[Any] = []

    @property
    def seen(self) -> list[TrainingRun]:
        """The training runs that were asked for."""
        return [task for task in self.asked if isinstance(task, TrainingRun)]

    def __call__(self, tasks: Sequence[Any], description: str) -> list[Any]:
        self.asked += tasks
        return [self.result(task) for task in tasks]

    def result(self, task: Any) -> Any:
        if isinstance(task, TrainingRun):
            return self.of_run(task)
        return {
            "BuildWorld": lambda: {},
            "SampleBias": lambda: {
                kind: {str(n): n**-0.5 for n in task.sizes} for kind in ("acceptable", "chosen")
            },
            "Agreement": lambda: dict.fromkeys(("kendall_tau", "same_set", "chosen_share"), 0.5),
            "DataCheck": lambda: {
                "none": ["outliers"],
                "48": ["outliers", "wrong-best"],
                "480": ["outliers", "wrong-best", "skewed-scores"],
            },
            "Reliability": lambda: {
                name: {str(n): 1 / n for n in (2, 4, 8, 16, 32)}
                for name in ("mean", "median", "full ranking")
            },
            "CoefficientMap": lambda: {
                "snr": quality(task),
                "cosine": 0.9,
                "population_gold": task.responses**-0.1,
            },
            "Distillation": lambda: dict.fromkeys(("gold", "ideal_gold", "kl", "outside"), 0.5),
        }[type(task).__name__]()

    def of_run(self, run: TrainingRun) -> dict[str, Any]:
        reach = 2.0 if self.reaches else 0.2
        gold = quality(run)
        gaps = SHARED + DRAWN[run.sampling.draw] * run.responses**-0.5
        trajectory = [
            {
                **dict.fromkeys(CONSTANT, 0.5),
                "step": float(step),
                "kl": reach * step / 40,
                "gold": gold * (step / 40) ** 0.5,
                "bias": gaps.abs().mean().item(),
                **{f"gap {number}": gap for number, gap in enumerate(gaps.tolist())},
            }
            for step in range(0, 41, 10)
        ]
        return {
            "trajectory": trajectory,
            "groups": run.prompts,
            "dropped": 0,
            "seconds": 1.0,
            "step_ms": float(run.responses),
            "memory_mib": 1.0,
        }


def quality(task: Any) -> float:
    """Of its seed and of what it is, but for the learning rate."""
    parts = (task.seed, task.loss, task.prompts, task.responses, task.sampling, task.judge)
    return 1 + 0.1 * (task.seed % 7) + 0.1 * crc32(repr(parts).encode()) / 2**32


def quick(name: str, out: Path, study_worlds: Path, *options: str) -> dict[str, Any]:
    """Run a quick form with one seed, in the worlds that are there, and return its summary."""
    out.mkdir(exist_ok=True)
    if not (out / "worlds").exists():
        (out / "worlds").symlink_to(study_worlds)
    main(["study", name, "--quick", "--seeds", "1", "--workers", "1", "--out", str(out), *options])
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert (summary["study"], summary["form"]) == (name, "quick")
    return summary


def assert_same(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    """But for the order in which kernels add."""
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
