"""Numbers of the groups that a check has read, as arrays; texts are not kept.

Shapes: ``G`` groups have ``R`` responses together. An array of shape (R,) holds one entry a
response, group after group.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from mpo_lightning.data.check.report import Flagged
from mpo_lightning.data.check.statistics import Bools, Floats, Integers
from mpo_lightning.data.conversation import response_text
from mpo_lightning.data.groups import PreferenceGroup
from mpo_lightning.data.prompt_identity import normalized, prompt_key
from mpo_lightning.losses import Partition, deviations

__all__ = ["GroupTable", "ScoredGroups", "ValueColumn"]

Item = TypeVar("Item", bound=np.generic)

NEAR_EMPTY = 3
# Different values of a column that get a number of their own.
NAMES = 1000
OTHER_NAMES = "(other)"
# Responses that are computed with at a time.
BLOCK = 1 << 17


class ValueColumn:
    """Values of one column, which holds a text a response or a text a row.

    Attributes:
        numbers: number of each different value; those after the first thousand share one.
        of_responses: number of each response's value, (R,); -1 where it has none.
        of_groups: number of each group's value, (G,); -1 where it has none.
    """

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self.of_responses = array("h")
        self.of_groups = array("h")

    def add(self, value: object, count: int) -> None:
        """Append the value of a group of ``count`` responses."""
        if isinstance(value, list) and len(value) == count:
            self.of_responses.extend(map(self._number, value))
            self.of_groups.append(-1)
        else:
            self.of_responses.extend([-1] * count)
            self.of_groups.append(self._number(value))

    def _number(self, value: object) -> int:
        if not isinstance(value, str):
            return -1
        if value not in self.numbers and len(self.numbers) >= NAMES:
            value = OTHER_NAMES
        return self.numbers.setdefault(value, len(self.numbers))


class GroupTable:
    """Numbers that are collected while groups are read.

    Args:
        by: names of the columns whose values are told apart.

    Attributes:
        files: number of each group's file, (G,), ascending.
        counts: responses of each group, (G,).
        prompt_keys: hash of each group's normalised prompt, (G,).
        prompt_chars: characters of its messages, (G,).
        prompt_tokens: tokens of its prompt, (G,); empty without a tokenizer.
        scores: score of each response, (R,).
        chars: its characters, (R,).
        tokens: its tokens, (R,); empty without a tokenizer.
        near_empty: numbers of the responses of at most three characters without the white space at
            the ends, counted from 0, ascending.
        exact_repeats: numbers of those that repeat an earlier one of their group to the letter.
        repeats: numbers of those that repeat an earlier one when both are normalised.
        repeated: number of the first such response, for each of ``repeats``.
        columns: values of each column of ``by``.
    """

    def __init__(self, by: Sequence[str]) -> None:
        self.files, self.counts = array("i"), array("i")
        self.prompt_keys, self.prompt_chars = array("Q"), array("i")
        self.prompt_tokens, self.tokens = array("i"), array("i")
        self.scores, self.chars = array("d"), array("i")
        self.near_empty, self.exact_repeats = array("q"), array("q")
        self.repeats, self.repeated = array("q"), array("q")
        self.columns = {name: ValueColumn() for name in by}
        # Place of each group, "file:row", as two numbers. A folder has several files.
        self._names: dict[str, int] = {}
        self._sources, self._rows = array("i"), array("q")

    def add(
        self, group: PreferenceGroup, file: int, tokens: tuple[int, list[int]] | None = None
    ) -> None:
        """Append a group.

        Args:
            group: checked.
            file: number of its file, no less than that of the group before.
            tokens: lengths in tokens of its prompt and of each response.
        """
        name, _, row = group.source.rpartition(":")
        self._sources.append(self._names.setdefault(name, len(self._names)))
        self._rows.append(int(row))
        self.files.append(file)
        self.counts.append(len(group.responses))
        self.prompt_keys.append(int.from_bytes(prompt_key(group.prompt, size=8)))
        prompt = group.prompt
        texts = [prompt] if isinstance(prompt, str) else list(map(response_text, prompt))
        self.prompt_chars.append(sum(map(len, texts)))
        if tokens is not None:
            self.prompt_tokens.append(tokens[0])
            self.tokens.extend(tokens[1])
        self._add_texts(list(map(response_text, group.responses)), first=len(self.scores))
        self.scores.extend(group.scores)
        for name, column in self.columns.items():
            column.add(group.extra.get(name), len(group.responses))

    def _add_texts(self, responses: Sequence[str], first: int) -> None:
        self.chars.extend(map(len, responses))
        for number, text in enumerate(responses, first):
            if len(text.strip()) <= NEAR_EMPTY:
                self.near_empty.append(number)
        texts = [normalized(text) for text in responses]
        if len(set(texts)) == len(texts):
            return
        exact: set[str] = set()
        same: dict[str, int] = {}
        for number, (response, text) in enumerate(zip(responses, texts, strict=True), first):
            if response in exact:
                self.exact_repeats.append(number)
            exact.add(response)
            if text in same:
                self.repeats.append(number)
                self.repeated.append(same[text])
            same.setdefault(text, number)

    def row(self, group: int) -> str:
        """Return "file:row" of a group, counted from 0."""
        return f"{list(self._names)[self._sources[group]]}:{self._rows[group]}"


@dataclass(frozen=True)
class ScoredGroups:
    """Scores of all groups, and the two sets that a partition rule makes of each.

    Groups that the rule gives no contrast have empty sets.

    Attributes:
        table: all other numbers of the groups.
        counts: responses of each group, (G,).
        scores: score of each response, (R,).
        chosen: whether it is chosen, (R,).
        rejected: whether it is rejected, (R,).
        deviations: its score minus its group's mean score, (R,).
        contrast: whether a group has both sets, (G,).
        equal: whether its scores are equal but for rounding, (G,).
    """

    table: GroupTable
    counts: Integers
    scores: Floats
    chosen: Bools
    rejected: Bools
    deviations: Floats
    contrast: Bools
    equal: Bools

    @classmethod
    def split(cls, table: GroupTable, partition: Partition) -> Self:
        """Split all groups of a table."""
        counts = np.asarray(table.counts, dtype=np.int64)
        scores = np.asarray(table.scores)
        chosen, rejected = np.zeros((2, len(scores)), dtype=np.bool_)
        contrast, equal = np.zeros((2, len(counts)), dtype=np.bool_)
        groups = cls(
            table, counts, scores, chosen, rejected, np.zeros(len(scores)), contrast, equal
        )
        for rows, slots in groups.blocks():
            block = torch.from_numpy(scores[slots])
            valid = torch.ones_like(block, dtype=torch.bool)
            sets = partition(block, valid)
            both = sets[0].any(1) & sets[1].any(1)
            delta = deviations(block, valid)
            chosen[slots], rejected[slots] = ((members & both[:, None]).numpy() for members in sets)
            groups.deviations[slots] = delta.numpy()
            contrast[rows], equal[rows] = both.numpy(), (delta == 0).all(1).numpy()
        return groups

    @cached_property
    def bounds(self) -> Integers:
        """Number of the first response of each group, (G + 1,), and at the end R."""
        return np.concatenate([[0], np.cumsum(self.counts)])

    def blocks(self) -> Iterator[tuple[Integers, Integers]]:
        """Yield numbers of groups of equal size n, (B,), and of their responses, (B, n).

        Every group comes once. Blocks are small, so that intermediate results take little memory.
        """
        by_size = np.argsort(self.counts, kind="stable")
        sizes, first = np.unique(self.counts[by_size], return_index=True)
        for size, groups in zip(sizes.tolist(), np.split(by_size, first[1:]), strict=False):
            for start in range(0, len(groups), max(BLOCK // size, 1)):
                block = groups[start : start + max(BLOCK // size, 1)]
                yield block, self.bounds[block][:, None] + np.arange(size)

    def spread(self, values: NDArray[Item]) -> NDArray[Item]:
        """Repeat a value of each group, (G,), for its responses, (R,)."""
        return np.repeat(values, self.counts)

    def sums(self, values: Floats) -> Floats:
        """Sum the values of each group's responses, (R,) to (G,)."""
        return np.add.reduceat(values, self.bounds[:-1])

    def highest(self, values: Floats) -> Floats:
        """Find the largest of the values of each group's responses, (R,) to (G,)."""
        return np.maximum.reduceat(values, self.bounds[:-1])

    def of_responses(self, responses: Integers) -> Integers:
        """Numbers of the groups that responses belong to, both counted from 0."""
        return np.searchsorted(self.bounds, responses, side="right") - 1

    def flagged(self, groups: Integers) -> Flagged:
        """Count numbers of groups, ascending, and name the rows of the first three groups."""
        first = np.unique(groups)[:3].tolist()
        return Flagged(len(groups), [self.table.row(group) for group in first])
