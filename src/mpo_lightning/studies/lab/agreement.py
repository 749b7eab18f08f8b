"""How well a judge's scores agree with gold, group by group, before any training."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from mpo_lightning.losses import AboveMean
from mpo_lightning.studies.world.judges import Judge, NoisyJudge
from mpo_lightning.studies.world.world import Sampling, Teaching, build
from mpo_lightning.training.metrics import kendall_tau_b

__all__ = ["Agreement"]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """The task of comparing a judge with gold on the groups that runs train on.

    Args:
        seed: of the world.
        judge: who scores.
        sampling: how responses are drawn.
        prompts: groups.
        responses: of each.
        teaching: of the world's model.
    """

    seed: int
    judge: Judge = field(default_factory=NoisyJudge)
    sampling: Sampling = field(default_factory=Sampling)
    prompts: int = 128
    responses: int = 10
    teaching: Teaching = field(default_factory=Teaching)

    def __call__(self, worlds: Path) -> dict[str, float]:
        """Kendall's tau, share of responses that are in the set of gold, share chosen."""
        world = build(worlds, self.seed, self.teaching)
        prompts = world.trained(self.prompts)
        drawn = world.sample(prompts, self.responses, self.sampling)
        valid = torch.ones_like(drawn, dtype=torch.bool)
        gold, scores = world.gold()[prompts[:, None], drawn], self.judge(world, prompts, drawn)
        chosen, _ = AboveMean()(scores, valid)
        in_gold, _ = AboveMean()(gold, valid)
        return {
            "kendall_tau": kendall_tau_b(scores, gold, valid).mean().item(),
            "same_set": (chosen == in_gold).double().mean().item(),
            "chosen_share": chosen.double().mean().item(),
        }
