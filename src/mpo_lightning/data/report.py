"""What became of the rows of a source: nothing is dropped without being counted here."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray

from mpo_lightning.data.groups import DataError

__all__ = ["DataReport"]

# Rows that are named for each reason, and errors that are shown.
EXAMPLES = 3
SHOWN_ERRORS = 10


@dataclass
class DataReport:
    """Counts over the rows of one source; reports of its parts add up.

    Attributes:
        data: the source.
        groups: groups read.
        kept: groups that remain.
        responses: responses that remain.
        dropped: groups dropped, by reason.
        changed: responses dropped or cut, and oddities that were kept, by reason.
        examples: the first rows of each reason.
        failed: groups that cannot be used.
        errors: what is wrong with the first of them.
    """

    data: str
    groups: int = 0
    kept: int = 0
    responses: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    failed: int = 0
    errors: list[str] = field(default_factory=list)

    def drop(self, reason: str, source: str) -> None:
        """Count a dropped group."""
        self.drop_all(reason, [source], 1)

    def drop_all(self, reason: str, sources: list[str], count: int) -> None:
        """Count dropped groups; ``sources`` are the first of them."""
        if count:
            self.dropped[reason] += count
            for source in sources:
                self._example(reason, source)

    def drop_without_contrast(
        self,
        contrast: NDArray[np.bool_],
        equal: NDArray[np.bool_],
        rule: str,
        source: Callable[[int], str],
    ) -> None:
        """Count the groups that a rule gives no contrast, under the reason why.

        Args:
            contrast: whether each group has a contrast, (G,).
            equal: whether its scores are all equal, (G,).
            rule: name of the loss or partition rule.
            source: gives "file:row" of a group by its number.
        """
        for reason, dropped in (
            ("with all scores equal", ~contrast & equal),
            (f"whose scores {rule} has no contrast for", ~contrast & ~equal),
        ):
            first = [source(group) for group in np.flatnonzero(dropped)[:EXAMPLES].tolist()]
            self.drop_all(reason, first, int(dropped.sum()))

    def note(self, reason: str, source: str, count: int = 1) -> None:
        """Count responses that were dropped or cut, or that are odd."""
        if count:
            self.changed[reason] += count
            self._example(reason, source)

    def fail(self, error: DataError) -> None:
        """Count a group that cannot be used."""
        self.failed += 1
        if len(self.errors) < SHOWN_ERRORS:
            self.errors.append(str(error))

    def _example(self, reason: str, source: str) -> None:
        examples = self.examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            examples.append(source)

    def add(self, part: Self) -> None:
        """Take in the report of the groups that follow."""
        self.groups += part.groups
        self.kept += part.kept
        self.responses += part.responses
        self.dropped += part.dropped
        self.changed += part.changed
        for reason, sources in part.examples.items():
            for source in sources:
                self._example(reason, source)
        self.failed += part.failed
        self.errors = (self.errors + part.errors)[:SHOWN_ERRORS]

    def check(self) -> None:
        """Stop where groups cannot be used, or none remains.

        Raises:
            DataError: with the first errors and the number of all.
        """
        if self.failed == 1:
            raise DataError(self.errors[0])
        if self.failed:
            shown = "\n".join(f"  {line}" for line in self.errors)
            more = self.failed - len(self.errors)
            and_more = f"\n  ... and {more} more" * (more > 0)
            raise DataError(f"{self.failed} rows cannot be used:\n{shown}{and_more}")
        if not self.kept:
            raise DataError(f"No group of {self.data} can be used.\n{self}")

    def to_json(self) -> str:
        """As JSON, which `from_json` reads."""
        return json.dumps(vars(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The report that `to_json` wrote."""
        values = json.loads(text)
        for name in ("dropped", "changed"):
            values[name] = Counter(values[name])
        return cls(**values)

    def __str__(self) -> str:
        """The report as text."""
        mean = self.responses / self.kept if self.kept else 0.0
        lines = [f"{self.data}: {self.kept} of {self.groups} groups, {mean:.1f} responses each"]
        for what, counts in (("groups dropped", self.dropped), ("responses", self.changed)):
            for reason, count in counts.items():
                where = ", ".join(self.examples[reason])
                lines.append(f"  {what}: {count} {reason} (first: {where})")
        return "\n".join(lines)
