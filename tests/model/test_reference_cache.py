"""The reference cache on real files: values by content, and what is refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mpo_lightning.batch import GroupBatch, TokenGroup
from mpo_lightning.model.reference_cache import ReferenceCache, ReferenceCacheError, response_keys
from mpo_lightning.model.reference_maintenance import clear, inspect
from tests.conftest import random_groups
from tests.model.references import (
    IDENTITY,
    OTHER,
    SHAPE,
    assert_complete,
    changed_token,
    content_logps,
    filled,
    shards,
)

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
    assert ReferenceCache(tmp_path, IDENTITY).known(response_keys(moved)).all()
    assert_complete(tmp_path, moved)


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
    assert np.flatnonzero(~cache.known(response_keys([other]))).tolist() == slots
    missing = other.indices[slots[0]]
    with pytest.raises(ReferenceCacheError, match=rf"^changed:3: response {missing} "):
        cache.look_up(GroupBatch.from_groups([other]))


def test_missing_response_is_named_by_its_place_in_the_row(tmp_path: Path) -> None:
    first, second = random_groups([(5, [4, 3]), (6, [2, 8, 3])])
    cache = filled(
        tmp_path, [first, second._replace(responses=second.responses[:2], scores=(1, 2))]
    )
    batch = GroupBatch.from_groups([first, second._replace(indices=(0, 4, 7))])
    with pytest.raises(ReferenceCacheError, match=r"^random:2: response 7 .*start the run again"):
        cache.look_up(batch)


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
    assert again.known(keys).all()


def test_several_openers_find_each_other(tmp_path: Path) -> None:
    first, second = random_groups(SHAPE)[:2]
    one, two = ReferenceCache(tmp_path, IDENTITY), ReferenceCache(tmp_path, IDENTITY)
    batch = GroupBatch.from_groups([first])
    one.add(batch, content_logps(batch))
    one.flush()
    assert not two.known(response_keys([first])).any()
    two.add(GroupBatch.from_groups([second]), content_logps(GroupBatch.from_groups([second])))
    two.reload()
    assert len(two) == 7
    one.reload()
    assert one.known(response_keys([first, second])).all()
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
    with pytest.raises(ReferenceCacheError, match=r"^random:1: response 0 .* holds -"):
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
    with pytest.raises(ReferenceCacheError, match=rf"^random:2: response 2 .* of {value}"):
        ReferenceCache(tmp_path, OTHER).add(batch, logps)
    assert len(cache) == 9


def test_a_cache_that_is_cleared_while_in_use_says_so(tmp_path: Path) -> None:
    batch = GroupBatch.from_groups(random_groups(SHAPE))
    cache = ReferenceCache(tmp_path, IDENTITY)
    clear(tmp_path)
    cache.add(batch, content_logps(batch))
    with pytest.raises(ReferenceCacheError, match=rf"{cache.folder}.*cannot be written"):
        cache.flush()
