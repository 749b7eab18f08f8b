"""Judges: gold scores, with noise and with the distortions of real judges."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor

from mpo_lightning.studies.world.grammar import RESPONSES, SYMBOLS, Utility
from mpo_lightning.studies.world.world import StudyWorld, draw_seed

__all__ = ["Judge", "NoisyJudge", "Remedy", "SetJudge", "SetRule", "Shape", "remedied"]

Shape = Literal["as-is", "exp", "log", "uniform", "bimodal", "rank", "levels"]
Remedy = Literal["none", "z-score", "rank"]
SetRule = Literal["sum", "max", "mean", "min"]


class Judge(Protocol):
    """Scorer of the responses of groups; a frozen dataclass with a `Remedy`."""

    @property
    def remedy(self) -> Remedy:
        """Transformation of the scores against the judge's scale."""

    def __call__(self, world: StudyWorld, prompts: Tensor, drawn: Tensor) -> Tensor:
        """Score responses numbered ``drawn``, (G, N), to prompts numbered (G,): float64 (G, N)."""


@dataclass(frozen=True, kw_only=True)
class NoisyJudge:
    """A judge that distorts gold in the order of the arguments.

    Args:
        utility: kind of gold (`Grammar.gold`).
        crowding: deduction for each other response of the group that begins with the same symbol:
            a score that depends on the set.
        taste: weight of the first nuisance attribute, in its standard deviations.
        noise: standard deviation of normal noise, independent between responses; a response that
            is drawn twice gets the same score twice.
        shape: map of a score s: "exp" is exp(1.5 s) (skewed to the right), "log" -exp(-1.5 s)
            (skewed to the left), "uniform" the share of a normal distribution below s, "bimodal"
            two humps around -3 and 3, "rank" the rank in the group, "levels" the number of the
            level that s falls into. All keep the order of scores; levels tie some.
        levels: number of equally likely levels.
        factor: factor of the scores.
        corrupted_tops: share of the responses in the worse half of a group that get its best score.
        corrupted_bottoms: share of the better half that get its worst score.
        draw: number of the draw of the noise: another one is another judge of the same kind.
        remedy: scores as they are ("none"), or they ("z-score") or their ranks ("rank") with mean 0
            and standard deviation 1 within the group.
    """

    utility: Utility = "additive"
    crowding: float = 0.0
    taste: float = 0.0
    noise: float = 1.0
    shape: Shape = "as-is"
    levels: int = 5
    factor: float = 1.0
    corrupted_tops: float = 0.0
    corrupted_bottoms: float = 0.0
    draw: int = 0
    remedy: Remedy = "none"

    def __call__(self, world: StudyWorld, prompts: Tensor, drawn: Tensor) -> Tensor:
        """Return the scores of the responses, (G, N)."""
        scores = world.gold(self.utility)[prompts[:, None], drawn]
        if self.crowding:
            begin = drawn // len(SYMBOLS)
            others = (begin[:, :, None] == begin[:, None, :]).sum(2) - 1
            scores = scores - self.crowding * others
        if self.taste:
            attribute = world.grammar.attributes[:, 0]
            scores = scores + self.taste * (attribute / attribute.square().mean().sqrt())[drawn]
        seed = draw_seed(world.seed, self.draw)
        scores = scores + self.noise * _per_response(seed, prompts, drawn)
        scores = self.factor * _shaped(scores, self.shape, self.levels)
        scores = self._corrupted(scores, seed, prompts, drawn)
        return remedied(scores, self.remedy)

    def _corrupted(self, scores: Tensor, seed: int, prompts: Tensor, drawn: Tensor) -> Tensor:
        if not (self.corrupted_tops or self.corrupted_bottoms):
            return scores
        hit = _per_response(-1 - seed, prompts, drawn)
        # Uniform on [0, 1], fixed for each response.
        chance = 0.5 * (1 + torch.erf(hit / math.sqrt(2)))
        better = _ranks(scores) >= scores.shape[1] / 2
        tops = ~better & (chance < self.corrupted_tops)
        bottoms = better & (chance < self.corrupted_bottoms)
        changed = torch.where(tops, scores.amax(1, keepdim=True), scores)
        return torch.where(bottoms, scores.amin(1, keepdim=True), changed)


@dataclass(frozen=True, kw_only=True)
class SetJudge:
    """A judge of sets: of the two halves of a group, the better one's responses all score 1.

    What a half is worth does not have to be the sum over its responses that the losses assume.

    Args:
        rule: worth of a half: "sum" is log sum exp of its noisy gold, "max", "mean" or "min" that
            of the noisy gold.
        noise: standard deviation of normal noise on each response.
        draw: number of the draw of the noise.
        remedy: as of a `NoisyJudge`.
    """

    rule: SetRule
    noise: float = 1.0
    draw: int = 0
    remedy: Remedy = "none"

    def __call__(self, world: StudyWorld, prompts: Tensor, drawn: Tensor) -> Tensor:
        """Return the scores of the responses, (G, N) with an even N."""
        gold = world.gold()[prompts[:, None], drawn]
        noise = _per_response(draw_seed(world.seed, self.draw), prompts, drawn)
        halves = (gold + self.noise * noise).view(len(gold), 2, -1)
        rules: dict[SetRule, Callable[[], Tensor]] = {
            "sum": lambda: halves.logsumexp(2),
            "max": lambda: halves.amax(2),
            "mean": lambda: halves.mean(2),
            "min": lambda: halves.amin(2),
        }
        worth = rules[self.rule]()
        better = worth == worth.amax(1, keepdim=True)
        scores = better.double().repeat_interleave(halves.shape[2], dim=1)
        return remedied(scores, self.remedy)


def remedied(scores: Tensor, remedy: Remedy) -> Tensor:
    """Apply a remedy (`NoisyJudge`) to scores, (G, N)."""
    if remedy == "none":
        return scores
    values = _ranks(scores) if remedy == "rank" else scores
    spread = values.std(1, correction=0, keepdim=True)
    # Groups of equal scores stay so.
    return torch.where(spread > 0, (values - values.mean(1, keepdim=True)) / spread, 0.0)


def _per_response(seed: int, prompts: Tensor, drawn: Tensor) -> Tensor:
    """Draw standard normal numbers (G, N), fixed for each response to each prompt."""
    rows = []
    for prompt, row in zip(prompts.tolist(), drawn, strict=True):
        generator = torch.Generator().manual_seed(2_000_003 * seed + prompt)
        rows.append(torch.randn(RESPONSES, generator=generator, dtype=torch.float64)[row])
    return torch.stack(rows)


def _ranks(scores: Tensor) -> Tensor:
    """Count the scores of the group that are lower, ties half, (G, N)."""
    lower = scores[:, None, :] < scores[:, :, None]
    equal = scores[:, None, :] == scores[:, :, None]
    return lower.sum(2).double() + (equal.sum(2).double() - 1) / 2


def _shaped(scores: Tensor, shape: Shape, levels: int) -> Tensor:
    def uniform() -> Tensor:
        return 0.5 * (1 + torch.erf(scores / scores.std(correction=0) / math.sqrt(2)))

    def of_levels() -> Tensor:
        shares = torch.linspace(0, 1, levels + 1, dtype=scores.dtype)[1:-1]
        return torch.bucketize(scores, scores.flatten().quantile(shares)).double()

    def bimodal() -> Tensor:
        return scores + 3 * scores.sign()

    shapes: dict[Shape, Callable[[], Tensor]] = {
        "as-is": scores.clone,
        "exp": (1.5 * scores).exp,
        "log": (-1.5 * scores).exp().neg,
        "uniform": uniform,
        "bimodal": bimodal,
        "rank": partial(_ranks, scores),
        "levels": of_levels,
    }
    return shapes[shape]()
