"""Agreement of a judge's scores with gold, group by group, before any training."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from mpo_lightning.losses import AboveMean
from mpo_lightning.studies.world.judges import Judge, NoisyJudge
from mpo_lightning.studies.world.world import GroupSampling, load_world
from mpo_lightning.training.metrics import kendall_tau_b

__all__ = ["Agreement"]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """The task of comparing a judge with gold on the groups that runs train on.

    Args:
        seed: seed of the world.
        judge: scores the responses.
        sampling: draws the responses.
        prompts: number of groups.
        responses: number of responses of a group.
    """

    seed: int
    judge: Judge = field(default_factory=NoisyJudge)
    sampling: GroupSampling = field(default_factory=GroupSampling)
    prompts: int = 128
    responses: int = 10

    def __call__(self, worlds: Path) -> dict[str, float]:
        """Return Kendall's tau-b, the share of responses in gold's set, and the share chosen."""
        world = load_world(worlds, self.seed)
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
