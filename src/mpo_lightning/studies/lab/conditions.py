"""Conditions that a study compares: the same seeds under each, read at the same divergence."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isnan
from typing import Any

from mpo_lightning.studies.lab.runner import Runner
from mpo_lightning.studies.lab.statistics import (
    Interval,
    detectable,
    holm,
    mean_interval,
    paired_t_test,
    wilcoxon,
)
from mpo_lightning.studies.lab.training import BETAS, PRIMARY, TrainingRun
from mpo_lightning.studies.world.measures import at_divergence
from mpo_lightning.studies.world.world import BuildWorld

__all__ = [
    "DIVERGENCES",
    "END",
    "PRIMARY",
    "Condition",
    "Contrast",
    "Findings",
    "Form",
    "RunOutcome",
    "as_json",
    "contrasts",
    "differences",
    "estimates",
    "paired",
    "perform",
    "run_tables",
    "shown_contrasts",
]

# Divergences from the reference at which policies are compared, nats: one nearer the reference,
# that of the primary measure, and one further away.
DIVERGENCES = (0.25, PRIMARY, 1.0)
END = "end"
MEASURES = (
    *("gold", "gold_of_all", "ideal_gold", "win_rate", "bias", "acceptable_bias", "distance"),
    *("rarity", "effective_chosen", "chosen_shift", "rejected_shift", "outside", "kl", "step"),
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

    @property
    def betas(self) -> tuple[float, ...]:
        """Betas at which the form trains; the quick form at one."""
        return BETAS[:1] if self.quick else BETAS

    def seeds_of(self, first: int, *, full: int, quick: int = 2) -> list[int]:
        """Return a study's seeds, given the first and its own numbers of them.

        No two studies share a seed, so that each is evidence of its own; the quick form's worlds
        are 0, 1, ..., which no study has.
        """
        own = quick if self.quick else full
        start = 0 if self.quick else first
        return list(range(start, start + (own if self.seeds is None else self.seeds)))


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
class Contrast:
    """A comparison named before the study is run.

    Attributes:
        name: its name.
        plus: labels of the conditions whose gold is added.
        minus: labels of the conditions whose gold is subtracted, as many.
        expected: the sign that the plan expects, or "none".
    """

    name: str
    plus: tuple[str, ...]
    minus: tuple[str, ...]
    expected: str


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
    outcomes: Sequence[RunOutcome], where: float | str
) -> dict[str, dict[int, dict[str, float]]]:
    """Return each condition's measures by seed, for the seeds that reached the divergence."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for outcome in outcomes:
        of_label = found.setdefault(outcome.condition.label, {})
        point = outcome.at(where)
        if point is not None:
            of_label[outcome.seed] = point
    return found


def estimates(
    outcomes: Sequence[RunOutcome], where: float | str = PRIMARY
) -> dict[str, dict[str, Interval]]:
    """Return each condition's measures, means over the seeds that reached the divergence."""
    return {
        label: {name: mean_interval([p[name] for p in points.values()]) for name in MEASURES}
        for label, points in _points(outcomes, where).items()
    }


def paired(
    outcomes: Sequence[RunOutcome],
    plus: Sequence[str],
    minus: Sequence[str],
    *,
    where: float | str = PRIMARY,
    measure: str = "gold",
) -> dict[int, float]:
    """Return the sum over some conditions less that over others, by seed.

    Seeds that did not reach the divergence in all of them are left out.
    """
    points = _points(outcomes, where)
    of = [points[label] for label in (*plus, *minus)]
    seeds = sorted(set.intersection(*(set(values) for values in of)))
    signs = [1.0] * len(plus) + [-1.0] * len(minus)
    return {
        seed: sum(sign * p[seed][measure] for sign, p in zip(signs, of, strict=True))
        for seed in seeds
    }


def contrasts(
    outcomes: Sequence[RunOutcome], named: Sequence[Contrast], where: float | str = PRIMARY
) -> list[dict[str, Any]]:
    """Test the contrasts that were named beforehand; Holm's method is over them, and nothing else.

    Returns:
        For each, as plain values: the difference with its interval, the p-value of the paired t
        test as it is and adjusted, that of Wilcoxon's signed-rank test, the number of worlds with a
        positive difference, and the smallest differences that this number of worlds would show in
        four of five studies, with a test by itself and after the adjustment.
    """
    found = [list(paired(outcomes, c.plus, c.minus, where=where).values()) for c in named]
    tests = [paired_t_test(values) for values in found]
    adjusted = holm([test.p for test in tests])
    rows = []
    for contrast, values, test, p in zip(named, found, tests, adjusted, strict=True):
        numbers = {
            "p": test.p,
            "p_holm": p,
            "p_wilcoxon": wilcoxon(values),
            "detectable": detectable(values),
            "detectable_after_holm": detectable(values, tests=len(named)),
        }
        rows.append(
            {
                **asdict(contrast),
                "difference": test.difference.to_json(),
                **{name: None if isnan(value) else value for name, value in numbers.items()},
                "won": sum(value > 0 for value in values),
                "worlds": len(values),
            }
        )
    return rows


def differences(
    outcomes: Sequence[RunOutcome],
    pairs: Sequence[tuple[str, str]],
    where: float | str = PRIMARY,
) -> list[dict[str, Any]]:
    """Describe pairs of conditions without a test: difference, interval and worlds won."""
    rows = []
    for first, second in pairs:
        values = list(paired(outcomes, (first,), (second,), where=where).values())
        rows.append(
            {
                "first": first,
                "second": second,
                "difference": mean_interval(values).to_json(),
                "won": sum(value > 0 for value in values),
                "worlds": len(values),
            }
        )
    return rows


def shown_contrasts(found: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return the rows of the printed table of contrasts."""

    def text(value: float | None, digits: int = 3) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    return [
        {
            "contrast": row["name"],
            "difference": Interval.from_json(row["difference"]).signed(),
            "p, Holm": text(row["p_holm"]),
            "p, Wilcoxon": text(row["p_wilcoxon"]),
            "worlds won": f"{row['won']} of {row['worlds']}",
            "would have shown": text(row["detectable_after_holm"]),
        }
        for row in found
    ]


def _rounded(value: Any) -> Any:
    """Return a value for a table; numbers keep six digits."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def run_tables(
    outcomes: Sequence[RunOutcome], extra: Sequence[str] = ()
) -> dict[str, list[dict[str, Any]]]:
    """Return the tables that every study writes.

    ``runs`` has a row for each run and divergence, and the end of training; ``trajectories`` one
    for each measurement of each run, from which a reader can compute the former.

    Args:
        outcomes: the runs.
        extra: names of further measures to write.
    """
    names = (*MEASURES, *extra)
    runs, trajectories = [], []
    for outcome in outcomes:
        described = {"condition": outcome.condition.label, **outcome.condition.columns}
        others = {name: v for name, v in outcome.result.items() if name != "trajectory"}
        for where in (*DIVERGENCES, END):
            point = outcome.at(where)
            runs.append(
                {
                    **described,
                    "seed": outcome.seed,
                    "at": where,
                    "reached": point is not None,
                    **{name: "" if point is None else _rounded(point[name]) for name in names},
                    **{name: _rounded(value) for name, value in others.items()},
                }
            )
        trajectories += [
            {
                "condition": outcome.condition.label,
                "seed": outcome.seed,
                **{name: _rounded(point[name]) for name in names},
            }
            for point in outcome.result["trajectory"]
        ]
    return {"runs": runs, "trajectories": trajectories}


def as_json(found: Mapping[str, Mapping[Any, Interval]]) -> dict[str, dict[str, Any]]:
    """Return a table of intervals as plain values."""
    return {
        label: {str(name): interval.to_json() for name, interval in of_label.items()}
        for label, of_label in found.items()
    }
