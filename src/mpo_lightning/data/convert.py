"""Conversion of scored groups of any known format to one file of canonical rows."""

from pathlib import Path

from mpo_lightning.checks import check_arguments
from mpo_lightning.data.reading import BadRows, Sources, refuse_lost_rows
from mpo_lightning.data.report import DataReport
from mpo_lightning.data.writing import arrow_schema, check_target, open_writers

__all__ = ["convert"]


def convert(
    sources: Sources, out: str | Path, *, bad_rows: BadRows = "error", force: bool = False
) -> list[DataReport]:
    """Write the groups of all files to one, which appears when it is complete.

    Reading the result gives the same groups, other columns included. Parquet has the same columns
    in every row: one that a row lacks reads back as null. Where some prompts are conversations it
    holds the others as one user message each, which is noted in the report.

    Args:
        sources: files to read. For Parquet they are read twice, to find the types of the columns.
        out: a ``.jsonl`` or ``.parquet`` file.
        bad_rows: "error" writes nothing if a row cannot be used; "drop" leaves such rows out.
        force: whether to overwrite an existing file.

    Returns:
        the report on the rows of each file.

    Raises:
        DataError: if rows are bad, no group remains, the file exists already, or its format cannot
            hold a column.
    """
    check_arguments(convert, locals())
    path = Path(out).expanduser()
    check_target(path, force=force)
    schema = arrow_schema(sources.groups([])) if path.suffix == ".parquet" else None
    path.parent.mkdir(parents=True, exist_ok=True)
    reports: list[DataReport] = []
    with open_writers([path], schema) as (writer,):
        for group in sources.groups(reports):
            writer.write(group, reports[-1])
        refuse_lost_rows(reports, bad_rows)
    return reports
