"""All methods at the same budget, compared at the same divergence from the reference.

Every method sees the same groups in the same order, starts from the same adapter and takes the same
number of steps, each with all responses of its groups. Pairwise training is also given as many
scored responses as the groups have, on more prompts. The learning rate of each method is chosen
among three on other seeds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from scipy import stats

from mpo_lightning.losses import (
    DPO,
    GVPO,
    IPO,
    MDPO,
    MPO,
    NCA,
    AboveQuantile,
    BestRest,
    EachAgainstBelow,
    EachMPO,
    InfoNCA,
    LiPO,
    MultiLevelMPO,
    PlackettLuce,
    SetLoss,
)
from mpo_lightning.studies.lab.coefficients import CoefficientMap
from mpo_lightning.studies.lab.conditions import (
    DIVERGENCES,
    END,
    PRIMARY,
    Condition,
    Contrast,
    Findings,
    Form,
    RunOutcome,
    as_json,
    contrasts,
    differences,
    estimates,
    perform,
    run_tables,
    shown_contrasts,
)
from mpo_lightning.studies.lab.figures import dots_of_seeds, lines, panels
from mpo_lightning.studies.lab.pairs import BestAgainstRandomDPO, FreshPairDPO
from mpo_lightning.studies.lab.runner import Runner
from mpo_lightning.studies.lab.statistics import mean_interval
from mpo_lightning.studies.lab.training import BETAS, LEARNING_RATE, TrainingRun

__all__ = ["METHODS", "Budgeted", "study"]

FIRST_SEED = 1000
TUNING_SEEDS = (900, 901)
LEARNING_RATES = (5e-4, LEARNING_RATE, 2e-3)
BASELINE = "MPO"
MOST_RESPONSES = 1280


@dataclass(frozen=True)
class Budgeted:
    """A loss, with the number of responses of a group; groups have 1,280 responses in all.

    Attributes:
        loss: makes the loss of its keyword ``beta``.
        responses: number of responses of a group.
    """

    loss: Callable[..., SetLoss]
    responses: int = 10

    def run(self, *, beta: float, **settings: Any) -> TrainingRun:
        """Return a training run at a beta."""
        prompts = MOST_RESPONSES // self.responses
        return TrainingRun(
            loss=self.loss(beta=beta), prompts=prompts, responses=self.responses, **settings
        )


# Gold scores have a standard deviation of one, to which the judge adds noise: a temperature of 1 is
# one standard deviation of gold.
METHODS: dict[str, Budgeted] = {
    "MPO": Budgeted(MPO),
    "W-MPO 0.5": Budgeted(partial(MPO, alpha=0.5, alpha_unit="std")),
    "W-MPO 1": Budgeted(partial(MPO, alpha=1.0, alpha_unit="std")),
    "W-MPO 2": Budgeted(partial(MPO, alpha=2.0, alpha_unit="std")),
    "MPO median": Budgeted(partial(MPO, partition=AboveQuantile())),
    "MPO best against rest": Budgeted(partial(MPO, partition=BestRest())),
    "EachMPO": Budgeted(EachMPO),
    "MPO with likelihood": Budgeted(partial(MPO, likelihood=0.1)),
    "mDPO": Budgeted(MDPO),
    "InfoNCA 0.5": Budgeted(partial(InfoNCA, temperature=0.5)),
    "InfoNCA 1": Budgeted(partial(InfoNCA, temperature=1.0)),
    "NCA 1": Budgeted(partial(NCA, temperature=1.0)),
    "GVPO 1": Budgeted(partial(GVPO, temperature=1.0)),
    "DPO best-worst": Budgeted(DPO),
    "DPO best against random": Budgeted(BestAgainstRandomDPO),
    "DPO random pair": Budgeted(partial(DPO, pairs="random")),
    "DPO fresh random pair": Budgeted(FreshPairDPO),
    "DPO 640 x 2": Budgeted(DPO, responses=2),
    "DPO all pairs": Budgeted(partial(DPO, pairs="all")),
    "IPO all pairs": Budgeted(partial(IPO, pairs="all")),
    "Plackett-Luce": Budgeted(PlackettLuce),
    "EachAgainstBelow": Budgeted(EachAgainstBelow),
    "LiPO": Budgeted(LiPO),
    "multi-level": Budgeted(MultiLevelMPO),
}
QUICK_METHODS = ("MPO", "DPO fresh random pair", "DPO 640 x 2")
# First less second, and the sign that is expected.
NAMED = (
    ("MPO", "DPO random pair", "+"),
    ("MPO", "DPO 640 x 2", "none"),
    ("MPO", "DPO all pairs", "none"),
    ("W-MPO 0.5", "MPO", "+"),
    ("multi-level", "MPO", "+"),
    ("EachMPO", "MPO", "none at beta 0.1, + at beta 1"),
    ("InfoNCA 1", "MPO", "+"),
)
# How points are named.
LETTERING: dict[str, Any] = {"fontsize": 6, "xytext": (3, 2), "textcoords": "offset points"}
# At most six lines in a figure.
DRAWN = ("MPO", "W-MPO 0.5", "InfoNCA 1", "DPO best-worst", "DPO 640 x 2", "DPO random pair")


def _label(method: str, beta: float) -> str:
    return f"beta {beta:g}: {method}"


def _tuned(runner: Runner, methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the learning rate of each method and beta that gives the most gold.

    At the primary divergence. A rate that does not reach it with every tuning seed is chosen only
    where none does; the gold at the end of training then decides.
    """
    conditions = [
        Condition(
            f"{_label(method, beta)} {lr}", partial(METHODS[method].run, beta=beta, lr=lr, epochs=8)
        )
        for beta in BETAS
        for method in methods
        for lr in LEARNING_RATES
    ]
    outcomes = perform(runner, conditions, TUNING_SEEDS, "Learning rates")
    at_primary, at_end = estimates(outcomes), estimates(outcomes, END)
    chosen = {}
    for name in dict.fromkeys(condition.label.rpartition(" ")[0] for condition in conditions):
        found = {}
        for lr in LEARNING_RATES:
            gold = at_primary[f"{name} {lr}"]["gold"]
            reached = gold.count == len(TUNING_SEEDS)
            if not reached:
                gold = at_end[f"{name} {lr}"]["gold"]
            found[lr] = {"reached": reached, "gold": gold.mean}
        best = max(found, key=lambda lr: (found[lr]["reached"], found[lr]["gold"]))
        chosen[name] = {"lr": best, "tried": {str(lr): value for lr, value in found.items()}}
    return chosen


def _maps(
    runner: Runner, methods: Sequence[str], betas: Sequence[float], seeds: Sequence[int]
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Return the coefficient maps of each method and beta, as means and by seed."""
    tasks = [
        (
            _label(method, beta),
            seed,
            CoefficientMap(
                seed=seed,
                loss=(budgeted := METHODS[method]).loss(beta=beta),
                prompts=MOST_RESPONSES // budgeted.responses,
                responses=budgeted.responses,
            ),
        )
        for beta in betas
        for method in methods
        for seed in seeds
    ]
    found = runner([task for _, _, task in tasks], "Coefficient maps")
    rows = [
        {"condition": name, "seed": seed, **of}
        for (name, seed, _), of in zip(tasks, found, strict=True)
    ]
    means = {
        name: {
            measure: mean_interval([row[measure] for row in rows if row["condition"] == name])
            for measure in found[0]
        }
        for name in dict.fromkeys(row["condition"] for row in rows)
    }
    return as_json(means), rows


def _predicted(
    maps: Mapping[str, Mapping[str, Any]],
    near: Mapping[str, Mapping[str, Any]],
    methods: Sequence[str],
    betas: Sequence[float],
) -> dict[str, dict[str, float | None]]:
    """Correlate the maps' signal-to-noise ratios with gold near the reference, over methods."""
    found: dict[str, dict[str, float | None]] = {}
    for beta in betas:
        pairs = [
            (maps[name]["snr"]["mean"], near[name]["gold"].mean)
            for name in (_label(method, beta) for method in methods)
            if near[name]["gold"].count
        ]
        enough = len(pairs) > 2
        pearson = stats.pearsonr(*zip(*pairs, strict=True)) if enough else None
        spearman = stats.spearmanr(*zip(*pairs, strict=True)) if enough else None
        found[f"beta {beta:g}"] = {
            "methods": len(pairs),
            "pearson": float(pearson.statistic) if pearson else None,
            "pearson_p": float(pearson.pvalue) if pearson else None,
            "spearman": float(spearman.statistic) if spearman else None,
        }
    return found


def study(runner: Runner, form: Form) -> Findings:
    """Train every method at every beta with every seed."""
    methods = list(QUICK_METHODS if form.quick else METHODS)
    betas, seeds = form.betas, form.seeds_of(FIRST_SEED, full=16)
    rates: dict[str, dict[str, Any]] = (
        {_label(m, beta): {"lr": LEARNING_RATE} for m in methods for beta in betas}
        if form.quick
        else _tuned(runner, methods)
    )
    conditions = []
    for beta in betas:
        for method in methods:
            lr = rates[_label(method, beta)]["lr"]
            run = partial(
                METHODS[method].run, beta=beta, lr=lr, epochs=2 if form.quick else 8, until=None
            )
            columns = {"method": method, "beta": beta, "lr": lr}
            conditions.append(Condition(_label(method, beta), run, columns))
    outcomes = perform(runner, conditions, seeds, "Methods")
    maps, map_rows = _maps(runner, methods, betas, seeds)
    found = {where: estimates(outcomes, where) for where in (*DIVERGENCES, END)}
    near = found[min(DIVERGENCES)]
    named = [
        Contrast(
            f"beta {beta:g}: {first} less {second}",
            (_label(first, beta),),
            (_label(second, beta),),
            expected,
        )
        for beta in betas
        for first, second, expected in NAMED
        if {first, second} <= set(methods)
    ]
    tested = contrasts(outcomes, named)
    beside = [
        (_label(method, beta), _label(BASELINE, beta))
        for beta in betas
        for method in methods
        if method != BASELINE
    ]
    return Findings(
        summary={
            "primary": f"gold at {PRIMARY:g} nat",
            "learning_rates": rates,
            "contrasts": tested,
            "differences": {
                str(where): differences(outcomes, beside, where) for where in (*DIVERGENCES, END)
            },
            "measures": {str(where): as_json(of) for where, of in found.items()},
            "maps": maps,
            "predicted": _predicted(maps, near, methods, betas),
        },
        tables={**run_tables(outcomes), "maps": map_rows},
        figures={
            "contrasts": partial(dots_of_seeds, outcomes, named),
            "maps": partial(_draw_maps, maps, near, methods, betas),
            "trajectories": partial(_draw_trajectories, outcomes, methods, betas, seeds),
        },
        shown=shown_contrasts(tested),
    )


def _draw_maps(
    maps: Mapping[str, Mapping[str, Any]],
    near: Mapping[str, Mapping[str, Any]],
    methods: Sequence[str],
    betas: Sequence[float],
) -> Any:
    figure, axes = panels(
        [f"beta {beta:g}" for beta in betas], "signal-to-noise ratio of the coefficients", width=6.0
    )
    for axis, beta in zip(axes, betas, strict=True):
        points: dict[str, tuple[float, float]] = {}
        for method in methods:
            name = _label(method, beta)
            at, gold = maps[name]["snr"]["mean"], near[name]["gold"]
            if gold.count:
                axis.plot(at, gold.mean, "o", color="C0", markersize=4)
                points[method] = (at, gold.mean)
        across, up = (max(ends) - min(ends) for ends in (axis.get_xlim(), axis.get_ylim()))
        named: list[tuple[float, float]] = []
        for method in sorted(points, key=lambda method: points[method]):
            at, height = points[method]
            # A name that would be written over another one is left out.
            if all(abs(at - x) > across / 5 or abs(height - y) > up / 40 for x, y in named):
                axis.annotate(method, (at, height), **LETTERING)
                named.append((at, height))
    axes[0].set_ylabel(f"gold at {min(DIVERGENCES):g} nat")
    return figure


def _draw_trajectories(
    outcomes: Sequence[RunOutcome],
    methods: Sequence[str],
    betas: Sequence[float],
    seeds: Sequence[int],
) -> Any:
    figure, axes = panels(
        [f"Gold score, beta {beta:g}" for beta in betas], "KL from the reference (nats)", width=6.0
    )
    divergences = [0.05 * step for step in range(1, 25)]
    at = {divergence: estimates(outcomes, divergence) for divergence in divergences}
    for axis, beta in zip(axes, betas, strict=True):
        for method in DRAWN:
            if method not in methods:
                continue
            name = _label(method, beta)
            # As far as all seeds have come.
            reached = [d for d in divergences if at[d][name]["gold"].count == len(seeds)]
            lines(axis, reached, [at[d][name]["gold"] for d in reached], method)
        axis.legend(fontsize=7)
    return figure
