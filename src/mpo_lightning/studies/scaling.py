"""Many responses: time, memory and quality from 2 to 512, all at once and in slices.

Each run has a process of its own, so that its peak memory can be read.
"""

import multiprocessing
import resource
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mpo_lightning.losses import MPO
from mpo_lightning.studies.lab.conditions import (
    PRIMARY,
    Condition,
    Findings,
    Form,
    as_json,
    estimates,
    perform,
    run_tables,
)
from mpo_lightning.studies.lab.figures import lines, panels
from mpo_lightning.studies.lab.runner import Runner
from mpo_lightning.studies.lab.statistics import Interval, log_log_slope, mean_interval
from mpo_lightning.studies.lab.training import BETA, TrainingRun, train

__all__ = ["Cost", "study"]

SIZES = (2, 8, 32, 128, 512)
QUICK_SIZES = (2, 32, 128)
PROMPTS = 32
# Responses that go through the model at a time.
WAYS = {"at once": None, "64 at a time": 64}
WARM_UP = TrainingRun(seed=0, loss=MPO(beta=BETA), prompts=8, responses=2, epochs=1)


@dataclass(frozen=True, kw_only=True)
class Cost(TrainingRun):
    """The task of a training run in a process of its own; its result also has what it cost.

    - ``step_ms``: milliseconds an optimizer step, mean over the run;
    - ``memory_mib``: growth of the process's peak memory beyond that of a run of two responses,
      made beforehand, which loads the libraries, the model and the measurements.
    """

    def __call__(self, worlds: Path) -> dict[str, Any]:
        """Train in a new process, and return the `TrainingResult`'s fields and the costs."""
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as process:
            return process.submit(_measure, self, worlds).result()


def _peak_mib() -> float:
    """Return the peak resident memory of this process, MiB."""
    status = Path("/proc/self/status")
    if status.is_file():
        # On Linux ru_maxrss begins with the memory of the process that started this one.
        lines = dict(line.split(":", 1) for line in status.read_text("utf-8").splitlines())
        return int(lines["VmHWM"].removesuffix("kB")) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _measure(run: Cost, worlds: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    train(replace(WARM_UP, seed=run.seed), worlds)
    before = _peak_mib()
    result = train(run, worlds)
    steps = result.trajectory[-1]["step"]
    return {
        **asdict(result),
        "step_ms": 1000 * result.seconds / steps,
        "memory_mib": _peak_mib() - before,
    }


def study(runner: Runner, form: Form) -> Findings:
    """Train with every n in both ways."""
    sizes = QUICK_SIZES if form.quick else SIZES
    cost_of = partial(Cost, loss=MPO(beta=BETA), prompts=PROMPTS)
    conditions = [
        Condition(
            f"n={n}, {way}",
            partial(cost_of, responses=n, responses_per_pass=at_a_time),
            {"n": n, "way": way},
        )
        for way, at_a_time in WAYS.items()
        for n in sizes
    ]
    seeds = form.seeds_of(full=4, quick=1)
    outcomes = perform(runner, conditions, seeds, "Sizes")
    found = estimates(outcomes)

    def mean_cost(what: str, label: str) -> Interval:
        return mean_interval([o.result[what] for o in outcomes if o.condition.label == label])

    costs = {
        what: {way: {n: mean_cost(what, f"n={n}, {way}") for n in sizes} for way in WAYS}
        for what in ("step_ms", "memory_mib")
    }

    def figure() -> Any:
        titles = ("Step (ms)", "Memory beyond two responses (MiB)", f"Gold at {PRIMARY:g} nat")
        drawn, axes = panels(titles, "responses of a prompt, n")
        for way in WAYS:
            for axis, what in zip(axes, costs, strict=False):
                lines(axis, sizes, [costs[what][way][n] for n in sizes], way)
            lines(axes[2], sizes, [found[f"n={n}, {way}"]["gold"] for n in sizes], way)
        for axis in axes:
            axis.set_xscale("log", base=2)
        axes[0].set_yscale("log", base=2)
        axes[0].legend()
        return drawn

    large = [n for n in sizes if n >= 32]
    return Findings(
        summary={
            "time_slope_from_32": {
                way: log_log_slope(large, [costs["step_ms"][way][n].mean for n in large])
                for way in WAYS
            },
            **{what: as_json(of_what) for what, of_what in costs.items()},
            "at_1_nat": as_json(found),
        },
        tables=run_tables(outcomes),
        figures={"scaling": figure},
        shown=[
            {
                "n": str(n),
                "way": way,
                "step (ms)": f"{costs['step_ms'][way][n].mean:.0f}",
                "memory (MiB)": f"{costs['memory_mib'][way][n].mean:.0f}",
                "gold at 1 nat": str(found[f"n={n}, {way}"]["gold"]),
            }
            for n in sizes
            for way in WAYS
        ],
    )
