"""Rows from files, ``datasets`` folders, hub data sets and memory, each with its origin.

Opening a source reads it once, to count its rows and to compute a digest of its content. Any range
of rows can then be read without holding the others, so that several processes can share the work.
"""

import json
import os
import pickle
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from glob import glob, has_magic
from hashlib import blake2b
from itertools import accumulate
from operator import methodcaller
from pathlib import Path
from typing import Any

from mpo_lightning.checks import plain
from mpo_lightning.data.alpaca_eval import joined_if_answers, result_files, without_raw_completions
from mpo_lightning.data.compressed import COMPRESSED, open_unpacked
from mpo_lightning.data.csv_files import CsvFile
from mpo_lightning.data.groups import DataError
from mpo_lightning.data.llama_factory import DESCRIPTIONS, open_described
from mpo_lightning.data.part_files import check_parts, check_rows, is_of_parts
from mpo_lightning.data.row_source import (
    Parts,
    RawRow,
    RowSource,
    SameFiles,
    Values,
    digest_of,
)
from mpo_lightning.data.split_files import files_of_split
from mpo_lightning.files import digest_of_files

__all__ = ["RowSource", "Rows", "open_rows", "open_source", "rename_columns"]

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
# Files that are parts of the folder that holds them; a .json file may be its settings.
PART_SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
# Rows that are read at a time from Arrow tables.
READ_AHEAD = 256

# In memory: a list of rows, or a data set of the ``datasets`` library.
Rows = Sequence[Mapping[str, object]]


def open_source(
    data: str, *, default_split: str | None = None, subset: str | None = None
) -> RowSource:
    """Open a source of rows.

    Args:
        data: a ``.jsonl``, ``.json`` (an array of objects), ``.csv``, ``.tsv`` or ``.parquet``
            file, all but the last also packed as ``.gz`` or ``.zst``; a folder, or a pattern like
            ``runs/*/rows.jsonl``, of such files; a folder of AlpacaEval's results, with an
            annotator after a colon if wanted; LLaMA-Factory's ``dataset_info.json`` with one of its
            data sets after a colon; a folder written by ``datasets.save_to_disk`` or a hub id. A
            folder of files, these folders and hub ids take a split after a colon if wanted
            (``org/name:train_prefs``).
        default_split: split of a source of several splits that names none. Defaults to "train" of a
            hub id or saved DatasetDict; a folder of splits is then refused.
        subset: configuration of a hub id. Defaults to its own default.

    Raises:
        DamagedError: if it was written with digests, and is not what was written.
        DataError: if the source is missing, empty, unfinished, or cannot be read as what it
            claims to be.
    """
    data = os.path.expanduser(data)
    path = Path(data)
    name, _, split = data.partition(":")
    if path.is_file() and path.name != DESCRIPTIONS:
        source = _open_file(_whole(path), data)
    elif Path(name).is_file() and Path(name).name == DESCRIPTIONS:
        source = open_described(Path(name), split, _open_named)
    elif Path(name).is_dir() and (results := result_files(Path(name), split)):
        source = joined_if_answers(_open_parts(results, data))
    elif Path(name).is_dir() and (parts := _parts(Path(name))):
        chosen = files_of_split(parts, name, split, default_split)
        given = data if len(chosen) == len(parts) or split else f"{data}:{default_split}"
        source = _open_parts(chosen, given)
    elif path.is_dir():
        source = _saved_dataset(data, path, "", default_split or "train")
    elif has_magic(data) and (matches := _matches(data)):
        source = joined_if_answers(_open_parts(matches, data))
    elif has_magic(data) or _kind(path) in SUFFIXES:
        raise DataError(f"{data}: no such file (working directory: {Path.cwd()}).")
    elif Path(name).is_dir():
        source = _saved_dataset(data, Path(name), split, default_split or "train")
    else:
        source = _hub_dataset(data, name, split or default_split or "train", subset)
    if not len(source):
        raise DataError(f"{data}: holds no rows.")
    return source


def _open_named(name: str, split: str, subset: str | None) -> RowSource:
    return open_source(name, default_split=split, subset=subset)


def open_rows(rows: Rows, name: str) -> RowSource:
    """Open rows that are in memory.

    Args:
        rows: a list of mappings, or a `datasets.Dataset`, whose own format selects the columns.
        name: name of the source; rows are named ``name:number``, counted from 1.

    Raises:
        DataError: if it is neither, has no rows, or is a data set with a transform, whose rows may
            differ each time that they are read.
    """
    from datasets import Dataset

    source: RowSource
    if isinstance(rows, Dataset):
        source = _in_memory_dataset(rows, name)
    elif isinstance(rows, list | tuple):
        # Of NumPy's and torch's arrays and numbers as little is left as in a file.
        values = [plain(row) for row in rows]
        source = Values(values, name, _digest_of_values(values))
    else:
        raise DataError(
            f"{name}: found {type(rows).__name__}; expected the name of a source, a list of names, "
            "a list of rows or a datasets.Dataset. Of a DatasetDict hand over one split; name a "
            "path as a text."
        )
    if not len(source):
        raise DataError(f"{name}: holds no rows.")
    return source


def rename_columns(
    row: Mapping[Any, object], columns: Mapping[str, str], source: str
) -> dict[Any, object]:
    """Rename the columns of a row.

    Args:
        row: the row as it was read.
        columns: columns to rename: the name in the source, and the name to read it as.
        source: "file:row", for messages.

    Raises:
        DataError: if two columns would get the same name.
    """
    renamed = {columns.get(name, name): value for name, value in row.items()}
    if len(renamed) < len(row):
        raise DataError(
            f"{source}: data.columns renames onto columns that are there already, among "
            f"{sorted(map(str, row))}. Rename those, too."
        )
    return renamed


def _kind(path: Path) -> str:
    """Return the suffix of a file, without that of its compression."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def _parts(folder: Path) -> list[Path]:
    """List the files of rows in a folder, such as ``sample`` and ``score`` write them.

    Of a data set as the hub keeps it, they are in the folder ``data``.

    Raises:
        DamagedError: if one that ``sample`` or ``score`` wrote is not what was written.
        DataError: if their output is unfinished.
    """
    for place in (folder, folder / "data"):
        files = sorted(place.iterdir()) if place.is_dir() else []
        found = [path for path in files if _kind(path) in PART_SUFFIXES]
        if is_of_parts(place):
            check_parts(place, found)
        if found:
            return found
    return []


def _matches(pattern: str) -> list[Path]:
    found = sorted(path for path in map(Path, glob(pattern, recursive=True)) if path.is_file())
    return list(map(_whole, found))


def _whole(path: Path) -> Path:
    """Return a file; one that ``sample`` or ``score`` wrote is checked against its digests."""
    if path.match("part-*.jsonl") and is_of_parts(path.parent):
        check_rows(path)
    return path


def _open_parts(paths: Sequence[Path], name: str) -> RowSource:
    parts = (_open_file(path, str(path)) for path in paths)
    return Parts(name, [without_raw_completions(part) for part in parts])


def _open_file(path: Path, name: str) -> RowSource:
    openers: dict[str, Callable[[Path, str], RowSource]] = {
        ".jsonl": _JsonLines,
        ".json": _json_array,
        ".csv": CsvFile,
        ".tsv": CsvFile,
        ".parquet": _Parquet,
    }
    kind = _kind(path)
    if kind not in openers or (kind == ".parquet" and path.suffix != kind):
        raise DataError(
            f"{name}: found suffix {path.suffix!r}; expected one of {SUFFIXES}, which may be "
            f"followed by one of {tuple(COMPRESSED)} (not .parquet)."
        )
    if path.suffix in COMPRESSED:
        return open_unpacked(path, lambda unpacked: openers[kind](unpacked, name), name)
    return openers[kind](path, name)


# ----------------------------------------------------------------------------------------- JSON


def _decode(raw: bytes, source: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{source}: not UTF-8 (byte {raw[error.start]:#04x} at {error.start}). "
            "Save the file as UTF-8."
        ) from error


def _parse(text: str, source: str) -> Any:
    """Parse a JSON text.

    Raises:
        DataError: if an object has a key twice, so that one value would be lost, or the text is
            nested too deeply or has too long a number.
        JSONDecodeError: if it is not JSON.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = sorted({key for key in keys if keys.count(key) > 1})
            raise DataError(
                f"{source}: found the keys {twice} twice in one object; expected each once. "
                "Remove or rename one of them."
            )
        return value

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (json.JSONDecodeError, DataError):
        raise
    # Too deep a nesting, or an integer with thousands of digits.
    except (RecursionError, ValueError) as error:
        raise DataError(f"{source}: cannot be read ({error}). Repair or remove it.") from error


class _JsonLines(RowSource):
    """A file with one object per line; blank lines are ignored."""

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self.name = name
        self._files = SameFiles(path)
        # Byte at which each row begins, and its line number.
        self.offsets, self.lines = array("q"), array("q")
        content, offset = blake2b(digest_size=16), 0
        with self._files.reading(), path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                content.update(line)
                if line.strip(b"\xef\xbb\xbf \t\r\n\f\v"):
                    self.offsets.append(offset)
                    self.lines.append(number)
                offset += len(line)
        self.digest = content.hexdigest()

    def __len__(self) -> int:
        return len(self.offsets)

    def rows(self, start: int, stop: int) -> Iterator[tuple[str, RawRow]]:
        """Yield the rows, named by their line numbers."""
        with self._files.reading(), self.path.open("rb") as file:
            for index in range(start, stop):
                file.seek(self.offsets[index])
                source = f"{self.name}:{self.lines[index]}"
                yield source, _parse_line(file.readline(), source)


def _parse_line(line: bytes, source: str) -> RawRow:
    try:
        row: RawRow = _parse(_decode(line, source), source)
    except DataError as error:
        return error
    except json.JSONDecodeError as error:
        return DataError(
            f"{source}: not valid JSON ({error.msg} at column {error.colno}). "
            "Each line must be one whole object: the line may be cut, or the file may be "
            "a JSON array, which must be named .json."
        )
    if isinstance(row, list):
        return DataError(
            f"{source}: found a JSON array; expected one object per line. "
            "Rename the file to .json if it is one array of objects."
        )
    return row


def _digest_of_values(values: Sequence[Any]) -> str:
    content = blake2b(digest_size=16)
    for value in values:
        # Any value can be pickled. Equal rows may differ in it, but unequal ones cannot agree.
        content.update(pickle.dumps(value, protocol=5))
    return content.hexdigest()


def _json_array(path: Path, name: str) -> RowSource:
    """Open a file that is one array of objects."""
    with SameFiles(path).reading():
        raw = path.read_bytes()
    text = _decode(raw, name)
    try:
        rows = _parse(text, name) if text.strip() else []
    except json.JSONDecodeError as error:
        raise DataError(
            f"{name}: not valid JSON ({error.msg} at line {error.lineno}, column "
            f"{error.colno}). Name a file with one object per line .jsonl."
        ) from error
    if not isinstance(rows, list):
        raise DataError(
            f"{name}: found {type(rows).__name__}; expected an array of objects. "
            "Name a file with one object per line .jsonl."
        )
    return Values(rows, name, blake2b(raw, digest_size=16).hexdigest())


# ---------------------------------------------------------------------------------------- Arrow


class _Parquet(RowSource):
    """A Parquet file; one row group is in memory at a time."""

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self.name = name
        self._files = SameFiles(path)
        metadata = self._read(lambda file: file.metadata)
        names = self._read(lambda file: file.schema_arrow.names)
        twice = sorted({column for column in names if names.count(column) > 1})
        if twice:
            raise DataError(
                f"{name}: found the columns {twice} twice; expected each once. Rename one of them."
            )
        groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
        self.ends = list(accumulate(group.num_rows for group in groups))
        with self._files.reading():
            self.digest = digest_of_files(path)

    def _read(self, read: Callable[[Any], Any]) -> Any:
        import pyarrow
        import pyarrow.parquet

        try:
            with self._files.reading(), pyarrow.parquet.ParquetFile(self.path) as file:
                return read(file)
        # Damaged pages raise an OSError.
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(
                f"{self.name}: cannot be read as Parquet ({error}). Write it again."
            ) from error

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def rows(self, start: int, stop: int) -> Iterator[tuple[str, RawRow]]:
        """Yield the rows, counted from 1."""
        for number in range(bisect_right(self.ends, start), len(self.ends)):
            first = self.ends[number - 1] if number else 0
            if first >= stop:
                return
            table = self._read(methodcaller("read_row_group", number))
            begin, end = max(start, first), min(stop, self.ends[number])
            for at in range(begin, end, READ_AHEAD):
                block = table.slice(at - first, min(READ_AHEAD, end - at)).to_pylist()
                for row_number, row in enumerate(block, start=at + 1):
                    yield f"{self.name}:{row_number}", row


class _Dataset(Values):
    """A data set of the ``datasets`` library, in memory or memory-mapped from files."""

    def __init__(self, dataset: Any, name: str, digest: str, files: SameFiles) -> None:
        super().__init__(dataset, name, digest)
        self._files = files

    def rows(self, start: int, stop: int) -> Iterator[tuple[str, RawRow]]:
        """Yield the rows, counted from 1."""
        for at in range(start, stop, READ_AHEAD):
            with self._files.reading():
                columns = self.values[at : min(at + READ_AHEAD, stop)]
            for number, values in enumerate(zip(*columns.values(), strict=True), start=at + 1):
                yield f"{self.name}:{number}", dict(zip(columns, values, strict=True))


def _mapped_dataset(dataset: Any, name: str) -> RowSource:
    paths = [Path(file["filename"]) for file in dataset.cache_files]
    files = SameFiles(*paths)
    with files.reading():
        # The fingerprint says which rows of the files were selected.
        digest = digest_of(dataset._fingerprint, digest_of_files(*paths))
    return _Dataset(dataset, name, digest, files)


def _in_memory_dataset(dataset: Any, name: str) -> RowSource:
    if dataset.format["type"] == "custom":
        raise DataError(
            f"{name}: the data set has a transform, which makes its rows when they are read. Use "
            "map instead of set_transform: rows must be the same each time they are read."
        )
    columns = dataset.format["columns"]
    # Its fingerprint leaves out what a function that was given to map has read.
    content = blake2b(repr(dataset.features).encode(), digest_size=16)
    for block in dataset.with_format("arrow", columns=columns).iter(batch_size=READ_AHEAD):
        for batch in block.combine_chunks().to_batches():
            content.update(batch.serialize())
    plain = dataset.with_format(None, columns=columns)
    return _Dataset(plain, name, content.hexdigest(), SameFiles())


def _saved_dataset(data: str, path: Path, split: str, default_split: str) -> RowSource:
    from datasets import DatasetDict, load_from_disk

    try:
        dataset = load_from_disk(str(path))
    # A damaged state or Arrow file raises a ValueError.
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: not a folder that datasets' save_to_disk wrote ({error}), and it holds no "
            ".jsonl or .parquet files."
        ) from error
    if isinstance(dataset, DatasetDict):
        split = split or default_split
        if split not in dataset:
            raise DataError(
                f"{path}: no split {split!r} among {sorted(dataset)}. "
                f"Name one of them after a colon, {path}:<split>."
            )
        dataset = dataset[split]
    elif split:
        raise DataError(f"{path}: holds one data set and no splits. Name it without {split!r}.")
    return _mapped_dataset(dataset, data)


def _hub_dataset(data: str, name: str, split: str, subset: str | None) -> RowSource:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        dataset = load_dataset(name, subset, split=split)
    # The kind of error depends on what is missing: the server, the data set or the split.
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"{name}: neither a file nor a folder here, and loading its split {split!r} from the "
            f"hub failed ({type(error).__name__}: {error})."
        ) from error
    return _mapped_dataset(dataset, data)
