"""GroupBatch: the one contract between data and model.

A batch is whole groups, laid out once and without padding: all token ids in one flat row, group
after group, each group its prompt and then its responses. Both layouts in which a model can compute
(the prompt shared, or one row per response) are made from it by ``logps.py``.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class TokenGroup(NamedTuple):
    """One group as token ids.

    Attributes:
        prompt: ids of the rendered prompt, at least one, (P,).
        responses: ids of each response, end-of-turn token included unless it was cut.
        scores: one score a response.
        source: where the row came from, as "file:row".
        extra: the row's other columns, as JSON.
        indices: the place of each response in its row, where some of the row were dropped; none
            given means all of them, in order.
    """

    prompt: Tensor
    responses: tuple[Tensor, ...]
    scores: tuple[float, ...]
    source: str
    extra: str = "{}"
    indices: tuple[int, ...] = ()


class GroupBatch:
    """Whole groups as one flat row of tokens.

    A plain class on purpose: precision plugins cast every floating tensor they find in tuples,
    dictionaries and dataclasses, and a bf16 score is no longer the score that was given.

    Attributes:
        tokens: long (T,), for each group the prompt and then its responses.
        prompt_lengths: tokens of each group's prompt, B numbers on the host.
        response_lengths: tokens of each response, B lists, ragged, on the host.
        scores: float64 (B, N); padding is zero.
        valid: bool (B, N), True where the slot holds a response.
        counted: bool (B,), False for a group that only keeps processes in step at an uneven end; it
            carries no loss and enters no metric.
        sources: "file:row" of each group.
        extras: other columns of each group's row, as JSON.
        indices: the place of each response in its row, B lists.
    """

    def __init__(
        self,
        *,
        tokens: Tensor,
        prompt_lengths: list[int],
        response_lengths: list[list[int]],
        scores: Tensor,
        valid: Tensor,
        counted: Tensor,
        sources: list[str],
        extras: list[str],
        indices: list[list[int]],
    ) -> None:
        self.tokens = tokens
        self.prompt_lengths = prompt_lengths
        self.response_lengths = response_lengths
        self.scores = scores
        self.valid = valid
        self.counted = counted
        self.sources = sources
        self.extras = extras
        self.indices = indices

    @classmethod
    def from_groups(cls, groups: Sequence[TokenGroup], *, counted: bool = True) -> Self:
        """Lay groups out as a batch.

        Raises:
            ValueError: for no groups, an empty prompt or response, or too few responses.
        """
        if not groups:
            raise ValueError("A batch needs at least one group.")
        for group in groups:
            if len(group.prompt) == 0 or any(len(response) == 0 for response in group.responses):
                raise ValueError(f"{group.source}: a prompt or response holds no token.")
            if not 1 <= len(group.responses) == len(group.scores):
                raise ValueError(
                    f"{group.source}: {len(group.responses)} responses and {len(group.scores)} "
                    "scores; a group needs at least one response and a score for each."
                )
        slots = max(len(group.responses) for group in groups)
        scores = torch.zeros(len(groups), slots, dtype=torch.float64)
        valid = torch.zeros(len(groups), slots, dtype=torch.bool)
        for row, group in enumerate(groups):
            scores[row, : len(group.scores)] = torch.tensor(group.scores, dtype=torch.float64)
            valid[row, : len(group.scores)] = True
        return cls(
            tokens=torch.cat([part for g in groups for part in (g.prompt, *g.responses)]).long(),
            prompt_lengths=[len(group.prompt) for group in groups],
            response_lengths=[[len(r) for r in group.responses] for group in groups],
            scores=scores,
            valid=valid,
            counted=torch.full((len(groups),), counted),
            sources=[group.source for group in groups],
            extras=[group.extra for group in groups],
            indices=[list(group.indices or range(len(group.responses))) for group in groups],
        )

    def __len__(self) -> int:
        """Number of groups, B."""
        return len(self.prompt_lengths)

    @property
    def slots(self) -> int:
        """Response slots of a group, N."""
        return self.valid.shape[1]

    @property
    def lengths(self) -> Tensor:
        """Tokens of each response, long (B, N) on the batch's device; zero on padding."""
        rows = [lengths + [0] * (self.slots - len(lengths)) for lengths in self.response_lengths]
        return torch.tensor(rows, device=self.tokens.device)

    def select(self, group: int) -> Self:
        """The batch that holds one of the groups only."""
        return self._take([(group, 0, len(self.response_lengths[group]))])

    def slices(self, responses: int) -> list[Self]:
        """The batch in parts of at most ``responses`` responses each, in order.

        A part holds the prompts of its responses; a group may go on in the next part.
        """
        parts: list[list[tuple[int, int, int]]] = [[]]
        room = responses
        for group, lengths in enumerate(self.response_lengths):
            start = 0
            while start < len(lengths):
                if room == 0:
                    parts.append([])
                    room = responses
                end = min(start + room, len(lengths))
                parts[-1].append((group, start, end))
                room -= end - start
                start = end
        return [self._take(part) for part in parts]

    def _take(self, runs: Sequence[tuple[int, int, int]]) -> Self:
        """The batch of these runs of responses: group, first response, first response after."""
        sizes = [
            p + sum(r) for p, r in zip(self.prompt_lengths, self.response_lengths, strict=True)
        ]
        tokens = []
        for group, start, end in runs:
            first = sum(sizes[:group])
            prompt, lengths = self.prompt_lengths[group], self.response_lengths[group]
            at = first + prompt + sum(lengths[:start])
            tokens += [
                self.tokens[first : first + prompt],
                self.tokens[at : at + sum(lengths[start:end])],
            ]
        groups = [group for group, _, _ in runs]

        def slots(values: Tensor) -> Tensor:
            rows = [values[group, start:end] for group, start, end in runs]
            return pad_sequence(rows, batch_first=True)

        return type(self)(
            tokens=torch.cat(tokens),
            prompt_lengths=[self.prompt_lengths[group] for group in groups],
            response_lengths=[self.response_lengths[group][a:b] for group, a, b in runs],
            scores=slots(self.scores),
            valid=slots(self.valid),
            counted=self.counted[groups],
            sources=[self.sources[group] for group in groups],
            extras=[self.extras[group] for group in groups],
            indices=[self.indices[group][a:b] for group, a, b in runs],
        )

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        moved = object.__new__(type(self))
        for name, value in vars(self).items():
            setattr(moved, name, change(value) if isinstance(value, Tensor) else value)
        return moved

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The batch with its tensors on another device; lengths stay on the host."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The batch in page-locked memory."""
        return self._map(Tensor.pin_memory)
