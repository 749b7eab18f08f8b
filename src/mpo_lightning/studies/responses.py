"""The number of responses: does bias fall as one over root n?

The paper's argument does not distinguish two biases. *Sample bias* is a property of draws, and the
theorem's object. *Policy bias* is that of the trained policy: how far its attributes are from those
of the ideal policy of the same divergence.

n varies with the number of prompts fixed (more responses are more data), and with the number of
responses fixed (more responses are fewer prompts). The responses of a prompt are the first n of one
pool.
"""

import math
from functools import partial
from statistics import fmean
from typing import Any

from mpo_lightning.studies.lab.conditions import (
    DIVERGENCES,
    PRIMARY,
    Condition,
    Findings,
    Form,
    RunOutcome,
    as_json,
    estimates,
    perform,
    run_tables,
)
from mpo_lightning.studies.lab.figures import lines, panels
from mpo_lightning.studies.lab.runner import Runner
from mpo_lightning.studies.lab.sample_bias import SampleBias
from mpo_lightning.studies.lab.statistics import (
    Interval,
    least_squares_slope,
    log_log_slope,
    mean_interval,
)
from mpo_lightning.studies.lab.training import TrainingRun
from mpo_lightning.studies.methods import METHODS

__all__ = ["study"]

PROMPTS = 128
TOTAL = 1280
SIZES = (2, 3, 5, 10, 20, 40)
QUICK_SIZES = (2, 10)
COMPARED = ("MPO", "W-MPO 1", "InfoNCA 1", "DPO best-worst", "DPO random pair", "DPO all pairs")
QUICK_COMPARED = ("MPO", "DPO best-worst")
DESIGNS = {"prompts fixed": PROMPTS, "responses fixed": None}


def _conditions(methods: tuple[str, ...], sizes: tuple[int, ...]) -> list[Condition]:
    return [
        Condition(
            f"{method}, n={n}, {design}",
            partial(TrainingRun, loss=METHODS[method], prompts=prompts, responses=n),
            {"method": method, "n": n, "design": design, "prompts": prompts},
        )
        for design, fixed in DESIGNS.items()
        for method in methods
        for n in sizes
        for prompts in [fixed or TOTAL // n]
    ]


def _sample_slope(results: list[dict[str, Any]], kind: str) -> Interval:
    """Return the slope of the log of the bias on the log of n, over seeds."""
    return mean_interval(
        [
            log_log_slope([float(n) for n in result[kind]], list(result[kind].values()))
            for result in results
        ]
    )


def _policy_bias(
    outcomes: list[RunOutcome],
    method: str,
    design: str,
    seeds: list[int],
    where: float,
) -> list[dict[int, float]]:
    """Return the policy's bias by n, for each seed that reached the divergence with every n."""
    found = []
    for seed in seeds:
        points = {
            o.condition.columns["n"]: o.at(where)
            for o in outcomes
            if (o.condition.columns["method"], o.condition.columns["design"], o.seed)
            == (method, design, seed)
        }
        reached = {n: point["bias"] for n, point in points.items() if point is not None}
        if len(reached) == len(points):
            found.append(reached)
    return found


def _floor(sizes: list[int], biases: list[float]) -> float:
    """Return the limit of the bias for large n: bias ** 2 = floor ** 2 + c / n, least squares."""
    x, y = [1 / n for n in sizes], [bias**2 for bias in biases]
    return math.sqrt(max(fmean(y) - least_squares_slope(x, y) * fmean(x), 0.0))


def study(runner: Runner, form: Form) -> Findings:
    """Measure samples, then train with every n, method and design."""
    sizes = QUICK_SIZES if form.quick else SIZES
    methods = QUICK_COMPARED if form.quick else COMPARED
    seeds = form.seeds_of(full=8)
    outcomes = perform(runner, _conditions(methods, sizes), seeds, "Responses")
    samples = runner([SampleBias(seed=seed, sizes=SIZES) for seed in seeds], "Samples")
    sample_bias = {
        kind: {n: mean_interval([result[kind][str(n)] for result in samples]) for n in SIZES}
        for kind in ("acceptable", "chosen")
    }
    sample_slopes = {kind: _sample_slope(samples, kind) for kind in sample_bias}
    policy_bias = {
        f"{method}, {design}, {where:g} nat": _policy_bias(outcomes, method, design, seeds, where)
        for where in DIVERGENCES
        for design in DESIGNS
        for method in methods
    }
    policy_slopes = {
        label: mean_interval([log_log_slope(list(of_n), list(of_n.values())) for of_n in by_seed])
        for label, by_seed in policy_bias.items()
    }
    floors = {
        label: mean_interval([_floor(list(of_n), list(of_n.values())) for of_n in by_seed])
        for label, by_seed in policy_bias.items()
    }
    found = {where: estimates(outcomes, where) for where in DIVERGENCES}

    def curves(measure: str, label: str) -> Any:
        figure, axes = panels(list(DESIGNS), "responses of a prompt, n")
        for axis, design in zip(axes, DESIGNS, strict=True):
            for method in methods:
                of_n = [found[PRIMARY][f"{method}, n={n}, {design}"][measure] for n in sizes]
                lines(axis, sizes, of_n, method)
            axis.set_xscale("log")
            axis.set_xticks(sizes, [str(n) for n in sizes])
            axis.minorticks_off()
        axes[0].set_ylabel(f"{label} at {PRIMARY:g} nat")
        axes[0].legend(fontsize=7)
        return figure

    def of_samples() -> Any:
        figure, (axis,) = panels(["Attribute bias of samples"], "n")
        for kind, of_kind in sample_bias.items():
            slope = sample_slopes[kind]
            lines(axis, list(of_kind), list(of_kind.values()), f"{kind}: slope {slope.mean:.2f}")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.legend()
        return figure

    fits: list[tuple[str, str, Interval, Interval | str]] = [
        (f"samples: {kind}", "-", slope, "-") for kind, slope in sample_slopes.items()
    ]
    for label, slope in policy_slopes.items():
        of, _, where = label.rpartition(", ")
        fits.append((f"policy: {of}", where, slope, floors[label]))
    return Findings(
        summary={
            "sample_bias_slope": sample_slopes["acceptable"].mean,
            "sample_bias_slopes": {kind: slope.to_json() for kind, slope in sample_slopes.items()},
            "policy_bias_slopes": {of: slope.to_json() for of, slope in policy_slopes.items()},
            "policy_bias_floors": {of: floor.to_json() for of, floor in floors.items()},
            "sample_bias": as_json(sample_bias),
            **{f"at_{where:g}_nat": as_json(of_place) for where, of_place in found.items()},
        },
        tables={
            **run_tables(outcomes),
            "samples": [
                {"seed": seed, "of": kind, "n": n, "bias": value}
                for seed, result in zip(seeds, samples, strict=True)
                for kind in sample_bias
                for n, value in result[kind].items()
            ],
        },
        figures={
            "policy_bias": partial(curves, "bias", "attribute bias of the policy"),
            "gold": partial(curves, "gold", "gold score"),
            "sample_bias": of_samples,
        },
        shown=[
            {"bias of": of, "at": where, "log-log slope": str(slope), "floor": str(floor)}
            for of, where, slope, floor in fits
        ],
    )
