"""Sample bias: how far the attributes of sampled responses are from those of acceptable ones.

It is what the paper's theorem bounds: a statement about samples, before any training.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mpo_lightning.losses import AboveMean
from mpo_lightning.studies.world.judges import Judge, NoisyJudge
from mpo_lightning.studies.world.measures import Yardstick
from mpo_lightning.studies.world.world import GroupSampling, StudyWorld, load_world

__all__ = ["SampleBias"]

ROUNDS = 64


@dataclass(frozen=True, kw_only=True)
class SampleBias:
    """The task of measuring sample bias at each size, on a world's held-out prompts.

    For each attribute the absolute difference between the mean over some responses and the mean
    over all that are acceptable: those that the reference writes and that are better than its mean.
    Averaged over attributes, prompts and draws. Its result has, by size,

    - ``acceptable``: n independent draws from the acceptable responses, the theorem's object;
    - ``chosen``: the chosen set that a judge makes of n responses of the reference.

    Args:
        seed: seed of the world.
        sizes: sizes n.
        sampling: draws the chosen sets' groups.
        judge: scores them.
    """

    seed: int
    sizes: tuple[int, ...]
    sampling: GroupSampling = field(default_factory=GroupSampling)
    judge: Judge = field(default_factory=NoisyJudge)

    def __call__(self, worlds: Path) -> dict[str, dict[str, float]]:
        """Measure both kinds of bias."""
        world = load_world(worlds, self.seed)
        prompts = world.held_out
        gold, attributes = world.gold()[prompts], world.grammar.attributes
        mean = Yardstick(world.reference[prompts], gold, attributes).acceptable
        return {
            "acceptable": self._of_acceptable(world, gold, mean),
            "chosen": self._of_chosen(world, mean),
        }

    def _of_acceptable(self, world: StudyWorld, gold: Tensor, mean: Tensor) -> dict[str, float]:
        weights = world.reference[world.held_out].exp()
        weights = torch.where(gold > (weights * gold).sum(1, keepdim=True), weights, 0.0)
        generator = torch.Generator().manual_seed(self.seed)
        count = max(self.sizes) * ROUNDS
        drawn = weights.multinomial(count, replacement=True, generator=generator)
        values = world.grammar.attributes[drawn].view(len(drawn), ROUNDS, max(self.sizes), -1)
        return {
            str(n): (values[:, :, :n].mean(2) - mean[:, None]).abs().mean().item()
            for n in self.sizes
        }

    def _of_chosen(self, world: StudyWorld, mean: Tensor) -> dict[str, float]:
        prompts, attributes = world.held_out, world.grammar.attributes
        pool = world.sample(prompts, max(self.sizes), self.sampling)
        found = {}
        for n in self.sizes:
            # As many groups of a pool as there is room for, one after the other.
            gaps = []
            for start in range(0, pool.shape[1] - n + 1, n):
                drawn = pool[:, start : start + n]
                scores = self.judge(world, prompts, drawn)
                chosen, _ = AboveMean()(scores, torch.ones_like(drawn, dtype=torch.bool))
                contrast = chosen.any(1)
                members = chosen[contrast].double()[:, :, None]
                of_set = (members * attributes[drawn[contrast]]).sum(1) / members.sum(1)
                gaps.append((of_set - mean[contrast]).abs())
            found[str(n)] = torch.cat(gaps).mean().item()
        return found
