"""Ordinal levels: does a loss that uses all of them gain over one that uses two sets?"""

from functools import partial

from mpo_lightning.losses import DPO, MPO, EachAgainstBelow, InfoNCA, MultiLevelMPO, PlackettLuce
from mpo_lightning.studies.lab.conditions import Findings, Form
from mpo_lightning.studies.lab.grid import Grid, Method, Scenario, within
from mpo_lightning.studies.lab.runner import Runner
from mpo_lightning.studies.world.judges import NoisyJudge

__all__ = ["study"]

FIRST_SEED = 6000
GRID = Grid(
    scenarios={
        **{
            f"{levels} levels": Scenario(judge=NoisyJudge(shape="levels", levels=levels))
            for levels in (3, 5, 10)
        },
        "5 levels, clean": Scenario(judge=NoisyJudge(shape="levels", levels=5, noise=0.0)),
    },
    methods={
        "MPO": Method(loss=MPO),
        "multi-level": Method(loss=MultiLevelMPO),
        "Plackett-Luce": Method(loss=PlackettLuce),
        "EachAgainstBelow": Method(loss=EachAgainstBelow),
        "DPO all pairs": Method(loss=partial(DPO, pairs="all")),
        # Levels are whole numbers: one apart, the higher has e times the share of the lower.
        "InfoNCA 1": Method(loss=InfoNCA),
    },
    contrasts=[
        *within("3 levels", "multi-level", "MPO", "none"),
        *within("5 levels", "multi-level", "MPO", "+"),
        *within("10 levels", "multi-level", "MPO", "+"),
        *within("5 levels", "multi-level", "DPO all pairs", "none"),
    ],
    pairs=[
        ("multi-level", "MPO"),
        ("Plackett-Luce", "MPO"),
        ("EachAgainstBelow", "MPO"),
        ("DPO all pairs", "MPO"),
        ("InfoNCA 1", "MPO"),
        ("multi-level", "DPO all pairs"),
    ],
    quick_scenarios=["5 levels"],
    quick_methods=["MPO", "multi-level"],
)


def study(runner: Runner, form: Form) -> Findings:
    """Train every method on every number of levels."""
    grid = GRID.in_form(form)
    return grid.findings(grid.train(runner, form.seeds_of(FIRST_SEED, full=12), "Levels"))
