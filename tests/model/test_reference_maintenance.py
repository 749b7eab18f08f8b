"""Reference caches are listed with what is wrong with them, and removed, and nothing else is."""

from pathlib import Path

import pytest

from mpo_lightning.model.reference_cache import ReferenceCache, ReferenceCacheError
from mpo_lightning.model.reference_maintenance import clear, inspect
from tests.conftest import random_groups
from tests.model.references import IDENTITY, OTHER, SHAPE, filled, shards


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
