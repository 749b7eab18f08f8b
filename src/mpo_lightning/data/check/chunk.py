"""A chunk of groups as tables, and statistics of it by length and by column."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mpo_lightning.data.check.report import LengthBias, OfGroups, OfResponses
from mpo_lightning.data.check.streaming import Bools, Covariance, Floats, Integers
from mpo_lightning.data.groups import PreferenceGroup
from mpo_lightning.losses import Partition, deviations

__all__ = ["BiasTally", "Chunk", "ColumnTally"]

# Values of a column that are told apart.
NAMES = 1000
OTHER_NAMES = "(other)"


@dataclass(frozen=True)
class Chunk:
    """Groups as tables, (B, N); slots that hold no response are False in ``valid``.

    Groups that the partition gives no contrast have empty sets.
    """

    places: list[str]
    scores: Floats
    valid: Bools
    counts: Integers
    chosen: Bools
    rejected: Bools
    delta: Floats
    contrast: Bools

    @classmethod
    def of(
        cls, places: list[str], scores: list[float], counts: list[int], partition: Partition
    ) -> "Chunk":
        """The table of scores given group after group."""
        number = np.array(counts, dtype=np.int64)
        valid: Bools = np.arange(number.max()) < number[:, None]
        table = np.zeros(valid.shape)
        table[valid] = scores
        tensors = torch.from_numpy(table), torch.from_numpy(valid)
        chosen, rejected = (members.numpy() for members in partition(*tensors))
        contrast: Bools = np.logical_and(chosen.any(1), rejected.any(1))
        return cls(
            places,
            table,
            valid,
            number,
            chosen & contrast[:, None],
            rejected & contrast[:, None],
            deviations(*tensors).numpy(),
            contrast,
        )

    def table(self, values: Sequence[int]) -> Integers:
        """Other numbers of the responses, group after group, as a table; zero on padding."""
        result = np.zeros(self.valid.shape, dtype=np.int64)
        result[self.valid] = values
        return result


class BiasTally:
    """How scores go with lengths."""

    def __init__(self) -> None:
        self.groups = 0
        self.sum = 0.0
        self.pooled = Covariance()
        self.lengths = {"chosen": 0, "rejected": 0}
        self.counts = {"chosen": 0, "rejected": 0}

    def add(self, chunk: Chunk, lengths: Integers) -> None:
        """Take in the lengths of a chunk's responses, (B, N)."""
        valid = chunk.valid
        self.pooled.add(chunk.scores[valid], lengths[valid].astype(np.float64))
        for name, members in (("chosen", chunk.chosen), ("rejected", chunk.rejected)):
            self.lengths[name] += int(lengths[members].sum())
            self.counts[name] += int(members.sum())
        mean = lengths.sum(1, keepdims=True) / chunk.counts[:, None]
        centred = np.where(valid, lengths - mean, 0.0)
        # Whole numbers: whether they vary is decided exactly.
        varies = (np.where(valid, lengths, lengths[:, :1]) != lengths[:, :1]).any(1)
        used = varies & chunk.contrast
        delta, centred = _unit_rows(chunk.delta[used]), _unit_rows(centred[used])
        self.groups += int(used.sum())
        self.sum += float((delta * centred).sum())

    def report(self) -> LengthBias:
        """The correlations and means."""

        def mean(name: str) -> float | None:
            return self.lengths[name] / self.counts[name] if self.counts[name] else None

        return LengthBias(
            groups=self.groups,
            within=self.sum / self.groups if self.groups else None,
            pooled=self.pooled.correlation,
            chosen=mean("chosen"),
            rejected=mean("rejected"),
        )


def _unit_rows(rows: Floats) -> Floats:
    # Divided by the largest first, so that squares neither overflow nor vanish.
    rows = rows / np.abs(rows).max(1, keepdims=True, initial=0.0)
    unit: Floats = rows / np.sqrt(np.square(rows).sum(1, keepdims=True))
    return unit


class ColumnTally:
    """Scores by the values of one column: one a response, or one a row."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.names: dict[str, int] = {}
        self.sums: dict[str, Floats] = {}
        self._of_responses: list[int] = []
        self._of_groups: list[int] = []

    def add(self, group: PreferenceGroup) -> None:
        """Take in a group's value, or values; -1 stands for none."""
        value = group.extra.get(self.name)
        count = len(group.responses)
        if isinstance(value, list) and len(value) == count:
            self._of_responses += [self._number(v) if isinstance(v, str) else -1 for v in value]
            self._of_groups.append(-1)
        else:
            self._of_responses += [-1] * count
            self._of_groups.append(self._number(value) if isinstance(value, str) else -1)

    def _number(self, name: str) -> int:
        number = self.names.get(name)
        if number is None:
            name = name if len(self.names) < NAMES else OTHER_NAMES
            number = self.names.setdefault(name, len(self.names))
        return number

    def flush(self, chunk: Chunk) -> None:
        """Take in the scores of the groups since the last chunk."""
        of_responses, of_groups = np.array(self._of_responses), np.array(self._of_groups)
        self._of_responses, self._of_groups = [], []
        valid, contrast = chunk.valid, chunk.contrast
        best = chunk.scores == np.where(valid, chunk.scores, -np.inf).max(1, keepdims=True)
        contrasted = np.broadcast_to(contrast[:, None], valid.shape)[valid]
        known = of_responses >= 0
        self._sum("responses", of_responses[known])
        self._sum("scores", of_responses[known], chunk.scores[valid][known])
        self._sum("deviations", of_responses[known], chunk.delta[valid][known])
        for name, flags in (
            ("contrasted", contrasted),
            ("chosen", chunk.chosen[valid]),
            ("best", best[valid] & contrasted),
        ):
            self._sum(name, of_responses[known & flags])
        known = of_groups >= 0
        numbers = of_groups[known]
        self._sum("groups", numbers)
        self._sum("of groups", numbers, chunk.counts[known].astype(np.float64))
        self._sum("scores of groups", numbers, chunk.scores.sum(1)[known])
        self._sum("squares", numbers, np.square(chunk.delta).sum(1)[known])
        self._sum("equal", of_groups[known & ~contrast])

    def _sum(self, what: str, numbers: Integers, values: Floats | None = None) -> None:
        added = np.bincount(numbers, values, minlength=len(self.names)).astype(np.float64)
        before = self.sums.get(what, np.zeros(0))
        added[: len(before)] += before
        self.sums[what] = added

    def of_responses(self) -> list[OfResponses]:
        """Of each value that belongs to responses, most frequent first."""
        result = []
        for name, i in self.names.items():
            count, contrasted = (int(self.sums[what][i]) for what in ("responses", "contrasted"))
            if count:
                result.append(
                    OfResponses(
                        name=name,
                        responses=count,
                        mean=float(self.sums["scores"][i] / count),
                        deviation=float(self.sums["deviations"][i] / count),
                        contrasted=contrasted,
                        chosen=float(self.sums["chosen"][i]) / contrasted if contrasted else None,
                        best=float(self.sums["best"][i]) / contrasted if contrasted else None,
                    )
                )
        return sorted(result, key=lambda of: -of.responses)

    def of_groups(self) -> list[OfGroups]:
        """Of each value that belongs to rows, most frequent first."""
        result = []
        for name, i in self.names.items():
            groups, responses = (int(self.sums[what][i]) for what in ("groups", "of groups"))
            if groups:
                result.append(
                    OfGroups(
                        name=name,
                        groups=groups,
                        responses=responses,
                        mean=float(self.sums["scores of groups"][i] / responses),
                        std=float(np.sqrt(self.sums["squares"][i] / responses)),
                        equal=int(self.sums["equal"][i]),
                    )
                )
        return sorted(result, key=lambda of: -of.groups)
