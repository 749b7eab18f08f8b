"""Filling of the reference cache before a run: compute the values that are missing."""

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from mpo_lightning.batch import GroupBatch, TokenGroup
from mpo_lightning.model.reference_cache import (
    Keys,
    ReferenceCache,
    ReferenceCacheError,
    response_keys,
)

__all__ = ["fill"]

# Batches of groups, each an index and the slots of its missing responses.
Plan = list[list[tuple[int, list[int]]]]


def fill(
    cache: ReferenceCache,
    groups: Sequence[TokenGroup],
    compute: Callable[[GroupBatch], Tensor],
    *,
    tokens_per_batch: int,
    rank: int = 0,
    world_size: int = 1,
    broadcast: Callable[[Plan], Plan] = lambda plan: plan,
    barrier: Callable[[], object] = lambda: None,
    description: str,
) -> int:
    """Compute the values that the cache lacks, with a progress bar; write them as they come.

    The next call continues an interrupted one. Every process calls ``compute`` equally often, as a
    sharded model requires: a process that has no batch left computes one again.

    Args:
        cache: this process's view of the cache.
        groups: the same groups in the same order on every process.
        compute: computes the log-probabilities of a batch, (B, N), nats.
        tokens_per_batch: prompts and responses together; a larger group is a batch by itself.
        rank: this process's number, from 0.
        world_size: number of processes.
        broadcast: returns the first process's argument on every process.
        barrier: waits until all processes have called it.
        description: label of the progress bar.

    Returns:
        Number of responses computed by all processes together.

    Raises:
        ReferenceCacheError: if a value is not finite or contradicts the cache, or if values that
            another process wrote cannot be seen here.
    """
    keys = response_keys(groups)
    plan: Plan = []
    if rank == 0:
        plan = _plan(_missing_slots(cache, groups, keys), groups, tokens_per_batch)
    plan = broadcast(plan)
    counts = [sum(len(slots) for _, slots in batch) for batch in plan]
    try:
        with tqdm(
            total=sum(counts), desc=description, unit=" responses", disable=rank > 0 or not plan
        ) as bar:
            for start in range(0, len(plan), world_size):
                own = start + rank < len(plan)
                # The last batch is the smallest.
                items = plan[start + rank] if own else plan[-1]
                batch = GroupBatch.from_groups([_part(groups[i], slots) for i, slots in items])
                logps = compute(batch)
                if own:
                    cache.add(batch, logps)
                bar.update(sum(counts[start : start + world_size]))
    finally:
        cache.flush()
    barrier()
    cache.reload()
    known = cache.known(keys)
    if not known.all():
        raise ReferenceCacheError(
            f"{cache.folder}: {np.sum(~known)} of {len(known)} responses are not here although "
            "every process has written its part. Set model.reference_cache to a folder that all "
            "nodes share."
        )
    return sum(counts)


def _missing_slots(
    cache: ReferenceCache, groups: Sequence[TokenGroup], keys: Keys
) -> dict[int, list[int]]:
    """Return the slots of unknown responses by index of the group, equal responses once."""
    unknown = np.flatnonzero(~cache.known(keys))
    _, first = np.unique(keys[unknown], return_index=True)
    counts = np.array([len(group.responses) for group in groups], dtype=np.int64)
    starts = np.cumsum(counts) - counts
    owners = np.repeat(np.arange(len(groups)), counts)
    slots: dict[int, list[int]] = {}
    for place in np.sort(unknown[first]).tolist():
        owner = int(owners[place])
        slots.setdefault(owner, []).append(place - int(starts[owner]))
    return slots


def _plan(slots: dict[int, list[int]], groups: Sequence[TokenGroup], tokens: int) -> Plan:
    """Return batches of similar size, the largest first, so that lack of memory shows at once."""

    def size(item: tuple[int, list[int]]) -> int:
        group = groups[item[0]]
        return len(group.prompt) + sum(len(group.responses[slot]) for slot in item[1])

    plan: Plan = []
    room = 0
    for item in sorted(slots.items(), key=size, reverse=True):
        if size(item) > room:
            plan.append([])
            room = max(tokens, size(item))
        plan[-1].append(item)
        room -= size(item)
    return plan


def _part(group: TokenGroup, slots: list[int]) -> TokenGroup:
    """Return a group with some of its responses."""
    places = group.indices or range(len(group.responses))
    return group._replace(
        responses=tuple(group.responses[slot] for slot in slots),
        scores=tuple(group.scores[slot] for slot in slots),
        indices=tuple(places[slot] for slot in slots),
    )
