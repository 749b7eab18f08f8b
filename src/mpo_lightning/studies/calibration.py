"""Miscalibrated judges: distorted scales, corrupted scores, tastes of their own, and a learnt one.

Every method is run as it is, and with the remedies that a look at the scores suggests: weights per
standard deviation, scores standardised within each group, the median, or no weights at all.
"""

from functools import partial
from statistics import fmean

from mpo_lightning.losses import MPO, AboveQuantile, InfoNCA
from mpo_lightning.studies.lab.agreement import Agreement
from mpo_lightning.studies.lab.conditions import Findings, Form
from mpo_lightning.studies.lab.grid import Grid, Method, Scenario, interaction, within
from mpo_lightning.studies.lab.runner import Runner
from mpo_lightning.studies.world.judges import NoisyJudge
from mpo_lightning.studies.world.learnt_judge import LearntJudge

__all__ = ["study"]

FIRST_SEED = 3000
GRID = Grid(
    scenarios={
        "noise": Scenario(),
        "scale x 10": Scenario(judge=NoisyJudge(factor=10.0)),
        "exp": Scenario(judge=NoisyJudge(shape="exp")),
        "log": Scenario(judge=NoisyJudge(shape="log")),
        "tops 15 %": Scenario(judge=NoisyJudge(corrupted_tops=0.15)),
        "tops 30 %": Scenario(judge=NoisyJudge(corrupted_tops=0.3)),
        "bottoms 30 %": Scenario(judge=NoisyJudge(corrupted_bottoms=0.3)),
        # All responses are equally long: an attribute stands in for a taste in length.
        "taste 0.5": Scenario(judge=NoisyJudge(taste=0.5)),
        "reward model": Scenario(judge=LearntJudge()),
    },
    methods={
        "MPO": Method(loss=MPO),
        "MPO median": Method(loss=partial(MPO, partition=AboveQuantile())),
        "W-MPO 1 per score": Method(loss=partial(MPO, alpha=1.0)),
        "W-MPO 1 per std": Method(loss=partial(MPO, alpha=1.0, alpha_unit="std")),
        "InfoNCA": Method(loss=partial(InfoNCA, temperature=0.5)),
        "InfoNCA on z-scores": Method(loss=partial(InfoNCA, temperature=0.5), remedy="z-score"),
    },
    contrasts=[
        *interaction("exp", "noise", "W-MPO 1 per score", "MPO", "-"),
        *within("exp", "W-MPO 1 per std", "W-MPO 1 per score", "+"),
        *interaction("tops 30 %", "noise", "W-MPO 1 per std", "MPO", "-"),
        *within("log", "MPO median", "MPO", "+"),
    ],
    # Remedies against none, and weights against none.
    pairs=[
        ("MPO median", "MPO"),
        ("W-MPO 1 per score", "MPO"),
        ("W-MPO 1 per std", "MPO"),
        ("W-MPO 1 per std", "W-MPO 1 per score"),
        ("InfoNCA on z-scores", "InfoNCA"),
        ("InfoNCA on z-scores", "MPO"),
    ],
    quick_scenarios=["noise", "exp"],
    quick_methods=["MPO", "W-MPO 1 per score"],
)


def study(runner: Runner, form: Form) -> Findings:
    """Train every method under every judge."""
    grid, seeds = GRID.in_form(form), form.seeds_of(FIRST_SEED, full=12)
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
