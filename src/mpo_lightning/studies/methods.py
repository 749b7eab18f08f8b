"""All methods at the same budget, compared at the same divergence from the reference.

Every method sees the same groups in the same order, starts from the same adapter and takes the same
number of steps, each with all responses of its groups. The learning rate of each is chosen among
three on other seeds. The primary measure, fixed beforehand, is the expected gold score on held-out
prompts where the divergence is 1 nat.
"""

from functools import partial
from typing import Any

from mpo_lightning.losses import (
    DPO,
    IPO,
    MDPO,
    MIPO,
    MPO,
    NCA,
    AboveQuantile,
    BestRest,
    EachMPO,
    InfoNCA,
    LiPO,
    MultiLevelMPO,
    PlackettLuce,
    SetLoss,
    TopBottom,
)
from mpo_lightning.studies.lab.conditions import (
    DIVERGENCES,
    END,
    PRIMARY,
    Condition,
    Findings,
    Form,
    as_json,
    comparisons,
    difference_text,
    estimates,
    paired,
    perform,
    run_tables,
)
from mpo_lightning.studies.lab.figures import bars, panels
from mpo_lightning.studies.lab.runner import Runner
from mpo_lightning.studies.lab.training import BETA, LEARNING_RATE, TrainingRun

__all__ = ["METHODS", "study"]

LEARNING_RATES = (5e-4, LEARNING_RATE, 2e-3)
TUNING_SEEDS = (1000, 1001)
BASELINE = "MPO"
# Line styles: ten colours, then the next style.
LINES = ("-", "--", ":")

# Gold scores have a standard deviation of one, to which the judge adds noise: a temperature of 1 is
# one standard deviation of gold.
METHODS: dict[str, SetLoss] = {
    "MPO": MPO(beta=BETA),
    "W-MPO 0.5": MPO(beta=BETA, alpha=0.5, alpha_unit="std"),
    "W-MPO 1": MPO(beta=BETA, alpha=1.0, alpha_unit="std"),
    "W-MPO 2": MPO(beta=BETA, alpha=2.0, alpha_unit="std"),
    "W-MPO 4": MPO(beta=BETA, alpha=4.0, alpha_unit="std"),
    "MPO median": MPO(beta=BETA, partition=AboveQuantile()),
    "MPO top and bottom 2": MPO(beta=BETA, partition=TopBottom(k=2)),
    "MPO best against rest": MPO(beta=BETA, partition=BestRest()),
    "EachMPO": EachMPO(beta=BETA),
    "MPO with likelihood": MPO(beta=BETA, likelihood=0.1),
    "mDPO": MDPO(beta=BETA),
    "mIPO": MIPO(beta=BETA),
    "InfoNCA 0.2": InfoNCA(beta=BETA, temperature=0.2),
    "InfoNCA 1": InfoNCA(beta=BETA, temperature=1.0),
    "NCA 1": NCA(beta=BETA, temperature=1.0),
    "DPO best-worst": DPO(beta=BETA),
    "DPO random pair": DPO(beta=BETA, pairs="random"),
    "DPO all pairs": DPO(beta=BETA, pairs="all"),
    "IPO all pairs": IPO(beta=BETA, pairs="all"),
    "Plackett-Luce": PlackettLuce(beta=BETA),
    "LiPO": LiPO(beta=BETA),
    "multi-level 3": MultiLevelMPO(beta=BETA, levels=3),
    "multi-level": MultiLevelMPO(beta=BETA),
}
QUICK_METHODS = ("MPO", "W-MPO 1", "InfoNCA 1", "NCA 1", "DPO best-worst", "DPO all pairs")


def _tuned(runner: Runner, methods: list[str]) -> dict[str, dict[str, Any]]:
    """Return the learning rate of each method that gives the most gold at the primary divergence.

    A rate that does not reach it with every tuning seed is chosen only where none does; the gold at
    the end of training then decides.
    """
    conditions = [
        Condition(f"{method} {lr}", partial(TrainingRun, loss=METHODS[method], lr=lr), {"lr": lr})
        for method in methods
        for lr in LEARNING_RATES
    ]
    outcomes = perform(runner, conditions, TUNING_SEEDS, "Learning rates")
    at_primary, at_end = estimates(outcomes), estimates(outcomes, END)
    chosen = {}
    for method in methods:
        found = {}
        for lr in LEARNING_RATES:
            gold = at_primary[f"{method} {lr}"]["gold"]
            reached = gold.count == len(TUNING_SEEDS)
            if not reached:
                gold = at_end[f"{method} {lr}"]["gold"]
            found[lr] = {"reached": reached, "gold": gold.mean}
        best = max(found, key=lambda lr: (found[lr]["reached"], found[lr]["gold"]))
        chosen[method] = {"lr": best, "tried": {str(lr): value for lr, value in found.items()}}
    return chosen


def study(runner: Runner, form: Form) -> Findings:
    """Train every method with every seed."""
    methods = list(QUICK_METHODS if form.quick else METHODS)
    if form.quick:
        rates: dict[str, dict[str, Any]] = {m: {"lr": LEARNING_RATE} for m in methods}
    else:
        rates = _tuned(runner, methods)
    conditions = [
        Condition(
            method,
            partial(TrainingRun, loss=METHODS[method], lr=rates[method]["lr"]),
            {"lr": rates[method]["lr"]},
        )
        for method in methods
    ]
    seeds = form.seeds_of(full=10)
    outcomes = perform(runner, conditions, seeds, "Methods")
    at_primary, at_end = estimates(outcomes), estimates(outcomes, END)
    against = [(method, BASELINE) for method in methods if method != BASELINE]
    found = comparisons(outcomes, against)
    nearer = comparisons(outcomes, against, where=min(DIVERGENCES))

    def gold_over_divergence() -> Any:
        titles = ("Gold score", "Attribute bias", "Effective share of the chosen")
        figure, axes = panels(titles, "KL from the reference (nats)")
        divergences = [0.05 * step for step in range(1, 31)]
        at = {divergence: estimates(outcomes, divergence) for divergence in divergences}
        for number, method in enumerate(methods):
            # As far as all seeds have come.
            reached = [d for d in divergences if at[d][method]["gold"].count == len(seeds)]
            for axis, measure in zip(axes, ("gold", "bias", "effective_chosen"), strict=True):
                values = [at[d][method][measure].mean for d in reached]
                axis.plot(reached, values, LINES[number // 10], label=method, linewidth=1.2)
        axes[0].legend(fontsize=6, ncols=2)
        return figure

    def at_one_nat() -> Any:
        titles = (f"Gold score less {BASELINE}'s,", "Attribute bias", "Chosen's logp change (nats)")
        figure, axes = panels(
            [f"{title} at {PRIMARY:g} nat" for title in titles], height=1 + 0.3 * len(methods)
        )
        # Worlds differ more than methods do: paired differences show what methods do.
        bars(axes[0], methods, [paired(outcomes, m, BASELINE).difference for m in methods])
        axes[0].axvline(0, color="grey", linewidth=1)
        for axis, measure in zip(axes[1:], ("bias", "chosen_shift"), strict=True):
            bars(axis, methods, [at_primary[method][measure] for method in methods])
        return figure

    return Findings(
        summary={
            "primary": f"gold at {PRIMARY:g} nat",
            "learning_rates": rates,
            "at_1_nat": as_json(at_primary),
            "at_end": as_json(at_end),
            "comparisons": found,
            f"comparisons_at_{min(DIVERGENCES):g}_nat": nearer,
        },
        tables=run_tables(outcomes),
        figures={"trajectories": gold_over_divergence, "methods": at_one_nat},
        shown=[
            {
                "method": method,
                "gold at 1 nat": str(at_primary[method]["gold"]),
                "less MPO": difference_text(found, method),
                f"at {min(DIVERGENCES):g} nat": difference_text(nearer, method),
                "bias": f"{at_primary[method]['bias'].mean:.3f}",
                "win rate": f"{at_primary[method]['win_rate'].mean:.3f}",
                "chosen logp": f"{at_primary[method]['chosen_shift'].mean:+.2f}",
                "reached": f"{at_primary[method]['gold'].count} of {at_end[method]['gold'].count}",
            }
            for method in methods
        ],
    )
