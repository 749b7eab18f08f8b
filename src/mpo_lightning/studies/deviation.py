"""Deviation weights: how much alpha helps, with judges without noise and with it."""

from functools import partial
from typing import Any

from mpo_lightning.losses import MPO
from mpo_lightning.studies.lab.conditions import Findings, Form, estimates
from mpo_lightning.studies.lab.figures import differences_over, panels
from mpo_lightning.studies.lab.grid import Grid, Method, Scenario, interaction, label, within
from mpo_lightning.studies.lab.runner import Runner
from mpo_lightning.studies.world.judges import NoisyJudge

__all__ = ["study"]

FIRST_SEED = 2000
ALPHAS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)


def _alpha(alpha: float) -> str:
    return f"alpha {alpha:g}"


# Gold's standard deviation is 1.
NOISES = (0.0, 1.0, 2.0)
GRID = Grid(
    scenarios={f"noise {noise:g}": Scenario(judge=NoisyJudge(noise=noise)) for noise in NOISES},
    methods={
        _alpha(alpha): Method(loss=partial(MPO, alpha=alpha, alpha_unit="std")) for alpha in ALPHAS
    },
    contrasts=[
        *within("noise 1", "alpha 0.5", "alpha 0", "+"),
        *within("noise 2", "alpha 1", "alpha 0", "+"),
        *within("noise 0", "alpha 4", "alpha 0", "-"),
        *interaction("noise 2", "noise 0", "alpha 1", "alpha 0", "+"),
    ],
    pairs=[(_alpha(alpha), "alpha 0") for alpha in ALPHAS if alpha],
    quick_scenarios=["noise 1"],
    quick_methods=["alpha 0", "alpha 0.5"],
)


def study(runner: Runner, form: Form) -> Findings:
    """Train with every alpha under every judge."""
    grid = GRID.in_form(form)
    outcomes = grid.train(runner, form.seeds_of(FIRST_SEED, full=16), "Alphas")
    found = estimates(outcomes)
    best = {}
    for beta in grid.betas:
        for noise in grid.scenarios:
            gold = {method: found[label(noise, method, beta)]["gold"] for method in grid.methods}
            reached = {method: value.mean for method, value in gold.items() if value.count}
            best[f"{noise}, beta {beta:g}"] = (
                max(reached, key=reached.__getitem__) if reached else None
            )

    def over_alpha() -> Any:
        titles = [f"beta {beta:g}" for beta in grid.betas]
        figure, axes = panels(titles, "alpha, per standard deviation")
        alphas = [alpha for alpha in ALPHAS if _alpha(alpha) in grid.methods]
        for axis, beta in zip(axes, grid.betas, strict=True):
            for noise in grid.scenarios:
                labels = [label(noise, _alpha(alpha), beta) for alpha in alphas]
                differences_over(axis, alphas, outcomes, labels, noise)
            axis.set_xscale("symlog", linthresh=0.25)
            axis.set_xticks(alphas, [f"{alpha:g}" for alpha in alphas])
        axes[0].set_ylabel("gold less that of alpha 0")
        axes[0].legend()
        return figure

    return grid.findings(outcomes, summary={"best_alpha": best}, figures={"alpha": over_alpha})
