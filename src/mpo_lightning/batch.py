"""The contract between data and model: batches, and what a run may ask of its data.

A `GroupBatch` is whole groups, laid out once and without padding: all token ids in one flat row,
group after group, each group its prompt and then its responses. Both layouts in which a model can
compute (the prompt shared, or one row per response) are made from it by ``model/logps.py``. A
`PromptBatch` is prompts to be answered. `RunData` names what a run may ask of its data module,
`RunModel` what the data module may ask of the module that is run.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, Self, TypeVar, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

__all__ = [
    "GroupBatch",
    "GroupList",
    "GroupSpan",
    "Message",
    "ModelLimits",
    "Prompt",
    "PromptBatch",
    "PromptItem",
    "Request",
    "Response",
    "RunData",
    "RunModel",
    "TokenGroup",
]

T = TypeVar("T")

# A chat message: its ``role`` and ``content``, and if it has them reasoning and ``tool_calls``.
Message = dict[str, Any]
# A text, or the conversation before the answer.
Prompt = str | list[Message]
# A text, or the assistant's message where it has more than content.
Response = str | Message


class TokenGroup(NamedTuple):
    """One group as token ids.

    Attributes:
        prompt: ids of the rendered prompt, at least one, (P,).
        responses: ids of each response, end-of-turn token included unless it was cut.
        scores: one score per response.
        source: the row it was read from, as "file:row".
        extra: the row's other columns, as JSON.
        indices: position of each response in its row, where some of the row's responses were
            dropped. Defaults to all of them, in order.
    """

    prompt: Tensor
    responses: tuple[Tensor, ...]
    scores: tuple[float, ...]
    source: str
    extra: str = "{}"
    indices: tuple[int, ...] = ()


class GroupSpan(NamedTuple):
    """Position of a group in a flat row of tokens: its prompt, then its responses.

    Attributes:
        start: index of the prompt's first token.
        prompt: tokens of the prompt.
        lengths: tokens of each response.
    """

    start: int
    prompt: int
    lengths: Sequence[int]

    @property
    def first_response(self) -> int:
        """Index of the first response's first token."""
        return self.start + self.prompt

    @property
    def end(self) -> int:
        """Index after the last response's last token."""
        return self.first_response + sum(self.lengths)

    def responses(self) -> Iterator[slice]:
        """Yield the slice of the flat row that holds each response."""
        at = self.first_response
        for length in self.lengths:
            yield slice(at, at + length)
            at += length


class GroupBatch:
    """Whole groups as one flat row of tokens.

    A plain class on purpose: precision plugins cast every floating tensor they find in tuples,
    dictionaries and dataclasses, and a bf16 score is no longer the score that was given.

    Attributes:
        tokens: long (T,), for each group the prompt and then its responses.
        prompt_lengths: tokens of each group's prompt, B numbers on the host.
        response_lengths: tokens of each response, B lists, ragged, on the host.
        lengths: the same as a tensor, long (B, N); padding is zero.
        scores: float64 (B, N); padding is zero.
        valid: bool (B, N), True where the slot holds a response.
        counted: bool (B,), False for a group that only keeps processes in step at an uneven end; it
            carries no loss and enters no metric.
        sources: "file:row" of each group.
        extras: other columns of each group's row, as JSON.
        indices: position of each response in its row, B lists.
        begun: whether the first group has responses in the slice before, see `slices`.
    """

    def __init__(
        self,
        *,
        tokens: Tensor,
        prompt_lengths: list[int],
        response_lengths: list[list[int]],
        lengths: Tensor,
        scores: Tensor,
        valid: Tensor,
        counted: Tensor,
        sources: list[str],
        extras: list[str],
        indices: list[list[int]],
        begun: bool = False,
    ) -> None:
        self.tokens = tokens
        self.prompt_lengths = prompt_lengths
        self.response_lengths = response_lengths
        self.lengths = lengths
        self.scores = scores
        self.valid = valid
        self.counted = counted
        self.sources = sources
        self.extras = extras
        self.indices = indices
        self.begun = begun
        self._kept: dict[object, Any] = {}

    @classmethod
    def from_groups(cls, groups: Sequence[TokenGroup], *, counted: bool = True) -> Self:
        """Lay groups out as a batch.

        Args:
            groups: at least one.
            counted: whether they carry loss and enter metrics.

        Raises:
            ValueError: for no groups, an empty prompt or response, or too few responses.

        Examples:
            >>> prompt, yes, no = torch.tensor([1, 2]), torch.tensor([3, 4, 5]), torch.tensor([6])
            >>> batch = GroupBatch.from_groups([TokenGroup(prompt, (yes, no), (1.0, 0.0), "f:1")])
            >>> batch.tokens
            tensor([1, 2, 3, 4, 5, 6])
            >>> batch.scores
            tensor([[1., 0.]], dtype=torch.float64)
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
        lengths = torch.zeros(len(groups), slots, dtype=torch.long)
        for row, group in enumerate(groups):
            scores[row, : len(group.scores)] = torch.tensor(group.scores, dtype=torch.float64)
            lengths[row, : len(group.scores)] = torch.tensor([len(r) for r in group.responses])
        return cls(
            tokens=torch.cat([part for g in groups for part in (g.prompt, *g.responses)]).long(),
            prompt_lengths=[len(group.prompt) for group in groups],
            response_lengths=[[len(r) for r in group.responses] for group in groups],
            lengths=lengths,
            scores=scores,
            # No response is empty.
            valid=lengths > 0,
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

    def spans(self) -> list[GroupSpan]:
        """Position of each group in ``tokens``."""
        spans, start = [], 0
        for prompt, lengths in zip(self.prompt_lengths, self.response_lengths, strict=True):
            spans.append(GroupSpan(start, prompt, lengths))
            start = spans[-1].end
        return spans

    def once(self, name: object, make: Callable[[], T]) -> T:
        """Return ``make()`` of the first call with this name.

        Policy and reference compute the same batch: index tensors and slices are made, and copied
        to the device, once for both.
        """
        if name not in self._kept:
            self._kept[name] = make()
        kept: T = self._kept[name]
        return kept

    def select(self, group: int) -> Self:
        """Batch of one of the groups.

        Examples:
            >>> group = TokenGroup(torch.tensor([1]), (torch.tensor([2]),), (0.0,), "f:1")
            >>> other = group._replace(prompt=torch.tensor([3]))
            >>> GroupBatch.from_groups([group, other]).select(1).tokens
            tensor([3, 2])
        """
        return self._take([(group, 0, len(self.response_lengths[group]))])

    def slices(self, responses: int) -> list[Self]:
        """Split into batches of at most ``responses`` responses each, in order.

        Each holds the prompts of its responses; a group may continue in the next one.

        Examples:
            >>> responses = tuple(torch.tensor([token]) for token in (7, 8, 9))
            >>> group = TokenGroup(torch.tensor([1]), responses, (2.0, 1.0, 0.0), "f:1")
            >>> [part.tokens.tolist() for part in GroupBatch.from_groups([group]).slices(2)]
            [[1, 7, 8], [1, 9]]
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
        """Batch of some runs of responses: (group, first response, response after the last)."""
        spans = self.spans()
        tokens = []
        for group, first, last in runs:
            span = spans[group]
            responses = list(span.responses())[first:last]
            tokens += [
                self.tokens[span.start : span.first_response],
                self.tokens[responses[0].start : responses[-1].stop],
            ]
        groups = [group for group, _, _ in runs]

        def slots(values: Tensor) -> Tensor:
            rows = [values[group, first:last] for group, first, last in runs]
            return pad_sequence(rows, batch_first=True)

        return type(self)(
            tokens=torch.cat(tokens),
            prompt_lengths=[self.prompt_lengths[group] for group in groups],
            response_lengths=[self.response_lengths[group][a:b] for group, a, b in runs],
            lengths=slots(self.lengths),
            scores=slots(self.scores),
            valid=slots(self.valid),
            counted=self.counted[groups],
            sources=[self.sources[group] for group in groups],
            extras=[self.extras[group] for group in groups],
            indices=[self.indices[group][a:b] for group, a, b in runs],
            begun=runs[0][1] > 0,
        )

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        moved = object.__new__(type(self))
        for name, value in vars(self).items():
            setattr(moved, name, change(value) if isinstance(value, Tensor) else value)
        moved._kept = {}
        return moved

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Copy with its tensors on another device; lists of lengths stay on the host."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Copy in page-locked memory."""
        return self._map(Tensor.pin_memory)


# ------------------------------------------------------------------------------------- prompts


@dataclass(frozen=True)
class Request:
    """A prompt to be answered.

    Attributes:
        prompt: a text, or the conversation before the answer.
        key: 16 bytes that decide, with the seed, its random numbers.
        source: "file:row", for messages.
        template_arguments: arguments of the chat template, such as ``tools``.
    """

    prompt: Prompt
    key: bytes
    source: str
    template_arguments: Mapping[str, object] = field(default_factory=dict)


class PromptItem:
    """One prompt of a data set.

    Attributes:
        number: its position in the data set, from 0.
        request: the prompt with the key of its random numbers.
        row: the row that holds it.
        repeated: whether the same prompt came before.
    """

    def __init__(
        self, number: int, request: Request, row: Mapping[str, object], repeated: bool
    ) -> None:
        self.number = number
        self.request = request
        self.row = row
        self.repeated = repeated


class PromptBatch:
    """Prompts that are answered together.

    A plain class, as `PromptItem`: it holds no tensor, and nothing moves to another device.

    Attributes:
        items: the prompts.
        tokenizer: the `GroupTokenizer` that makes their tokens, by the rules of training.
        counted: False where this process has no batch of its own left; it is not to be answered.
    """

    def __init__(self, items: Sequence[PromptItem], tokenizer: Any, *, counted: bool) -> None:
        self.items = list(items)
        self.tokenizer = tokenizer
        self.counted = counted


# ---------------------------------------------------------------------------------- data of a run


@runtime_checkable
class RunData(Protocol):
    """What a run may ask of its data module, beside its batches.

    A data module of the user's own need not follow it: an adapter then has no tokenizer beside it,
    and a checkpoint does not say which data it was trained on.

    Attributes:
        tokenizer: the Hugging Face tokenizer, saved with each adapter.
        loss: the loss that decided which groups teach something; None if none was given.
    """

    tokenizer: Any
    loss: Any

    def answers_prompts(self) -> bool:
        """Whether predict is to answer prompts without responses."""

    def record(self) -> dict[str, Any]:
        """What was read and with which settings, as plain values without paths."""


class ModelLimits(NamedTuple):
    """Limits of a model on the rows that it can compute.

    Attributes:
        tokens: number of token ids of its embedding; None if it is unknown.
        positions: limit on prompt + response, in tokens; None without a limit.
    """

    tokens: int | None = None
    positions: int | None = None


@runtime_checkable
class RunModel(Protocol):
    """What a data module may ask of the module that is run, before its model is loaded."""

    def limits(self) -> ModelLimits:
        """Return the limits of the model."""


@runtime_checkable
class GroupList(Protocol):
    """A data set that knows all its groups, as the reference cache needs it."""

    @property
    def groups(self) -> Sequence[TokenGroup]:
        """All groups."""

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Tokens of each group, (number of groups,)."""
