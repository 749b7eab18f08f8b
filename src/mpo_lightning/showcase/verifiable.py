"""Study of a real model on its own answers, whose scores a program verifies."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mpo_lightning.losses import DPO, GVPO, MPO, InfoNCA, SetLoss
from mpo_lightning.showcase.constraints import text_of
from mpo_lightning.showcase.estimates import bootstrap, compared, described, drawn, shown
from mpo_lightning.showcase.measures import MEASURES, Answers
from mpo_lightning.showcase.runs import TRAIN, Base, Fit, Groups, Sampled, fit_table
from mpo_lightning.showcase.tuning import LEARNING_RATES, chosen_rates
from mpo_lightning.studies.lab.conditions import Contrast, Findings, Form
from mpo_lightning.studies.lab.figures import lines, panels
from mpo_lightning.studies.lab.runner import Runner
from mpo_lightning.studies.lab.statistics import Interval

__all__ = ["ARMS", "METHODS", "study"]

Floats = NDArray[np.float64]

ARMS: Final = ("main", "others", "responses", "rounds")
METHODS: Final[Mapping[str, SetLoss]] = {
    "MPO": MPO(beta=0.1),
    "W-MPO": MPO(beta=0.1, alpha=0.5, alpha_unit="std"),
    "DPO best-worst": DPO(beta=0.1),
    "DPO random pair": DPO(beta=0.1, pairs="random"),
    "InfoNCA": InfoNCA(beta=0.1, temperature=0.25),
    "GVPO": GVPO(beta=0.1),
}
# Of the main arm; the arm "others" has the other methods.
COMPARED: Final = ("MPO", "W-MPO", "DPO best-worst", "DPO random pair")
# The methods of the arms of responses and rounds.
TWO: Final = ("MPO", "DPO best-worst")
CONTRASTS: Final = (
    Contrast("MPO - base", ("MPO",), ("base",), "+"),
    Contrast("MPO - DPO random pair", ("MPO",), ("DPO random pair",), "+"),
    Contrast("W-MPO - MPO", ("W-MPO",), ("MPO",), "+"),
    Contrast("MPO - DPO best-worst", ("MPO",), ("DPO best-worst",), "none"),
)
PRIMARY: Final = next(iter(MEASURES))
SPLITS: Final = ("test", "other-kinds")
# Number of test prompts on whose answers the divergence is measured.
MEASURED: Final = 64


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Numbers of the study."""

    seeds: int = 3
    prompts: int = 128
    responses: int = 8
    tuned: int = 64
    tuning: int = 48
    test: int = 128
    other_kinds: int = 48
    answers: int = 4
    steps: int = 16
    new_tokens: int = 80
    rates: tuple[float, ...] = LEARNING_RATES


QUICK: Final = Sizes(
    seeds=1,
    prompts=4,
    tuned=4,
    tuning=3,
    test=4,
    other_kinds=2,
    answers=2,
    steps=2,
    new_tokens=10,
    rates=LEARNING_RATES[-1:],
)


class _Plan:
    """Makes the study's tasks."""

    def __init__(self, base: Base, sizes: Sizes) -> None:
        self.base = base
        self.sizes = sizes

    def pool(self, seed: int, prompts: int, first: int = 0, **settings: Any) -> Sampled:
        """Sample groups of training prompts."""
        named = {"n": self.sizes.responses, "split": "train", **settings}
        return self._sampled(prompts=prompts, first=first, seed=seed, **named)

    def _sampled(self, **settings: Any) -> Sampled:
        return Sampled(base=self.base, new_tokens=self.sizes.new_tokens, **settings)

    def pools(self, seed: int) -> tuple[Sampled, Sampled]:
        """All groups of a seed: eight answers to the first prompts, and two to as many others."""
        count = self.sizes.prompts
        return self.pool(seed, count), self.pool(seed, count, first=count, n=2)

    def tuning(self, loss: SetLoss, lr: float) -> Fit:
        """Fit that is judged on the tuning prompts."""
        judged = self.pool(100, self.sizes.tuning, split="tuning")
        groups = (self.pool(100, self.sizes.tuned),)
        return self.fit(loss, lr, 100, groups, prompts=self.sizes.tuned, judged=judged)

    def fit(
        self, loss: SetLoss, lr: float, seed: int, groups: Sequence[Groups], **settings: Any
    ) -> Fit:
        """Fit for the study's number of steps, of a share of the groups each."""
        prompts = settings.get("prompts", self.sizes.prompts)
        return Fit(
            base=self.base,
            groups=tuple(groups),
            loss=loss,
            lr=lr,
            seed=seed,
            steps=self.sizes.steps,
            groups_per_step=max(1, prompts // self.sizes.steps),
            **settings,
        )

    def answers(self, split: str, seed: int, fit: Fit | None, **settings: Any) -> Sampled:
        """Sample answers to test, whose seeds are not those of groups."""
        count = self.sizes.test if split == "test" else self.sizes.other_kinds
        named = {"n": self.sizes.answers, **settings}
        return self._sampled(split=split, prompts=count, seed=1000 + seed, fit=fit, **named)


def study(runner: Runner, form: Form, base: Base, arms: Sequence[str] = ARMS) -> Findings:
    """Run the study.

    Args:
        runner: performs the tasks.
        form: size of the study.
        base: the model.
        arms: parts of the study, of `ARMS`; "main" is always run.
    """
    sizes = QUICK if form.quick else Sizes()
    seeds = form.seeds_of(0, full=sizes.seeds, quick=sizes.seeds)
    plan = _Plan(base, sizes)
    pools = [pool for seed in seeds for pool in plan.pools(seed)[: 1 + ("responses" in arms)]]
    tuned = plan.tuning(METHODS["MPO"], 0.0)
    assert isinstance(tuned.judged, Sampled)
    runner([*pools, tuned.groups[0], tuned.judged], "Groups")  # type: ignore[list-item]
    names = list(METHODS) if "others" in arms else COMPARED
    methods = {name: METHODS[name] for name in names}
    rates, tried = chosen_rates(runner, methods, plan.tuning, sizes.rates)

    def fits(name: str, **settings: Any) -> list[Fit]:
        return [
            plan.fit(METHODS[name], rates[name], seed, plan.pools(seed)[:wanted], **settings)
            for seed in seeds
            for wanted in [1 + (settings.get("prompts", 0) > sizes.prompts)]
        ]

    of: dict[str, list[Fit] | list[None]] = {"base": [None] * len(seeds)}
    of |= {name: fits(name) for name in methods}
    if "responses" in arms:
        of |= {
            _size_label(name, prompts, n): fits(name, prompts=prompts, responses=n)
            for name in TWO
            for prompts, n in _budgets(sizes)
            # With two responses both are the same loss.
            if n > 2 or name == "MPO"
        }
    runner([fit for of_label in of.values() for fit in of_label if fit], "Fits")
    if "rounds" in arms:
        of |= _second_round(runner, plan, of, seeds, rates)
    found = _answered(runner, plan, of, seeds)
    named = {
        (label, seed): fit
        for label, fits_of in of.items()
        for seed, fit in zip(seeds, fits_of, strict=True)
        if fit is not None
    }
    tables = {
        "answers": [row for each in found for row in each.rows],
        "fits": fit_table(named, runner.folder / "worlds"),
        "tuning": tried,
    }
    return _findings(found, tables, rates, sizes)


def _budgets(sizes: Sizes) -> list[tuple[int, int]]:
    """Return numbers of prompts and of responses: fewer responses, and half of them otherwise."""
    count, n = sizes.prompts, sizes.responses
    return [(count, 2), (count, n // 2), (min(2 * count, TRAIN), 2), (count // 2, n)]


def _size_label(name: str, prompts: int, responses: int) -> str:
    return f"{name}, {prompts} x {responses}"


def _second_round(
    runner: Runner,
    plan: _Plan,
    of: Mapping[str, Sequence[Fit | None]],
    seeds: Sequence[int],
    rates: Mapping[str, float],
) -> dict[str, list[Fit]]:
    second: dict[str, list[Fit]] = {}
    for name in TWO:
        for seed, first in zip(seeds, of[name], strict=True):
            pool = plan.pool(200 + seed, plan.sizes.prompts, fit=first)
            again = plan.fit(METHODS[name], rates[name], seed, (pool,), after=first)
            second.setdefault(f"{name}, second round", []).append(again)
    fits = [fit for of_label in second.values() for fit in of_label]
    runner([pool for fit in fits for pool in fit.groups], "Groups, second round")  # type: ignore[misc]
    runner(fits, "Fits, second round")
    return second


@dataclass(frozen=True)
class _Answered:
    """Answers of a condition with one seed to a split's prompts, measured."""

    condition: str
    split: str
    seed: int
    scale: float
    divergence: float | None
    measures: dict[int, dict[str, float]]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Rows of the table of answers, one a prompt."""
        named = {name: getattr(self, name) for name in ("condition", "split", "seed", "scale")}
        return [{**named, "prompt": key, **values} for key, values in self.measures.items()]


def _answered(
    runner: Runner,
    plan: _Plan,
    of: Mapping[str, Sequence[Fit | None]],
    seeds: Sequence[int],
) -> list[_Answered]:
    asked: list[tuple[str, str, int, float, Sampled]] = []
    for label, fits in of.items():
        # Of fewer responses the score is all that is asked for.
        whole = "," not in label or "round" in label
        for seed, fit in zip(seeds, fits, strict=True):
            measured = MEASURED if whole and fit is not None else 0
            for split in SPLITS if whole else SPLITS[:1]:
                answers = plan.answers(
                    split, seed, fit, measured=measured if split == "test" else 0
                )
                asked.append((label, split, seed, 1.0, answers))
            if label in METHODS and seed == seeds[0]:
                half = plan.answers("test", seed, fit, scale=0.5, n=2, measured=measured)
                asked.append((label, "test", seed, 0.5, half))
    results = runner([task for *_, task in asked], "Answers")
    return [
        _Answered(
            condition=label,
            split=split,
            seed=seed,
            scale=scale,
            divergence=result["divergence"],
            measures={row["key"]: _measures(row) for row in result["rows"]},
        )
        for (label, split, seed, scale, _), result in zip(asked, results, strict=True)
    ]


def _measures(row: Mapping[str, Any]) -> dict[str, float]:
    answers = Answers(text_of(row["prompt"]), row["responses"], row["scores"], row["truncated"])
    return {name: measure(answers) for name, measure in MEASURES.items()}


def _values(
    found: Sequence[_Answered], measure: str, split: str = "test", scale: float = 1.0
) -> dict[str, Floats]:
    """Return each condition's values of a measure, (S, P)."""
    values: dict[str, list[list[float]]] = {}
    for each in found:
        if each.split == split and each.scale == scale:
            row = [of[measure] for _, of in sorted(each.measures.items())]
            values.setdefault(each.condition, []).append(row)
    return {label: np.array(rows) for label, rows in values.items()}


def _findings(
    found: Sequence[_Answered],
    tables: Mapping[str, Sequence[Mapping[str, Any]]],
    rates: Mapping[str, float],
    sizes: Sizes,
) -> Findings:
    primary = _values(found, PRIMARY)
    contrasts = compared(primary, CONTRASTS)
    means = {
        split: {
            measure: {
                label: bootstrap(values)[0]
                for label, values in _values(found, measure, split).items()
            }
            for measure in MEASURES
        }
        for split in SPLITS
    }
    pairs = [(label, "MPO") for label in primary if label not in ("MPO", "base")]
    pairs += [(f"{name}, second round", name) for name in TWO if f"{name}, second round" in primary]
    frontier = _frontier(found)
    budgets = _by_responses(primary, sizes)
    summary = {
        "contrasts": contrasts,
        "differences": {
            split: {
                measure: described(of, [pair for pair in pairs if set(pair) <= of.keys()])
                for measure in MEASURES
                for of in [_values(found, measure, split)]
            }
            for split in SPLITS
        },
        "means": {
            split: {
                measure: {label: value.to_json() for label, value in of.items()}
                for measure, of in by_measure.items()
            }
            for split, by_measure in means.items()
        },
        "frontier": frontier,
        "scored_responses": budgets,
        "learning_rates": dict(rates),
    }
    figures = {
        "methods": lambda: drawn(
            {name: of for name, of in means["test"][PRIMARY].items() if "," not in name}, PRIMARY
        ),
        "frontier": lambda: _draw_frontier(frontier),
    }
    if len(budgets) > len(TWO):
        figures["responses"] = lambda: _draw_responses(budgets)
    return Findings(summary, tables, figures, shown(contrasts))


def _frontier(found: Sequence[_Answered]) -> list[dict[str, Any]]:
    """Return score and divergence of each method at each scale of its adapter."""
    rows = []
    for scale in (0.5, 1.0):
        for label, values in _values(found, PRIMARY, scale=scale).items():
            divergences = [
                each.divergence
                for each in found
                if (each.condition, each.scale) == (label, scale) and each.divergence is not None
            ]
            if label in METHODS:
                score = bootstrap(values)[0].to_json()
                divergence = fmean(divergences)
                row = {"condition": label, "scale": scale, "divergence": divergence, "score": score}
                rows.append(row)
    return rows


def _by_responses(primary: Mapping[str, Floats], sizes: Sizes) -> list[dict[str, Any]]:
    """Return the score of each method by numbers of prompts and responses."""
    rows = []
    full = (sizes.prompts, sizes.responses)
    for name in TWO:
        for prompts, n in (full, *_budgets(sizes)):
            label = name if (prompts, n) == full else _size_label(name, prompts, n)
            # With two responses both are the same loss.
            label = label if n > 2 else _size_label("MPO", prompts, n)
            if label in primary:
                score = bootstrap(primary[label])[0].to_json()
                row = {"method": name, "prompts": prompts, "responses": n, "score": score}
                rows.append({**row, "scored": prompts * n})
    return rows


def _draw_frontier(rows: Sequence[Mapping[str, Any]]) -> Any:
    figure, (axis,) = panels([PRIMARY], "mean log-ratio of own answers to the base, nats")
    for label in dict.fromkeys(row["condition"] for row in rows):
        of = [row for row in rows if row["condition"] == label]
        scores = [Interval.from_json(row["score"]) for row in of]
        lines(axis, [row["divergence"] for row in of], scores, label)
    axis.legend()
    return figure


def _draw_responses(rows: Sequence[Mapping[str, Any]]) -> Any:
    figure, (axis,) = panels([PRIMARY], "scored responses")
    for name in TWO:
        for n in sorted({row["responses"] for row in rows}):
            of = sorted(
                (row for row in rows if (row["method"], row["responses"]) == (name, n)),
                key=lambda row: row["scored"],
            )
            if of and (n > 2 or name == "MPO"):
                scores = [Interval.from_json(row["score"]) for row in of]
                lines(axis, [row["scored"] for row in of], scores, f"{name}, {n} a prompt")
    axis.set_xscale("log", base=2)
    axis.legend()
    return figure
