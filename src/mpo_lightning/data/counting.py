"""Groups of a source, and a count of the rows that gave none."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Literal

from mpo_lightning.data.groups import DataError, PreferenceGroup
from mpo_lightning.data.reading import Outcome, read_outcomes
from mpo_lightning.data.report import DataReport
from mpo_lightning.data.schemas.base import Schema

__all__ = [
    "BadRows",
    "Sources",
    "count_outcome",
    "describe",
    "failures",
    "refuse_lost_rows",
    "total",
]

BadRows = Literal["error", "drop"]

# Different reasons and notes that are told apart.
REASONS = 200
OTHER_REASONS = "(for other reasons)"


def count_outcome(outcome: Outcome, report: DataReport) -> PreferenceGroup | None:
    """The group, or none; the report counts what became of the row."""
    report.groups += 1
    if outcome.error is not None:
        report.fail(outcome.error)
    if outcome.skipped is not None:
        known = outcome.skipped in report.dropped or len(report.dropped) < REASONS
        report.drop(outcome.skipped if known else OTHER_REASONS, outcome.source)
    for note in outcome.notes:
        known = note in report.changed or len(report.changed) < REASONS
        report.note(note if known else OTHER_REASONS, outcome.source)
    return outcome.group


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Files and how to read them.

    Attributes:
        files: sources; see `open_source`.
        schema: shape of the rows; found from the first row's columns if none.
        columns: other names of columns: the name in the source, and the name to read it as.
        default_split: split of a hub id or saved DatasetDict that names none.
    """

    files: Sequence[str]
    schema: Schema | None = None
    columns: Mapping[str, str] | None = field(default=None)
    default_split: str = "train"

    def outcomes(self, file: str) -> Iterator[Outcome]:
        """What becomes of each group of a file."""
        return read_outcomes(
            file, schema=self.schema, columns=self.columns, default_split=self.default_split
        )

    def groups(self, reports: list[DataReport]) -> Iterator[PreferenceGroup]:
        """The groups of all files; a report for each file is appended, and counts as they come."""
        for file in self.files:
            report = DataReport(file)
            reports.append(report)
            for outcome in self.outcomes(file):
                group = count_outcome(outcome, report)
                if group is not None:
                    report.kept += 1
                    report.responses += len(group.responses)
                    yield group


def failures(report: DataReport) -> list[str]:
    """Lines on the rows that cannot be used: how many, and what is wrong with the first."""
    if not report.failed:
        return []
    more = report.failed - len(report.errors)
    return [
        f"{report.failed:,} rows cannot be used:",
        *(f"  {error}" for error in report.errors),
        *([f"  ... and {more:,} more"] if more else []),
    ]


def describe(report: DataReport) -> str:
    """The report as text, with the rows that cannot be used."""
    return "\n".join([str(report), *(f"  {line}" for line in failures(report))])


def total(reports: Sequence[DataReport]) -> DataReport:
    """The reports of several files as one."""

    def together(whole: DataReport, part: DataReport) -> DataReport:
        whole.add(part)
        return whole

    return reduce(together, reports, DataReport("total"))


def refuse_lost_rows(reports: Sequence[DataReport], bad_rows: BadRows) -> None:
    """Stop where no group is left, or bad rows are not to be dropped.

    Raises:
        DataError: with the first bad rows and the number of all.
    """
    whole = total(reports)
    if whole.failed and bad_rows == "error":
        try:
            whole.check()
        except DataError as error:
            raise DataError(
                f"{error}\nNothing was written. --bad_rows drop leaves them out."
            ) from None
    if not whole.kept:
        raise DataError(f"{', '.join(r.data for r in reports)}: no group can be used.\n{whole}")
