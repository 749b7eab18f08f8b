"""A learnt judge: a small reward model, trained on a few responses with gold scores."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from mpo_lightning.files import whole_folder
from mpo_lightning.quiet import quiet
from mpo_lightning.studies.world.judges import Remedy, remedied
from mpo_lightning.studies.world.world import GroupSampling, StudyWorld

__all__ = ["LearntJudge"]

STEPS = 150
BATCH = 64


@dataclass(frozen=True, kw_only=True)
class LearntJudge:
    """A sequence classifier on the world's base, taught gold by least squares.

    Its errors are those of a reward model with little data: alike for similar responses, unlike
    independent noise.

    Args:
        samples: number of labelled responses, each to another prompt; at most 400.
        remedy: transformation of its scores (`NoisyJudge`).
    """

    samples: int = 256
    remedy: Remedy = "none"

    def __call__(self, world: StudyWorld, prompts: Tensor, drawn: Tensor) -> Tensor:
        """Return the scores of the responses, (G, N)."""
        from transformers import AutoModelForSequenceClassification

        folder = world.folder / f"reward-{self.samples}"
        with quiet():
            with FileLock(folder.with_name(f".{folder.name}.lock")):
                if not folder.is_dir():
                    self._teach(world, folder)
            model = AutoModelForSequenceClassification.from_pretrained(folder)
        model.eval()
        ids = _ids(world, prompts.repeat_interleave(drawn.shape[1]), drawn.flatten())
        with torch.no_grad():
            found = [model(input_ids=part).logits[:, 0] for part in torch.split(ids, 4096)]
        return remedied(torch.cat(found).double().view(drawn.shape), self.remedy)

    def _teach(self, world: StudyWorld, folder: Path) -> None:
        from transformers import AutoModelForSequenceClassification

        # Prompts from the end, before those held out, with responses that no group takes.
        asked = world.order[-len(world.held_out) - self.samples : -len(world.held_out)]
        drawn = world.sample(asked, 512, GroupSampling())[:, -1]
        ids, gold = _ids(world, asked, drawn), world.gold()[asked, drawn].float()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(world.seed)
            model: Any = AutoModelForSequenceClassification.from_pretrained(
                world.base, num_labels=1
            )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        generator = torch.Generator().manual_seed(world.seed)
        model.train()
        for _ in range(STEPS):
            batch = torch.randint(self.samples, (BATCH,), generator=generator)
            loss = (model(input_ids=ids[batch]).logits[:, 0] - gold[batch]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with whole_folder(folder) as unfinished:
            model.save_pretrained(unfinished)


def _ids(world: StudyWorld, prompts: Tensor, responses: Tensor) -> Tensor:
    """Return the token ids of prompt, response and end token, one row each."""
    symbols = world.symbol_ids
    parts = [
        world.prompt_ids(prompts),
        symbols[responses // len(symbols)][:, None],
        symbols[responses % len(symbols)][:, None],
        torch.full((len(prompts), 1), world.tokenizer.eos_token_id),
    ]
    return torch.cat(parts, dim=1)
