"""What tests of the studies share: made-up results, the quick form, equal trajectories."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mpo_lightning.cli import main
from mpo_lightning.studies.lab.training import TrainingRun


class MadeUp:
    """A runner that trains nothing: a run's gold depends on its seed and what it is."""

    def __init__(self, *, reaches: bool = True) -> None:
        self.reaches = reaches
        self.seen: list[TrainingRun] = []

    def __call__(self, tasks: Sequence[Any], description: str) -> list[Any]:
        return [self.result(task) for task in tasks]

    def result(self, task: Any) -> Any:
        if isinstance(task, TrainingRun):
            self.seen.append(task)
            return self.of_run(task)
        return {
            "BuildWorld": lambda: {},
            "SampleBias": lambda: {
                kind: {str(n): n**-0.5 for n in task.sizes} for kind in ("acceptable", "chosen")
            },
            "Agreement": lambda: dict.fromkeys(("kendall_tau", "same_set", "chosen_share"), 0.5),
            "Reliability": lambda: {
                name: {str(n): 1 / n for n in (2, 4, 8, 16, 32)}
                for name in ("mean", "median", "full ranking")
            },
        }[type(task).__name__]()

    def of_run(self, run: TrainingRun) -> dict[str, Any]:
        quality = 1 + 0.1 * run.seed % 7 + len(repr(run.loss)) / 1000
        names = ("ideal_gold", "win_rate", "acceptable_bias", "distance", "rarity", "outside")
        names += ("effective_chosen", "chosen_shift", "rejected_shift")
        reach = 2.0 if self.reaches else 0.5
        trajectory = [
            {
                **dict.fromkeys(names, 0.5),
                "step": float(step),
                "kl": reach * step / 40,
                "gold": quality * (step / 40) ** 0.5,
                "bias": run.responses**-0.5 + 0.01 * run.seed,
            }
            for step in range(0, 41, 2)
        ]
        return {
            "trajectory": trajectory,
            "groups": run.prompts,
            "dropped": 0,
            "seconds": 1.0,
            "step_ms": float(run.responses),
            "memory_mib": 1.0,
        }


def quick(name: str, out: Path, study_worlds: Path, *options: str) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    if not (out / "worlds").exists():
        shutil.copytree(study_worlds, out / "worlds")
    main(["study", name, "--quick", "--seeds", "1", "--workers", "1", "--out", str(out), *options])
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert (summary["study"], summary["form"]) == (name, "quick")
    return summary


def assert_same(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    """But for the order in which kernels add."""
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
