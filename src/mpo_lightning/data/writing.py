"""Groups to files in canonical form: whole files only, never over another one unasked."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from mpo_lightning.data.groups import DataError, PreferenceGroup
from mpo_lightning.files import whole_file

__all__ = [
    "SUFFIXES",
    "GroupWriter",
    "arrow_schema",
    "canonical_row",
    "check_target",
    "open_writers",
]

SUFFIXES = (".jsonl", ".parquet")
# Rows that are held before they are written.
HELD_ROWS = 1024


def canonical_row(group: PreferenceGroup) -> dict[str, object]:
    """The row that reads back as this group."""
    truncated = {} if group.truncated is None else {"truncated": group.truncated}
    return {
        "prompt": group.prompt,
        "responses": group.responses,
        "scores": group.scores,
        **truncated,
        **group.extra,
    }


class GroupWriter(ABC):
    """Writes groups to one file.

    Attributes:
        groups: how many were written.
    """

    groups: int = 0

    @abstractmethod
    def write(self, group: PreferenceGroup) -> None:
        """Write a group.

        Raises:
            DataError: if the format cannot hold it.
        """

    @abstractmethod
    def finish(self) -> None:
        """Write what is held back.

        Raises:
            DataError: if the format cannot hold it.
        """

    @abstractmethod
    def close(self) -> None:
        """Close the file."""


class _JsonLines(GroupWriter):
    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")

    def write(self, group: PreferenceGroup) -> None:
        """Write a group as a line."""
        row = canonical_row(group)
        try:
            line = json.dumps(row, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            name = next(name for name, value in row.items() if not _fits_json(value))
            raise DataError.of_field(
                group.source,
                name,
                found=f"what JSON cannot hold ({error})",
                expected="texts, finite numbers, true, false, null, lists and objects",
                remedy="Write .parquet, or remove the column.",
            ) from error
        try:
            self._file.write(line.encode() + b"\n")
        except UnicodeEncodeError:
            # Half a character, in a column that passes through: an escape carries it.
            self._file.write(json.dumps(row).encode() + b"\n")
        self.groups += 1

    def finish(self) -> None:
        """Write what is held back."""
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _fits_json(value: object) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


class _Parquet(GroupWriter):
    def __init__(self, path: Path, schema: Any) -> None:
        import pyarrow
        import pyarrow.parquet

        self._schema = schema
        self._held: list[PreferenceGroup] = []
        try:
            self._writer = pyarrow.parquet.ParquetWriter(path, schema)
        except pyarrow.ArrowException as error:
            raise DataError(
                f"{path}: Parquet has no such columns ({error}). Write .jsonl, or remove them."
            ) from error

    def write(self, group: PreferenceGroup) -> None:
        """Hold a group, and write when there are enough."""
        self._held.append(group)
        self.groups += 1
        if len(self._held) == HELD_ROWS:
            self.finish()

    def finish(self) -> None:
        """Write what is held."""
        import pyarrow

        if self._held:
            columns = _columns(self._held)
            arrays = [
                _array(columns, name, self._held, self._schema) for name in self._schema.names
            ]
            table = pyarrow.Table.from_arrays(arrays, schema=self._schema)
            try:
                self._writer.write_table(table)
            except pyarrow.ArrowException as error:
                raise _unfit(self._held, "row", error) from error
            self._held = []

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def _columns(groups: Sequence[PreferenceGroup]) -> dict[str, list[object]]:
    rows = [canonical_row(group) for group in groups]
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _unfit(groups: Sequence[PreferenceGroup], name: str, error: Exception) -> DataError:
    return DataError.of_field(
        f"{groups[0].source} to {groups[-1].source}",
        name,
        found=f"what a Parquet file cannot hold ({error})",
        expected="values of one type in a column",
        remedy="Write .jsonl, or make the column's values alike.",
    )


def _array(
    columns: Mapping[str, list[object]],
    name: str,
    groups: Sequence[PreferenceGroup],
    schema: Any = None,
) -> Any:
    import pyarrow

    values = columns.get(name, [None] * len(groups))
    try:
        return pyarrow.array(values, type=None if schema is None else schema.field(name).type)
    # Integers beyond 64 bits, and half characters.
    except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError) as error:
        raise _unfit(groups, name, error) from error


def arrow_schema(groups: Iterable[PreferenceGroup]) -> Any:
    """The types that hold all of the groups: a Parquet file has one type a column.

    Raises:
        DataError: if there are none, because a column holds what does not go together.
    """
    import pyarrow

    schema = pyarrow.schema([])
    rest = iter(groups)
    while held := list(islice(rest, HELD_ROWS)):
        columns = _columns(held)
        fields = [(name, _array(columns, name, held).type) for name in columns]
        try:
            schema = pyarrow.unify_schemas(
                [schema, pyarrow.schema(fields)], promote_options="permissive"
            )
        except pyarrow.ArrowException as error:
            raise _unfit(held, "row", error) from error
    return schema


def check_target(path: Path, *, force: bool) -> None:
    """Refuse a file that is there already, or of a format that is not written.

    Raises:
        DataError: saying which.
    """
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: found suffix {path.suffix!r}; expected one of {SUFFIXES}.")
    if path.is_dir():
        raise DataError(f"{path}: is a folder. Name a file.")
    if path.exists() and not force:
        raise DataError(f"{path} exists already. Name another file, or overwrite it with --force.")


@contextmanager
def open_writers(paths: Sequence[Path], schema: Any) -> Iterator[list[GroupWriter]]:
    """Writers of files that appear, all of them, when the block has ended without an error.

    Args:
        paths: of the files, in folders that exist.
        schema: from `arrow_schema`, if they are Parquet.
    """
    with ExitStack() as stack:
        # Entered before the writers, so that all are closed before the first file has its name.
        unfinished = [stack.enter_context(whole_file(path)) for path in paths]
        writers: list[GroupWriter] = []
        for path, partial in zip(paths, unfinished, strict=True):
            made = _Parquet(partial, schema) if path.suffix == ".parquet" else _JsonLines(partial)
            stack.callback(made.close)
            writers.append(made)
        yield writers
        for writer in writers:
            writer.finish()
