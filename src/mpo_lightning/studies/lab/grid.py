"""Scenarios by methods: every method in every scenario at every beta, compared within it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from mpo_lightning.losses import SetLoss
from mpo_lightning.studies.lab.conditions import (
    PRIMARY,
    Condition,
    Contrast,
    Findings,
    Form,
    RunOutcome,
    as_json,
    contrasts,
    differences,
    estimates,
    perform,
    run_tables,
    shown_contrasts,
)
from mpo_lightning.studies.lab.figures import dots_of_seeds
from mpo_lightning.studies.lab.runner import Runner
from mpo_lightning.studies.lab.training import BETAS, LEARNING_RATE, TrainingRun
from mpo_lightning.studies.world.judges import Judge, NoisyJudge, Remedy
from mpo_lightning.studies.world.world import GroupSampling

__all__ = ["Grid", "Method", "Scenario", "interaction", "label", "within"]


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A kind of groups.

    Args:
        judge: scores the responses.
        sampling: draws the responses.
        responses: number of responses of a group.
        prompts: number of groups.
    """

    judge: Judge = field(default_factory=NoisyJudge)
    sampling: GroupSampling = field(default_factory=GroupSampling)
    responses: int = 10
    prompts: int = 128


@dataclass(frozen=True, kw_only=True)
class Method:
    """A loss, and a transformation of the scores before it.

    Args:
        loss: makes the loss of its keyword ``beta``.
        remedy: transformation of the scores (`NoisyJudge`).
    """

    loss: Callable[..., SetLoss]
    remedy: Remedy = "none"


def _run(seed: int, scenario: Scenario, method: Method, beta: float, lr: float) -> TrainingRun:
    # Any judge is a dataclass with a remedy, which a protocol cannot say.
    judge: Any = scenario.judge
    return TrainingRun(
        seed=seed,
        loss=method.loss(beta=beta),
        lr=lr,
        prompts=scenario.prompts,
        responses=scenario.responses,
        sampling=scenario.sampling,
        judge=replace(judge, remedy=method.remedy),
    )


def label(scenario: str, method: str, beta: float) -> str:
    """Return the label of the condition of a method in a scenario at a beta."""
    return f"{scenario}, beta {beta:g}: {method}"


def within(scenario: str, first: str, second: str, expected: str) -> list[Contrast]:
    """Name the contrast of two methods in a scenario, at each beta."""
    return [
        Contrast(
            f"{scenario}, beta {beta:g}: {first} less {second}",
            (label(scenario, first, beta),),
            (label(scenario, second, beta),),
            expected,
        )
        for beta in BETAS
    ]


def interaction(
    scenario: str, beside: str, first: str, second: str, expected: str
) -> list[Contrast]:
    """Name what a scenario does to the difference of two methods, at each beta.

    The difference in the scenario less that in the scenario beside it: a difference that is
    significant in one scenario and not in another does not show that the two scenarios differ.
    """
    return [
        Contrast(
            f"{scenario} less {beside}, beta {beta:g}: {first} less {second}",
            (label(scenario, first, beta), label(beside, second, beta)),
            (label(scenario, second, beta), label(beside, first, beta)),
            expected,
        )
        for beta in BETAS
    ]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Every method in every scenario, at every beta.

    Args:
        scenarios: scenarios by name.
        methods: methods by name.
        contrasts: the comparisons that are tested, named beforehand.
        pairs: methods whose differences, first minus second, are described in each scenario.
        quick_scenarios: names of the quick form's scenarios.
        quick_methods: names of the quick form's methods.
        betas: betas.
        lr: learning rate.
    """

    scenarios: Mapping[str, Scenario]
    methods: Mapping[str, Method]
    contrasts: Sequence[Contrast]
    pairs: Sequence[tuple[str, str]]
    quick_scenarios: Sequence[str]
    quick_methods: Sequence[str]
    betas: Sequence[float] = BETAS
    lr: float = LEARNING_RATE

    def in_form(self, form: Form) -> "Grid":
        """Return the part that a form of the study runs."""
        if not form.quick:
            return self
        part = replace(
            self,
            scenarios={name: self.scenarios[name] for name in self.quick_scenarios},
            methods={name: self.methods[name] for name in self.quick_methods},
            pairs=[pair for pair in self.pairs if set(pair) <= set(self.quick_methods)],
            betas=form.betas,
        )
        made = {condition.label for condition in part.conditions()}
        return replace(part, contrasts=[c for c in self.contrasts if {*c.plus, *c.minus} <= made])

    def conditions(self) -> list[Condition]:
        """Return every method in every scenario at every beta."""
        return [
            Condition(
                label(scenario, method, beta),
                partial(
                    _run,
                    scenario=self.scenarios[scenario],
                    method=self.methods[method],
                    beta=beta,
                    lr=self.lr,
                ),
                {"scenario": scenario, "method": method, "beta": beta},
            )
            for beta in self.betas
            for scenario in self.scenarios
            for method in self.methods
        ]

    def train(self, runner: Runner, seeds: Sequence[int], description: str) -> list[RunOutcome]:
        """Train every method in every scenario at every beta with every seed."""
        return perform(runner, self.conditions(), seeds, description)

    def findings(
        self,
        outcomes: Sequence[RunOutcome],
        *,
        summary: Mapping[str, Any] | None = None,
        tables: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
        figures: Mapping[str, Callable[[], Any]] | None = None,
        beside: Sequence[tuple[str, str]] = (),
    ) -> Findings:
        """Return the findings at the primary divergence.

        Args:
            outcomes: result of `train`.
            summary: further entries of the summary.
            tables: further tables.
            figures: further figures.
            beside: labels of further conditions whose differences are described.
        """
        tested = contrasts(outcomes, self.contrasts)
        pairs = [
            (label(scenario, first, beta), label(scenario, second, beta))
            for beta in self.betas
            for scenario in self.scenarios
            for first, second in self.pairs
        ]
        return Findings(
            summary={
                "primary": f"gold at {PRIMARY:g} nat",
                "contrasts": tested,
                "differences": differences(outcomes, [*pairs, *beside]),
                "measures": as_json(estimates(outcomes)),
                **(summary or {}),
            },
            tables={**run_tables(outcomes), **(tables or {})},
            figures={
                "contrasts": partial(dots_of_seeds, outcomes, self.contrasts),
                **(figures or {}),
            },
            shown=shown_contrasts(tested),
        )
