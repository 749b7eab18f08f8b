"""Responses that are not independent, and qualities that do not add up.

The theorem assumes independent responses, and the loss adds utilities. Violations may affect sample
bias and the trained policy differently, so both are measured.
"""

from statistics import fmean

from mpo_lightning.losses import DPO, MPO, InfoNCA
from mpo_lightning.studies.lab.conditions import Findings, Form, comparisons
from mpo_lightning.studies.lab.grid import Grid, Method, Scenario, label
from mpo_lightning.studies.lab.runner import Runner
from mpo_lightning.studies.lab.sample_bias import SampleBias
from mpo_lightning.studies.lab.training import BETA
from mpo_lightning.studies.world.judges import NoisyJudge
from mpo_lightning.studies.world.world import GroupSampling

__all__ = ["study"]

CLEAN = NoisyJudge(noise=0.0)
GRID = Grid(
    scenarios={
        "independent": Scenario(),
        "independent, clean": Scenario(judge=CLEAN),
        "shared 0.5": Scenario(sampling=GroupSampling(shared=0.5)),
        "shared 0.9": Scenario(sampling=GroupSampling(shared=0.9)),
        "shared 0.9, clean": Scenario(sampling=GroupSampling(shared=0.9), judge=CLEAN),
        "5 copies of 2": Scenario(sampling=GroupSampling(copies=5)),
        "2 responses": Scenario(responses=2),
        "temperature 0.5": Scenario(sampling=GroupSampling(temperature=0.5)),
        "temperature 1.5": Scenario(sampling=GroupSampling(temperature=1.5)),
        "product of symbols": Scenario(judge=NoisyJudge(utility="product")),
        "crowding": Scenario(judge=NoisyJudge(crowding=0.5)),
        "crowding, shared 0.5": Scenario(
            judge=NoisyJudge(crowding=0.5), sampling=GroupSampling(shared=0.5)
        ),
    },
    methods={
        "MPO": Method(loss=MPO(beta=BETA)),
        "W-MPO 1": Method(loss=MPO(beta=BETA, alpha=1.0, alpha_unit="std")),
        "InfoNCA 1": Method(loss=InfoNCA(beta=BETA)),
        "DPO best-worst": Method(loss=DPO(beta=BETA)),
    },
    pairs=[("W-MPO 1", "MPO"), ("InfoNCA 1", "MPO"), ("DPO best-worst", "MPO")],
    quick_scenarios=["independent", "shared 0.9", "5 copies of 2", "2 responses"],
    quick_methods=["MPO", "DPO best-worst"],
)
# The kind of groups that each kind is compared with, by the same method.
BESIDE = {
    "shared 0.5": "independent",
    "shared 0.9": "independent",
    "shared 0.9, clean": "independent, clean",
    "5 copies of 2": "2 responses",
    "temperature 0.5": "independent",
    "temperature 1.5": "independent",
    "crowding": "independent",
    "crowding, shared 0.5": "shared 0.5",
}


def study(runner: Runner, form: Form) -> Findings:
    """Train every method on every kind of groups, and measure the groups themselves."""
    grid, seeds = GRID.in_form(form), form.seeds_of(full=6)
    outcomes = grid.train(runner, seeds, "Groups")
    tasks = [
        (
            name,
            seed,
            SampleBias(seed=seed, sizes=(s.responses,), sampling=s.sampling, judge=s.judge),
        )
        for name, s in grid.scenarios.items()
        for seed in seeds
    ]
    samples = runner([task for _, _, task in tasks], "Samples")
    rows = [
        {"scenario": name, "seed": seed, "bias": next(iter(sample["chosen"].values()))}
        for (name, seed, _), sample in zip(tasks, samples, strict=True)
    ]
    beside = [
        (label(kind, method), label(BESIDE[kind], method))
        for kind in BESIDE
        if kind in grid.scenarios
        for method in grid.methods
    ]
    return grid.findings(
        outcomes,
        summary={
            "sample_bias_of_chosen": {
                name: fmean(row["bias"] for row in rows if row["scenario"] == name)
                for name in grid.scenarios
            },
            "beside": comparisons(outcomes, beside),
        },
        tables={"samples": rows},
    )
