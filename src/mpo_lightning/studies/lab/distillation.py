"""Capacity: what the adapted model can express, whatever the loss on groups."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mpo_lightning.quiet import quiet
from mpo_lightning.studies.lab.training import LEARNING_RATE, PRIMARY
from mpo_lightning.studies.world.enumeration import enumerate_logps
from mpo_lightning.studies.world.grammar import Utility
from mpo_lightning.studies.world.measures import Yardstick, at_divergence
from mpo_lightning.studies.world.world import load_world

__all__ = ["Distillation"]


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """The task of teaching the adapted model the ideal policy itself, on the prompts of groups.

    The adapter is that of the runs, the target the policy of most gold at the primary divergence,
    with all its probabilities. Its result has the gold score at the primary divergence on held-out
    prompts, or at the end where the model does not come as far, that divergence, and the gold of
    the ideal policy there.

    Args:
        seed: seed of the world.
        utility: kind of gold.
        prompts: number of prompts that are taught.
        steps: number of optimizer steps, each with all prompts.
    """

    seed: int
    utility: Utility
    prompts: int = 128
    steps: int = 200

    def __call__(self, worlds: Path) -> dict[str, float]:
        """Teach, and measure every ten steps."""
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        world = load_world(worlds, self.seed)
        taught, held_out = world.trained(self.prompts), world.held_out
        gold, attributes = world.gold(self.utility), world.grammar.attributes
        teacher = Yardstick(world.reference[taught], gold[taught], attributes)
        # A little further than the reading, which interpolates between measurements.
        target = teacher.ideal(1.2 * PRIMARY).exp()
        yardstick = Yardstick(world.reference[held_out], gold[held_out], attributes)
        torch.manual_seed(self.seed)
        with quiet():
            base = AutoModelForCausalLM.from_pretrained(world.base)
            adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
            model: Any = get_peft_model(base, adapter)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)
        taught_ids, held_out_ids = world.prompt_ids(taught), world.prompt_ids(held_out)
        trajectory = []
        for step in range(self.steps + 1):
            if step % 10 == 0 or step == self.steps:
                with torch.no_grad():
                    found = enumerate_logps(model, held_out_ids, world.symbol_ids)
                trajectory.append(yardstick(found))
            if step == self.steps:
                break
            logps = enumerate_logps(model, taught_ids, world.symbol_ids)
            loss = -(target * logps).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        point = at_divergence(trajectory, PRIMARY) or trajectory[-1]
        return {name: point[name] for name in ("gold", "ideal_gold", "kl", "outside")}
