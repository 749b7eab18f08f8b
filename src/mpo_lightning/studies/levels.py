"""Ordinal levels: does a loss that uses all of them gain over one that uses two sets?"""

from mpo_lightning.losses import DPO, MPO, InfoNCA, MultiLevelMPO, PlackettLuce
from mpo_lightning.studies.lab.conditions import Findings, Form
from mpo_lightning.studies.lab.grid import Grid, Method, Scenario
from mpo_lightning.studies.lab.runner import Runner
from mpo_lightning.studies.lab.training import BETA
from mpo_lightning.studies.world.judges import NoisyJudge

__all__ = ["study"]

GRID = Grid(
    scenarios={
        f"{levels} levels, noise {noise:g}": Scenario(
            judge=NoisyJudge(shape="levels", levels=levels, noise=noise)
        )
        for noise in (0.0, 1.0)
        for levels in (2, 3, 5, 10)
    },
    methods={
        "MPO": Method(loss=MPO(beta=BETA)),
        "W-MPO 1": Method(loss=MPO(beta=BETA, alpha=1.0, alpha_unit="std")),
        "multi-level": Method(loss=MultiLevelMPO(beta=BETA)),
        "Plackett-Luce": Method(loss=PlackettLuce(beta=BETA)),
        "DPO all pairs": Method(loss=DPO(beta=BETA, pairs="all")),
        # Levels are whole numbers: one apart, the higher has e times the share of the lower.
        "InfoNCA 1": Method(loss=InfoNCA(beta=BETA)),
    },
    pairs=[
        ("W-MPO 1", "MPO"),
        ("multi-level", "MPO"),
        ("Plackett-Luce", "MPO"),
        ("DPO all pairs", "MPO"),
        ("InfoNCA 1", "MPO"),
    ],
    quick_scenarios=["2 levels, noise 1", "5 levels, noise 1"],
    quick_methods=["MPO", "multi-level", "DPO all pairs"],
)


def study(runner: Runner, form: Form) -> Findings:
    """Train every method on every number of levels."""
    grid = GRID.in_form(form)
    return grid.findings(grid.train(runner, form.seeds_of(full=8), "Levels"))
