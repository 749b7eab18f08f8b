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

from mpo_lightning.losses import DPO, MPO, InfoNCA, SetLoss
from mpo_lightning.studies.lab.coefficients import CoefficientMap
from mpo_lightning.studies.lab.conditions import (
    PRIMARY,
    Condition,
    Contrast,
    Findings,
    Form,
    as_json,
    contrasts,
    estimates,
    perform,
    run_tables,
)
from mpo_lightning.studies.lab.figures import dots_of_seeds, lines, panels
from mpo_lightning.studies.lab.runner import Runner
from mpo_lightning.studies.lab.statistics import Interval, log_log_slope, mean_interval
from mpo_lightning.studies.lab.training import TrainingRun, train

__all__ = ["Cost", "study"]

FIRST_SEED = 10_000
SIZES = (2, 8, 32, 128, 512)
QUICK_SIZES = (32,)
PROMPTS = 32
# Responses that go through the model at a time.
WAYS = {"at once": None, "64 at a time": 64}
WARM_UP = TrainingRun(seed=0, loss=MPO(beta=0.1), prompts=8, responses=2, epochs=1)
# Losses whose coefficient maps are followed over n, without training.
MAPPED: dict[str, SetLoss] = {
    "MPO": MPO(beta=0.1),
    "W-MPO 0.5": MPO(beta=0.1, alpha=0.5, alpha_unit="std"),
    "InfoNCA 0.5": InfoNCA(beta=0.1, temperature=0.5),
    "DPO best-worst": DPO(beta=0.1),
    "DPO all pairs": DPO(beta=0.1, pairs="all"),
}
MAPPED_SIZES = (2, 4, 8, 16, 32, 64, 128)


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


def _label(n: int, beta: float) -> str:
    return f"beta {beta:g}: n={n}"


def study(runner: Runner, form: Form) -> Findings:
    """Train with every n, measure the costs in both ways, and follow the coefficient maps."""
    betas, sizes = form.betas, QUICK_SIZES if form.quick else SIZES
    ways = dict([*WAYS.items()][1:]) if form.quick else WAYS
    followed = dict([*MAPPED.items()][:1]) if form.quick else MAPPED
    seeds = form.seeds_of(FIRST_SEED, full=16, quick=1)
    conditions = [
        Condition(
            _label(n, beta),
            partial(TrainingRun, loss=MPO(beta=beta), prompts=PROMPTS, responses=n),
            {"n": n, "beta": beta},
        )
        for beta in betas
        for n in sizes
    ]
    cost_of = partial(
        Cost, loss=MPO(beta=0.1), prompts=PROMPTS, epochs=1 if form.quick else 3, until=None
    )
    costly = [
        Condition(
            f"n={n}, {way}",
            partial(cost_of, responses=n, responses_per_pass=at_a_time),
            {"n": n, "way": way},
        )
        for way, at_a_time in ways.items()
        for n in sizes
    ]
    outcomes = perform(runner, conditions, seeds, "Sizes")
    measured = perform(runner, costly, seeds[:3], "Costs")
    mapped = [
        (name, n, seed, CoefficientMap(seed=seed, loss=loss, prompts=PROMPTS, responses=n))
        for name, loss in followed.items()
        for n in (MAPPED_SIZES[:2] if form.quick else MAPPED_SIZES)
        for seed in seeds
    ]
    maps = [
        {"loss": name, "n": n, "seed": seed, **of}
        for (name, n, seed, _), of in zip(
            mapped, runner([task for *_, task in mapped], "Coefficient maps"), strict=True
        )
    ]
    found = estimates(outcomes)
    named = [
        Contrast(
            f"beta {beta:g}: {more} less {fewer} responses",
            (_label(more, beta),),
            (_label(fewer, beta),),
            expected,
        )
        for beta in betas
        for fewer, more, expected in ((8, 32, "+"), (32, 128, "+"), (128, 512, "none"))
        if {fewer, more} <= set(sizes)
    ]
    tested = contrasts(outcomes, named)

    def mean_cost(what: str, label: str) -> Interval:
        return mean_interval([o.result[what] for o in measured if o.condition.label == label])

    costs = {
        what: {way: {n: mean_cost(what, f"n={n}, {way}") for n in sizes} for way in ways}
        for what in ("step_ms", "memory_mib")
    }
    population = {
        name: {
            n: mean_interval(
                [r["population_gold"] for r in maps if (r["loss"], r["n"]) == (name, n)]
            )
            for n in dict.fromkeys(row["n"] for row in maps)
        }
        for name in followed
    }

    def figure() -> Any:
        titles = ("Step (ms)", "Memory beyond two responses (MiB)", f"Gold at {PRIMARY:g} nat")
        drawn, axes = panels(titles, "responses of a prompt, n")
        for way in ways:
            for axis, what in zip(axes, costs, strict=False):
                lines(axis, sizes, [costs[what][way][n] for n in sizes], way)
        for beta in betas:
            of_n = [found[_label(n, beta)]["gold"] for n in sizes]
            lines(axes[2], sizes, of_n, f"beta {beta:g}")
        for axis in axes:
            axis.set_xscale("log", base=2)
            axis.legend(fontsize=7)
        axes[0].set_yscale("log", base=2)
        return drawn

    def populations() -> Any:
        drawn, (axis,) = panels(["Gold at 0.25 nat from infinitely many groups"], "n", width=6.0)
        for name, of_n in population.items():
            lines(axis, list(of_n), list(of_n.values()), name)
        axis.set_xscale("log", base=2)
        axis.legend(fontsize=7)
        return drawn

    large = [n for n in sizes if n >= 32]
    return Findings(
        summary={
            "primary": f"gold at {PRIMARY:g} nat",
            "contrasts": tested,
            "time_slope_from_32": {
                way: log_log_slope(large, [costs["step_ms"][way][n].mean for n in large])
                if len(large) > 1
                else None
                for way in ways
            },
            **{what: as_json(of_what) for what, of_what in costs.items()},
            "population_gold": as_json(population),
            "measures": as_json(found),
        },
        tables={
            **run_tables([*outcomes, *measured]),
            "maps": maps,
        },
        figures={
            "scaling": figure,
            "population": populations,
            **({"contrasts": partial(dots_of_seeds, outcomes, named)} if named else {}),
        },
        shown=[
            {
                "n": str(n),
                **{f"step (ms), {way}": f"{costs['step_ms'][way][n].mean:.0f}" for way in ways},
                **{
                    f"memory (MiB), {way}": f"{costs['memory_mib'][way][n].mean:.0f}"
                    for way in ways
                },
                **{f"gold, beta {beta:g}": str(found[_label(n, beta)]["gold"]) for beta in betas},
            }
            for n in sizes
        ],
    )
