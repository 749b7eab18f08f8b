"""Tokenised groups in Arrow tables, memory-mapped if they are on disk."""

from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from hashlib import blake2b
from typing import Any, overload

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from mpo_lightning.batch import GroupBatch, TokenGroup
from mpo_lightning.data.sampler import StepGroups

__all__ = ["SCHEMA", "GroupDataset", "Groups", "table_row"]

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

SCHEMA = pa.schema(
    {
        "prompt": pa.list_(pa.int32()),
        "responses": pa.list_(pa.list_(pa.int32())),
        "scores": pa.list_(pa.float64()),
        # Position of each response in its row.
        "indices": pa.list_(pa.int32()),
        "source": pa.string(),
        "extra": pa.string(),
    }
)


def table_row(group: TokenGroup) -> dict[str, Any]:
    """Return a group as a row of a table with the columns of SCHEMA."""
    return {
        "prompt": group.prompt.numpy(),
        "responses": [response.numpy() for response in group.responses],
        "scores": group.scores,
        "indices": group.indices or range(len(group.responses)),
        "source": group.source,
        "extra": group.extra,
    }


def _in_memory(groups: Sequence[TokenGroup]) -> Any:
    import datasets

    return datasets.Dataset(pa.Table.from_pylist(list(map(table_row, groups)), schema=SCHEMA))


class _Block:
    """Consecutive groups of a table, as arrays that share its memory."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        prompt, responses = batch.column("prompt"), batch.column("responses")
        scores, indices = batch.column("scores"), batch.column("indices")
        self.prompt_ends, self.prompt_ids = prompt.offsets.to_numpy(), prompt.values.to_numpy()
        self.response_ends = responses.offsets.to_numpy()
        self.token_ends = responses.values.offsets.to_numpy()
        self.token_ids = responses.values.values.to_numpy()
        self.score_ends, self.scores = scores.offsets.to_numpy(), scores.values.to_numpy()
        self.index_ends, self.indices = indices.offsets.to_numpy(), indices.values.to_numpy()
        self.source, self.extra = batch.column("source"), batch.column("extra")

    def __len__(self) -> int:
        return len(self.source)

    def sizes(self) -> Integers:
        """Return the tokens of each group: its prompt once, and its responses."""
        of_responses = np.diff(self.token_ends[self.response_ends])
        sizes: Integers = np.diff(self.prompt_ends).astype(np.int64) + of_responses
        return sizes

    def largest_ids(self) -> Integers:
        """Return the largest token id of each group."""
        largest = []
        ends_of_responses = self.token_ends[self.response_ends]
        for ids, ends in (
            (self.prompt_ids, self.prompt_ends),
            (self.token_ids, ends_of_responses),
        ):
            # No prompt is empty, and no group without a response.
            largest.append(np.maximum.reduceat(ids[: ends[-1]], ends[:-1]))
        return np.maximum(*largest).astype(np.int64)

    def counts(self) -> Integers:
        """Return the number of responses of each group."""
        counts: Integers = np.diff(self.response_ends).astype(np.int64)
        return counts

    def own_scores(self) -> Floats:
        """Return the scores of all responses, group after group."""
        scores: Floats = self.scores[self.score_ends[0] : self.score_ends[-1]]
        return scores

    def group(self, index: int, scores: Floats) -> TokenGroup:
        """Return one group, with these scores."""
        first, last = self.response_ends[index : index + 2]
        ends = self.token_ends[first : last + 1]
        # A copy, because a tensor could write to a memory-mapped table.
        ids = torch.from_numpy(self.token_ids[ends[0] : ends[-1]].astype(np.int64))
        prompt = self.prompt_ids[slice(*self.prompt_ends[index : index + 2])]
        return TokenGroup(
            prompt=torch.from_numpy(prompt.astype(np.int64)),
            responses=torch.split(ids, np.diff(ends).tolist()),
            scores=tuple(scores.tolist()),
            source=self.source[index].as_py(),
            extra=self.extra[index].as_py(),
            indices=tuple(self.indices[slice(*self.index_ends[index : index + 2])].tolist()),
        )

    def streams(self) -> tuple[bytes, ...]:
        """Return lengths and ids as bytes; those of consecutive blocks can be concatenated."""
        ends = self.token_ends[self.response_ends[0] : self.response_ends[-1] + 1]
        prompts = self.prompt_ids[self.prompt_ends[0] : self.prompt_ends[-1]]
        lengths = (np.diff(e) for e in (self.prompt_ends, self.response_ends, ends))
        return (
            *(length.astype("<i8").tobytes() for length in lengths),
            prompts.astype("<i4").tobytes(),
            self.token_ids[ends[0] : ends[-1]].astype("<i4").tobytes(),
        )


class Groups(Sequence[TokenGroup]):
    """Groups of a data set of the ``datasets`` library, each built when it is indexed.

    Args:
        data: a data set with the columns of SCHEMA.
        scores: scores of all responses in the data set, group after group. Defaults to its own.
        selected: rows of the data set that are used, ascending. Defaults to all of them.
    """

    def __init__(
        self, data: Any, scores: Floats | None = None, selected: Integers | None = None
    ) -> None:
        self.data = data
        self._batches = [batch for batch in data.data.table.to_batches() if len(batch)]
        self._blocks = [_Block(batch) for batch in self._batches]
        self._starts = np.cumsum([0, *map(len, self._blocks)]).tolist()
        counts = _joined([block.counts() for block in self._blocks], np.int64)
        # Positions in ``scores`` at which the groups of the data set begin and end.
        self.score_ends: Integers = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        own = [block.own_scores() for block in self._blocks]
        self.scores: Floats = _joined(own, np.float64) if scores is None else scores
        self.selected: Integers = np.arange(len(counts)) if selected is None else selected

    def __len__(self) -> int:
        """Number of selected groups."""
        return len(self.selected)

    @overload
    def __getitem__(self, index: int) -> TokenGroup: ...

    @overload
    def __getitem__(self, index: slice) -> list[TokenGroup]: ...

    def __getitem__(self, index: int | slice) -> TokenGroup | list[TokenGroup]:
        """Return a group, or a list of them."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        row = int(self.selected[index])
        block, at = self._find(row)
        return block.group(at, self.scores[self.score_ends[row] : self.score_ends[row + 1]])

    def _find(self, row: int) -> tuple[_Block, int]:
        """Return the block that holds a row of the data set, and the row's position in it."""
        number = bisect_right(self._starts, row) - 1
        return self._blocks[number], row - self._starts[number]

    @property
    def sizes(self) -> Integers:
        """Tokens of each group: its prompt once, and its responses."""
        sizes: Integers = _joined([block.sizes() for block in self._blocks], np.int64)
        return sizes[self.selected]

    @property
    def largest_ids(self) -> Integers:
        """Largest token id of each group."""
        ids: Integers = _joined([block.largest_ids() for block in self._blocks], np.int64)
        return ids[self.selected]

    @property
    def counts(self) -> Integers:
        """Number of responses of each group."""
        counts: Integers = np.diff(self.score_ends)
        return counts[self.selected]

    def source(self, index: int) -> str:
        """Return the origin of a group, as "file:row"."""
        block, at = self._find(int(self.selected[index]))
        source: str = block.source[at].as_py()
        return source

    def slots(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return scores (float64, zero on padding) and valid slots of a range, (B, N) each."""
        rows = self.selected[start:stop]
        starts, ends = self.score_ends[rows], self.score_ends[rows + 1]
        offsets = np.arange((ends - starts).max(initial=0))
        valid = offsets < (ends - starts)[:, None]
        places = np.minimum(starts[:, None] + offsets, len(self.scores) - 1)
        scores = np.where(valid, self.scores[places], 0.0)
        return torch.from_numpy(scores), torch.from_numpy(valid)

    def digest(self) -> str:
        """Return a digest of token ids and scores, in order."""
        content = [blake2b(digest_size=16) for _ in range(6)]
        for batch, start in zip(self._batches, self._starts, strict=False):
            bounds = np.searchsorted(self.selected, [start, start + len(batch)])
            rows = self.selected[slice(*bounds)] - start
            whole = len(rows) == len(batch)
            block = _Block(batch if whole else batch.take(pa.array(rows)))
            for stream, of_block in zip(content, block.streams(), strict=False):
                stream.update(of_block)
            for row in rows + start if not whole else []:
                scores = self.scores[self.score_ends[row] : self.score_ends[row + 1]]
                content[-1].update(scores.astype("<f8").tobytes())
            if whole:
                first, last = self.score_ends[[start, start + len(batch)]]
                content[-1].update(self.scores[first:last].astype("<f8").tobytes())
        return blake2b(b"".join(c.digest() for c in content), digest_size=16).hexdigest()


def _joined(arrays: list[Any], dtype: Any) -> Any:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=dtype)


class GroupDataset(Dataset[GroupBatch]):
    """Tokenised groups; indexed with the groups of a step, it returns their batch.

    Args:
        groups: a list, or groups of a data set.
    """

    def __init__(self, groups: Sequence[TokenGroup]) -> None:
        self.groups = groups if isinstance(groups, Groups) else Groups(_in_memory(groups))

    def __len__(self) -> int:
        """Number of groups."""
        return len(self.groups)

    @cached_property
    def sizes(self) -> Integers:
        """Tokens of each group: its prompt once, and its responses."""
        return self.groups.sizes

    @cached_property
    def digest(self) -> str:
        """Digest of token ids and scores, in order."""
        return self.groups.digest()

    def __getitem__(self, step: StepGroups) -> GroupBatch:
        """Return the batch of a step."""
        return GroupBatch.from_groups([self.groups[i] for i in step.indices], counted=step.counted)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for worker processes; a data set on disk is pickled as its path."""
        groups = self.groups
        return {"data": groups.data, "scores": groups.scores, "selected": groups.selected}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Build the groups from the state."""
        self.groups = Groups(**state)
