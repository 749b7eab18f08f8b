"""Which groups a process sees, step by step."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.utils.data import DistributedSampler

__all__ = ["GroupSampler", "StepGroups"]


class StepGroups(NamedTuple):
    """The groups of one step on one process.

    Attributes:
        indices: positions in the data set.
        counted: False at an uneven end, where this process has no group of its own left and borrows
            one only to stay in step with the others.
    """

    indices: list[int]
    counted: bool


class GroupSampler(DistributedSampler[StepGroups]):
    """Deals whole groups to processes: every group exactly once an epoch, in equally many steps.

    A step of all processes together takes ``groups_per_batch * num_replicas`` consecutive groups
    of the epoch's order, whatever the number of processes, so that what an optimizer step averages
    over does not depend on it. The last step may hold fewer groups, also on some processes only.

    It is a DistributedSampler so that Lightning takes it as it is and calls ``set_epoch``; it
    yields batches, for a DataLoader with ``batch_size=None``.

    Args:
        num_groups: groups in the data set.
        groups_per_batch: groups of a step on one process.
        shuffle: draw a new order each epoch, from seed and epoch.
        seed: seed of the order.
        num_replicas: processes that share the data.
        rank: which of them this is.
    """

    def __init__(
        self,
        num_groups: int,
        groups_per_batch: int,
        *,
        shuffle: bool,
        seed: int,
        num_replicas: int,
        rank: int,
    ) -> None:
        # DistributedSampler's own initialisation plans single indices; only its interface is used.
        self.num_groups = num_groups
        self.groups_per_batch = groups_per_batch
        self.shuffle = shuffle
        self.seed = seed
        self.num_replicas = num_replicas
        self.rank = rank
        self.epoch = 0
        # Steps that the next walk leaves out: those a resumed epoch has behind it.
        self.skip = 0

    def __len__(self) -> int:
        """Steps in an epoch, the same on every process."""
        return math.ceil(self.num_groups / (self.groups_per_batch * self.num_replicas))

    def __iter__(self) -> Iterator[StepGroups]:
        """The steps of the epoch."""
        skip, self.skip = self.skip, 0
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(self.num_groups, generator=generator).tolist()
        else:
            order = list(range(self.num_groups))
        stride = self.groups_per_batch * self.num_replicas
        for start in range(skip * stride, self.num_groups, stride):
            step = order[start : start + stride]
            own = step[self.rank :: self.num_replicas]
            yield StepGroups(own or step[:1], counted=bool(own))
