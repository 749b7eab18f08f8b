"""Data set of prompts without responses, in batches for a model to answer."""

from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from mpo_lightning.batch import PromptBatch, PromptItem
from mpo_lightning.data.limits import prompts_within
from mpo_lightning.data.prompts import PromptSource
from mpo_lightning.data.sampler import GroupSampler, StepGroups
from mpo_lightning.data.tokens import GroupTokenizer

__all__ = ["PromptDataset"]


class PromptDataset(Dataset[PromptBatch]):
    """All prompts of some sources; indexed with the prompts of a step, it returns their batch.

    Prompts of similar length share a batch, so that there is little padding.

    Args:
        sources: checked sources of prompts.
        tokenizer: tokenizer with the rules of training.
        tokens: number of token ids of the model's embedding; None if it is unknown.

    Raises:
        DataError: for all prompts together that cannot be tokenised, or that hold a token beyond
            the embedding.
    """

    def __init__(
        self,
        sources: Sequence[PromptSource],
        tokenizer: GroupTokenizer,
        tokens: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        rows = [row for source in sources for row in source.rows(0, len(source))]
        self.items = [PromptItem(number, *row) for number, row in enumerate(rows)]
        prompts = prompts_within([item.request for item in self.items], tokenizer, tokens)
        self._order = np.argsort([len(ids) for ids in prompts], kind="stable").tolist()

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.items)

    def __getitem__(self, step: StepGroups) -> PromptBatch:
        """Return the batch of a step."""
        items = [self.items[self._order[index]] for index in step.indices]
        return PromptBatch(items, self.tokenizer, counted=step.counted)

    def sampler(self, prompts_per_batch: int, *, num_replicas: int, rank: int) -> GroupSampler:
        """Return a sampler whose batches do not depend on the number of processes."""
        return GroupSampler(
            # Each prompt counts as one token: batches are cut before they are distributed.
            np.ones(len(self)),
            tokens_per_batch=prompts_per_batch,
            shuffle=False,
            seed=0,
            num_replicas=num_replicas,
            rank=rank,
        )
