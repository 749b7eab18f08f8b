"""Writers of canonical rows: whole files only, and no file is overwritten unasked."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from mpo_lightning.data.conversation import as_messages, context_columns
from mpo_lightning.data.groups import DataError, PreferenceGroup, bad_field
from mpo_lightning.data.report import DataReport
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
# Rows that are written together: a row group in Parquet.
CHUNK_ROWS = 1024


def canonical_row(group: PreferenceGroup) -> dict[str, object]:
    """Return the row that reads back as this group."""
    truncated = {} if group.truncated is None else {"truncated": group.truncated}
    return {
        "prompt": group.prompt,
        "responses": group.responses,
        "scores": group.scores,
        **truncated,
        **context_columns(group.template_arguments),
        **group.extra,
    }


class GroupWriter(ABC):
    """Writer of groups to one file, in chunks.

    Attributes:
        groups: number of groups written.
    """

    _out: Any
    # Whether the file holds prompts as lists of messages only.
    _conversations = False

    def __init__(self) -> None:
        self.groups = 0
        self._buffer: list[PreferenceGroup] = []

    def write(self, group: PreferenceGroup, report: DataReport) -> None:
        """Write a group, and note in a report what the file cannot hold as it is.

        Raises:
            DataError: if the format cannot hold it.
        """
        if self._conversations and isinstance(group.prompt, str):
            reason = "to a text prompt, written as one user message since others are conversations"
            report.note(reason, group.source, len(group.responses))
        self._buffer.append(group)
        self.groups += 1
        if len(self._buffer) == CHUNK_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write the groups that are still in memory.

        Raises:
            DataError: if the format cannot hold one of them.
        """
        if self._buffer:
            self._write_chunk(self._buffer)
            self._buffer = []

    @abstractmethod
    def _write_chunk(self, groups: Sequence[PreferenceGroup]) -> None: ...

    def close(self) -> None:
        """Close the file."""
        self._out.close()


class _JsonLines(GroupWriter):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self._out = path.open("wb")

    def _write_chunk(self, groups: Sequence[PreferenceGroup]) -> None:
        self._out.writelines(map(_line, groups))


def _line(group: PreferenceGroup) -> bytes:
    row = canonical_row(group)
    try:
        line = json.dumps(row, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        name = next(name for name, value in row.items() if not _fits_json(value))
        found = f"a value that JSON has no form for ({error})"
        expected = "texts, finite numbers, true, false, null, lists and objects"
        remedy = "Write .parquet, or remove the column."
        raise bad_field(group.source, name, found, expected, remedy) from error
    try:
        return line.encode() + b"\n"
    except UnicodeEncodeError:
        # A lone surrogate in a column that passes through has to be escaped.
        return json.dumps(row).encode() + b"\n"


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

        super().__init__()
        self._schema = schema
        self._conversations = not pyarrow.types.is_string(schema.field("prompt").type)
        try:
            self._out = pyarrow.parquet.ParquetWriter(path, schema)
        except pyarrow.ArrowException as error:
            raise DataError(
                f"{path}: Parquet cannot hold such columns ({error}). Write .jsonl, or remove them."
            ) from error

    def _write_chunk(self, groups: Sequence[PreferenceGroup]) -> None:
        import pyarrow

        columns = _columns(groups, conversations=self._conversations)
        arrays = [_array(columns, name, groups, self._schema) for name in self._schema.names]
        try:
            self._out.write_table(pyarrow.Table.from_arrays(arrays, schema=self._schema))
        except pyarrow.ArrowException as error:
            raise _unfit(groups, "row", error) from error


def _columns(groups: Sequence[PreferenceGroup], *, conversations: bool) -> dict[str, list[object]]:
    rows = [canonical_row(group) for group in groups]
    if conversations:
        rows = [
            {**row, "prompt": as_messages(group.prompt)}
            for group, row in zip(groups, rows, strict=True)
        ]
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _unfit(groups: Sequence[PreferenceGroup], name: str, error: Exception) -> DataError:
    rows = f"{groups[0].source} to {groups[-1].source}"
    found = f"a value that the Parquet file cannot hold ({error})"
    remedy = "Write .jsonl, or give the column's values one type."
    return bad_field(rows, name, found, "values of one type in a column", remedy)


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
    # Integers beyond 64 bits, and lone surrogates.
    except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError) as error:
        raise _unfit(groups, name, error) from error


def arrow_schema(groups: Iterable[PreferenceGroup]) -> Any:
    """Return the schema of a Parquet file of these groups, with one type per column.

    Prompts are texts if all are, otherwise lists of messages.

    Raises:
        DataError: if a column has values of types that do not fit together.
    """
    import pyarrow

    schema = pyarrow.schema([])
    texts = True
    rest = iter(groups)
    while chunk := list(islice(rest, CHUNK_ROWS)):
        texts = texts and all(isinstance(group.prompt, str) for group in chunk)
        columns = _columns(chunk, conversations=True)
        fields = [(name, _array(columns, name, chunk).type) for name in columns]
        try:
            schema = pyarrow.unify_schemas(
                [schema, pyarrow.schema(fields)], promote_options="permissive"
            )
        except pyarrow.ArrowException as error:
            raise _unfit(chunk, "row", error) from error
    if texts and schema.names:
        prompt = schema.get_field_index("prompt")
        return schema.set(prompt, pyarrow.field("prompt", pyarrow.string()))
    return schema


def check_target(path: Path, *, force: bool) -> None:
    """Refuse a file that exists already, or whose format cannot be written.

    Raises:
        DataError: with the reason.
    """
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: found suffix {path.suffix!r}; expected one of {SUFFIXES}.")
    if path.is_dir():
        raise DataError(f"{path}: is a folder. Name a file.")
    if path.exists() and not force:
        raise DataError(f"{path} exists already. Name another file, or overwrite it with --force.")


@contextmanager
def open_writers(paths: Sequence[Path], schema: Any) -> Iterator[list[GroupWriter]]:
    """Open writers of files that appear, all together, if the block ends without an error.

    Args:
        paths: the files, in folders that exist.
        schema: the result of `arrow_schema`, if they are Parquet.
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
            writer.flush()
