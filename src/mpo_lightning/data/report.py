"""Report on the rows of a source: nothing is dropped or changed without being counted in it."""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from mpo_lightning.data.groups import SHOWN_ERRORS, DataError, error_lines
from mpo_lightning.printable import printable

__all__ = ["BadRows", "DataReport"]

BadRows = Literal["error", "drop"]

# Rows that are named for each reason.
EXAMPLES = 3
# Different reasons that are told apart.
REASONS = 200
OTHER_REASONS = "(for other reasons)"


@dataclass
class DataReport:
    """Counts over the rows of one source; reports on its parts add up.

    Attributes:
        data: the source.
        groups: groups (rows, where a command works on rows) read.
        kept: groups that remain.
        responses: responses in the groups that remain.
        dropped: groups dropped, by reason.
        changed: responses dropped or cut, and oddities that were left, by reason.
        examples: the first rows for each reason.
        failed: groups that cannot be used.
        errors: messages of the first of these.
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

    def keep(self, responses: int) -> None:
        """Count a group that remains."""
        self.kept += 1
        self.responses += responses

    def drop(self, reason: str, source: str) -> None:
        """Count a dropped group."""
        self._count(self.dropped, reason, [source], 1)

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
            self._count(self.dropped, reason, first, int(dropped.sum()))

    def note(self, reason: str, source: str, count: int = 1) -> None:
        """Count responses that were dropped or cut, or that are odd."""
        self._count(self.changed, reason, [source], count)

    def fail(self, error: DataError) -> None:
        """Count a group that cannot be used."""
        self.failed += 1
        if len(self.errors) < SHOWN_ERRORS:
            self.errors.append(str(error))

    def _count(self, counts: Counter[str], reason: str, sources: Iterable[str], count: int) -> None:
        if not count:
            return
        if reason not in counts and len(counts) >= REASONS:
            reason = OTHER_REASONS
        counts[reason] += count
        examples = self.examples.setdefault(reason, [])
        for source in sources:
            if len(examples) < EXAMPLES and source not in examples:
                examples.append(source)

    def add(self, part: Self) -> None:
        """Add the report on the groups that follow."""
        self.groups += part.groups
        self.kept += part.kept
        self.responses += part.responses
        for whole, counts in ((self.dropped, part.dropped), (self.changed, part.changed)):
            for reason, count in counts.items():
                self._count(whole, reason, part.examples[reason], count)
        self.failed += part.failed
        self.errors = (self.errors + part.errors)[:SHOWN_ERRORS]

    @classmethod
    def total(cls, reports: Iterable[Self]) -> Self:
        """Return the sum of reports on several files."""
        whole = cls("total")
        for report in reports:
            whole.add(report)
        return whole

    def check(self, bad_rows: BadRows = "error") -> None:
        """Stop where groups cannot be used, unless these are to be dropped, or none remains.

        Raises:
            DataError: with the first errors and the number of all.
        """
        if self.failed and bad_rows == "error":
            raise DataError(self.errors[0] if self.failed == 1 else "\n".join(self.failures()))
        if not self.kept:
            raise DataError(f"No group of {self.data} can be used.\n{self}")

    def failures(self) -> list[str]:
        """Return lines on the groups that cannot be used: their number and the first errors."""
        return error_lines(self.errors, self.failed) if self.failed else []

    def to_json(self) -> str:
        """Return the report as JSON, for `from_json`."""
        return json.dumps(vars(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Return the report that `to_json` wrote."""
        values = json.loads(text)
        return cls(**values | {name: Counter(values[name]) for name in ("dropped", "changed")})

    def summary(
        self, kept: str = "groups", dropped: str = "groups dropped", changed: str = "responses"
    ) -> str:
        """Return the counts as text.

        Args:
            kept: title of the groups that remain.
            dropped: title of the dropped groups.
            changed: title of the changed responses.
        """
        mean = self.responses / self.kept if self.kept else 0.0
        lines = [f"{self.kept} of {self.groups} {kept}, {mean:.1f} responses each"]
        for title, counts in ((dropped, self.dropped), (changed, self.changed)):
            for reason, count in counts.items():
                where = ", ".join(self.examples[reason])
                lines.append(f"  {title}: {count} {reason} (first: {where})")
        if self.failed:
            lines.append(f"  {dropped}: {self.failed} that cannot be used ({self.errors[0]})")
        return "\n".join(lines)

    def __str__(self) -> str:
        return printable(f"{self.data}: {self.summary()}")
