"""Conditions that a study compares: the same seeds under each, read at the same divergence."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isnan
from typing import Any

from mpo_lightning.studies.lab.runner import Runner
from mpo_lightning.studies.lab.statistics import Interval, compare, holm, mean_interval
from mpo_lightning.studies.lab.training import TrainingRun
from mpo_lightning.studies.world.measures import at_divergence
from mpo_lightning.studies.world.world import BuiltWorld

__all__ = [
    "DIVERGENCES",
    "END",
    "PRIMARY",
    "Condition",
    "Findings",
    "Form",
    "Outcome",
    "as_json",
    "comparisons",
    "csv_rows",
    "difference_text",
    "estimates",
    "interval_json",
    "perform",
    "trajectory_rows",
]

# Where policies are compared: the divergence of the primary measure, and one nearer the reference.
PRIMARY = 1.0
DIVERGENCES = (0.25, PRIMARY)
END = "end"
MEASURES = (
    *("gold", "ideal_gold", "win_rate", "bias", "acceptable_bias", "distance", "rarity"),
    *("effective_chosen", "chosen_shift", "rejected_shift", "outside", "kl", "step"),
)


@dataclass(frozen=True, kw_only=True)
class Form:
    """How large a study is.

    Args:
        quick: the form of under two minutes.
        seeds: how many; the study's own number if none.
    """

    quick: bool = False
    seeds: int | None = None

    def seeds_of(self, *, full: int, quick: int = 2) -> list[int]:
        """Seeds 0, 1, ..."""
        own = quick if self.quick else full
        return list(range(own if self.seeds is None else self.seeds))


@dataclass(frozen=True)
class Findings:
    """What a study found.

    Attributes:
        summary: the whole of summary.json.
        tables: files of comma-separated values by name, a list of rows each.
        figures: figures by name, drawn when they are asked for.
        shown: a table for people, as rows of texts.
    """

    summary: dict[str, Any]
    tables: Mapping[str, Sequence[Mapping[str, Any]]]
    figures: Mapping[str, Callable[[], Any]]
    shown: Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Condition:
    """One of the things compared.

    Attributes:
        label: its name.
        run: the training run of a seed.
        columns: what else is told of it in tables.
    """

    label: str
    run: Callable[[int], TrainingRun]
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What a condition gave with a seed."""

    condition: Condition
    seed: int
    result: dict[str, Any]

    def at(self, where: float | str) -> dict[str, float] | None:
        """The measures at a divergence (None if it was not reached), or at the end of training."""
        trajectory: list[dict[str, float]] = self.result["trajectory"]
        return trajectory[-1] if isinstance(where, str) else at_divergence(trajectory, where)


def perform(
    runner: Runner, conditions: Sequence[Condition], seeds: Sequence[int], description: str
) -> list[Outcome]:
    """Train every condition with every seed, worlds first."""
    pairs = [(condition, seed) for seed in seeds for condition in conditions]
    runs = [condition.run(seed) for condition, seed in pairs]
    runner(
        list(dict.fromkeys(BuiltWorld(seed=run.seed, teaching=run.teaching) for run in runs)),
        "Worlds",
    )
    results = runner(runs, description)
    return [Outcome(*pair, result) for pair, result in zip(pairs, results, strict=True)]


def _of(outcomes: Sequence[Outcome], label: str) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.condition.label == label]


def estimates(
    outcomes: Sequence[Outcome], where: float | str = PRIMARY
) -> dict[str, dict[str, Interval]]:
    """Each condition's measures, means over the seeds that reached the divergence."""
    labels = dict.fromkeys(outcome.condition.label for outcome in outcomes)
    found = {}
    for label in labels:
        points = [outcome.at(where) for outcome in _of(outcomes, label)]
        reached = [point for point in points if point is not None]
        found[label] = {name: mean_interval([p[name] for p in reached]) for name in MEASURES}
    return found


def comparisons(
    outcomes: Sequence[Outcome],
    pairs: Sequence[tuple[str, str]],
    *,
    measure: str = "gold",
    where: float | str = PRIMARY,
) -> list[dict[str, Any]]:
    """First minus second of each pair of conditions, paired by seed, with Holm's p-values.

    A seed counts where both reached the divergence.
    """
    found = []
    for first, second in pairs:
        points = [
            {o.seed: p[measure] for o in _of(outcomes, label) if (p := o.at(where)) is not None}
            for label in (first, second)
        ]
        seeds = sorted(points[0].keys() & points[1].keys())
        found.append(compare([points[0][s] for s in seeds], [points[1][s] for s in seeds]))
    adjusted = holm([comparison.p for comparison in found])
    return [
        {
            "first": first,
            "second": second,
            "measure": measure,
            "difference": interval_json(comparison.difference),
            "p": None if isnan(comparison.p) else comparison.p,
            "p_holm": None if isnan(p) else p,
        }
        for (first, second), comparison, p in zip(pairs, found, adjusted, strict=True)
    ]


def difference_text(compared: Sequence[Mapping[str, Any]], first: str) -> str:
    """A condition's difference, for people; a dash where there is none."""
    for row in compared:
        if row["first"] == first and row["p_holm"] is not None:
            return f"{row['difference']['mean']:+.3f} (p {row['p_holm']:.3f})"
    return "-"


def csv_rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """One row for each run and place of reading."""
    rows = []
    for outcome in outcomes:
        for where in (*DIVERGENCES, END):
            point = outcome.at(where)
            rows.append(
                {
                    "condition": outcome.condition.label,
                    **outcome.condition.columns,
                    "seed": outcome.seed,
                    "at": where,
                    "reached": point is not None,
                    **{name: "" if point is None else point[name] for name in MEASURES},
                    "groups": outcome.result["groups"],
                    "dropped": outcome.result["dropped"],
                    "seconds": outcome.result["seconds"],
                }
            )
    return rows


def trajectory_rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """One row for each measurement of each run."""
    return [
        {"condition": outcome.condition.label, "seed": outcome.seed, **point}
        for outcome in outcomes
        for point in outcome.result["trajectory"]
    ]


def interval_json(interval: Interval) -> dict[str, Any]:
    """An interval as plain values; what is undefined is null."""
    return {name: None if isnan(value) else value for name, value in asdict(interval).items()}


def as_json(intervals: Mapping[str, Mapping[str, Interval]]) -> dict[str, dict[str, Any]]:
    """Estimates as plain values."""
    return {
        label: {name: interval_json(interval) for name, interval in of_label.items()}
        for label, of_label in intervals.items()
    }
