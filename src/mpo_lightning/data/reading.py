"""From the rows of a source to checked groups, with what became of every row."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mpo_lightning.data.groups import DataError, PreferenceGroup, check_row
from mpo_lightning.data.schemas import Schema, SkippedRow, detect
from mpo_lightning.data.sources import read_rows

__all__ = ["Outcome", "read_outcomes"]


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


def read_outcomes(
    data: str,
    *,
    schema: Schema | None = None,
    columns: Mapping[str, str] | None = None,
    default_split: str = "train",
) -> Iterator[Outcome]:
    """Read a source row by row; a bad row is an outcome, not the end.

    Args:
        data: file, folder or hub id; see `read_rows`.
        schema: shape of the rows; found from the first row's columns if none.
        columns: other names of columns: the name in the source, and the name to read it as.
        default_split: split of a hub id or saved DatasetDict that names none.

    Raises:
        DataError: if the source cannot be read at all, or no schema fits it.
    """
    for source, row in read_rows(data, default_split=default_split):
        if isinstance(row, Mapping):
            named = {(columns or {}).get(name, name): value for name, value in row.items()}
            schema = schema or detect(named, source)
            row = named
        try:
            assert schema is not None
            converted = schema.convert(row, source)
            group = check_row(converted.row, source)
        except SkippedRow as skipped:
            yield Outcome(source, skipped=str(skipped))
        except DataError as error:
            yield Outcome(source, error=error)
        else:
            yield Outcome(source, group=group, notes=converted.notes)
