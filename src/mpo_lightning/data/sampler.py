"""Distribution of groups over steps and processes."""

import math
from collections.abc import Iterator
from functools import cached_property
from heapq import heapify, heappop, heappush
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch.utils.data import DistributedSampler, SequentialSampler

__all__ = ["GroupSampler", "StepGroups"]


class StepGroups(NamedTuple):
    """The groups of one step on one process.

    Attributes:
        indices: positions in the data set.
        counted: False at an uneven end, where this process has no group of its own left and repeats
            one only to stay in step with the others.
    """

    indices: list[int]
    counted: bool


class GroupSampler(DistributedSampler[StepGroups], SequentialSampler):
    """Sampler of whole groups: each exactly once per epoch, in as many steps on every process.

    Without a limit on tokens, all processes together take ``groups_per_batch * num_replicas``
    consecutive groups of the epoch's order per step, so that the average of an optimizer step does
    not depend on how many processes share it. The last step may have fewer groups, also on some
    processes only.

    With a limit, a batch takes groups of similar size while they fit, and a group beyond the limit
    is a batch of its own; the batches of a step have similar numbers of tokens on all processes.
    Without ``shuffle`` the order of the groups is kept instead, within and between batches.

    It derives from DistributedSampler so that Lightning does not replace it and calls
    ``set_epoch``, and from SequentialSampler so that ``overfit_batches`` leaves it; it yields
    batches, for a DataLoader with ``batch_size=None``.

    Args:
        sizes: tokens of each group of the data set: its prompt once, and its responses.
        groups_per_batch: limit on the groups of a step on one process. Defaults to none.
        tokens_per_batch: limit on the tokens of a step on one process. Defaults to none.
        shuffle: whether to draw a new order each epoch, from seed and epoch.
        seed: seed of the order.
        num_replicas: number of processes that share the data.
        rank: number of this process.
    """

    def __init__(
        self,
        sizes: ArrayLike,
        *,
        groups_per_batch: int | None = None,
        tokens_per_batch: int | None = None,
        shuffle: bool,
        seed: int,
        num_replicas: int,
        rank: int,
    ) -> None:
        # DistributedSampler.__init__ is for samplers of single indices; only its type is needed.
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.groups_per_batch = len(self.sizes) if groups_per_batch is None else groups_per_batch
        self.tokens_per_batch = tokens_per_batch
        self.shuffle = shuffle
        self.seed = seed
        self.num_replicas = num_replicas
        self.rank = rank
        self.epoch = 0
        # Steps that the next iteration skips: those done before an epoch was resumed.
        self.skip = 0

    def __len__(self) -> int:
        """Number of steps in an epoch, the same on every process and in every epoch."""
        if self.tokens_per_batch is not None:
            return len(self._plan)
        return math.ceil(len(self.sizes) / (self.groups_per_batch * self.num_replicas))

    def __iter__(self) -> Iterator[StepGroups]:  # type: ignore[override]
        """Yield the steps of the epoch."""
        skip, self.skip = self.skip, 0
        for step in self._steps()[skip:]:
            own = step[self.rank] if self.rank < len(step) else []
            yield StepGroups(own or step[0][:1], counted=bool(own))

    def _steps(self) -> list[list[list[int]]]:
        """Return the epoch's steps, each a batch per process; some have none at an uneven end."""
        seed = self.seed + self.epoch
        if self.tokens_per_batch is not None:
            return [self._plan[number] for number in self._order(len(self._plan), seed)]
        order = self._order(len(self.sizes), seed)
        processes = self.num_replicas
        stride = self.groups_per_batch * processes
        steps = (order[start : start + stride] for start in range(0, len(order), stride))
        return [[step[rank::processes] for rank in range(processes)] for step in steps]

    def _order(self, count: int, seed: int) -> list[int]:
        if not self.shuffle:
            return list(range(count))
        generator = torch.Generator().manual_seed(seed)
        order: list[int] = torch.randperm(count, generator=generator).tolist()
        return order

    # From the seed alone: batches that are cut anew each epoch could make another number of steps,
    # which Lightning asks for once. The epoch decides the order of the steps.
    @cached_property
    def _plan(self) -> list[list[list[int]]]:
        """Steps under a limit on tokens, each a batch per process."""
        order = self._order(len(self.sizes), self.seed)
        if self.shuffle:
            # Sizes within a tenth of each other count as equal and keep their random order.
            classes = (10 * np.log(self.sizes)).astype(np.int64)
            order = [order[place] for place in np.argsort(classes[order], kind="stable").tolist()]
        batches = self._cut(order)
        if self.shuffle:
            batches = self._even(batches)
        starts = range(0, len(batches), self.num_replicas)
        return [batches[start : start + self.num_replicas] for start in starts]

    def _cut(self, order: list[int]) -> list[list[int]]:
        """Cut the order into batches, each as long as the limits allow."""
        assert self.tokens_per_batch is not None
        batches: list[list[int]] = []
        room = 0
        for index, size in zip(order, self.sizes[order].tolist(), strict=True):
            room -= size
            if not batches or room < 0 or len(batches[-1]) == self.groups_per_batch:
                batches.append([])
                room = self.tokens_per_batch - size
            batches[-1].append(index)
        return batches

    def _even(self, batches: list[list[int]]) -> list[list[int]]:
        """Sort batches by tokens; split the largest until every process has one in each step."""

        def tokens(batch: list[int]) -> int:
            return int(self.sizes[batch].sum())

        def entry(batch: list[int]) -> tuple[int, list[int]]:
            # The heap's smallest entry is split first; a single group cannot be split.
            return -tokens(batch) if len(batch) > 1 else 0, batch

        heap = [entry(batch) for batch in batches]
        heapify(heap)
        while len(heap) % self.num_replicas and len(heap[0][1]) > 1:
            _, batch = heappop(heap)
            heappush(heap, entry(batch[::2]))
            heappush(heap, entry(batch[1::2]))
        return sorted((batch for _, batch in heap), key=tokens, reverse=True)
