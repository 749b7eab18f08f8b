"""The shape of the scores' distribution, and the rule that splits groups.

All shapes are the same judge, its scores mapped in another way: a method that uses only their order
does not notice. How reliably a rule splits a group when scores are noisy is measured without
training.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mpo_lightning.losses import DPO, MPO, AboveMean, AboveQuantile, Partition
from mpo_lightning.studies.lab.conditions import Findings, Form, as_json
from mpo_lightning.studies.lab.figures import lines, panels
from mpo_lightning.studies.lab.grid import Grid, Method, Scenario, interaction, within
from mpo_lightning.studies.lab.runner import Runner
from mpo_lightning.studies.lab.statistics import mean_interval
from mpo_lightning.studies.world.judges import NoisyJudge

__all__ = ["Reliability", "study"]

FIRST_SEED = 5000
RULES: dict[str, Partition] = {
    "mean": AboveMean(),
    "median": AboveQuantile(),
    "top quarter": AboveQuantile(quantile=0.75),
}
GRID = Grid(
    scenarios={
        "normal": Scenario(),
        "right": Scenario(judge=NoisyJudge(shape="exp")),
        "left": Scenario(judge=NoisyJudge(shape="log")),
        "bimodal": Scenario(judge=NoisyJudge(shape="bimodal")),
    },
    methods={
        **{f"MPO {rule}": Method(loss=partial(MPO, partition=RULES[rule])) for rule in RULES},
        **{
            f"W-MPO 1 {rule}": Method(
                loss=partial(MPO, alpha=1.0, alpha_unit="std", partition=RULES[rule])
            )
            for rule in ("mean", "median")
        },
        "DPO best-worst": Method(loss=DPO),
    },
    contrasts=[
        *within("left", "MPO median", "MPO mean", "+"),
        *within("right", "MPO median", "MPO mean", "none"),
        *interaction("left", "normal", "W-MPO 1 mean", "MPO mean", "-"),
        *interaction("right", "left", "W-MPO 1 median", "MPO median", "+"),
    ],
    pairs=[
        ("MPO median", "MPO mean"),
        ("MPO top quarter", "MPO mean"),
        ("W-MPO 1 mean", "MPO mean"),
        ("W-MPO 1 median", "MPO median"),
        ("DPO best-worst", "MPO mean"),
    ],
    quick_scenarios=["normal", "left"],
    quick_methods=["MPO mean", "MPO median"],
)
SIZES = (2, 4, 8, 16, 32)
RANKING = "full ranking"


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """The task of counting how often noise leaves a split, or the ranking, unchanged.

    Groups of n responses with true scores 1/n apart and normal noise of half that: the setting of
    the paper's later version, in which noise shrinks with the spacing.

    Args:
        seed: seed of the noise.
        draws: number of groups of each size.
    """

    seed: int
    draws: int = 4000

    def __call__(self, worlds: Path) -> dict[str, dict[str, float]]:
        """Return the share of groups split, or ranked, as without noise, by rule and size."""
        generator = torch.Generator().manual_seed(self.seed)
        split = {name: RULES[name] for name in ("mean", "median")}
        found: dict[str, dict[str, float]] = {name: {} for name in (*split, RANKING)}
        for n in SIZES:
            true = (torch.arange(n, dtype=torch.float64) / n).expand(self.draws, n)
            noise = torch.randn(self.draws, n, generator=generator, dtype=torch.float64)
            noisy, valid = true + 0.5 / n * noise, torch.ones(self.draws, n, dtype=torch.bool)
            for name, rule in split.items():
                same = (rule(true, valid)[0] == rule(noisy, valid)[0]).all(1)
                found[name][str(n)] = same.double().mean().item()
            ordered = (noisy.diff(dim=1) > 0).all(1)
            found[RANKING][str(n)] = ordered.double().mean().item()
        return found


def study(runner: Runner, form: Form) -> Findings:
    """Train with every rule on every shape, and measure how reliable the rules are."""
    grid, seeds = GRID.in_form(form), form.seeds_of(FIRST_SEED, full=16)
    outcomes = grid.train(runner, seeds, "Shapes")
    counted = runner([Reliability(seed=seed) for seed in seeds], "Reliability")
    reliability = {
        name: {n: mean_interval([result[name][str(n)] for result in counted]) for n in SIZES}
        for name in counted[0]
    }

    def figure() -> Any:
        drawn, (axis,) = panels(["Groups split, or ranked, as without noise"], "n")
        for name, of_name in reliability.items():
            lines(axis, SIZES, list(of_name.values()), name)
        axis.set_xscale("log", base=2)
        axis.legend()
        return drawn

    return grid.findings(
        outcomes,
        figures={"reliability": figure},
        summary={"reliability": as_json(reliability)},
        tables={
            "reliability": [
                {"seed": seed, "rule": name, "n": n, "as without noise": value}
                for seed, result in zip(seeds, counted, strict=True)
                for name, of_name in result.items()
                for n, value in of_name.items()
            ]
        },
    )
