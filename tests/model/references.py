"""Reference caches of a reference that is quick to compute."""

import random
from pathlib import Path
from typing import Any

import torch

from mpo_lightning.batch import GroupBatch, TokenGroup
from mpo_lightning.model.reference_cache import ReferenceCache
from mpo_lightning.model.reference_fill import fill
from tests.conftest import random_groups

IDENTITY = {"weights": "ab" * 32, "config": "cd" * 32, "dtype": "float32", "model": "tiny"}
OTHER = {**IDENTITY, "attention": "eager"}
SHAPE = [(11, [3, 1, 9]), (4, [20, 2, 7, 5]), (17, [6, 6])]


def content_logps(batch: GroupBatch) -> torch.Tensor:
    """A reference that is quick: each value a function of the prompt's and response's ids alone."""
    result = torch.zeros(len(batch), batch.slots, dtype=torch.float64)
    for number in range(len(batch)):
        one = batch.select(number)
        prompt, *responses = one.tokens.double().split(
            [one.prompt_lengths[0], *one.response_lengths[0]]
        )
        for slot, ids in enumerate(responses):
            sine = (torch.cat([prompt, ids]) * torch.arange(1, len(prompt) + len(ids) + 1)).sin()
            result[number, slot] = -300 - sine.sum() - len(prompt) / 7
    return result


def responses_in(groups: list[TokenGroup]) -> int:
    return sum(len(group.responses) for group in groups)


def many_groups(count: int = 41) -> list[TokenGroup]:
    draw = random.Random(0)
    shape = [
        (draw.randint(1, 30), [draw.randint(1, 40) for _ in range(draw.randint(2, 6))])
        for _ in range(count)
    ]
    return random_groups(shape)


def filled(root: Path, groups: list[TokenGroup], **settings: Any) -> ReferenceCache:
    cache = ReferenceCache(root, IDENTITY, **settings)
    fill(cache, groups, content_logps, tokens_per_batch=200, description="Reference")
    return cache


def assert_complete(root: Path, groups: list[TokenGroup]) -> None:
    """What another process finds is what the reference gives."""
    batch = GroupBatch.from_groups(groups)
    found = ReferenceCache(root, IDENTITY).look_up(batch, torch.float64)
    assert torch.equal(found, content_logps(batch))


def shards(cache: ReferenceCache) -> list[Path]:
    return sorted(cache.folder.glob("responses-*.parquet"))


def changed_token(group: TokenGroup) -> TokenGroup:
    last = group.responses[0].clone()
    last[-1] += 1
    return group._replace(responses=(last, *group.responses[1:]))
