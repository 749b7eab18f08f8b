"""The known schemas, and detection of the one that a row fits."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from mpo_lightning.data.groups import DataError
from mpo_lightning.data.schemas.base import Converted, Row, Schema
from mpo_lightning.data.schemas.conversations import is_messages, messages
from mpo_lightning.data.schemas.lists import BestOf, Generations, Nectar, Numbered, OnPolicy, Ranked
from mpo_lightning.data.schemas.pairs import (
    Arena,
    HelpSteer2Preference,
    HelpSteer3,
    Pairs,
    SafePairs,
    ScoredPairs,
    TranscriptPairs,
)
from mpo_lightning.data.schemas.single_response import HelpSteer2, ScoredResponses, Unpaired
from mpo_lightning.data.schemas.ultrafeedback import UltraFeedback

__all__ = ["SCHEMAS", "Canonical", "detect"]


@dataclass(frozen=True, kw_only=True)
class Canonical(Schema):
    """Canonical rows: ``prompt``, ``responses``, ``scores``."""

    columns: ClassVar[str] = "prompt, responses, scores"
    required: ClassVar[frozenset[str]] = frozenset({"prompt", "responses", "scores"})

    def convert(self, row: Row, source: str) -> Converted:
        """Return the row itself; messages lose fields that are null."""
        prompt = row.get("prompt")
        if is_messages(prompt):
            return Converted({**row, "prompt": messages(prompt, "prompt", source)})
        return Converted(dict(row))


SCHEMAS: tuple[type[Schema], ...] = (
    Canonical,
    UltraFeedback,
    OnPolicy,
    Generations,
    Numbered,
    Nectar,
    Ranked,
    BestOf,
    Pairs,
    ScoredPairs,
    TranscriptPairs,
    HelpSteer2Preference,
    HelpSteer3,
    SafePairs,
    Arena,
    HelpSteer2,
    ScoredResponses,
    Unpaired,
)


def detect(row: Row, source: str, schemas: Iterable[type[Schema]] = SCHEMAS) -> Schema:
    """Return the schema that a row fits.

    Raises:
        DataError: if none fits, or more than one, with the columns found and the known schemas.
    """
    schemas = tuple(schemas)
    columns = frozenset(map(str, row))
    fitting = [schema for schema in schemas if schema.fits(columns, row)]
    if len(fitting) == 1:
        return fitting[0]()
    known = "\n".join(f"  {schema.__name__}: {schema.columns}" for schema in schemas)
    fits = " and ".join(schema.__name__ for schema in fitting) or "no schema"
    raise DataError(
        f"{source}: the columns {sorted(columns)} fit {fits}. Name the schema (data.schema), or "
        f"rename columns (data.columns). Known schemas:\n{known}"
    )
