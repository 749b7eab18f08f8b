"""A file of trusted labels, and the checked responses that they belong to."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mpo_lightning.data.check.report import Flagged, TrustedReport
from mpo_lightning.data.check.trusted import compare_with_trusted
from mpo_lightning.data.conversation import response_text
from mpo_lightning.data.groups import DataError, PreferenceGroup
from mpo_lightning.data.prompt_identity import normalized, prompt_key
from mpo_lightning.data.reading import Sources
from mpo_lightning.data.report import DataReport
from mpo_lightning.data.schemas.detect import Canonical
from mpo_lightning.data.sources import open_source

__all__ = ["TrustedLabels"]

LENGTH = "length in characters"


@dataclass
class _Row:
    """Labels of one row: whether each one's response was found, and whether the prompt was."""

    source: str
    texts: list[str]
    scores: list[float]
    matched: list[bool]
    known: bool = False


class TrustedLabels:
    """Labels of a file, to be matched with groups as these are read.

    Prompts are the same if they are when normalised. A label belongs to the responses that are the
    same to the letter or, if there are none, when normalised.

    Args:
        sources: the one file; rows that are canonical need none of its other settings.
        by: columns of the groups that are compared, with a number or text a response.

    Raises:
        DataError: if it cannot be read, or no row of it can be used.
    """

    def __init__(self, sources: Sources, by: Sequence[str]) -> None:
        (self.file,) = sources.files
        self.read = DataReport(self.file)
        self.rows: dict[bytes, list[_Row]] = {}
        first = open_source(self.file, default_split=sources.default_split).first_objects(1)
        if first and Canonical.required <= first[0][1].keys():
            sources = replace(sources, schema=None, columns=None)
        for result in sources.results(self.file):
            group = result.count_in(self.read)
            if group is not None:
                texts = list(map(response_text, group.responses))
                row = _Row(group.source, texts, group.scores, [False] * len(texts))
                self.rows.setdefault(prompt_key(group.prompt), []).append(row)
        if not self.rows:
            found = "\n".join(self.read.failures()) or str(self.read)
            raise DataError(f"{self.file}: no row of trusted labels can be used.\n{found}")
        # Of each pair of a checked group and a row of labels, one entry a response.
        self._scores: list[float] = []
        self._trusted: list[float] = []
        self._groups: list[int] = []
        self._prompts: list[int] = []
        self._numbers: dict[bytes, int] = {}
        self._columns: dict[str, list[object]] = {name: [] for name in dict.fromkeys([LENGTH, *by])}

    def match(self, group: PreferenceGroup) -> None:
        """Find the labels of a checked group."""
        key = prompt_key(group.prompt)
        if key not in self.rows:
            return
        texts = list(map(response_text, group.responses))
        exact, alike = _positions(texts), _positions([normalized(text) for text in texts])
        for row in self.rows[key]:
            row.known = True
            found: list[list[float]] = [[] for _ in texts]
            for number, (text, score) in enumerate(zip(row.texts, row.scores, strict=True)):
                for position in exact.get(text) or alike.get(normalized(text), []):
                    row.matched[number] = True
                    found[position].append(score)
            if any(found):
                self._add(group, key, texts, found)

    def _add(
        self,
        group: PreferenceGroup,
        key: bytes,
        texts: Sequence[str],
        found: Sequence[Sequence[float]],
    ) -> None:
        number = self._groups[-1] + 1 if self._groups else 0
        self._groups += [number] * len(texts)
        self._prompts += [self._numbers.setdefault(key, len(self._numbers))] * len(texts)
        self._scores += group.scores
        # A response that is labelled twice in a row has the mean.
        self._trusted += [sum(each) / len(each) if each else math.nan for each in found]
        for name, values in self._columns.items():
            given = list(map(len, texts)) if name == LENGTH else group.extra.get(name)
            whole = isinstance(given, list) and len(given) == len(texts)
            entries = given if whole and isinstance(given, list) else [None] * len(texts)
            values += [e if isinstance(e, str | int | float) else None for e in entries]

    def report(self, checked: Sequence[str]) -> TrustedReport:
        """Compare the groups that were matched; ``checked`` are the names of their files.

        Raises:
            DataError: if no label was matched, or never two of a group.
        """
        rows = [row for rows in self.rows.values() for row in rows]
        for row in rows:
            if any(row.matched):
                self.read.keep(sum(row.matched))
        labels = sum(len(row.texts) for row in rows)
        prompts = _unmatched([row for row in rows if not row.known])
        responses = _unmatched([row for row in rows if row.known])
        if not self.read.kept:
            what = "its responses to them are others" if responses.count else "its prompts differ"
            raise DataError(
                f"{self.file}: none of its {labels:,} labels belongs to a response of "
                f"{', '.join(checked)}: {what} (first: {rows[0].source}). Labels are matched by "
                "prompt and response: take both from the checked rows as they are."
            )
        of_groups = np.bincount(self._groups, ~np.isnan(self._trusted))
        if of_groups.max() < 2:
            raise DataError(
                f"{self.file}: {self.read.responses:,} of its labels belong to checked responses, "
                f"but never two to the same group (first: {rows[0].source}). Label two responses "
                "or more of each prompt: scores are compared within groups."
            )
        comparison = compare_with_trusted(
            self._scores,
            self._trusted,
            self._groups,
            {name: values for name, values in self._columns.items() if _any(values)},
            prompts=self._prompts,
        )
        return TrustedReport(
            read=self.read,
            labels=labels,
            unknown_prompts=prompts,
            unknown_responses=responses,
            comparison=comparison,
        )


def _positions(texts: Sequence[str]) -> Mapping[str, list[int]]:
    positions: dict[str, list[int]] = {}
    for position, text in enumerate(texts):
        positions.setdefault(text, []).append(position)
    return positions


def _unmatched(rows: Sequence[_Row]) -> Flagged:
    missed = [row for row in rows if not all(row.matched)]
    count = sum(row.matched.count(False) for row in missed)
    return Flagged(count, [row.source for row in missed[:3]])


def _any(values: Sequence[object]) -> bool:
    return any(value is not None for value in values)
