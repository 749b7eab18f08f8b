"""Miscalibrated judges: distorted scales, corrupted scores, tastes of their own, and a learnt one.

Every method is tried as it is, and with what a look at the scores would advise: scores or ranks
brought to one scale in each group, or no weights at all.
"""

from statistics import fmean

from mpo_lightning.losses import DPO, MPO, AboveQuantile, InfoNCA
from mpo_lightning.studies.lab.agreement import Agreement
from mpo_lightning.studies.lab.conditions import Findings, Form
from mpo_lightning.studies.lab.grid import Method, Scenario, findings, train_grid
from mpo_lightning.studies.lab.runner import Runner
from mpo_lightning.studies.lab.training import BETA
from mpo_lightning.studies.world.judges import NoisyJudge
from mpo_lightning.studies.world.learnt_judge import RewardModel

__all__ = ["study"]

SCENARIOS = {
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
    # All responses are equally long here: an attribute stands in for the judge's taste in length.
    "taste 0.5": Scenario(judge=NoisyJudge(taste=0.5)),
    "reward model": Scenario(judge=RewardModel()),
}
QUICK_SCENARIOS = ("noise", "exp", "tops 30 %")
METHODS = {
    "MPO": Method(loss=MPO(beta=BETA)),
    "MPO median": Method(loss=MPO(beta=BETA, partition=AboveQuantile())),
    "W-MPO 1 per score": Method(loss=MPO(beta=BETA, alpha=1.0)),
    "W-MPO 1 per std": Method(loss=MPO(beta=BETA, alpha=1.0, alpha_unit="std")),
    "W-MPO 1 on ranks": Method(loss=MPO(beta=BETA, alpha=1.0), remedy="rank"),
    "InfoNCA": Method(loss=InfoNCA(beta=BETA)),
    "InfoNCA on z-scores": Method(loss=InfoNCA(beta=BETA), remedy="z-score"),
    "InfoNCA on ranks": Method(loss=InfoNCA(beta=BETA), remedy="rank"),
    "DPO best-worst": Method(loss=DPO(beta=BETA)),
}
QUICK_METHODS = ("MPO", "W-MPO 1 per score", "W-MPO 1 on ranks")
# As it is against what would be advised, and weights against none.
PAIRS = (
    ("MPO median", "MPO"),
    ("W-MPO 1 per score", "MPO"),
    ("W-MPO 1 on ranks", "W-MPO 1 per score"),
    ("W-MPO 1 per std", "W-MPO 1 per score"),
    ("InfoNCA on z-scores", "InfoNCA"),
    ("InfoNCA on ranks", "InfoNCA"),
    ("DPO best-worst", "MPO"),
)


def study(runner: Runner, form: Form) -> Findings:
    """Train every method under every judge."""
    scenarios = {n: SCENARIOS[n] for n in (QUICK_SCENARIOS if form.quick else SCENARIOS)}
    methods = {n: METHODS[n] for n in (QUICK_METHODS if form.quick else METHODS)}
    pairs = [pair for pair in PAIRS if set(pair) <= methods.keys()]
    seeds = form.seeds_of(full=6)
    outcomes = train_grid(runner, seeds, scenarios, methods, "Judges")
    tasks = [(n, s, Agreement(seed=s, judge=scenarios[n].judge)) for n in scenarios for s in seeds]
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
        for name in scenarios
    }
    return findings(
        outcomes,
        pairs,
        summary={
            "judges": {name: repr(scenario.judge) for name, scenario in scenarios.items()},
            "agreement_with_gold": means,
        },
        tables={"agreement": rows},
    )
