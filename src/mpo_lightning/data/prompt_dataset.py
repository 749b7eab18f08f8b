"""Prompts without responses, in batches that a model answers."""

from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from mpo_lightning.batch import PromptBatch, PromptItem
from mpo_lightning.data.groups import collect_errors
from mpo_lightning.data.prompts import PromptSource
from mpo_lightning.data.sampler import GroupSampler, StepGroups
from mpo_lightning.data.tokens import GroupTokenizer

__all__ = ["PromptDataset"]


class PromptDataset(Dataset[PromptBatch]):
    """All prompts of some sources; an item is the batch that a sampler names for a step.

    Prompts of similar length come together, so that little is padding.

    Args:
        sources: where they come from, already checked.
        tokenizer: makes their tokens, by the rules of training.

    Raises:
        DataError: for prompts that cannot be tokenised, all of them together.
    """

    def __init__(self, sources: Sequence[PromptSource], tokenizer: GroupTokenizer) -> None:
        self.tokenizer = tokenizer
        rows = [row for source in sources for row in source.rows(0, len(source))]
        self.items = [PromptItem(number, *row) for number, row in enumerate(rows)]
        lengths = collect_errors(
            self.items,
            lambda item: len(tokenizer.prompt_ids(item.request.prompt, item.request.source)),
        )
        self._order = np.argsort(lengths, kind="stable").tolist()

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.items)

    def __getitem__(self, step: StepGroups) -> PromptBatch:
        """The batch of a step."""
        items = [self.items[self._order[place]] for place in step.indices]
        return PromptBatch(items, self.tokenizer, counted=step.counted)

    def sampler(self, prompts_per_batch: int, *, num_replicas: int, rank: int) -> GroupSampler:
        """Deals whole batches to processes, so that what is in them does not depend on how many."""
        return GroupSampler(
            # Each counts as one, and the limit is on their sum: a batch is cut before it is dealt.
            np.ones(len(self)),
            tokens_per_batch=prompts_per_batch,
            shuffle=False,
            seed=0,
            num_replicas=num_replicas,
            rank=rank,
        )
