"""Miscalibrated judges: distorted scales, corrupted scores, tastes of their own, and a learnt one.

Every method is run as it is, and with the remedies that a look at the scores suggests: weights per
standard deviation, scores standardised within each group, the median, or no weights at all.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any

from mpo_lightning.losses import MPO, AboveQuantile, InfoNCA
from mpo_lightning.studies.lab.advice import AS_IT_IS, LABELLED, PLAIN, DataCheck, advised
from mpo_lightning.studies.lab.agreement import Agreement
from mpo_lightning.studies.lab.conditions import PRIMARY, Findings, Form, RunOutcome
from mpo_lightning.studies.lab.grid import Grid, Method, Scenario, interaction, label, within
from mpo_lightning.studies.lab.runner import Runner
from mpo_lightning.studies.lab.statistics import mean_interval
from mpo_lightning.studies.world.judges import NoisyJudge
from mpo_lightning.studies.world.learnt_judge import LearntJudge

__all__ = ["study"]

# Warnings by judge and seed, and by number of trusted labels.
Said = Mapping[tuple[str, int], Mapping[str, Sequence[str]]]

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
    quick_scenarios=["exp"],
    quick_methods=["MPO", "MPO median", "W-MPO 1 per score", "W-MPO 1 per std"],
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
    checks = [(n, s, DataCheck(seed=s, judge=judge)) for n, judge in judges.items() for s in seeds]
    told = runner([task for _, _, task in checks], "Checks of the data")
    said = {(name, seed): found for (name, seed, _), found in zip(checks, told, strict=True)}
    return grid.findings(
        outcomes,
        summary={
            "judges": {name: repr(judge) for name, judge in judges.items()},
            "agreement_with_gold": means,
            "checks": _checks(said, judges),
            "following": [
                row for beta in grid.betas for row in _following(outcomes, said, judges, beta)
            ],
        },
        tables={
            "agreement": rows,
            "checks": [
                {
                    "scenario": name,
                    "seed": seed,
                    "labels": labels,
                    "warnings": " ".join(warnings),
                    "method": advised(warnings),
                }
                for (name, seed), found in said.items()
                for labels, warnings in found.items()
            ],
        },
    )


def _checks(said: Said, judges: Iterable[str]) -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    """Count, by judge and trusted labels, the worlds of each warning and of each method advised."""
    return {
        judge: {
            labels: {
                "warnings": dict(Counter(w for found in of_judge for w in found[labels])),
                "methods": dict(Counter(advised(found[labels]) for found in of_judge)),
            }
            for labels in LABELLED
        }
        for judge in judges
        for of_judge in [[found for (name, _), found in said.items() if name == judge]]
    }


def _following(
    outcomes: Sequence[RunOutcome], said: Said, judges: Iterable[str], beta: float
) -> list[dict[str, Any]]:
    """Describe gold of what a user meant to run, and of what the check advises in each world."""
    gold = {
        (outcome.condition.label, outcome.seed): point["gold"]
        for outcome in outcomes
        if (point := outcome.at(PRIMARY)) is not None
    }

    def of(judge: str, seed: int, method: str) -> float | None:
        return gold.get((label(judge, method, beta), seed))

    rows = []
    for judge in judges:
        seeds = [seed for name, seed in said if name == judge]
        as_it_is = [of(judge, seed, AS_IT_IS) for seed in seeds]
        row = {
            "judge": judge,
            "beta": beta,
            "as_it_is": mean_interval([g for g in as_it_is if g is not None]).to_json(),
        }
        for labels in LABELLED:
            for name, other in (("as_it_is", AS_IT_IS), ("plain", PLAIN)):
                pairs = [
                    (
                        of(judge, seed, advised(said[judge, seed][labels])),
                        of(judge, seed, other),
                    )
                    for seed in seeds
                ]
                values = [a - b for a, b in pairs if a is not None and b is not None]
                row[f"{labels} labels less {name}"] = {
                    "difference": mean_interval(values).to_json(),
                    "won": sum(value > 0 for value in values),
                    "worlds": len(values),
                }
        rows.append(row)
    return rows
