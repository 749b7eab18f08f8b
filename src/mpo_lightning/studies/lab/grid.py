"""Scenarios by methods: every method in every scenario, compared within it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from mpo_lightning.losses import SetLoss
from mpo_lightning.studies.lab.conditions import (
    PRIMARY,
    Condition,
    Findings,
    Outcome,
    as_json,
    comparisons,
    csv_rows,
    difference_text,
    estimates,
    perform,
    trajectory_rows,
)
from mpo_lightning.studies.lab.figures import panels, rows_of_points
from mpo_lightning.studies.lab.runner import Runner
from mpo_lightning.studies.lab.training import LEARNING_RATE, TrainingRun
from mpo_lightning.studies.world.judges import Judge, NoisyJudge, Remedy
from mpo_lightning.studies.world.world import Sampling

__all__ = ["Method", "Scenario", "findings", "label", "train_grid"]


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What groups are like.

    Args:
        judge: who scores them.
        sampling: how their responses are drawn.
        responses: how many each has.
    """

    judge: Judge = field(default_factory=NoisyJudge)
    sampling: Sampling = field(default_factory=Sampling)
    responses: int = 10


@dataclass(frozen=True, kw_only=True)
class Method:
    """A loss, and what is done to the scores before.

    Args:
        loss: what is minimised.
        remedy: see `NoisyJudge`.
    """

    loss: SetLoss
    remedy: Remedy = "none"


def _run(seed: int, *, scenario: Scenario, method: Method) -> TrainingRun:
    # Any judge is a dataclass with a remedy, which a protocol cannot say.
    judge: Any = scenario.judge
    return TrainingRun(
        seed=seed,
        loss=method.loss,
        lr=LEARNING_RATE,
        responses=scenario.responses,
        sampling=scenario.sampling,
        judge=replace(judge, remedy=method.remedy),
    )


def label(scenario: str, method: str) -> str:
    """Of the condition."""
    return f"{scenario}: {method}"


def train_grid(
    runner: Runner,
    seeds: Sequence[int],
    scenarios: Mapping[str, Scenario],
    methods: Mapping[str, Method],
    description: str,
) -> list[Outcome]:
    """Train every method in every scenario with every seed."""
    conditions = [
        Condition(
            label(scenario, method),
            partial(_run, scenario=scenarios[scenario], method=methods[method]),
            {"scenario": scenario, "method": method},
        )
        for scenario in scenarios
        for method in methods
    ]
    return perform(runner, conditions, seeds, description)


def findings(
    outcomes: Sequence[Outcome],
    pairs: Sequence[tuple[str, str]],
    *,
    summary: Mapping[str, Any] | None = None,
    tables: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> Findings:
    """What a grid shows, read at the primary divergence.

    Args:
        outcomes: of `train_grid`.
        pairs: methods that are compared within each scenario, first minus second; a method's first
            pair is the one shown.
        summary: what else goes into the summary.
        tables: other files.
    """
    scenarios = list(dict.fromkeys(o.condition.columns["scenario"] for o in outcomes))
    methods = list(dict.fromkeys(o.condition.columns["method"] for o in outcomes))
    found = estimates(outcomes)
    compared = comparisons(
        outcomes,
        [
            (label(scenario, first), label(scenario, second))
            for scenario in scenarios
            for first, second in pairs
        ],
    )
    against = dict(reversed(pairs))
    seeds = len({outcome.seed for outcome in outcomes})

    def figure() -> Any:
        drawn, axes = panels(2, width=6.0, height=1 + 0.1 * len(scenarios) * (len(methods) + 2))
        for axis, (measure, title) in zip(
            axes, (("gold", "Gold score"), ("bias", "Attribute bias")), strict=True
        ):
            values = {m: [found[label(s, m)][measure] for s in scenarios] for m in methods}
            rows_of_points(axis, scenarios, values, f"{title} at {PRIMARY:g} nat")
        axes[1].legend(fontsize=7)
        return drawn

    return Findings(
        summary={
            "primary": f"gold at {PRIMARY:g} nat",
            "at_1_nat": as_json(found),
            "comparisons": compared,
            **(summary or {}),
        },
        tables={
            "runs": csv_rows(outcomes),
            "trajectories": trajectory_rows(outcomes),
            **(tables or {}),
        },
        figures={"grid": figure},
        shown=[
            {
                "scenario": scenario,
                "method": method,
                "gold at 1 nat": str(found[label(scenario, method)]["gold"]),
                "difference": difference_text(compared, label(scenario, method)),
                "from": against.get(method, "-"),
                "bias": f"{found[label(scenario, method)]['bias'].mean:.3f}",
                "reached": f"{found[label(scenario, method)]['gold'].count} of {seeds}",
            }
            for scenario in scenarios
            for method in methods
        ],
    )
