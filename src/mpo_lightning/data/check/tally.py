"""The statistics of a check, chunk by chunk: groups come in and are not kept."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from mpo_lightning.data.check.chunk import BiasTally, Chunk, ColumnTally
from mpo_lightning.data.check.report import (
    FileReport,
    Outliers,
    Quantiles,
    Summary,
    Ties,
    Weights,
)
from mpo_lightning.data.check.streaming import (
    Flagged,
    Histogram,
    IntegerCounts,
    Largest,
    Moments,
    Sample,
)
from mpo_lightning.data.counting import total
from mpo_lightning.data.groups import PreferenceGroup
from mpo_lightning.data.prompt_identity import normalized
from mpo_lightning.data.report import DataReport
from mpo_lightning.losses import Partition, deviation_log_weights
from mpo_lightning.losses.scores import AlphaUnit

__all__ = ["FileTally", "GroupTally"]

# A chunk ends at so many groups, or slots of the padded table of its scores.
CHUNK_GROUPS = 4096
CHUNK_SLOTS = 1 << 17
NEAR_EMPTY = 3
OUTLIER = 5.0
DOMINATED = 0.9
EVEN = 0.99


@dataclass
class FileTally:
    """What is counted for each file."""

    read: DataReport
    responses: int = 0
    scores: Moments = field(default_factory=Moments)

    def report(self) -> FileReport:
        """The counts."""
        return FileReport(read=self.read, responses=self.responses, scores=Summary.of(self.scores))


class GroupTally:
    """All statistics but those of prompts and tokens' limits.

    Args:
        alpha: strength of the deviation weights.
        power: exponent of the deviation.
        alpha_unit: "score" or "std"; see `deviation_log_weights`.
        max_length: limit on prompt + response in tokens.
        by: columns whose values are told apart.
    """

    def __init__(
        self,
        *,
        partition: Partition,
        alpha: float,
        power: float,
        alpha_unit: AlphaUnit,
        max_length: int,
        by: Sequence[str],
    ) -> None:
        self.partition = partition
        self.alpha, self.power, self.alpha_unit = alpha, power, alpha_unit
        self.max_length = max_length
        self.scores = Moments()
        self.histogram = Histogram()
        self.deviations = Moments()
        self.largest = Largest()
        self.group_std = Sample()
        self.shape = {"skewness": 0.0, "kurtosis": 0.0}
        self.contrasted = 0
        self.sets: dict[int, Counter[int]] = {}
        self.equal = Flagged()
        self.ties: Counter[str] = Counter()
        self.highest = (-np.inf, 0)
        self.prompt_chars, self.response_chars = IntegerCounts(), IntegerCounts()
        self.bias, self.token_bias = BiasTally(), BiasTally()
        self.weights = {"largest": Sample(), "effective": Sample()}
        self.dominated, self.even, self.even_of = Flagged(), 0, 0
        self.exact, self.normalized = Flagged(), Flagged()
        self.unequal, self.contradicting = Flagged(), Flagged()
        self.near_empty = Flagged()
        self.prompt_tokens, self.response_tokens = IntegerCounts(), IntegerCounts()
        self.beyond, self.prompts_beyond = Flagged(), Flagged()
        self.groups_beyond = 0
        self.beyond_of_set: Counter[str] = Counter()
        self.columns = [ColumnTally(name) for name in by]
        self._clear()

    def _clear(self) -> None:
        self._places: list[str] = []
        self._counts: list[int] = []
        self._widest = 0
        self._scores: list[float] = []
        self._prompt_chars: list[int] = []
        self._chars: list[int] = []
        self._short: list[int] = []
        self._prompt_tokens: list[int] = []
        self._tokens: list[int] = []
        # Of groups with repeated responses: the group, how many repeat, a number for each text.
        self._repeats: list[tuple[int, int, int, list[int]]] = []

    def add(
        self,
        group: PreferenceGroup,
        file: FileTally,
        tokens: tuple[int, list[int]] | None = None,
    ) -> None:
        """Take in a group.

        Args:
            group: checked.
            file: the tally of its file.
            tokens: lengths in tokens of its prompt and of each response.
        """
        responses = group.responses
        count = len(responses)
        widest = max(self._widest, count)
        if (len(self._counts) + 1) * widest > CHUNK_SLOTS or len(self._counts) == CHUNK_GROUPS:
            self.flush(file)
            widest = count
        self._widest = widest
        self._places.append(group.source)
        self._counts.append(count)
        self._scores += group.scores
        prompt = group.prompt
        whole = prompt if isinstance(prompt, str) else [m["content"] for m in prompt]
        self._prompt_chars.append(len(prompt) if isinstance(whole, str) else sum(map(len, whole)))
        chars = list(map(len, responses))
        self._chars += chars
        # Most responses are longer with white space at the ends than any near-empty one without.
        self._short.append(sum(len(text.strip()) <= NEAR_EMPTY for text in responses))
        texts = [normalized(text) for text in responses]
        if len(set(texts)) < count:
            numbers: dict[str, int] = {}
            classes = [numbers.setdefault(text, len(numbers)) for text in texts]
            exact = count - len(set(responses))
            self._repeats.append((len(self._counts) - 1, exact, count - len(numbers), classes))
        if tokens is not None:
            self._prompt_tokens.append(tokens[0])
            self._tokens += tokens[1]
        for column in self.columns:
            column.add(group)

    def flush(self, file: FileTally) -> None:
        """Take the groups that were added into the statistics; all of them are of one file."""
        if not self._counts:
            return
        # Sums of scores near the end of float64's range are infinite; what follows from them is
        # reported as undefined.
        with np.errstate(over="ignore", invalid="ignore"):
            self._flush(file)
        self._clear()

    def _flush(self, file: FileTally) -> None:
        chunk = Chunk.of(self._places, self._scores, self._counts, self.partition)
        self._add_scores(chunk, file)
        self._add_ties(chunk)
        self._add_sets(chunk, file)
        self._add_shape(chunk)
        self._add_weights(chunk)
        self._add_texts(chunk)
        if self._tokens:
            self._add_tokens(chunk)
        for column in self.columns:
            column.flush(chunk)

    def _add_scores(self, chunk: Chunk, file: FileTally) -> None:
        scores = chunk.scores[chunk.valid]
        file.responses += len(scores)
        file.scores.add(scores)
        self.scores.add(scores)
        self.histogram.add(scores)
        high = float(scores.max())
        if high > self.highest[0]:
            self.highest = (high, 0)
        if high == self.highest[0]:
            self.highest = (high, self.highest[1] + int((scores == high).sum()))

    def _add_ties(self, chunk: Chunk) -> None:
        ordered = np.sort(np.where(chunk.valid, chunk.scores, np.inf), axis=1)
        slots = np.arange(ordered.shape[1])
        same = np.zeros_like(chunk.valid)
        same[:, 1:] = (ordered[:, 1:] == ordered[:, :-1]) & (slots[1:] < chunk.counts[:, None])
        # Each score makes a tie with every equal one before it: as many as since its run began.
        began = np.maximum.accumulate(np.where(same, 0, slots), axis=1)
        self.ties["tied pairs"] += int(np.where(same, slots - began, 0).sum())
        self.ties["pairs"] += int((chunk.counts * (chunk.counts - 1) // 2).sum())
        self.ties["groups"] += int(same.any(1).sum())
        last = np.take_along_axis(same, chunk.counts[:, None] - 1, axis=1)
        self.ties["best"] += int(last.sum())

    def _add_sets(self, chunk: Chunk, file: FileTally) -> None:
        chosen = chunk.chosen.sum(1)
        pairs, numbers = np.unique(
            np.stack([chunk.counts, chosen], axis=1), axis=0, return_counts=True
        )
        for (n, of_chosen), number in zip(pairs.tolist(), numbers.tolist(), strict=True):
            self.sets.setdefault(n, Counter())[of_chosen] += number
        equal = ~(chunk.delta != 0).any(1)
        self.equal.add(equal, chunk.places)
        name = type(self.partition).__name__
        for reason, members in (
            ("with all scores equal", equal),
            (f"whose scores {name} has no contrast for", ~chunk.contrast & ~equal),
        ):
            dropped = Flagged()
            dropped.add(members, chunk.places)
            file.read.drop_all(reason, dropped.rows, dropped.count)
        file.read.kept += int(chunk.contrast.sum())
        file.read.responses += int(chunk.counts[chunk.contrast].sum())

    def _add_shape(self, chunk: Chunk) -> None:
        delta = chunk.delta[chunk.contrast]
        valid, counts = chunk.valid[chunk.contrast], chunk.counts[chunk.contrast]
        if not len(delta):
            return
        self.contrasted += len(delta)
        self.deviations.add(delta[valid])
        scale = np.abs(delta).max(1)
        unit = delta / scale[:, None]
        second = np.square(unit).sum(1) / counts
        self.group_std.add(scale * np.sqrt(second))
        self.shape["skewness"] += float(((unit**3).sum(1) / counts / second**1.5).sum())
        self.shape["kurtosis"] += float(((unit**4).sum(1) / counts / second**2 - 3).sum())
        places = np.repeat(np.flatnonzero(chunk.contrast), counts)
        self.largest.add(np.abs(delta[valid]), [chunk.places[i] for i in places.tolist()])

    def _add_weights(self, chunk: Chunk) -> None:
        valid = torch.from_numpy(chunk.valid[chunk.contrast])
        log_weights = deviation_log_weights(
            torch.from_numpy(chunk.scores[chunk.contrast]),
            valid,
            alpha=self.alpha,
            power=self.power,
            alpha_unit=self.alpha_unit,
        )
        if not len(log_weights):
            return
        weights = log_weights.masked_fill(~valid, -torch.inf).softmax(1)
        largest = weights.amax(1).numpy()
        entropy = torch.special.entr(weights).sum(1)
        effective = (entropy.exp() / valid.sum(1)).numpy()
        self.weights["largest"].add(largest)
        self.weights["effective"].add(effective)
        several = chunk.counts[chunk.contrast] > 2
        places = [chunk.places[i] for i in np.flatnonzero(chunk.contrast).tolist()]
        self.dominated.add((largest > DOMINATED) & several, places)
        self.even += int(((effective > EVEN) & several).sum())
        self.even_of += int(several.sum())

    def _add_texts(self, chunk: Chunk) -> None:
        self.prompt_chars.add(np.array(self._prompt_chars))
        self.response_chars.add(np.array(self._chars))
        self.bias.add(chunk, chunk.table(self._chars))
        short = np.array(self._short)
        self.near_empty.add(short > 0, chunk.places, short)
        exact, same, unequal, contradicting = np.zeros((4, len(chunk.counts)), dtype=np.int64)
        for group, exactly, normalised, classes in self._repeats:
            exact[group], same[group] = exactly, normalised
            scores = chunk.scores[group].tolist()
            sides = chunk.chosen[group].tolist()
            texts = len(set(classes))
            # As many pairs of text and score as texts, unless a text has two.
            unequal[group] = len(set(zip(classes, scores, strict=False))) > texts
            contradicting[group] = len(set(zip(classes, sides, strict=False))) > texts
        for flagged, counts in (
            (self.exact, exact),
            (self.normalized, same),
            (self.unequal, unequal),
            (self.contradicting, contradicting),
        ):
            flagged.add(counts > 0, chunk.places, counts)

    def _add_tokens(self, chunk: Chunk) -> None:
        prompts = np.array(self._prompt_tokens)
        self.prompt_tokens.add(prompts)
        self.response_tokens.add(np.array(self._tokens))
        tokens = chunk.table(self._tokens)
        self.token_bias.add(chunk, tokens)
        beyond = chunk.valid & (prompts[:, None] + tokens > self.max_length)
        number = beyond.sum(1)
        self.beyond.add(number > 0, chunk.places, number)
        self.groups_beyond += int((number > 0).sum())
        self.prompts_beyond.add(prompts >= self.max_length, chunk.places)
        for name, members in (("chosen", chunk.chosen), ("rejected", chunk.rejected)):
            self.beyond_of_set[name] += int((beyond & members).sum())

    # -------------------------------------------------------------------------------- results

    def report_ties(self) -> Ties:
        """Equal scores."""
        return Ties(
            groups=self.ties["groups"],
            pairs=self.ties["pairs"],
            tied_pairs=self.ties["tied pairs"],
            best=self.ties["best"],
            highest=self.highest[0] if self.highest[1] else None,
            at_highest=self.highest[1],
        )

    def report_weights(self) -> Weights:
        """What deviation weighting makes of the groups."""
        return Weights(
            alpha=self.alpha,
            power=self.power,
            alpha_unit=self.alpha_unit,
            largest=Quantiles.of(self.weights["largest"]),
            effective=Quantiles.of(self.weights["effective"]),
            dominated=self.dominated,
            even=self.even,
            even_of=self.even_of,
        )

    def report_outliers(self) -> Outliers:
        """Responses far from their group's mean."""
        std = self.deviations.std
        if not std:
            return Outliers(limit=None, count=0, more=False, rows=[])
        count, more = self.largest.above(OUTLIER * std)
        first = zip(self.largest.places[: min(count, 3)], self.largest.values, strict=False)
        rows = [f"{place} ({value:.3g} from its mean)" for place, value in first]
        return Outliers(limit=OUTLIER * std, count=count, more=more, rows=rows)

    def report_shape(self, name: str) -> float | None:
        """Mean skewness or kurtosis of the groups with a chosen set."""
        return self.shape[name] / self.contrasted if self.contrasted else None


def total_of(files: Sequence[FileTally], scores: Moments) -> FileReport:
    """All files together."""
    return FileReport(
        read=total([file.read for file in files]),
        responses=sum(file.responses for file in files),
        scores=Summary.of(scores),
    )
