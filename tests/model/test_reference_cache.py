"""The reference cache on real files and with real processes.

As a script, ``python test_reference.py ROOT OUT SECONDS RANK WORLD_SIZE``, it is such a process.
"""

import json
import random
import re
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mpo_lightning.batch import GroupBatch, TokenGroup
from mpo_lightning.model.logps import response_logps
from mpo_lightning.model.reference_cache import (
    ReferenceCache,
    ReferenceCacheError,
    clear,
    default_root,
    fill,
    inspect,
)
from tests.conftest import random_groups, tiny_model
from tests.processes import Started

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


# ------------------------------------------------------------------------------------ look-up


def test_values_come_back_from_memory_and_from_disk(tmp_path: Path) -> None:
    batch = GroupBatch.from_groups(random_groups(SHAPE))
    logps = content_logps(batch)
    cache = ReferenceCache(tmp_path, IDENTITY)
    cache.add(batch, logps)
    assert shards(cache) == []
    assert torch.equal(cache.look_up(batch, torch.float64), logps)
    cache.flush()
    assert len(shards(cache)) == 1
    assert torch.equal(cache.look_up(batch, torch.float64), logps)
    again = ReferenceCache(tmp_path, IDENTITY)
    assert again.folder == cache.folder
    assert len(again) == len(cache) == 9
    assert torch.equal(again.look_up(batch, torch.float64), logps)
    assert (again.look_up(batch, torch.float64)[~batch.valid] == 0).all()
    rounded = again.look_up(batch)
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, logps.float())
    again.flush()
    assert len(shards(cache)) == 1, "nothing waits, nothing is written"


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


def test_shards_are_plain_parquet_with_page_checksums(tmp_path: Path) -> None:
    cache = filled(tmp_path, random_groups(SHAPE))
    table = pq.read_table(shards(cache)[0], page_checksum_verification=True)
    assert table.column_names == ["key", "logp"]
    assert table.schema.types == [pa.binary(16), pa.float64()]
    assert table.num_rows == 9
    assert table.schema.metadata[b"identity"].decode().startswith(cache.folder.name)
    description = json.loads((cache.folder / "cache.json").read_text(encoding="utf-8"))
    assert description["identity"] == IDENTITY


def test_a_response_is_found_by_content_wherever_it_stands(tmp_path: Path) -> None:
    groups = random_groups(SHAPE)
    filled(tmp_path, groups)
    moved = [
        TokenGroup(
            prompt=group.prompt.int(),
            responses=group.responses[::-1],
            scores=tuple(-score for score in group.scores),
            source=f"elsewhere:{number}",
            extra={"other": 1},
            indices=tuple(range(10, 10 + len(group.responses))),
        )
        for number, group in enumerate(groups[::-1])
    ]
    assert ReferenceCache(tmp_path, IDENTITY).missing(moved) == []
    assert_complete(tmp_path, moved)


def changed_token(group: TokenGroup) -> TokenGroup:
    last = group.responses[0].clone()
    last[-1] += 1
    return group._replace(responses=(last, *group.responses[1:]))


def changed_prompt(group: TokenGroup) -> TokenGroup:
    prompt = group.prompt.clone()
    prompt[0] += 1
    return group._replace(prompt=prompt, responses=group.responses[:1], scores=group.scores[:1])


def moved_boundary(group: TokenGroup) -> TokenGroup:
    prompt, first = group.prompt, group.responses[0]
    return group._replace(
        prompt=torch.cat([prompt, first[:1]]), responses=(first[1:],), scores=group.scores[:1]
    )


def moved_between_responses(group: TokenGroup) -> TokenGroup:
    """The flat row is the same."""
    first, second, third = group.responses
    return group._replace(responses=(first, second[:-1], torch.cat([second[-1:], third])))


@pytest.mark.parametrize(
    ("change", "slots"),
    [
        (changed_token, [0]),
        (changed_prompt, [0]),
        (moved_boundary, [0]),
        (moved_between_responses, [1, 2]),
    ],
)
def test_other_content_is_not_found(
    tmp_path: Path, change: Callable[[TokenGroup], TokenGroup], slots: list[int]
) -> None:
    (group,) = random_groups([(5, [4, 3, 2])])
    cache = filled(tmp_path, [group])
    other = change(group)._replace(source="changed:3", indices=(2, 5, 7))
    (part,) = cache.missing([other])
    assert part.indices == tuple(other.indices[slot] for slot in slots)
    assert part.scores == tuple(other.scores[slot] for slot in slots)
    assert all(
        torch.equal(a, other.responses[b]) for a, b in zip(part.responses, slots, strict=True)
    )
    with pytest.raises(ReferenceCacheError, match=rf"^changed:3: response {part.indices[0]} "):
        cache.look_up(GroupBatch.from_groups([other]))


def test_missing_response_is_named_by_its_place_in_the_row(tmp_path: Path) -> None:
    first, second = random_groups([(5, [4, 3]), (6, [2, 8, 3])])
    cache = filled(
        tmp_path, [first, second._replace(responses=second.responses[:2], scores=(1, 2))]
    )
    batch = GroupBatch.from_groups([first, second._replace(indices=(0, 4, 7))])
    with pytest.raises(ReferenceCacheError, match=r"^random:2: response 7 .*start the run again"):
        cache.look_up(batch)


def test_missing_keeps_what_is_unknown_and_each_content_once(tmp_path: Path) -> None:
    first, second, third = random_groups(SHAPE)
    cache = filled(tmp_path, [first])
    twice = third._replace(responses=(third.responses[0],) * 3, scores=(1.0, 2.0, 3.0))
    parts = cache.missing([first, second, second, twice])
    assert [(part.source, part.indices) for part in parts] == [
        ("random:2", (0, 1, 2, 3)),
        ("random:3", (0,)),
    ]
    assert ReferenceCache(tmp_path, OTHER).missing([first])[0].indices == (0, 1, 2)


def test_each_identity_has_its_own_folder(tmp_path: Path) -> None:
    groups = random_groups(SHAPE)
    cache = filled(tmp_path, groups)
    reordered = ReferenceCache(tmp_path, dict(reversed(IDENTITY.items())))
    other = ReferenceCache(tmp_path, OTHER)
    assert re.fullmatch(r"[0-9a-f]{16}", cache.folder.name)
    assert reordered.folder == cache.folder != other.folder
    assert cache.folder.parent == tmp_path
    assert len(reordered) == 9
    assert len(other) == 0


def test_keys_that_end_in_zero_bytes_are_whole(tmp_path: Path) -> None:
    """NumPy drops them from a single value; 1 of 256 keys ends so."""
    groups = random_groups([(2, [1] * 100)] * 30)
    cache = filled(tmp_path, groups)
    keys = pq.read_table(shards(cache)[0])["key"].to_pylist()
    assert any(key.endswith(b"\0") for key in keys)
    assert_complete(tmp_path, groups)


def test_a_million_responses_take_little_memory(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path, IDENTITY)
    digest = b"identity", pq_identity(cache)
    generator = np.random.default_rng(0)
    for number in range(10):
        keys = np.sort(np.frombuffer(generator.bytes(1_600_000), "S16"))
        write_shard(cache, f"{number:032x}", keys.tobytes(), np.full(100_000, -1.5), digest)
    again = ReferenceCache(tmp_path, IDENTITY)
    assert len(again) == 1_000_000
    assert again._keys.nbytes + again._values.nbytes == 24_000_000
    assert again._find(keys)[1].all()


def test_several_openers_find_each_other(tmp_path: Path) -> None:
    first, second = random_groups(SHAPE)[:2]
    one, two = ReferenceCache(tmp_path, IDENTITY), ReferenceCache(tmp_path, IDENTITY)
    batch = GroupBatch.from_groups([first])
    one.add(batch, content_logps(batch))
    one.flush()
    assert two.missing([first]) != []
    two.add(GroupBatch.from_groups([second]), content_logps(GroupBatch.from_groups([second])))
    two.reload()
    assert len(two) == 7
    one.reload()
    assert one.missing([first, second]) == []
    assert len(shards(one)) == 2
    # Each shard is read once.
    for path in shards(one):
        path.write_bytes(b"")
    one.reload()
    two.reload()


def test_a_shard_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ReferenceCache(tmp_path, IDENTITY)
    batch = GroupBatch.from_groups(random_groups(SHAPE))
    cache.add(batch, content_logps(batch))
    visible = []
    monkeypatch.setattr("os.fsync", lambda _: visible.append(shards(cache)))
    cache.flush()
    assert visible == [[]]
    assert len(shards(cache)) == 1


# --------------------------------------------------------------------------------------- fill


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
    unknown = [
        name for g in cache.missing(groups) for name in content_names(GroupBatch.from_groups([g]))
    ]
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


# ------------------------------------------------------------------------------------ refusal


def pq_identity(cache: ReferenceCache) -> bytes:
    return cache._digest.encode()


def write_shard(
    cache: ReferenceCache,
    name: str,
    keys: bytes,
    values: Any,
    *metadata: tuple[bytes, bytes],
    columns: tuple[str, str] = ("key", "logp"),
) -> Path:
    """A shard made by hand."""
    count = len(keys) // 16
    key_column = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(16), count, [None, pa.py_buffer(keys)]
    )
    schema = pa.schema(
        [
            pa.field(columns[0], pa.binary(16), nullable=False),
            pa.field(columns[1], pa.float64(), nullable=False),
        ],
        metadata={
            b"format": b"mpo-lightning reference log-probabilities",
            b"version": b"1",
            b"identity": pq_identity(cache),
            **dict(metadata),
        },
    )
    path = cache.folder / f"responses-{name}.parquet"
    table = pa.table([key_column, pa.array(values, pa.float64())], schema=schema)
    pq.write_table(table, path, write_page_checksum=True)
    return path


KEY = bytes(range(16))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"metadata": [(b"version", b"2")]}, "its version is 2"),
        ({"metadata": [(b"format", b"weather")]}, "its format is weather"),
        ({"metadata": [(b"identity", b"\xff" * 32)]}, "its identity is"),
        ({"columns": ("key", "value")}, "its columns are"),
        ({"values": [float("nan")]}, "it holds a value that is not a number"),
        ({"values": [float("-inf")]}, "it holds a value that is not a number"),
        ({}, None),
    ],
    ids=str,
)
def test_a_shard_made_otherwise_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], found: str | None
) -> None:
    cache = ReferenceCache(tmp_path, IDENTITY)
    settings = {"values": [-1.5], "metadata": [], **change}
    path = write_shard(
        cache, "0" * 32, KEY, settings.pop("values"), *settings.pop("metadata"), **settings
    )
    if found is None:
        assert len(ReferenceCache(tmp_path, IDENTITY)) == 1
        return
    with pytest.raises(ReferenceCacheError, match=rf"{path}: {found}") as refused:
        ReferenceCache(tmp_path, IDENTITY)
    assert f"mpo-lightning cache clear {tmp_path} --name {cache.folder.name}" in str(refused.value)
    # A process that had opened the cache before does not take it either.
    with pytest.raises(ReferenceCacheError, match=str(path)):
        cache.reload()


def test_a_shard_copied_from_another_cache_is_refused(tmp_path: Path) -> None:
    groups = random_groups(SHAPE)
    cache, other = filled(tmp_path, groups), ReferenceCache(tmp_path, OTHER)
    path = other.folder / shards(cache)[0].name
    path.write_bytes(shards(cache)[0].read_bytes())
    with pytest.raises(ReferenceCacheError, match=rf"{path}: its identity is .* belongs elsewhere"):
        ReferenceCache(tmp_path, OTHER)


@pytest.mark.parametrize("length", [0, 3, 100, 0.5, -8, -1])
def test_a_truncated_shard_is_refused(tmp_path: Path, length: float) -> None:
    cache = filled(tmp_path, random_groups(SHAPE))
    (path,) = shards(cache)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * length) if length == 0.5 else int(length)])
    with pytest.raises(ReferenceCacheError, match=rf"{path}: truncated, damaged"):
        ReferenceCache(tmp_path, IDENTITY)


def test_a_flipped_byte_is_refused_or_harmless(tmp_path: Path) -> None:
    """Each byte of the file in turn: whatever is read afterwards is what was written."""
    batch = GroupBatch.from_groups(random_groups(SHAPE))
    cache = filled(tmp_path, random_groups(SHAPE))
    (path,) = shards(cache)
    data = path.read_bytes()
    stored = pq.read_table(path)
    sensitive = [
        data.index(stored[name].chunk(0).buffers()[1].to_pybytes()) for name in stored.schema.names
    ]
    refused = set()
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            found = ReferenceCache(tmp_path, IDENTITY).look_up(batch, torch.float64)
        except ReferenceCacheError:
            refused.add(place)
        else:
            assert torch.equal(found, content_logps(batch)), place
    for start, size in zip(sensitive, (9 * 16, 9 * 8), strict=True):
        assert refused.issuperset(range(start, start + size))


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (None, r"no such file"),
        ("", r"cannot be read"),
        ('{"format": "mpo-lightning ref', r"cannot be read"),
        ("[]", r"not the description of a reference cache"),
        ({"format": "weather"}, r"not the description of a reference cache"),
        ({"version": 2}, r"version 2, this is version 1"),
        ({"identity": None}, r"version 1"),
        ({"identity": {**IDENTITY, "dtype": "bfloat16"}}, r"another reference; dtype differ"),
        ({"identity": OTHER}, r"another reference; attention differ"),
    ],
    ids=str,
)
def test_a_wrong_description_is_refused(
    tmp_path: Path, content: str | dict[str, Any] | None, found: str
) -> None:
    path = filled(tmp_path, random_groups(SHAPE)).folder / "cache.json"
    if content is None:
        path.unlink()
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    else:
        path.write_text(
            json.dumps({**json.loads(path.read_text(encoding="utf-8")), **content}),
            encoding="utf-8",
        )
    with pytest.raises(ReferenceCacheError, match=rf"{path}: .*{found}"):
        ReferenceCache(tmp_path, IDENTITY)
    (info,) = inspect(tmp_path)
    assert info.problem is not None
    assert str(path.parent) in info.problem


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    folder = ReferenceCache(tmp_path, IDENTITY).folder
    (folder / "cache.json").unlink()
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ReferenceCacheError, match=str(folder)):
        ReferenceCache(tmp_path, IDENTITY)
    assert sorted(p.name for p in folder.iterdir()) == ["notes.txt"]
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ReferenceCacheError, match=rf"{tmp_path}/file.*model.reference_cache"):
        ReferenceCache(tmp_path / "file", IDENTITY)


def test_what_killed_writers_left_is_ignored_and_kept(tmp_path: Path) -> None:
    groups = random_groups(SHAPE)
    cache = filled(tmp_path, groups)
    partial = cache.folder / f".{'0' * 32}.partial"
    partial.write_bytes(shards(cache)[0].read_bytes()[:50])
    assert_complete(tmp_path, groups)
    # Killed before cache.json was written: a new process takes the folder over.
    other = tmp_path / ReferenceCache(tmp_path, OTHER).folder.name
    (other / "cache.json").rename(other / f".{'1' * 32}.partial")
    assert len(ReferenceCache(tmp_path, OTHER)) == 0
    assert partial.exists()
    assert (other / f".{'1' * 32}.partial").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_values_for_one_response_are_refused(tmp_path: Path, dtype: str) -> None:
    identity = {**IDENTITY, "dtype": dtype}
    batch = GroupBatch.from_groups(random_groups([(5, [4, 3])]))
    logps = content_logps(batch)
    rounding = {"float32": 1e-3, "bfloat16": 2e-2}[dtype]

    def write(factor: float) -> ReferenceCache:
        """As a process that has seen nothing of the others."""
        cache = ReferenceCache(tmp_path, identity)
        folder = cache.folder.rename(tmp_path / "aside")
        cache = ReferenceCache(tmp_path, identity)
        cache.add(batch, logps * factor)
        cache.flush()
        for path in folder.glob("responses-*"):
            path.rename(cache.folder / path.name)
        clear(tmp_path, "aside")
        return cache

    write(1.0)
    write(1.0)
    write(1 + rounding)
    seen = ReferenceCache(tmp_path, identity)
    assert len(seen) == 2
    # The lower one, in whatever order they were read.
    expected = logps * (1 + rounding)
    assert torch.equal(seen.look_up(batch, torch.float64), expected)
    first = write(1 - rounding)
    first.reload()
    assert torch.equal(first.look_up(batch, torch.float64), expected)

    # A value that contradicts what is known is never written.
    wrong = logps * (1 + 10 * rounding)
    with pytest.raises(ReferenceCacheError, match=r"^random:1: .* response 0 .* holds -"):
        seen.add(batch, wrong)
    seen.flush()
    assert len(shards(seen)) == 4
    last = write(1 + 10 * rounding)
    for refuse in (last.reload, lambda: ReferenceCache(tmp_path, identity)):
        with pytest.raises(ReferenceCacheError, match=rf"{last.folder}: two shards .*different"):
            refuse()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_no_number_is_not_taken(tmp_path: Path, value: float) -> None:
    batch = GroupBatch.from_groups(random_groups(SHAPE))
    cache = ReferenceCache(tmp_path, IDENTITY)
    logps = content_logps(batch)
    logps[~batch.valid] = value
    cache.add(batch, logps)
    logps[1, 2] = value
    with pytest.raises(ReferenceCacheError, match=rf"^random:2: .* response 2 .* of {value}"):
        ReferenceCache(tmp_path, OTHER).add(batch, logps)
    assert len(cache) == 9


# -------------------------------------------------------------------------- inspect and clear


def test_inspect_lists_every_cache(tmp_path: Path) -> None:
    assert inspect(tmp_path / "nothing") == []
    groups = random_groups(SHAPE)
    cache, other = filled(tmp_path, groups, seconds_per_shard=0), ReferenceCache(tmp_path, OTHER)
    (tmp_path / "file").write_text("", encoding="utf-8")
    found = {info.folder: info for info in inspect(tmp_path)}
    assert set(found) == {cache.folder, other.folder}
    info = found[cache.folder]
    assert (info.responses, info.shards, info.identity, info.problem) == (9, 1, IDENTITY, None)
    assert info.bytes == sum(path.stat().st_size for path in cache.folder.iterdir())
    assert (found[other.folder].responses, found[other.folder].problem) == (0, None)

    shards(cache)[0].write_bytes(b"PAR1")
    renamed = other.folder.rename(tmp_path / "backup")
    (tmp_path / "photos").mkdir()
    found = {info.folder: info for info in inspect(tmp_path)}
    assert found[cache.folder].responses is None
    assert str(shards(cache)[0]) in str(found[cache.folder].problem)
    assert "of another reference" in str(found[renamed].problem)
    assert "no such file" in str(found[tmp_path / "photos"].problem)


def test_clear_removes_one_or_all(tmp_path: Path) -> None:
    assert clear(tmp_path / "nothing") == []
    cache, other = filled(tmp_path, random_groups(SHAPE)), ReferenceCache(tmp_path, OTHER)
    (cache.folder / f".{'0' * 32}.partial").write_bytes(b"")
    with pytest.raises(
        ReferenceCacheError, match=rf"no cache named x; found .*{other.folder.name}"
    ):
        clear(tmp_path, "x")
    with pytest.raises(ReferenceCacheError, match="no cache named"):
        clear(tmp_path / "sub", f"../{other.folder.name}")
    assert clear(tmp_path, cache.folder.name) == [cache.folder]
    assert sorted(tmp_path.iterdir()) == [other.folder]
    again = filled(tmp_path, random_groups(SHAPE))
    assert sorted(clear(tmp_path)) == sorted([again.folder, other.folder])
    assert sorted(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", '{"format": "mpo-light', None, "version"])
def test_clear_removes_damaged_caches(tmp_path: Path, content: str | None) -> None:
    cache = filled(tmp_path, random_groups(SHAPE))
    path = cache.folder / "cache.json"
    if content is None:
        path.unlink()
    elif content == "version":
        path.write_text(path.read_text().replace('"version": 1', '"version": 7'))
    else:
        path.write_text(content)
    shards(cache)[0].write_bytes(b"")
    assert clear(tmp_path) == [cache.folder]
    assert not cache.folder.exists()


@pytest.mark.parametrize("content", ["photos", "own file", "folder", "other format"])
def test_clear_refuses_what_is_no_cache(tmp_path: Path, content: str) -> None:
    groups = random_groups(SHAPE)
    cache = filled(tmp_path, groups)
    folder = filled(tmp_path, groups).folder if content != "photos" else tmp_path / "photos"
    folder.mkdir(exist_ok=True)
    if content == "folder":
        (folder / f"responses-{'0' * 32}.parquet").mkdir()
    elif content == "other format":
        (folder / "cache.json").write_text('{"format": "weather"}', encoding="utf-8")
    elif content == "own file":
        (folder / "responses-mine.parquet").write_bytes(b"")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ReferenceCacheError, match=rf"{folder}: not a reference cache"):
        clear(tmp_path)
    with pytest.raises(ReferenceCacheError, match="Nothing was removed"):
        clear(tmp_path, folder.name)
    assert sorted(tmp_path.rglob("*")) == before
    assert cache.folder.exists()


def test_a_cache_that_is_cleared_while_in_use_says_so(tmp_path: Path) -> None:
    batch = GroupBatch.from_groups(random_groups(SHAPE))
    cache = ReferenceCache(tmp_path, IDENTITY)
    clear(tmp_path)
    cache.add(batch, content_logps(batch))
    with pytest.raises(ReferenceCacheError, match=rf"{cache.folder}.*cannot be written"):
        cache.flush()


def test_the_default_root_is_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("MPO_LIGHTNING_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/scratch/me")
    assert default_root() == Path("/scratch/me/mpo-lightning/reference")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert default_root() == Path("/home/me/.cache/mpo-lightning/reference")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_root() == Path("/home/me/.cache/mpo-lightning/reference")
    monkeypatch.setenv("MPO_LIGHTNING_CACHE", "/scratch/mine")
    assert default_root() == Path("/scratch/mine/reference")
