"""The reference cache is filled once, by one process or several, killed ones included."""

import json
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from mpo_lightning.batch import GroupBatch, TokenGroup
from mpo_lightning.model.logps import response_logps
from mpo_lightning.model.reference_cache import ReferenceCache, ReferenceCacheError, response_keys
from mpo_lightning.model.reference_fill import fill
from tests.conftest import random_groups, tiny_model
from tests.model.references import (
    IDENTITY,
    SHAPE,
    assert_complete,
    changed_token,
    content_logps,
    filled,
    many_groups,
    responses_in,
    shards,
)
from tests.processes import Started


def test_values_of_a_model_are_those_computed_live(tmp_path: Path) -> None:
    model, groups = tiny_model(), many_groups(7)

    @torch.no_grad()
    def compute(batch: GroupBatch) -> torch.Tensor:
        return response_logps(model, batch, layout="shared")

    cache = ReferenceCache(tmp_path, IDENTITY)
    done = fill(cache, groups, compute, tokens_per_batch=150, description="Reference")
    assert done == responses_in(groups)
    batch = GroupBatch.from_groups(groups[::-1])
    torch.testing.assert_close(cache.look_up(batch), compute(batch), rtol=1e-5, atol=1e-4)


def test_unknown_responses_are_computed_and_each_content_once(tmp_path: Path) -> None:
    first, second, third = random_groups(SHAPE)
    cache = filled(tmp_path, [first])
    twice = third._replace(responses=(third.responses[0],) * 3, scores=(1.0, 2.0, 3.0))
    asked = []

    def compute(batch: GroupBatch) -> torch.Tensor:
        asked.extend(zip(batch.sources, batch.indices, strict=True))
        return content_logps(batch)

    known = [first, second._replace(responses=second.responses[:1], scores=(1.0,))]
    fill(cache, known, content_logps, tokens_per_batch=200, description="Reference")
    groups = [*known, second, second, twice]
    fill(cache, groups, compute, tokens_per_batch=200, description="Reference")
    assert sorted(asked) == [("random:2", [1, 2, 3]), ("random:3", [0])]
    assert_complete(tmp_path, groups)


def test_fill_computes_only_what_is_missing(tmp_path: Path) -> None:
    groups = many_groups()
    calls: list[GroupBatch] = []

    def compute(batch: GroupBatch) -> torch.Tensor:
        calls.append(batch)
        return content_logps(batch)

    def run(some: list[TokenGroup]) -> int:
        calls.clear()
        cache = ReferenceCache(tmp_path, IDENTITY)
        return fill(cache, some, compute, tokens_per_batch=150, description="Reference")

    assert run(groups[:20]) == responses_in(groups[:20])
    sizes = [len(batch.tokens) for batch in calls]
    assert all(n <= 150 or len(batch) == 1 for n, batch in zip(sizes, calls, strict=True))
    assert sum(sizes) == sum(len(g.prompt) + sum(map(len, g.responses)) for g in groups[:20])
    largest = [
        max(map(len, (batch.select(i).tokens for i in range(len(batch))))) for batch in calls
    ]
    assert largest == sorted(largest, reverse=True)
    # The others twice, the first again, and one response of a known group changed.
    more = [*groups, *groups[20:], changed_token(groups[0])]
    assert run(more) == responses_in(groups[20:]) + 1
    assert run(more) == 0
    assert calls == []
    assert_complete(tmp_path, more)


def test_shards_are_written_as_it_goes(tmp_path: Path) -> None:
    groups = many_groups()
    cache = filled(tmp_path / "count", groups, responses_per_shard=20)
    sizes = [pq.read_metadata(path).num_rows for path in shards(cache)]
    assert sum(sizes) == responses_in(groups)
    assert all(n < 20 + 30 for n in sizes)
    assert sum(n < 20 for n in sizes) <= 1
    cache = filled(tmp_path / "time", groups, seconds_per_shard=0)
    assert len(shards(cache)) > 10
    cache = filled(tmp_path / "end", groups)
    assert len(shards(cache)) == 1
    for name in ("count", "time", "end"):
        assert_complete(tmp_path / name, groups)


def test_progress_bar_counts_responses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    groups = many_groups(9)
    filled(tmp_path, groups)
    total = responses_in(groups)
    assert re.search(rf"Reference: 100%.* {total}/{total} .* responses/s", capsys.readouterr().err)
    filled(tmp_path, groups)
    assert capsys.readouterr().err == ""


def test_an_error_loses_nothing_that_was_computed(tmp_path: Path) -> None:
    groups = many_groups()
    calls = 0

    def compute(batch: GroupBatch) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise RuntimeError("out of memory")
        return content_logps(batch)

    cache = ReferenceCache(tmp_path, IDENTITY)
    with pytest.raises(RuntimeError, match="out of memory"):
        fill(cache, groups, compute, tokens_per_batch=200, description="Reference")
    known = len(ReferenceCache(tmp_path, IDENTITY))
    assert 0 < known == len(cache) < responses_in(groups)
    done = fill(
        ReferenceCache(tmp_path, IDENTITY), groups, compute, tokens_per_batch=200, description=""
    )
    assert done == responses_in(groups) - known
    assert_complete(tmp_path, groups)


def test_a_folder_that_is_not_shared_is_refused(tmp_path: Path) -> None:
    """Two ranks on two nodes, one after the other, each with a folder of its own."""
    groups = many_groups()
    plans: list[list[Any]] = []

    def first(plan: list[Any]) -> list[Any]:
        plans.append(plan)
        return plan

    for rank, broadcast in enumerate((first, lambda _: plans[0])):
        cache = ReferenceCache(tmp_path / f"node{rank}", IDENTITY)
        with pytest.raises(ReferenceCacheError, match=rf"{cache.folder}: .* all nodes share"):
            fill(
                cache,
                groups,
                content_logps,
                tokens_per_batch=200,
                rank=rank,
                world_size=2,
                broadcast=broadcast,
                description="Reference",
            )
    # All known to the first one: the second has nothing to do, and still lacks it.
    cache = ReferenceCache(tmp_path / "node2", IDENTITY)
    with pytest.raises(ReferenceCacheError, match="all nodes share"):
        fill(
            cache,
            groups,
            content_logps,
            tokens_per_batch=200,
            rank=1,
            world_size=2,
            broadcast=lambda _: [],
            description="Reference",
        )


def computed(out: Path, rank: int) -> list[list[str]]:
    """The keys of each batch that a process was asked for."""
    lines = (out / f"rank{rank}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def content_names(batch: GroupBatch) -> list[str]:
    return [repr(value) for value in content_logps(batch)[batch.valid].tolist()]


def worker(root: Path, out: Path, seconds: float, rank: int, world_size: int) -> None:
    """A process that fills the cache, each batch a collective and so many seconds long."""
    distributed = torch.distributed
    if world_size > 1:
        distributed.init_process_group(
            "gloo", init_method=f"file://{out}/meet", rank=rank, world_size=world_size
        )

    def compute(batch: GroupBatch) -> torch.Tensor:
        with (out / f"rank{rank}.jsonl").open("a", encoding="utf-8") as log:
            print(json.dumps(content_names(batch)), file=log)
        if world_size > 1:
            distributed.all_reduce(torch.zeros(1))
        time.sleep(seconds)
        return content_logps(batch)

    def broadcast(plan: list[Any]) -> list[Any]:
        box = [plan if rank == 0 else None]
        distributed.broadcast_object_list(box)
        assert box[0] is not None
        return box[0]

    cache = ReferenceCache(root, IDENTITY, responses_per_shard=8)
    alone = {} if world_size == 1 else {"broadcast": broadcast, "barrier": distributed.barrier}
    fill(
        cache,
        many_groups(),
        compute,
        tokens_per_batch=200,
        rank=rank,
        world_size=world_size,
        description="Reference",
        **alone,
    )
    if world_size > 1:
        distributed.destroy_process_group()


def test_a_killed_process_is_taken_up_where_its_last_shard_ends(tmp_path: Path) -> None:
    groups, root = many_groups(), tmp_path / "cache"
    started = Started(worker, [root, tmp_path, 0.1, 0, 1])
    (killed,) = started.processes
    deadline = time.monotonic() + 120
    while len(list(root.glob("*/responses-*.parquet"))) < 3:
        assert killed.exitcode is None, started.finish().stderr
        assert time.monotonic() < deadline
        time.sleep(0.02)
    killed.kill()
    assert started.finish().returncode == -signal.SIGKILL
    (tmp_path / "rank0.jsonl").rename(tmp_path / "first.jsonl")

    cache = ReferenceCache(root, IDENTITY)
    known = len(cache)
    assert 24 <= known < responses_in(groups)
    names = zip(
        content_names(GroupBatch.from_groups(groups)),
        cache.known(response_keys(groups)),
        strict=True,
    )
    unknown = [name for name, found in names if not found]
    assert len(unknown) == responses_in(groups) - known
    worker(root, tmp_path, 0, 0, 1)
    assert sorted(name for batch in computed(tmp_path, 0) for name in batch) == sorted(unknown)
    assert_complete(root, groups)


@pytest.mark.parametrize("size", [2, 3, 5, 40])
def test_every_process_computes_equally_often(tmp_path: Path, size: int) -> None:
    """Threads stand for processes; whoever computes alone breaks the barrier."""
    groups = many_groups()
    together = threading.Barrier(size)
    plans: list[Any] = []
    calls: list[list[list[str]]] = [[] for _ in range(size)]

    def run(rank: int) -> int:
        def broadcast(plan: list[Any]) -> list[Any]:
            if rank == 0:
                plans.append(plan)
            together.wait(20)
            return plans[0]

        def compute(batch: GroupBatch) -> torch.Tensor:
            together.wait(20)
            calls[rank].append(content_names(batch))
            return content_logps(batch)

        return fill(
            ReferenceCache(tmp_path, IDENTITY),
            groups,
            compute,
            tokens_per_batch=200,
            rank=rank,
            world_size=size,
            broadcast=broadcast,
            barrier=lambda: together.wait(20),
            description="Reference",
        )

    with ThreadPoolExecutor(size) as pool:
        assert list(pool.map(run, range(size))) == [responses_in(groups)] * size
    assert len({len(batches) for batches in calls}) == 1
    batches = [tuple(batch) for own in calls for batch in own]
    if size != 3:
        assert 0 < len(batches) - len(set(batches)) < size, "the end is even"
    assert sum(map(len, set(batches))) == responses_in(groups)
    assert_complete(tmp_path, groups)
    stored = [pq.read_metadata(path).num_rows for path in tmp_path.glob("*/responses-*")]
    assert sum(stored) == responses_in(groups), "a repeated batch was stored"


def test_two_processes_fill_one_cache(tmp_path: Path) -> None:
    root, groups = tmp_path / "cache", many_groups()
    processes = [Started(worker, [root, tmp_path, 0, rank, 2]) for rank in range(2)]
    for started in processes:
        result = started.finish()
        assert result.returncode == 0, result.stderr
    first, second = (computed(tmp_path, rank) for rank in range(2))
    assert len(first) == len(second)
    names = {name for batch in first + second for name in batch}
    assert len(names) == responses_in(groups)
    assert first[-1] == second[-1], "the end is even"
    assert_complete(root, groups)
    assert not list(root.glob("*/.*"))


def test_independent_processes_may_fill_one_cache_at_once(tmp_path: Path) -> None:
    root, groups = tmp_path / "cache", many_groups()
    outs = [tmp_path / "a", tmp_path / "b"]
    for out in outs:
        out.mkdir()
    for started in [Started(worker, [root, out, 0.01, 0, 1]) for out in outs]:
        result = started.finish()
        assert result.returncode == 0, result.stderr
    assert_complete(root, groups)
