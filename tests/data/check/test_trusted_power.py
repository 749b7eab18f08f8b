"""Trusted labels tell planted faults of a judge as often as they say, and sound judges from them.

Many draws of a few dozen prompts: gold is normal, a sound judge is gold with noise of its size.
"""

from collections import Counter
from collections.abc import Callable
from functools import cache
from statistics import NormalDist, fmean
from typing import Any

import numpy as np
import pytest

from mpo_lightning.data.check.report import Comparison, Contrast
from mpo_lightning.data.check.trusted import compare_with_trusted
from mpo_lightning.data.check.warnings import TRUSTED_KINDS, find_trusted_warnings

DRAWS, RESPONSES = 100, 8
Judge = Callable[[np.random.Generator, Any, Any], Any]


def noisy(draw: np.random.Generator, gold: Any, length: Any) -> Any:
    return gold + draw.standard_normal(gold.shape)


def corrupted(draw: np.random.Generator, gold: Any, share: float, *, tops: bool) -> Any:
    """Give a share of the worse half the best score, or of the better half the worst one."""
    scores = noisy(draw, gold, None) if tops else -noisy(draw, gold, None)
    worse = scores.argsort(1).argsort(1) < RESPONSES / 2
    hit = worse & (draw.random(gold.shape) < share)
    scores = np.where(hit, scores.max(1, keepdims=True), scores)
    return scores if tops else -scores


def spiked(draw: np.random.Generator, gold: Any, length: Any) -> Any:
    """Make some scores far too high or too low: large differences are of no sure order."""
    spikes = 10 * draw.standard_normal(gold.shape) * (draw.random(gold.shape) < 0.15)
    return noisy(draw, gold, length) + spikes


def levels(draw: np.random.Generator, gold: Any, length: Any) -> Any:
    return np.digitize(noisy(draw, gold, length), [-1.2, -0.35, 0.35, 1.2]).astype(float)


# How a judge scores, and what length has to do with gold and labels with gold: its weight in gold,
# and the labels' noise.
SOUND: dict[str, tuple[Judge, float, float]] = {
    "noise": (noisy, 0.0, 0.0),
    "scale": (lambda *given: 10 * noisy(*given), 0.0, 0.0),
    "exp": (lambda *given: np.exp(1.5 * noisy(*given)), 0.0, 0.0),
    "levels": (levels, 0.0, 0.0),
    "long answers are better": (noisy, 0.4, 0.0),
    "long answers are better, noisy labels": (noisy, 0.4, 1.0),
}
# The warning, the judge, and a number of prompts.
PLANTED: dict[str, tuple[str, Judge, int]] = {
    "tops 30 %": ("wrong-best", lambda d, g, x: corrupted(d, g, 0.3, tops=True), 20),
    "tops 15 %": ("wrong-best", lambda d, g, x: corrupted(d, g, 0.15, tops=True), 40),
    "bottoms 30 %": ("wrong-worst", lambda d, g, x: corrupted(d, g, 0.3, tops=False), 12),
    "taste 0.5": ("favoured-column", lambda d, g, x: noisy(d, g, x) + 0.5 * x, 20),
    "mostly noise": ("low-agreement", lambda d, g, x: noisy(d, 0.25 * g, x), 32),
    "spikes 15 %": ("unsure-differences", spiked, 48),
}


@cache
def comparisons(kind: str, judge: Judge, prompts: int, weight: float, noise: float) -> Any:
    draw = np.random.default_rng(sum(map(ord, kind)))
    found = []
    for _ in range(DRAWS):
        length = draw.standard_normal((prompts, RESPONSES))
        gold = weight * length + np.sqrt(1 - weight**2) * draw.standard_normal(length.shape)
        scores = judge(draw, gold, length)
        labels = gold + noise * draw.standard_normal(gold.shape)
        columns = {"length": length}
        found.append(compare_with_trusted(scores, labels, columns=columns, resamples=200))
    return found


def of(name: str, comparison: Comparison) -> tuple[Contrast, float, int]:
    """Return what a warning goes by, its limit, and the sign of what is warned of."""
    (limit,) = (kind.threshold for kind in TRUSTED_KINDS if kind.name == name)
    contrasts = {
        "low-agreement": (comparison.order, -1),
        "unsure-differences": (comparison.spared, -1),
        "wrong-best": (comparison.best_shortfall, 1),
        "wrong-worst": (comparison.worst_excess, 1),
        "favoured-column": (comparison.columns[0].beyond, 1),
    }
    contrast, sign = contrasts[name]
    return contrast, limit, sign


def stated_power(contrast: Contrast, limit: float, sign: int, truth: float) -> float:
    """Probability of a warning at a true value, where it is 80 % at ``noticeable``."""
    assert contrast.noticeable is not None
    assert contrast.high is not None
    assert contrast.low is not None
    reach = (contrast.high - contrast.low) / 2
    border = limit - reach if sign < 0 else max(limit, reach)
    std = abs(contrast.noticeable - border) / NormalDist().inv_cdf(0.8)
    return NormalDist().cdf(sign * (truth - border) / std)


def warned(found: list[Comparison]) -> Counter[str]:
    return Counter(warning.name for each in found for warning in find_trusted_warnings(each))


def test_sound_judges_are_rarely_warned_of() -> None:
    found = [
        each
        for kind, (judge, weight, noise) in SOUND.items()
        for each in comparisons(kind, judge, 24, weight, noise)
    ]
    wrong = sum(bool(find_trusted_warnings(each)) for each in found)
    # The stated rate, and three standard errors of so many draws.
    assert wrong <= len(found) * 0.05 + 3 * np.sqrt(len(found) * 0.05 * 0.95)


@pytest.mark.parametrize("kind", PLANTED)
def test_faults_are_warned_of_as_often_as_stated(kind: str) -> None:
    name, judge, prompts = PLANTED[kind]
    found = comparisons(kind, judge, prompts, 0.0, 0.0)
    # The mean over many draws is the truth. Of the rate it has a standard error of 0.05 at most.
    truth = fmean(of(name, each)[0].value or 0.0 for each in found)
    stated = fmean(stated_power(*of(name, each), truth) for each in found)
    rate = warned(found)[name] / DRAWS
    assert rate == pytest.approx(stated, abs=0.15)
