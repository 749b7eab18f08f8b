"""Which columns a public data set has, and how a row of it becomes the canonical row."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from mpo_lightning.data.groups import DataError

__all__ = ["Canonical", "Converted", "Schema", "SkippedRow", "detect"]

Row = Mapping[str, object]


class SkippedRow(Exception):  # noqa: N818 (it is no error: the row is counted and reported)
    """A row that a schema leaves out by its settings; the message is the reason."""


@dataclass(frozen=True)
class Converted:
    """A row in canonical form.

    Attributes:
        row: ``prompt``, ``responses``, ``scores``, optionally ``truncated``, and other columns,
            which pass through.
        notes: what was changed or is odd, one entry a response; counted in the report.
    """

    row: dict[str, object]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Schema(ABC):
    """How rows of one public shape are read.

    Subclass it for a shape of your own; ``class_path`` in a configuration names the subclass.
    """

    # Shown where no schema fits.
    columns: ClassVar[str]
    # True where a row holds one response; rows with the same prompt make a group then, in the order
    # of the file, and `convert` gives each as a group of one.
    one_response_a_row: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def fits(cls, columns: frozenset[str], row: Row) -> bool:
        """Whether rows with these columns are of this shape; ``row`` is the first of them."""

    @abstractmethod
    def convert(self, row: Row, source: str) -> Converted:
        """The canonical row.

        Args:
            row: as it was read, columns renamed where the user asked for it.
            source: "file:row", for messages.

        Raises:
            DataError: naming the row, the field, what was found, what was expected and what to do.
            SkippedRow: if the settings leave the row out.
        """


@dataclass(frozen=True, kw_only=True)
class Canonical(Schema):
    """The package's own: ``prompt``, ``responses``, ``scores``."""

    columns: ClassVar[str] = "prompt, responses, scores"

    @classmethod
    def fits(cls, columns: frozenset[str], row: Row) -> bool:
        """Whether these are the canonical columns."""
        return columns >= {"prompt", "responses", "scores"}

    def convert(self, row: Row, source: str) -> Converted:
        """The row itself."""
        return Converted(dict(row))


SCHEMAS: tuple[type[Schema], ...] = (Canonical,)


def detect(row: Row, source: str, schemas: Iterable[type[Schema]] = SCHEMAS) -> Schema:
    """The schema whose columns a row has.

    Raises:
        DataError: if none fits, or more than one, with the columns found and the schemas known.
    """
    columns = frozenset(map(str, row))
    fitting = [schema for schema in schemas if schema.fits(columns, row)]
    if len(fitting) == 1:
        return fitting[0]()
    known = "\n".join(f"  {schema.__name__}: {schema.columns}" for schema in schemas)
    fits = " and ".join(schema.__name__ for schema in fitting) or "no schema"
    raise DataError(
        f"{source}: the columns {sorted(columns)} fit {fits}. Name the schema (data.schema), or "
        f"rename columns (data.columns). Known are\n{known}"
    )
