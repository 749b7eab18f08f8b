"""Conditions that a study compares: the same seeds under each, read at the same divergence."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan
from typing import Any

from mpo_lightning.studies.lab.runner import Runner
from mpo_lightning.studies.lab.statistics import (
    Comparison,
    Interval,
    holm,
    mean_interval,
    paired_t_test,
)
from mpo_lightning.studies.lab.training import TrainingRun
from mpo_lightning.studies.world.measures import at_divergence
from mpo_lightning.studies.world.world import BuildWorld

__all__ = [
    "DIVERGENCES",
    "END",
    "PRIMARY",
    "Condition",
    "Findings",
    "Form",
    "RunOutcome",
    "as_json",
    "comparisons",
    "difference_text",
    "estimates",
    "paired",
    "perform",
    "run_tables",
]

# Divergences from the reference at which policies are compared, nats: that of the primary measure,
# and one nearer the reference.
PRIMARY = 1.0
DIVERGENCES = (0.25, PRIMARY)
END = "end"
MEASURES = (
    *("gold", "ideal_gold", "win_rate", "bias", "acceptable_bias", "distance", "rarity"),
    *("effective_chosen", "chosen_shift", "rejected_shift", "outside", "kl", "step"),
)


@dataclass(frozen=True, kw_only=True)
class Form:
    """Size of a study.

    Args:
        quick: run the form of under two minutes.
        seeds: number of seeds. Defaults to the study's own.
    """

    quick: bool = False
    seeds: int | None = None

    def seeds_of(self, *, full: int, quick: int = 2) -> list[int]:
        """Return the seeds 0, 1, ..., given a study's own numbers of them."""
        own = quick if self.quick else full
        return list(range(own if self.seeds is None else self.seeds))


@dataclass(frozen=True)
class Findings:
    """Results of a study.

    Attributes:
        summary: content of summary.json.
        tables: rows of each CSV file, by the file's name.
        figures: functions that draw a figure, by the file's name.
        shown: rows of the table that is printed.
    """

    summary: dict[str, Any]
    tables: Mapping[str, Sequence[Mapping[str, Any]]]
    figures: Mapping[str, Callable[[], Any]]
    shown: Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Condition:
    """One of the things that a study compares.

    Attributes:
        label: its name.
        run: makes the training run of its keyword ``seed``.
        columns: further columns that describe it in tables.
    """

    label: str
    run: Callable[..., TrainingRun]
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunOutcome:
    """Result of a condition's training run with one seed."""

    condition: Condition
    seed: int
    result: dict[str, Any]

    def at(self, where: float | str) -> dict[str, float] | None:
        """Return the measures at a divergence (None if it was not reached) or at `END`."""
        trajectory: list[dict[str, float]] = self.result["trajectory"]
        return trajectory[-1] if isinstance(where, str) else at_divergence(trajectory, where)


def perform(
    runner: Runner, conditions: Sequence[Condition], seeds: Sequence[int], description: str
) -> list[RunOutcome]:
    """Train every condition with every seed, after their worlds are built."""
    pairs = [(condition, seed) for seed in seeds for condition in conditions]
    runner([BuildWorld(seed=seed) for seed in seeds], "Worlds")
    results = runner([condition.run(seed=seed) for condition, seed in pairs], description)
    return [RunOutcome(*pair, result) for pair, result in zip(pairs, results, strict=True)]


def _points(
    outcomes: Sequence[RunOutcome], label: str, where: float | str
) -> dict[int, dict[str, float]]:
    """Return a condition's measures by seed, for the seeds that reached the divergence."""
    of_label = [outcome for outcome in outcomes if outcome.condition.label == label]
    return {o.seed: point for o in of_label if (point := o.at(where)) is not None}


def estimates(
    outcomes: Sequence[RunOutcome], where: float | str = PRIMARY
) -> dict[str, dict[str, Interval]]:
    """Return each condition's measures, means over the seeds that reached the divergence."""
    found = {}
    for label in dict.fromkeys(outcome.condition.label for outcome in outcomes):
        points = _points(outcomes, label, where).values()
        found[label] = {name: mean_interval([p[name] for p in points]) for name in MEASURES}
    return found


def paired(
    outcomes: Sequence[RunOutcome], first: str, second: str, where: float | str = PRIMARY
) -> Comparison:
    """Compare two conditions' gold by seed, over the seeds that reached the divergence in both."""
    points = [_points(outcomes, label, where) for label in (first, second)]
    seeds = sorted(points[0].keys() & points[1].keys())
    return paired_t_test(*([of[seed]["gold"] for seed in seeds] for of in points))


def comparisons(
    outcomes: Sequence[RunOutcome],
    pairs: Sequence[tuple[str, str]],
    where: float | str = PRIMARY,
) -> list[dict[str, Any]]:
    """Return the `paired` comparison of each pair of conditions as plain values, with Holm's p."""
    found = [paired(outcomes, *pair, where) for pair in pairs]
    adjusted = holm([comparison.p for comparison in found])
    return [
        {
            "first": first,
            "second": second,
            "measure": "gold",
            "difference": comparison.difference.to_json(),
            "p": None if isnan(comparison.p) else comparison.p,
            "p_holm": None if isnan(p) else p,
        }
        for (first, second), comparison, p in zip(pairs, found, adjusted, strict=True)
    ]


def difference_text(compared: Sequence[Mapping[str, Any]], first: str) -> str:
    """Return a condition's difference and p-value as text; a dash where it was not compared."""
    for row in compared:
        if row["first"] == first and row["p_holm"] is not None:
            return f"{row['difference']['mean']:+.3f} (p {row['p_holm']:.3f})"
    return "-"


def run_tables(outcomes: Sequence[RunOutcome]) -> dict[str, list[dict[str, Any]]]:
    """Return the tables that every study writes.

    ``runs`` has a row for each run and divergence, and the end of training; ``trajectories`` one
    for each measurement of each run.
    """
    runs, trajectories = [], []
    for outcome in outcomes:
        condition = outcome.condition
        others = {name: v for name, v in outcome.result.items() if name != "trajectory"}
        for where in (*DIVERGENCES, END):
            point = outcome.at(where)
            runs.append(
                {
                    "condition": condition.label,
                    **condition.columns,
                    "seed": outcome.seed,
                    "at": where,
                    "reached": point is not None,
                    **{name: "" if point is None else point[name] for name in MEASURES},
                    **others,
                }
            )
        trajectories += [
            {"condition": condition.label, "seed": outcome.seed, **point}
            for point in outcome.result["trajectory"]
        ]
    return {"runs": runs, "trajectories": trajectories}


def as_json(found: Mapping[str, Mapping[Any, Interval]]) -> dict[str, dict[str, Any]]:
    """Return a table of intervals as plain values."""
    return {
        label: {str(name): interval.to_json() for name, interval in of_label.items()}
        for label, of_label in found.items()
    }
