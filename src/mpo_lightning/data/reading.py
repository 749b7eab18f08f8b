"""From the rows of a source to checked groups, with what became of every row."""

from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from json import dumps
from typing import Any

import numpy as np

from mpo_lightning.data.groups import DataError, PreferenceGroup, check_row
from mpo_lightning.data.schemas.base import Converted, Schema, SkippedRow
from mpo_lightning.data.schemas.detect import Canonical, detect
from mpo_lightning.data.sources import RawRow, RowSource, open_source, rename_columns

__all__ = ["GroupReader", "Outcome", "read_outcomes"]

# Columns of a canonical row with one entry a response.
OF_RESPONSES = ("responses", "scores", "truncated")


@dataclass(frozen=True)
class Outcome:
    """What became of one row, or of the rows of one prompt: exactly one of the three.

    Attributes:
        source: "file:row"; the first of several rows.
        group: the checked group.
        error: why it cannot be used.
        skipped: why a setting leaves it out.
        notes: what was changed in the group or is odd, one entry a response.
    """

    source: str
    group: PreferenceGroup | None = None
    error: DataError | None = None
    skipped: str | None = None
    notes: tuple[str, ...] = ()


class GroupReader:
    """Gives any range of a source's groups without holding the others.

    Args:
        data: file, folder or hub id, see `open_source`; or a source that is open.
        schema: shape of the rows; found from the first row's columns if none.
        columns: other names of columns: the name in the source, and the name to read it as.
        default_split: split of a hub id or saved DatasetDict that names none.

    Raises:
        DataError: if the source cannot be read at all, no schema fits it, or a column to be renamed
            is not there.
    """

    def __init__(
        self,
        data: str | RowSource,
        *,
        schema: Schema | None = None,
        columns: Mapping[str, str] | None = None,
        default_split: str = "train",
    ) -> None:
        if isinstance(data, str):
            data = open_source(data, default_split=default_split)
        self.source = data
        self.columns = dict(columns or {})
        self.schema = schema or self._detect()
        # Where a row holds one response: the rows of each group, group after group.
        self._members: tuple[Any, Any] | None = None
        if self.schema.one_response_a_row:
            self._members = self._group_rows()

    def __len__(self) -> int:
        """Number of groups, those included that will turn out to be unusable."""
        return len(self.source) if self._members is None else len(self._members[1]) - 1

    def outcomes(self, start: int = 0, stop: int | None = None) -> Iterator[Outcome]:
        """What becomes of the groups from start to stop (all if none), both counted from 0."""
        stop = len(self) if stop is None else stop
        if self._members is None:
            for name, row in self.source.rows(start, stop):
                yield self._outcome([(name, row)])
            return
        rows, ends = self._members
        for group in range(start, stop):
            yield self._outcome(
                [self.source[row] for row in rows[ends[group] : ends[group + 1]].tolist()]
            )

    def _detect(self) -> Schema:
        for name, row in self.source.rows(0, len(self.source)):
            if isinstance(row, Mapping):
                absent = sorted(set(self.columns) - set(row))
                if absent:
                    raise DataError(
                        f"{name}: data.columns renames {absent}; found the columns "
                        f"{sorted(map(str, row))}."
                    )
                return detect(rename_columns(row, self.columns, name), name)
        # What is wrong with the rows will be told by their check.
        return Canonical()

    def _convert(self, name: str, row: RawRow) -> Converted:
        if isinstance(row, DataError):
            raise row
        if not isinstance(row, Mapping):
            # Its check tells what is wrong.
            check_row(row, name)
        assert isinstance(row, Mapping)
        renamed = rename_columns(row, self.columns, name)
        try:
            return self.schema.convert(renamed, name)
        except (DataError, SkippedRow):
            raise
        # A schema of the user's own may fail on a row in any way.
        except Exception as error:
            error.add_note(f"{name}: {type(self.schema).__name__}.convert failed on this row.")
            raise

    def _outcome(self, rows: list[tuple[str, RawRow]]) -> Outcome:
        first = rows[0][0]
        try:
            converted = [self._convert(name, row) for name, row in rows]
            whole = converted[0].row if self._members is None else _merged(converted, first)
            group = check_row(whole, first)
        except SkippedRow as skipped:
            return Outcome(first, skipped=str(skipped))
        except DataError as error:
            return Outcome(first, error=error)
        return Outcome(first, group=group, notes=tuple(n for c in converted for n in c.notes))

    def _group_rows(self) -> tuple[Any, Any]:
        """Numbers of the rows, those of one prompt together, and where each prompt's begin."""
        numbers: dict[bytes, int] = {}
        group_of_row = array("q")
        for name, row in self.source.rows(0, len(self.source)):
            try:
                prompt = self._convert(name, row).row.get("prompt")
                key = blake2b(dumps(prompt, sort_keys=True).encode(), digest_size=16).digest()
            except (DataError, SkippedRow):
                # On its own, so that what is wrong with it is told of it alone.
                key = name.encode()
            group_of_row.append(numbers.setdefault(key, len(numbers)))
        groups = np.frombuffer(group_of_row, dtype=np.int64)
        counts = np.bincount(groups, minlength=len(numbers))
        return np.argsort(groups, kind="stable"), np.concatenate([[0], np.cumsum(counts)])


def _merged(parts: list[Converted], source: str) -> dict[str, object]:
    """The canonical row of one prompt's rows.

    Raises:
        DataError: if one says whether its response was cut and another does not.
        SkippedRow: if there is only one.
    """
    if len(parts) == 1:
        raise SkippedRow("with a single response")
    rows = [part.row for part in parts]
    merged: dict[str, object] = {"prompt": rows[0]["prompt"]}
    names = dict.fromkeys(name for row in rows for name in row if name != "prompt")
    for name in names:
        values = [row.get(name) for row in rows]
        if name in OF_RESPONSES and all(value is None for value in values):
            continue
        if name in OF_RESPONSES:
            if any(value is None for value in values):
                raise DataError.of_field(
                    source,
                    name,
                    found="null in some rows of the prompt",
                    expected="a value in each, or in none",
                    remedy="Complete the column, or drop it.",
                )
            merged[name] = [entry for value in values for entry in value]  # type: ignore[attr-defined]
        else:
            same = all(value == values[0] for value in values)
            merged[name] = values[0] if same else values
    return merged


def read_outcomes(
    data: str,
    *,
    schema: Schema | None = None,
    columns: Mapping[str, str] | None = None,
    default_split: str = "train",
) -> Iterator[Outcome]:
    """Read a source group by group; a bad row is an outcome, not the end. See `GroupReader`."""
    reader = GroupReader(data, schema=schema, columns=columns, default_split=default_split)
    yield from reader.outcomes()
