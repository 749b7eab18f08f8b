"""Responses that are not independent, and a quality that does not add up within a response.

The theorem assumes independent responses. Violations may affect sample bias and the trained policy
differently, so both are measured. Where every loss does badly the model may be to blame: it is also
taught the ideal policy itself.
"""

from functools import partial
from statistics import fmean
from typing import Any

from mpo_lightning.losses import DPO, MPO, InfoNCA
from mpo_lightning.studies.lab.conditions import Contrast, Findings, Form
from mpo_lightning.studies.lab.distillation import Distillation
from mpo_lightning.studies.lab.grid import Grid, Method, Scenario, label, within
from mpo_lightning.studies.lab.runner import Runner
from mpo_lightning.studies.lab.sample_bias import SampleBias
from mpo_lightning.studies.lab.statistics import mean_interval
from mpo_lightning.studies.lab.training import BETAS
from mpo_lightning.studies.world.grammar import Utility
from mpo_lightning.studies.world.judges import NoisyJudge
from mpo_lightning.studies.world.world import GroupSampling

__all__ = ["study"]

FIRST_SEED = 4000
CLEAN = NoisyJudge(noise=0.0)


def _beside(scenario: str, other: str, expected: str) -> list[Contrast]:
    """Name the contrast of MPO in two scenarios, at each beta."""
    return [
        Contrast(
            f"beta {beta:g}: MPO, {scenario} less {other}",
            (label(scenario, "MPO", beta),),
            (label(other, "MPO", beta),),
            expected,
        )
        for beta in BETAS
    ]


GRID = Grid(
    scenarios={
        "independent": Scenario(),
        "independent, clean": Scenario(judge=CLEAN),
        "shared 0.9": Scenario(sampling=GroupSampling(shared=0.9)),
        "shared 0.9, clean": Scenario(sampling=GroupSampling(shared=0.9), judge=CLEAN),
        "5 copies of 2": Scenario(sampling=GroupSampling(copies=5)),
        "2 responses": Scenario(responses=2),
        "temperature 0.5": Scenario(sampling=GroupSampling(temperature=0.5)),
        "product of symbols": Scenario(judge=NoisyJudge(utility="product")),
    },
    methods={
        "MPO": Method(loss=MPO),
        "W-MPO 0.5": Method(loss=partial(MPO, alpha=0.5, alpha_unit="std")),
        "InfoNCA 0.5": Method(loss=partial(InfoNCA, temperature=0.5)),
        "DPO best-worst": Method(loss=DPO),
    },
    contrasts=[
        *_beside("shared 0.9", "independent", "-"),
        *_beside("shared 0.9, clean", "independent, clean", "-"),
        *_beside("5 copies of 2", "2 responses", "none"),
        *within("product of symbols", "InfoNCA 0.5", "MPO", "+"),
    ],
    pairs=[("W-MPO 0.5", "MPO"), ("InfoNCA 0.5", "MPO"), ("DPO best-worst", "MPO")],
    quick_scenarios=["5 copies of 2", "2 responses"],
    quick_methods=["MPO"],
)
# The kind of groups that each kind is compared with, by the same method.
BESIDE = {
    "shared 0.9": "independent",
    "shared 0.9, clean": "independent, clean",
    "5 copies of 2": "2 responses",
    "temperature 0.5": "independent",
}
UTILITIES: tuple[Utility, ...] = ("additive", "product")


def study(runner: Runner, form: Form) -> Findings:
    """Train every method on every kind of groups, and measure the groups and the model."""
    grid, seeds = GRID.in_form(form), form.seeds_of(FIRST_SEED, full=12)
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
    taught = {
        utility: runner(
            [
                Distillation(seed=seed, utility=utility, steps=8 if form.quick else 200)
                for seed in seeds
            ],
            "Capacity",
        )
        for utility in UTILITIES
    }
    capacity: list[dict[str, Any]] = [
        {"utility": utility, "seed": seed, **of}
        for utility, found in taught.items()
        for seed, of in zip(seeds, found, strict=True)
    ]
    return grid.findings(
        outcomes,
        summary={
            "sample_bias_of_chosen": {
                name: fmean(row["bias"] for row in rows if row["scenario"] == name)
                for name in grid.scenarios
            },
            "capacity": {
                utility: {
                    measure: mean_interval([of[measure] for of in found]).to_json()
                    for measure in found[0]
                }
                for utility, found in taught.items()
            },
        },
        tables={"samples": rows, "capacity": capacity},
        beside=[
            (label(kind, method, beta), label(BESIDE[kind], method, beta))
            for beta in grid.betas
            for kind in BESIDE
            if {kind, BESIDE[kind]} <= set(grid.scenarios)
            for method in grid.methods
        ],
    )
