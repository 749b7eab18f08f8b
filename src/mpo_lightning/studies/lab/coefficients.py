"""Coefficient maps: which push a loss gives to each response, before any training.

Where beta times the log-ratios is small, a step moves each response's log-probability by a
coefficient that depends on the group's scores alone: minus the derivative of the loss at log-ratios
of zero. Losses then differ by that map and nothing else.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mpo_lightning.losses import SetLoss
from mpo_lightning.studies.lab.training import PRIMARY
from mpo_lightning.studies.world.judges import Judge, NoisyJudge
from mpo_lightning.studies.world.measures import Yardstick
from mpo_lightning.studies.world.world import GroupSampling, StudyWorld, load_world

__all__ = ["CoefficientMap", "coefficients"]

# Equally likely ranges of gold in which the map of a population is averaged.
BINS = 32
# Number of groups of each held-out prompt over which it is averaged, at most.
MOST_GROUPS = 64
NEAR = 0.25


def coefficients(loss: SetLoss, log_ratios: Tensor, scores: Tensor) -> Tensor:
    """Return minus the derivative of the mean loss by each log-ratio, times the groups, (G, N)."""
    log_ratios = log_ratios.clone().requires_grad_()
    value = loss(log_ratios, scores, torch.ones_like(scores, dtype=torch.bool)).sum()
    (slope,) = torch.autograd.grad(value, log_ratios)
    return -slope


@dataclass(frozen=True, kw_only=True)
class CoefficientMap:
    """The task of measuring a loss's coefficient map on the groups that runs train on.

    Its result has

    - ``snr``: the signal-to-noise ratio E sum(c g) / root(E sum(c ** 2)), with the coefficients c
      and the gold scores g of a group's responses;
    - ``cosine``: between the coefficients at log-ratios of zero and those where the policy is the
      ideal one of the primary divergence: 1 says that the loss is still linear there;
    - ``population_gold``: gold, at 0.25 nat, of the reference tilted by the mean coefficient of
      responses of equal gold: what infinitely many groups of this size would teach.

    Args:
        seed: seed of the world.
        loss: the loss.
        prompts: number of groups.
        responses: number of responses of a group.
        sampling: draws the responses.
        judge: scores them.
    """

    seed: int
    loss: SetLoss
    prompts: int = 128
    responses: int = 10
    sampling: GroupSampling = field(default_factory=GroupSampling)
    judge: Judge = field(default_factory=NoisyJudge)

    def __call__(self, worlds: Path) -> dict[str, float]:
        """Compute it."""
        world = load_world(worlds, self.seed)
        gold = world.gold()
        prompts = world.trained(self.prompts)
        drawn = world.sample(prompts, self.responses, self.sampling)
        scores = self.judge(world, prompts, drawn)
        of_drawn = gold[prompts[:, None], drawn]
        start = coefficients(self.loss, torch.zeros_like(scores), scores)
        yardstick = Yardstick(world.reference[prompts], gold[prompts], world.grammar.attributes)
        moved = (yardstick.ideal(PRIMARY) - yardstick.reference).gather(1, drawn)
        later = coefficients(self.loss, moved, scores)
        signal = (start * of_drawn).sum(1).mean()
        return {
            "snr": (signal / start.square().sum(1).mean().sqrt()).item(),
            "cosine": torch.cosine_similarity(start.flatten(), later.flatten(), dim=0).item(),
            "population_gold": self._population_gold(world, gold),
        }

    def _population_gold(self, world: StudyWorld, gold: Tensor) -> float:
        prompts = world.held_out
        pool = world.sample(prompts, 512, self.sampling)
        groups = min(512 // self.responses, MOST_GROUPS)
        pairs = []
        for start in range(0, groups * self.responses, self.responses):
            drawn = pool[:, start : start + self.responses]
            scores = self.judge(world, prompts, drawn)
            found = coefficients(self.loss, torch.zeros_like(scores), scores)
            pairs.append(torch.stack([gold[prompts[:, None], drawn].flatten(), found.flatten()]))
        of_gold, pushes = torch.cat(pairs, dim=1)
        edges = of_gold.quantile(torch.linspace(0, 1, BINS + 1, dtype=of_gold.dtype))[1:-1]
        place = torch.bucketize(of_gold, edges)
        sums = torch.zeros(BINS, dtype=of_gold.dtype).index_add_(0, place, pushes)
        means = sums / place.bincount(minlength=BINS).clamp(min=1)
        tilt = means[torch.bucketize(gold[prompts], edges)]
        # The scale of a tilt is free: that of the divergence is found.
        tilt = tilt / tilt.std()
        yardstick = Yardstick(world.reference[prompts], tilt, world.grammar.attributes)
        shares = yardstick.ideal(NEAR).exp()
        return (shares * gold[prompts]).sum(1).mean().item()
