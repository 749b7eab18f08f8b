"""Rows from files, saved ``datasets`` folders and hub data sets, each with where it came from."""

import json
from collections.abc import Iterator
from pathlib import Path

from mpo_lightning.data.groups import DataError

__all__ = ["read_rows"]

SUFFIXES = (".jsonl", ".json", ".parquet")


def read_rows(data: str, *, default_split: str = "train") -> Iterator[tuple[str, object]]:
    """Yield ``("file:row", row)`` of every row; rows count from 1, in JSON Lines they are lines.

    Args:
        data: a ``.jsonl``, ``.json`` (an array of objects) or ``.parquet`` file, or a folder
            written by ``datasets.save_to_disk`` or a hub id, these two with a split after a colon
            if wanted (``org/name:train_prefs``).
        default_split: split of a hub id or saved DatasetDict that names none.

    Raises:
        DataError: if the source is missing, empty, or cannot be read as what it claims to be.
    """
    path = Path(data)
    name, _, split = data.partition(":")
    if path.is_file():
        readers = {".jsonl": _json_lines, ".json": _json_array, ".parquet": _parquet}
        if path.suffix not in readers:
            raise DataError(f"{data}: found suffix {path.suffix!r}; expected one of {SUFFIXES}.")
        rows = readers[path.suffix](path)
    elif path.is_dir():
        rows = _saved_dataset(path, "", default_split)
    elif path.suffix in SUFFIXES:
        raise DataError(f"{data}: no such file (working directory: {Path.cwd()}).")
    elif Path(name).is_dir():
        rows = _saved_dataset(Path(name), split, default_split)
    else:
        rows = _hub_dataset(name, split or default_split)
    empty = True
    for number, row in rows:
        empty = False
        yield f"{data}:{number}", row
    if empty:
        raise DataError(f"{data}: holds no rows.")


def _json_lines(path: Path) -> Iterator[tuple[int, object]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = _decode(line, f"{path}:{number}")
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}:{number}: not valid JSON ({error.msg} at column {error.colno}). "
                    "Each line must be one whole object: the line may be cut, or the file may be "
                    "a JSON array, which is named .json."
                ) from error
            if isinstance(row, list):
                raise DataError(
                    f"{path}:{number}: found a JSON array; expected one object a line. "
                    "Rename the file to .json if it holds one array of objects."
                )
            yield number, row


def _json_array(path: Path) -> Iterator[tuple[int, object]]:
    text = _decode(path.read_bytes(), str(path))
    if not text.strip():
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: not valid JSON ({error.msg} at line {error.lineno}, column {error.colno}). "
            "Name a file with one object a line .jsonl."
        ) from error
    if not isinstance(rows, list):
        raise DataError(
            f"{path}: found {type(rows).__name__}; expected an array of objects. "
            "Name a file with one object a line .jsonl."
        )
    yield from enumerate(rows, start=1)


def _decode(raw: bytes, source: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{source}: not UTF-8 (byte {raw[error.start]:#04x} at {error.start}). "
            "Save the file as UTF-8."
        ) from error


def _parquet(path: Path) -> Iterator[tuple[int, object]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield number, row
    # Damaged pages are an OSError.
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error}). Write it again.") from error


def _saved_dataset(path: Path, split: str, default_split: str) -> Iterator[tuple[int, object]]:
    from datasets import DatasetDict, load_from_disk

    try:
        dataset = load_from_disk(str(path))
    # A damaged state or Arrow file is a ValueError.
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: not a folder that datasets' save_to_disk wrote ({error})."
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
    yield from enumerate(dataset, start=1)


def _hub_dataset(name: str, split: str) -> Iterator[tuple[int, object]]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        dataset = load_dataset(name, split=split)
    # What a hub lookup raises depends on what was missing: the server, the data set or the split.
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"{name}: neither a file nor a folder here, and loading its split {split!r} from the "
            "hub failed "
            f"({type(error).__name__}: {error})."
        ) from error
    yield from enumerate(dataset, start=1)
