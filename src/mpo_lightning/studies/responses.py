"""The number of responses: does bias fall as one over root n, and what is a response worth?

The paper's argument does not distinguish two biases. *Sample bias* is a property of draws, and the
theorem's object. *Policy bias* is that of the trained policy: how far its attributes are from those
of the ideal policy of the same divergence. Only a part of it comes from the sample: the data are
drawn several times in each world, and the part that all draws share is told from the part that
differs. Policies are read early, on the optimizer's path, and where a loss with a finite optimum
has converged.

At the same number of scored responses, n varies against the number of prompts.
"""

from collections.abc import Sequence
from functools import partial
from math import sqrt
from statistics import fmean
from typing import Any

from mpo_lightning.losses import DPO, MPO, InfoNCA
from mpo_lightning.studies.lab.conditions import (
    END,
    PRIMARY,
    Condition,
    Contrast,
    Findings,
    Form,
    RunOutcome,
    as_json,
    contrasts,
    estimates,
    perform,
    run_tables,
    shown_contrasts,
)
from mpo_lightning.studies.lab.figures import dots_of_seeds, lines, panels
from mpo_lightning.studies.lab.runner import Runner
from mpo_lightning.studies.lab.sample_bias import SampleBias
from mpo_lightning.studies.lab.statistics import Interval, log_log_slope, mean_interval
from mpo_lightning.studies.lab.training import TrainingRun
from mpo_lightning.studies.methods import METHODS, Budgeted
from mpo_lightning.studies.world.grammar import ATTRIBUTES
from mpo_lightning.studies.world.judges import NoisyJudge
from mpo_lightning.studies.world.world import GroupSampling

__all__ = ["study"]

FIRST_SEED = 7000
PROMPTS = 128
SIZES = (2, 3, 5, 10, 20, 40)
QUICK_SIZES = (2, 10)
DRAWS = 4
GAPS = tuple(f"gap {number}" for number in range(ATTRIBUTES))
# Where the bias of policies is read: early at a divergence, and at a converged optimum.
PLACES: dict[str, tuple[partial[TrainingRun], float | str]] = {
    "MPO, beta 0.1, at 0.5 nat": (partial(TrainingRun, loss=MPO(beta=0.1)), PRIMARY),
    "MPO, beta 1, at 0.5 nat": (partial(TrainingRun, loss=MPO(beta=1.0)), PRIMARY),
    "InfoNCA, beta 1, converged": (
        partial(TrainingRun, loss=InfoNCA(beta=1.0), until=None, epochs=12, measured_every=8),
        END,
    ),
}
# Methods and sizes of the same 1,280 scored responses.
EQUAL = {
    "MPO": Budgeted(MPO),
    "W-MPO 0.5": METHODS["W-MPO 0.5"],
    "DPO all pairs": Budgeted(partial(DPO, pairs="all")),
    "DPO best-worst": Budgeted(DPO),
    "DPO random pair": Budgeted(partial(DPO, pairs="random")),
}
EQUAL_SIZES = (2, 5, 10, 20, 40)


def _of_draw(make: partial[TrainingRun], seed: int, n: int, draw: int) -> TrainingRun:
    return make(
        seed=seed,
        prompts=PROMPTS,
        responses=n,
        sampling=GroupSampling(draw=draw),
        judge=NoisyJudge(draw=draw),
    )


def _bias_conditions(
    places: Sequence[str], sizes: Sequence[int], draws: int, **settings: int
) -> list[Condition]:
    return [
        Condition(
            f"{place}, n={n}, draw {draw}",
            partial(_of_draw, partial(PLACES[place][0], **settings), n=n, draw=draw),
            {"place": place, "n": n, "draw": draw},
        )
        for place in places
        for n in sizes
        for draw in range(draws)
    ]


def _equal_label(method: str, n: int, beta: float) -> str:
    return f"beta {beta:g}: {method}, {1280 // n} x {n}"


def _equal_conditions(
    betas: Sequence[float], methods: Sequence[str], sizes: Sequence[int]
) -> list[Condition]:
    return [
        Condition(
            _equal_label(method, n, beta),
            partial(Budgeted(EQUAL[method].loss, n).run, beta=beta),
            {"method": method, "n": n, "beta": beta},
        )
        for beta in betas
        for method in methods
        for n in sizes
    ]


def _parts(gaps: Sequence[Sequence[float]]) -> dict[str, float]:
    """Split the bias of a world's draws into what they share and what differs.

    Args:
        gaps: signed gap of each attribute, by draw; at least two draws.

    Returns:
        ``whole``, the mean absolute gap; ``sampling``, the root mean square of the draws'
        deviations from their mean; and ``shared``, that of the mean without the part of its square
        that the deviations explain.
    """
    draws = len(gaps)
    means = [fmean(of) for of in zip(*gaps, strict=True)]
    variances = [
        sum((gap - mean) ** 2 for gap in of) / (draws - 1)
        for of, mean in zip(zip(*gaps, strict=True), means, strict=True)
    ]
    shared = fmean(mean**2 for mean in means) - fmean(variances) / draws
    return {
        "whole": fmean(abs(gap) for of in gaps for gap in of),
        "sampling": sqrt(fmean(variances)),
        "shared": sqrt(max(shared, 0.0)),
    }


def _policy_bias(
    outcomes: Sequence[RunOutcome],
    places: Sequence[str],
    sizes: Sequence[int],
    seeds: Sequence[int],
) -> list[dict[str, Any]]:
    """Return a row for each place, size and seed with the parts of its bias.

    A world of which a draw did not reach the divergence is left out there.
    """
    rows = []
    for place in places:
        for seed in seeds:
            for n in sizes:
                points = [
                    o.at(PLACES[place][1])
                    for o in outcomes
                    if (o.condition.columns["place"], o.condition.columns["n"]) == (place, n)
                    and o.seed == seed
                ]
                reached = [[point[gap] for gap in GAPS] for point in points if point is not None]
                if len(reached) == len(points):
                    rows.append({"place": place, "seed": seed, "n": n, **_parts(reached)})
    return rows


def _slopes(
    rows: Sequence[dict[str, Any]], place: str, part: str, sizes: Sequence[int]
) -> Interval:
    """Return the slope of log bias on log n, over worlds in which it is above zero at every n."""
    found = []
    of_place = [row for row in rows if row["place"] == place]
    for seed in sorted({row["seed"] for row in of_place}):
        values = [row[part] for row in of_place if row["seed"] == seed]
        if len(values) == len(sizes) and all(value > 0 for value in values):
            found.append(log_log_slope(list(sizes), values))
    return mean_interval(found)


def study(runner: Runner, form: Form) -> Findings:
    """Measure samples, then train with every n."""
    betas, sizes = form.betas, QUICK_SIZES if form.quick else SIZES
    places = list(PLACES)[-1 if form.quick else 0 :]
    draws = 2 if form.quick else DRAWS
    # Enough for half a nat, and far from converged.
    shorter = {"epochs": 4} if form.quick else {}
    methods = ("MPO",) if form.quick else tuple(EQUAL)
    equal_sizes = QUICK_SIZES if form.quick else EQUAL_SIZES
    seeds = form.seeds_of(FIRST_SEED, full=10, quick=1)
    samples = runner([SampleBias(seed=seed, sizes=SIZES) for seed in seeds], "Samples")
    of_bias = _bias_conditions(places, sizes, draws, **shorter)
    biased = perform(runner, of_bias, seeds, "Bias")
    equal = perform(runner, _equal_conditions(betas, methods, equal_sizes), seeds, "Equal budgets")
    sample_bias = {
        kind: {n: mean_interval([result[kind][str(n)] for result in samples]) for n in SIZES}
        for kind in ("acceptable", "chosen")
    }
    sample_slopes = {
        kind: mean_interval(
            [
                log_log_slope([float(n) for n in result[kind]], list(result[kind].values()))
                for result in samples
            ]
        )
        for kind in sample_bias
    }
    rows = _policy_bias(biased, places, sizes, seeds)
    parts = ("whole", "sampling", "shared")
    policy_bias = {
        f"{place}: {part}": {
            n: mean_interval([r[part] for r in rows if (r["place"], r["n"]) == (place, n)])
            for n in sizes
        }
        for place in places
        for part in parts
    }
    slopes = {
        f"{place}: {part}": _slopes(rows, place, part, sizes) for place in places for part in parts
    }
    named = [
        Contrast(
            f"beta {beta:g}, 1,280 responses: {name}",
            (_equal_label(*first, beta),),
            (_equal_label(*second, beta),),
            expected,
        )
        for beta in betas
        for name, first, second, expected in (
            ("MPO 128 x 10 less DPO 640 x 2", ("MPO", 10), ("DPO all pairs", 2), "none"),
            ("MPO 32 x 40 less MPO 128 x 10", ("MPO", 40), ("MPO", 10), "-"),
            ("DPO best-worst 32 x 40 less MPO 32 x 40", ("DPO best-worst", 40), ("MPO", 40), "-"),
        )
        if not form.quick
    ]
    tested = contrasts(equal, named)
    golds = estimates(equal)

    def of_samples() -> Any:
        figure, (axis,) = panels(["Attribute bias of samples"], "n", width=6.0)
        for kind, of_kind in sample_bias.items():
            slope = sample_slopes[kind]
            lines(axis, list(of_kind), list(of_kind.values()), f"{kind}: slope {slope.mean:.2f}")
        _root_line(axis, SIZES, sample_bias["acceptable"][SIZES[0]].mean)
        return figure

    def of_policies() -> Any:
        figure, axes = panels(places, "responses of a prompt, n")
        for axis, place in zip(axes, places, strict=True):
            for part in parts:
                slope = slopes[f"{place}: {part}"]
                values = [policy_bias[f"{place}: {part}"][n] for n in sizes]
                lines(axis, sizes, values, f"{part}: slope {slope.mean:.2f}")
            _root_line(axis, sizes, policy_bias[f"{place}: sampling"][sizes[0]].mean)
        axes[0].set_ylabel("attribute bias of the policy")
        return figure

    def of_gold() -> Any:
        figure, axes = panels([f"beta {beta:g}" for beta in betas], "responses of a prompt, n")
        for axis, beta in zip(axes, betas, strict=True):
            for method in methods:
                values = [golds[_equal_label(method, n, beta)]["gold"] for n in equal_sizes]
                lines(axis, equal_sizes, values, method)
            axis.set_xscale("log")
            axis.set_xticks(equal_sizes, [str(n) for n in equal_sizes])
            axis.minorticks_off()
        axes[0].set_ylabel(f"gold at {PRIMARY:g} nat, 1,280 scored responses")
        axes[0].legend(fontsize=7)
        return figure

    shown = [
        {"contrast": f"bias of {name}", "difference": f"slope {slope}"}
        for name, slope in (
            *((f"samples, {kind}", slope) for kind, slope in sample_slopes.items()),
            *slopes.items(),
        )
    ]
    columns = [*shown_contrasts(tested), *shown]
    names = list(dict.fromkeys(name for row in columns for name in row))
    return Findings(
        summary={
            "primary": f"gold at {PRIMARY:g} nat",
            "contrasts": tested,
            "sample_bias_slopes": {kind: slope.to_json() for kind, slope in sample_slopes.items()},
            "sample_bias": as_json(sample_bias),
            "policy_bias_slopes": {name: slope.to_json() for name, slope in slopes.items()},
            "policy_bias": as_json(policy_bias),
            "measures": as_json(golds),
        },
        tables={
            **run_tables([*biased, *equal], GAPS),
            "samples": [
                {"seed": seed, "of": kind, "n": n, "bias": value}
                for seed, result in zip(seeds, samples, strict=True)
                for kind in sample_bias
                for n, value in result[kind].items()
            ],
            "policy_bias": rows,
        },
        figures={
            "policy_bias": of_policies,
            "equal_budgets": of_gold,
            "sample_bias": of_samples,
            **({"contrasts": partial(dots_of_seeds, equal, named)} if named else {}),
        },
        shown=[{name: row.get(name, "") for name in names} for row in columns],
    )


def _root_line(axis: Any, sizes: Sequence[int], start: float) -> None:
    """Draw a line of slope -1/2 through the first point, on logarithmic axes."""
    values = [start * sqrt(sizes[0] / n) for n in sizes]
    axis.plot(sizes, values, "--", color="grey", linewidth=1, label="slope -1/2")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(sizes, [str(n) for n in sizes])
    axis.legend(fontsize=7)
