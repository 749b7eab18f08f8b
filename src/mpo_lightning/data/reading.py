"""Reading of sources: rows become checked groups, and every row is accounted for."""

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from json import dumps
from typing import Any

import numpy as np

from mpo_lightning.data.conversation import CONTEXT, parse_texts
from mpo_lightning.data.groups import (
    DataError,
    PreferenceGroup,
    bad_field,
    check_object,
)
from mpo_lightning.data.report import BadRows, DataReport
from mpo_lightning.data.row_source import RawRow, RowSource
from mpo_lightning.data.rows import check_row
from mpo_lightning.data.schemas.base import Converted, Row, Schema, SkippedRow
from mpo_lightning.data.schemas.detect import Canonical, detect
from mpo_lightning.data.sources import open_source, rename_columns

__all__ = ["BadRows", "GroupReader", "RowResult", "Sources", "refuse_lost_rows"]

# Columns of a canonical row with one entry per response.
RESPONSE_COLUMNS = ("responses", "scores", "truncated")


@dataclass(frozen=True)
class RowResult:
    """Result of reading one row, or the rows of one prompt: a group, an error or a reason to skip.

    Attributes:
        source: "file:row"; the first of several rows.
        group: the checked group.
        error: the reason why it cannot be used.
        skipped: the setting that leaves it out, as a reason.
        notes: changes to the group and oddities in it, one entry per response.
    """

    source: str
    group: PreferenceGroup | None = None
    error: DataError | None = None
    skipped: str | None = None
    notes: tuple[str, ...] = ()

    def count_in(self, report: DataReport) -> PreferenceGroup | None:
        """Count the row in a report and return its group, if it has one."""
        report.groups += 1
        if self.error is not None:
            report.fail(self.error)
        if self.skipped is not None:
            report.drop(self.skipped, self.source)
        for note in self.notes:
            report.note(note, self.source)
        return self.group


class GroupReader:
    """Reader of any range of a source's groups, without holding the others.

    Args:
        data: file, folder or hub id, see `open_source`; or a source that is open.
        schema: format of the rows. Defaults to the one that most of the first 100 rows fit.
        columns: columns to rename: the name in the source, and the name to read it as.

    Raises:
        DataError: if the source cannot be read at all, no schema fits it, or a column to be renamed
            is missing.
    """

    def __init__(
        self,
        data: str | RowSource,
        *,
        schema: Schema | None = None,
        columns: Mapping[str, str] | None = None,
    ) -> None:
        self.source = open_source(data) if isinstance(data, str) else data
        self.columns = dict(columns or {})
        self.schema = schema or self._detect()
        # With one response per row: row numbers, group after group, and where each group begins.
        self._members: tuple[Any, Any] | None = None
        if self.schema.one_response_a_row:
            self._members = self._group_rows()

    def __len__(self) -> int:
        """Number of groups, including those that will turn out to be unusable."""
        return len(self.source) if self._members is None else len(self._members[1]) - 1

    def results(self, start: int = 0, stop: int | None = None) -> Iterator[RowResult]:
        """Read the groups from start to stop, counted from 0. Defaults to all of them."""
        stop = len(self) if stop is None else stop
        if self._members is None:
            for name, row in self.source.rows(start, stop):
                yield self._result([(name, row)])
            return
        rows, ends = self._members
        for group in range(start, stop):
            yield self._result(
                [self.source[row] for row in rows[ends[group] : ends[group + 1]].tolist()]
            )

    def _detect(self) -> Schema:
        found = self.source.first_objects()
        if not found:
            # No row is an object: their check says so.
            return Canonical()
        absent = sorted(set(self.columns).difference(*(row for _, row in found)))
        if absent:
            name, row = found[0]
            raise DataError(
                f"{name}: data.columns renames {absent}; found the columns {sorted(map(str, row))}."
            )
        rows: list[tuple[str, Row]] = []
        errors: list[DataError] = []
        for name, row in found:
            try:
                rows.append((name, self._parsed(name, row)[0]))
            except DataError as error:
                errors.append(error)
        if not rows:
            raise errors[0]
        return detect(rows)

    def _parsed(
        self, name: str, row: Mapping[Any, object]
    ) -> tuple[Mapping[Any, object], list[str]]:
        """Return a row with its columns renamed and parsed, and the columns that were."""
        return parse_texts(rename_columns(row, self.columns, name), name)

    def _convert(self, name: str, row: RawRow) -> Converted:
        given = check_object(row, name, "an object with prompt, responses and scores")
        renamed, parsed = self._parsed(name, given)
        odd = [] if self.source.in_cells else parsed
        notes = tuple(f"of a row whose {column} is a list written as text" for column in odd)
        try:
            converted = self.schema.convert(renamed, name)
            return Converted(converted.row, converted.notes + notes)
        except (DataError, SkippedRow):
            raise
        # A user's own schema may fail on a row in any way.
        except Exception as error:
            error.add_note(f"{name}: {type(self.schema).__name__}.convert failed on this row.")
            raise

    def _result(self, rows: list[tuple[str, RawRow]]) -> RowResult:
        first = rows[0][0]
        try:
            converted: Sequence[Converted] = [self._convert(name, row) for name, row in rows]
            if self._members is not None:
                converted = self.schema.gather(converted, first)
            whole = converted[0].row if self._members is None else _merged(converted, first)
            group = check_row(whole, first)
        except SkippedRow as skipped:
            return RowResult(first, skipped=str(skipped))
        except DataError as error:
            return RowResult(first, error=error)
        return RowResult(first, group=group, notes=tuple(n for c in converted for n in c.notes))

    def _group_rows(self) -> tuple[Any, Any]:
        """Return the row numbers sorted by conversation, and where each one's rows begin."""
        numbers: dict[bytes, int] = {}
        group_of_row = array("q")
        for name, row in self.source.rows(0, len(self.source)):
            try:
                whole = self._convert(name, row).row
                parts = [whole.get(column) for column in ("prompt", *CONTEXT)]
                content = dumps(parts, sort_keys=True, default=str).encode()
                key = blake2b(content, digest_size=16).digest()
            except (DataError, SkippedRow):
                # A group of its own, so that its error is reported for this row alone.
                key = name.encode()
            group_of_row.append(numbers.setdefault(key, len(numbers)))
        groups = np.frombuffer(group_of_row, dtype=np.int64)
        counts = np.bincount(groups, minlength=len(numbers))
        return np.argsort(groups, kind="stable"), np.concatenate([[0], np.cumsum(counts)])


def _merged(parts: Sequence[Converted], source: str) -> dict[str, object]:
    """Return the canonical row of one prompt's rows.

    Raises:
        DataError: if some rows say whether their response was cut and others do not.
        SkippedRow: if there is only one row.
    """
    if len(parts) == 1:
        raise SkippedRow("with a single response")
    rows = [part.row for part in parts]
    merged: dict[str, object] = {"prompt": rows[0]["prompt"]}
    names = dict.fromkeys(name for row in rows for name in row if name != "prompt")
    for name in names:
        values = [row.get(name) for row in rows]
        if name in RESPONSE_COLUMNS and all(value is None for value in values):
            continue
        if name in RESPONSE_COLUMNS:
            if any(value is None for value in values):
                found, expected = "null in some rows of the prompt", "a value in each, or in none"
                raise bad_field(source, name, found, expected, "Complete the column, or drop it.")
            merged[name] = [entry for value in values for entry in value]  # type: ignore[attr-defined]
        else:
            same = all(value == values[0] for value in values)
            merged[name] = values[0] if same else values
    return merged


# ---------------------------------------------------------------------------------- several files


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Files and how to read them.

    Attributes:
        files: sources; see `open_source`.
        schema: format of the rows. Defaults to the one that most of the first 100 rows fit.
        columns: columns to rename: the name in the source, and the name to read it as.
        default_split: split of a source of several splits that names none; see `open_source`.
    """

    files: Sequence[str]
    schema: Schema | None = None
    columns: Mapping[str, str] | None = None
    default_split: str | None = None

    def results(self, file: str) -> Iterator[RowResult]:
        """Read the groups of a file."""
        source = open_source(file, default_split=self.default_split)
        return GroupReader(source, schema=self.schema, columns=self.columns).results()

    def groups(self, reports: list[DataReport]) -> Iterator[PreferenceGroup]:
        """Yield the groups of all files; append to ``reports`` one for each file, as it is read."""
        for file in self.files:
            report = DataReport(file)
            reports.append(report)
            for result in self.results(file):
                group = result.count_in(report)
                if group is not None:
                    report.keep(len(group.responses))
                    yield group


def refuse_lost_rows(reports: Sequence[DataReport], bad_rows: BadRows) -> None:
    """Stop where no group is left, or rows cannot be used and are not to be dropped.

    Raises:
        DataError: with the first bad rows and the number of all.
    """
    whole = DataReport.total(reports)
    if whole.failed and bad_rows == "error":
        try:
            whole.check()
        except DataError as error:
            raise DataError(
                f"{error}\nNothing was written. --bad_rows drop leaves them out."
            ) from None
    if not whole.kept:
        raise DataError(f"{', '.join(r.data for r in reports)}: no group can be used.\n{whole}")
