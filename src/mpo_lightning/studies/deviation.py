"""Deviation weights: how much alpha helps, with judges without noise and with it."""

from functools import partial
from typing import Any

from mpo_lightning.losses import MPO
from mpo_lightning.studies.lab.conditions import (
    PRIMARY,
    Condition,
    Findings,
    Form,
    as_json,
    comparisons,
    difference_text,
    estimates,
    perform,
    run_tables,
)
from mpo_lightning.studies.lab.figures import lines, panels
from mpo_lightning.studies.lab.runner import Runner
from mpo_lightning.studies.lab.training import BETA, TrainingRun
from mpo_lightning.studies.world.judges import NoisyJudge

__all__ = ["study"]

ALPHAS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
QUICK_ALPHAS = (0.0, 1.0, 4.0)
# Standard deviations of the judge's noise; gold's is 1.
NOISES = (0.0, 1.0, 2.0)
QUICK_NOISES = (0.0, 1.0)


def _label(alpha: float, noise: float) -> str:
    return f"alpha {alpha:g}, noise {noise:g}"


def study(runner: Runner, form: Form) -> Findings:
    """Train with every alpha under every judge."""
    alphas = QUICK_ALPHAS if form.quick else ALPHAS
    noises = QUICK_NOISES if form.quick else NOISES
    conditions = [
        Condition(
            _label(alpha, noise),
            partial(
                TrainingRun,
                loss=MPO(beta=BETA, alpha=alpha, alpha_unit="std"),
                judge=NoisyJudge(noise=noise),
            ),
            {"alpha": alpha, "noise": noise},
        )
        for noise in noises
        for alpha in alphas
    ]
    outcomes = perform(runner, conditions, form.seeds_of(full=10), "Alphas")
    found = estimates(outcomes)
    pairs = [
        (_label(alpha, noise), _label(0.0, noise)) for noise in noises for alpha in alphas if alpha
    ]
    compared = comparisons(outcomes, pairs)

    def over_alpha() -> Any:
        titles = ("Gold score", "Attribute bias", "Drift to rare responses (nats)")
        figure, axes = panels(
            [f"{title} at {PRIMARY:g} nat" for title in titles], "alpha (per standard deviation)"
        )
        for axis, measure in zip(axes, ("gold", "bias", "rarity"), strict=True):
            for noise in noises:
                values = [found[_label(alpha, noise)][measure] for alpha in alphas]
                lines(axis, alphas, values, f"noise {noise:g}")
            axis.set_xscale("symlog", linthresh=0.25)
            axis.set_xticks(alphas, [f"{alpha:g}" for alpha in alphas])
        axes[0].legend()
        return figure

    best = {}
    for noise in noises:
        gold = {alpha: found[_label(alpha, noise)]["gold"] for alpha in alphas}
        reached = {alpha: value.mean for alpha, value in gold.items() if value.count}
        best[f"noise {noise:g}"] = max(reached, key=reached.__getitem__) if reached else None
    return Findings(
        summary={
            "primary": f"gold at {PRIMARY:g} nat",
            "best_alpha": best,
            "at_1_nat": as_json(found),
            "comparisons": compared,
        },
        tables=run_tables(outcomes),
        figures={"alpha": over_alpha},
        shown=[
            {
                "noise": f"{noise:g}",
                "alpha": f"{alpha:g}",
                "gold at 1 nat": str(found[_label(alpha, noise)]["gold"]),
                "less alpha 0": difference_text(compared, _label(alpha, noise)),
                "bias": f"{found[_label(alpha, noise)]['bias'].mean:.3f}",
                "effective": f"{found[_label(alpha, noise)]['effective_chosen'].mean:.3f}",
            }
            for noise in noises
            for alpha in alphas
        ],
    )
