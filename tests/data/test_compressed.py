"""Compressed files are read as the files that are in them, and leave nothing behind."""

import gzip
import json
import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from mpo_lightning.data.groups import DataError
from mpo_lightning.data.row_source import RowSource
from mpo_lightning.data.sources import open_source

ROWS = [{"prompt": f"Größe {number}?", "score": str(number)} for number in range(5)]
LINES = [json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS]
CONTENT: dict[str, str] = {
    ".jsonl": "".join(LINES),
    ".json": json.dumps(ROWS),
    ".csv": "prompt,score\n" + "".join(f"{row['prompt']},{row['score']}\n" for row in ROWS),
    ".tsv": "prompt\tscore\n" + "".join(f"{row['prompt']}\t{row['score']}\n" for row in ROWS),
}


def zst(content: bytes) -> bytes:
    packed = pyarrow.compress(content, codec="zstd", asbytes=True)
    assert isinstance(packed, bytes)
    return packed


PACK: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zst}


@pytest.fixture(autouse=True)
def folder_of_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("kind", CONTENT)
def test_rows_of_a_compressed_file(
    kind: str, packed: str, tmp_path: Path, folder_of_temporary_files: Path
) -> None:
    plain, path = tmp_path / f"rows{kind}", tmp_path / f"rows{kind}{packed}"
    plain.write_text(CONTENT[kind], encoding="utf-8")
    path.write_bytes(PACK[packed](plain.read_bytes()))
    source, unpacked = open_source(str(path)), open_source(str(plain))
    assert [row for _, row in source.rows(0, 5)] == ROWS
    assert [row for _, row in source.rows(2, 4)] == ROWS[2:4]
    assert source.digest == unpacked.digest
    # Named by the compressed file, by the lines or rows of what is in it.
    named = [name.replace(str(plain), str(path)) for name, _ in unpacked.rows(0, 5)]
    assert [name for name, _ in source.rows(0, 5)] == named
    assert len(list(folder_of_temporary_files.iterdir())) == 1
    del source
    assert not list(folder_of_temporary_files.iterdir())


@pytest.mark.parametrize("packed", PACK)
def test_files_that_were_packed_in_pieces(packed: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.jsonl{packed}"
    path.write_bytes(b"".join(PACK[packed](line.encode()) for line in LINES))
    assert [row for _, row in open_source(str(path)).rows(0, 5)] == ROWS


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("spoil", ["cut", "other"])
def test_damaged_file(
    packed: str, spoil: str, tmp_path: Path, folder_of_temporary_files: Path
) -> None:
    whole = PACK[packed](CONTENT[".jsonl"].encode() * 50)
    path = tmp_path / f"rows.jsonl{packed}"
    path.write_bytes(whole[: len(whole) // 2] if spoil == "cut" else b"{}" + whole)
    with pytest.raises(DataError, match=rf"rows\.jsonl\{packed}: cannot be unpacked into"):
        open_source(str(path))
    assert not list(folder_of_temporary_files.iterdir())


def test_folder_of_compressed_and_plain_parts(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "a.jsonl.gz").write_bytes(gzip.compress("".join(LINES[:2]).encode()))
    (folder / "b.csv").write_text(f"prompt,score\n{ROWS[2]['prompt']},2\n", encoding="utf-8")
    (folder / "c.jsonl.zst").write_bytes(zst("".join(LINES[3:]).encode()))
    (folder / "settings.json").write_text("{}", encoding="utf-8")
    source = open_source(str(folder))
    assert [row for _, row in source.rows(0, len(source))] == ROWS


@pytest.mark.parametrize("name", ["rows.parquet.gz", "rows.gz", "rows.txt.zst"])
def test_other_files_are_not_unpacked(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"found suffix .*; expected one of .*\(not \.parquet\)"):
        open_source(str(tmp_path / name))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.csv\.gz: no such file"):
        open_source(str(tmp_path / "gone.csv.gz"))


def read_and_forget(source: RowSource, found: Any) -> None:
    found.put([row for _, row in source.rows(0, 5)])
    del source


def test_processes_that_were_forked_leave_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress("".join(LINES).encode()))
    source = open_source(str(path))
    context = multiprocessing.get_context("fork")
    found = context.Queue()
    process = context.Process(target=read_and_forget, args=(source, found))
    process.start()
    assert found.get(timeout=60) == ROWS
    process.join()
    assert [row for _, row in source.rows(0, 5)] == ROWS
