"""Utilities that do not add up between responses: labels of sets by their best, mean or worst.

MPO says that a set is preferred with odds of its sum of exp(utility) against that of the other.
Here a judge labels halves of groups, by that sum, or by something else.
"""

from functools import partial

from mpo_lightning.losses import DPO, MDPO, MPO, EachMPO
from mpo_lightning.studies.lab.conditions import Findings, Form
from mpo_lightning.studies.lab.grid import Grid, Method, Scenario, interaction, within
from mpo_lightning.studies.lab.runner import Runner
from mpo_lightning.studies.world.judges import SetJudge, SetRule

__all__ = ["study"]

FIRST_SEED = 8000
RULES: tuple[SetRule, ...] = ("sum", "max", "mean", "min")
GRID = Grid(
    scenarios={
        # Without labels of sets, each response has a score of its own.
        "single scores": Scenario(),
        **{rule: Scenario(judge=SetJudge(rule=rule)) for rule in RULES},
    },
    methods={
        "MPO": Method(loss=MPO),
        "EachMPO": Method(loss=EachMPO),
        "mDPO": Method(loss=MDPO),
        "DPO sets": Method(loss=partial(DPO, pairs="sets")),
    },
    contrasts=[
        *interaction("mean", "sum", "mDPO", "MPO", "+"),
        *interaction("max", "sum", "EachMPO", "MPO", "-"),
        *interaction("min", "sum", "EachMPO", "MPO", "+"),
        *within("mean", "mDPO", "MPO", "+"),
    ],
    pairs=[("EachMPO", "MPO"), ("mDPO", "MPO"), ("DPO sets", "MPO")],
    quick_scenarios=["mean"],
    quick_methods=["MPO", "mDPO"],
)


def study(runner: Runner, form: Form) -> Findings:
    """Train every method on sets labelled by every rule."""
    grid = GRID.in_form(form)
    return grid.findings(grid.train(runner, form.seeds_of(FIRST_SEED, full=12), "Sets"))
