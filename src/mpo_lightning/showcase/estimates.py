"""Bootstrap over prompts and seeds, and contrasts that were named beforehand."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isnan
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mpo_lightning.studies.lab.conditions import Contrast
from mpo_lightning.studies.lab.figures import panels
from mpo_lightning.studies.lab.statistics import Interval, holm

__all__ = ["MARGIN", "bootstrap", "compared", "described", "drawn", "shown"]

Floats = NDArray[np.float64]

RESAMPLES: Final = 10_000
MARGIN: Final = 0.03
"""Two conditions are level where the interval of their difference lies within plus and minus it."""


def bootstrap(values: Floats) -> tuple[Interval, float]:
    """Return the mean with its 95 % percentile interval, and the p-value of a mean of zero.

    Seeds and prompts are resampled each on their own, with replacement: prompts are crossed with
    seeds. Such intervals are rather too wide than too narrow (Owen 2007, arXiv 0712.1111).

    Args:
        values: a value for each seed and prompt, (S, P); of one seed, prompts alone are resampled.
    """
    seeds, prompts = values.shape
    rng = np.random.default_rng(0)
    of_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES) / seeds
    of_prompts = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=RESAMPLES) / prompts
    means = ((of_seeds @ values) * of_prompts).sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    tail = min((means <= 0).sum(), (means >= 0).sum())
    p = min(1.0, 2 * (1 + float(tail)) / (1 + RESAMPLES))
    return Interval(float(values.mean()), float(low), float(high), prompts), p


def _difference(of: Mapping[str, Floats], contrast: Contrast) -> Floats:
    plus = sum(of[label] for label in contrast.plus)
    return np.asarray(plus - sum(of[label] for label in contrast.minus))


def compared(of: Mapping[str, Floats], contrasts: Sequence[Contrast]) -> list[dict[str, Any]]:
    """Test contrasts. Holm's method is over those of which a sign is expected.

    Args:
        of: each condition's values, (S, P) with the same seeds and prompts.
        contrasts: contrasts; those with a condition that is missing are left out.

    Returns:
        for each, as plain values: the difference with its interval, the p-value as it is and
        adjusted (None where the plan expects none), and whether the two are level.
    """
    named = [c for c in contrasts if {*c.plus, *c.minus} <= of.keys()]
    found = [bootstrap(_difference(of, contrast)) for contrast in named]
    tested = [
        p if contrast.expected != "none" else float("nan")
        for contrast, (_, p) in zip(named, found, strict=True)
    ]
    return [
        {
            **asdict(contrast),
            "difference": interval.to_json(),
            "p": None if isnan(p) else p,
            "p_holm": None if isnan(p) else adjusted,
            "level": max(-interval.low, interval.high) < MARGIN,
        }
        for contrast, (interval, _), p, adjusted in zip(
            named, found, tested, holm(tested), strict=True
        )
    ]


def described(of: Mapping[str, Floats], pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Describe differences of pairs of conditions by intervals, without a test."""
    rows = compared(of, [Contrast(f"{a} - {b}", (a,), (b,), "none") for a, b in pairs])
    return [{"name": row["name"], "difference": row["difference"]} for row in rows]


def shown(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return the rows of the printed table of contrasts."""
    return [
        {
            "contrast": row["name"],
            "expected": row["expected"],
            "difference": Interval.from_json(row["difference"]).signed(),
            "p, Holm": "-" if row["p_holm"] is None else f"{row['p_holm']:.4f}",
            f"within {MARGIN:g}": "yes" if row["level"] else "no",
        }
        for row in rows
    ]


def drawn(values: Mapping[str, Interval], title: str, chance: float | None = None) -> Any:
    """Draw means with their intervals, a row for each condition, and chance as a line."""
    figure, (axis,) = panels([title], width=6.0, height=1 + 0.35 * len(values))
    for place, of in enumerate(values.values()):
        axis.plot([of.low, of.high], [place, place], color="C0")
        axis.plot(of.mean, place, "o", color="C0")
    if chance is not None:
        axis.axvline(chance, color="grey", linewidth=1)
    axis.set_yticks(range(len(values)), list(values))
    axis.invert_yaxis()
    return figure
