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
    Form,
    RunOutcome,
    as_json,
    comparisons,
    difference_text,
    estimates,
    perform,
    run_tables,
)
from mpo_lightning.studies.lab.figures import panels, rows_of_points
from mpo_lightning.studies.lab.runner import Runner
from mpo_lightning.studies.lab.training import TrainingRun
from mpo_lightning.studies.world.judges import Judge, NoisyJudge, Remedy
from mpo_lightning.studies.world.world import GroupSampling

__all__ = ["Grid", "Method", "Scenario", "label"]


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A kind of groups.

    Args:
        judge: scores the responses.
        sampling: draws the responses.
        responses: number of responses of a group.
    """

    judge: Judge = field(default_factory=NoisyJudge)
    sampling: GroupSampling = field(default_factory=GroupSampling)
    responses: int = 10


@dataclass(frozen=True, kw_only=True)
class Method:
    """A loss, and a transformation of the scores before it.

    Args:
        loss: the loss.
        remedy: transformation of the scores (`NoisyJudge`).
    """

    loss: SetLoss
    remedy: Remedy = "none"


def _run(seed: int, scenario: Scenario, method: Method) -> TrainingRun:
    # Any judge is a dataclass with a remedy, which a protocol cannot say.
    judge: Any = scenario.judge
    return TrainingRun(
        seed=seed,
        loss=method.loss,
        responses=scenario.responses,
        sampling=scenario.sampling,
        judge=replace(judge, remedy=method.remedy),
    )


def label(scenario: str, method: str) -> str:
    """Return the label of the condition of a method in a scenario."""
    return f"{scenario}: {method}"


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Every method in every scenario.

    Args:
        scenarios: scenarios by name.
        methods: methods by name.
        pairs: methods that are compared within each scenario, first minus second; of a method's
            pairs, the first is in the printed table.
        quick_scenarios: names of the quick form's scenarios.
        quick_methods: names of the quick form's methods.
    """

    scenarios: Mapping[str, Scenario]
    methods: Mapping[str, Method]
    pairs: Sequence[tuple[str, str]]
    quick_scenarios: Sequence[str]
    quick_methods: Sequence[str]

    def in_form(self, form: Form) -> "Grid":
        """Return the part that a form of the study runs."""
        if not form.quick:
            return self
        return replace(
            self,
            scenarios={name: self.scenarios[name] for name in self.quick_scenarios},
            methods={name: self.methods[name] for name in self.quick_methods},
            pairs=[pair for pair in self.pairs if set(pair) <= set(self.quick_methods)],
        )

    def train(self, runner: Runner, seeds: Sequence[int], description: str) -> list[RunOutcome]:
        """Train every method in every scenario with every seed."""
        conditions = [
            Condition(
                label(scenario, method),
                partial(_run, scenario=self.scenarios[scenario], method=self.methods[method]),
                {"scenario": scenario, "method": method},
            )
            for scenario in self.scenarios
            for method in self.methods
        ]
        return perform(runner, conditions, seeds, description)

    def findings(
        self,
        outcomes: Sequence[RunOutcome],
        *,
        summary: Mapping[str, Any] | None = None,
        tables: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    ) -> Findings:
        """Return the findings at the primary divergence.

        Args:
            outcomes: result of `train`.
            summary: further entries of the summary.
            tables: further tables.
        """
        found = estimates(outcomes)
        compared = comparisons(
            outcomes,
            [
                (label(scenario, first), label(scenario, second))
                for scenario in self.scenarios
                for first, second in self.pairs
            ],
        )
        against = dict(reversed(self.pairs))
        seeds = len({outcome.seed for outcome in outcomes})

        def figure() -> Any:
            rows = len(self.scenarios) * (len(self.methods) + 2)
            titles = [f"{title} at {PRIMARY:g} nat" for title in ("Gold score", "Attribute bias")]
            drawn, axes = panels(titles, width=6.0, height=1 + 0.1 * rows)
            for axis, measure in zip(axes, ("gold", "bias"), strict=True):
                values = {
                    method: [found[label(scenario, method)][measure] for scenario in self.scenarios]
                    for method in self.methods
                }
                rows_of_points(axis, list(self.scenarios), values)
            axes[1].legend(fontsize=7)
            return drawn

        return Findings(
            summary={
                "primary": f"gold at {PRIMARY:g} nat",
                "at_1_nat": as_json(found),
                "comparisons": compared,
                **(summary or {}),
            },
            tables={**run_tables(outcomes), **(tables or {})},
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
                for scenario in self.scenarios
                for method in self.methods
            ],
        )
