"""The known schemas, and detection of the one that a row fits."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from mpo_lightning.data.groups import DataError
from mpo_lightning.data.schemas.alpaca_eval import AlpacaEval
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
from mpo_lightning.data.schemas.rejected import Rejected
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
    Rejected,
    HelpSteer2Preference,
    HelpSteer3,
    SafePairs,
    Arena,
    HelpSteer2,
    ScoredResponses,
    Unpaired,
    AlpacaEval,
)


def detect(rows: Sequence[tuple[str, Row]], schemas: Iterable[type[Schema]] = SCHEMAS) -> Schema:
    """Return the schema that most of some rows fit, so that a bad one among them decides nothing.

    Args:
        rows: "file:row" and row, of at least one.
        schemas: the schemas to choose from.

    Raises:
        DataError: if none fits, or more than one, with the columns found and the known schemas.
    """
    schemas = tuple(schemas)
    fitting = [
        tuple(schema for schema in schemas if schema.fits(frozenset(map(str, row)), row))
        for _, row in rows
    ]
    # Of as many, the first.
    most, _ = Counter(filter(None, fitting)).most_common(1)[0] if any(fitting) else ((), 0)
    if len(most) == 1:
        return most[0]()
    # If none fits, the most usual columns are shown.
    usual, _ = Counter(frozenset(row) for _, row in rows).most_common(1)[0]
    at = fitting.index(most) if most else [frozenset(row) for _, row in rows].index(usual)
    source, row = rows[at]
    known = "\n".join(f"  {schema.__name__}: {schema.columns}" for schema in schemas)
    fits = " and ".join(schema.__name__ for schema in most) or "no schema"
    unscored = {"prompt", "responses"} <= set(row) and not most
    hint = " They have no scores: `mpo-lightning score` gives them some." if unscored else ""
    raise DataError(
        f"{source}: the columns {sorted(map(str, row))} fit {fits}.{hint} Name the schema "
        f"(data.schema), or rename columns (data.columns). Known schemas:\n{known}"
    )
