"""Files and folders are there whole or not at all."""

import errno
from hashlib import blake2b
from pathlib import Path

import pytest

from mpo_lightning.digests import SUMS
from mpo_lightning.files import cache_folder, digest_of_files, whole_file, whole_folder, write_whole


def content(folder: Path) -> dict[str, str]:
    """Texts of all files but those of digests."""
    return {
        str(path.relative_to(folder)): path.read_text(encoding="utf-8")
        for path in folder.rglob("*")
        if path.is_file() and path.name != SUMS
    }


def test_an_error_leaves_what_was_there_before(tmp_path: Path) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    write_whole(file, b"before")
    with whole_folder(folder) as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "a").write_text("before", encoding="utf-8")
    before = content(tmp_path)
    assert before == {"file": "before", "folder/inner/a": "before"}
    with pytest.raises(ZeroDivisionError), whole_file(file) as partial:
        partial.write_text(f"after {1 / 0}", encoding="utf-8")
    with pytest.raises(ZeroDivisionError), whole_folder(folder) as partial:
        (partial / "b").write_text(f"after {1 / 0}", encoding="utf-8")
    with pytest.raises(FileNotFoundError), whole_file(file):
        pass
    assert content(tmp_path) == before


def test_a_folder_replaces_another_and_what_was_left_beside_it(tmp_path: Path) -> None:
    for name in ("folder", ".folder.partial", ".folder.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").write_text("old", encoding="utf-8")
    with whole_folder(tmp_path / "folder") as partial:
        assert content(partial) == {}
        (partial / "new").write_text("new", encoding="utf-8")
        # Not there yet.
        assert content(tmp_path / "folder") == {"old": "old"}
    assert content(tmp_path) == {"folder/new": "new"}


def test_digest_of_several_files_is_that_of_their_content(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path, data in zip(paths, (b"one", b"two"), strict=True):
        path.write_bytes(data)
    assert digest_of_files(*paths) == blake2b(b"onetwo", digest_size=16).hexdigest()


def test_caches_lie_in_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("MPO_LIGHTNING_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/scratch/me")
    assert cache_folder("reference") == Path("/scratch/me/mpo-lightning/reference")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder("reference") == Path("/home/me/.cache/mpo-lightning/reference")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder("reference") == Path("/home/me/.cache/mpo-lightning/reference")
    monkeypatch.setenv("MPO_LIGHTNING_CACHE", "/scratch/mine")
    assert cache_folder("reference") == Path("/scratch/mine/reference")


def test_errors_of_the_system_name_the_file_that_was_asked_for(tmp_path: Path) -> None:
    """A full disk names none, and a disk that is read-only the hidden one beside it."""
    file, below = tmp_path / "file", tmp_path / "file" / "below"
    full = OSError(errno.ENOSPC, "No space left on device")
    for whole in (whole_file, whole_folder):
        with pytest.raises(OSError, match="No space") as caught, whole(tmp_path / "new"):
            raise full
        assert caught.value.filename == str(tmp_path / "new")
        full.filename = None
    file.write_text("here", encoding="utf-8")
    with pytest.raises(NotADirectoryError) as caught:
        write_whole(below, b"x")
    assert caught.value.filename == str(below)
    with pytest.raises(NotADirectoryError) as caught, whole_folder(below):
        pass
    assert caught.value.filename == str(below)
    # What names another file keeps its name.
    with pytest.raises(FileNotFoundError) as caught, whole_file(tmp_path / "new"):
        (tmp_path / "absent").read_bytes()
    assert str(caught.value.filename) == str(tmp_path / "absent")
