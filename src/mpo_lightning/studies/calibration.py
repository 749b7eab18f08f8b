"""Miscalibrated judges: distorted scales, corrupted scores, tastes of their own, and a learnt one.

Every method is run as it is, and with the remedies that a look at the scores suggests: scores or
ranks standardised within each group, or no weights at all.
"""

from statistics import fmean

from mpo_lightning.losses import DPO, MPO, AboveQuantile, InfoNCA
from mpo_lightning.studies.lab.agreement import Agreement
from mpo_lightning.studies.lab.conditions import Findings, Form
from mpo_lightning.studies.lab.grid import Grid, Method, Scenario
from mpo_lightning.studies.lab.runner import Runner
from mpo_lightning.studies.lab.training import BETA
from mpo_lightning.studies.world.judges import NoisyJudge
from mpo_lightning.studies.world.learnt_judge import LearntJudge

__all__ = ["study"]

GRID = Grid(
    scenarios={
        "noise": Scenario(),
        "scale x 10": Scenario(judge=NoisyJudge(factor=10.0)),
        "exp": Scenario(judge=NoisyJudge(shape="exp")),
        "log": Scenario(judge=NoisyJudge(shape="log")),
        "ranks": Scenario(judge=NoisyJudge(shape="rank")),
        "5 levels": Scenario(judge=NoisyJudge(shape="levels")),
        "tops 5 %": Scenario(judge=NoisyJudge(corrupted_tops=0.05)),
        "tops 15 %": Scenario(judge=NoisyJudge(corrupted_tops=0.15)),
        "tops 30 %": Scenario(judge=NoisyJudge(corrupted_tops=0.3)),
        "bottoms 5 %": Scenario(judge=NoisyJudge(corrupted_bottoms=0.05)),
        "bottoms 15 %": Scenario(judge=NoisyJudge(corrupted_bottoms=0.15)),
        "bottoms 30 %": Scenario(judge=NoisyJudge(corrupted_bottoms=0.3)),
        # All responses are equally long: an attribute stands in for a taste in length.
        "taste 0.5": Scenario(judge=NoisyJudge(taste=0.5)),
        "reward model": Scenario(judge=LearntJudge()),
    },
    methods={
        "MPO": Method(loss=MPO(beta=BETA)),
        "MPO median": Method(loss=MPO(beta=BETA, partition=AboveQuantile())),
        "W-MPO 1 per score": Method(loss=MPO(beta=BETA, alpha=1.0)),
        "W-MPO 1 per std": Method(loss=MPO(beta=BETA, alpha=1.0, alpha_unit="std")),
        "W-MPO 1 on ranks": Method(loss=MPO(beta=BETA, alpha=1.0), remedy="rank"),
        "InfoNCA": Method(loss=InfoNCA(beta=BETA)),
        "InfoNCA on z-scores": Method(loss=InfoNCA(beta=BETA), remedy="z-score"),
        "InfoNCA on ranks": Method(loss=InfoNCA(beta=BETA), remedy="rank"),
        "DPO best-worst": Method(loss=DPO(beta=BETA)),
    },
    # Remedies against none, and weights against none.
    pairs=[
        ("MPO median", "MPO"),
        ("W-MPO 1 per score", "MPO"),
        ("W-MPO 1 on ranks", "W-MPO 1 per score"),
        ("W-MPO 1 per std", "W-MPO 1 per score"),
        ("InfoNCA on z-scores", "InfoNCA"),
        ("InfoNCA on ranks", "InfoNCA"),
        ("DPO best-worst", "MPO"),
    ],
    quick_scenarios=["noise", "exp", "tops 30 %"],
    quick_methods=["MPO", "W-MPO 1 per score", "W-MPO 1 on ranks"],
)


def study(runner: Runner, form: Form) -> Findings:
    """Train every method under every judge."""
    grid, seeds = GRID.in_form(form), form.seeds_of(full=6)
    outcomes = grid.train(runner, seeds, "Judges")
    judges = {name: scenario.judge for name, scenario in grid.scenarios.items()}
    tasks = [(n, s, Agreement(seed=s, judge=judge)) for n, judge in judges.items() for s in seeds]
    agreements = runner([task for _, _, task in tasks], "Agreement with gold")
    rows = [
        {"scenario": name, "seed": seed, **agreement}
        for (name, seed, _), agreement in zip(tasks, agreements, strict=True)
    ]
    means = {
        name: {
            measure: fmean(row[measure] for row in rows if row["scenario"] == name)
            for measure in ("kendall_tau", "same_set", "chosen_share")
        }
        for name in judges
    }
    return grid.findings(
        outcomes,
        summary={
            "judges": {name: repr(judge) for name, judge in judges.items()},
            "agreement_with_gold": means,
        },
        tables={"agreement": rows},
    )
