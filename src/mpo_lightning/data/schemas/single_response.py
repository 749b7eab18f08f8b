"""Formats with one response per row; the rows of a prompt make a group."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from mpo_lightning.data.groups import bad_field, check_field, check_number, is_list
from mpo_lightning.data.schemas.base import (
    Answer,
    Converted,
    PublicSchema,
    Row,
    ScoredSchema,
    one_of,
)
from mpo_lightning.data.schemas.conversations import (
    answer_text,
    is_messages,
    marked_turns,
    split_conversation,
)
from mpo_lightning.data.schemas.trainer_columns import (
    CONVERSATIONS,
    as_messages,
    check_label,
    has_prompt,
    is_conversation,
    is_label,
    read_prompt,
)

__all__ = ["HelpSteer2", "ScoredResponses", "Unpaired"]

ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
# Weights of NVIDIA's reward model of 70 billion parameters, in the order of the attributes.
WEIGHTS_70B = (0.65, 0.8, 0.45, 0.55, -0.4)
RESPONSE_COLUMNS = ("response", "completion")
SCORE_COLUMNS = ("score", "reward", "rating")
COMPLETION_COLUMNS = ("completion", "response", "output")
LABEL_COLUMNS = ("label", "kto_tag")


@dataclass(frozen=True, kw_only=True)
class HelpSteer2(ScoredSchema):
    """nvidia/HelpSteer2: one response per row, with five attributes from 0 to 4.

    Prompts of several turns become messages. The attributes pass through as well.

    Args:
        weights: weight of each attribute; the score is the sum of weight times attribute. Defaults
            to those of NVIDIA's reward model of 70 billion parameters.
    """

    weights: dict[str, float] = field(
        default_factory=lambda: dict(zip(ATTRIBUTES, WEIGHTS_70B, strict=True))
    )

    columns: ClassVar[str] = f"prompt, response, {', '.join(ATTRIBUTES)}"
    required: ClassVar[frozenset[str]] = frozenset({"prompt", "response", *ATTRIBUTES})
    one_response_a_row: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_weights(self.weights)

    def convert(self, row: Row, source: str) -> Converted:
        """Return the canonical row, a group of one."""
        score = weighted_sum(row, self.weights, source)
        answer = Answer(row.get("response"), score, "response", "a weighted attribute")
        prompt = marked_turns(check_field(row, "prompt", source))
        read = ("prompt", "response")
        return self.canonical(row, source, prompt=prompt, answers=[answer], read=read)


@dataclass(frozen=True, kw_only=True)
class ScoredResponses(ScoredSchema):
    """One scored response per row: ``prompt``, ``response`` (``completion``), ``score``.

    The prompt may have the other names that `Pairs` reads. The score is the column ``score``,
    ``reward`` or ``rating``, or a sum over several columns.

    Args:
        weights: columns whose weighted sum is the score, with their weights. Defaults to the
            score's column.
    """

    weights: dict[str, float] | None = None

    columns: ClassVar[str] = (
        "prompt, response or completion, score or reward or rating; one response per row"
    )
    one_response_a_row: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights is not None:
            _require_weights(self.weights)

    @classmethod
    def fits(cls, columns: frozenset[str], row: Row) -> bool:
        """Whether there are a prompt, one response and one score."""
        return (
            has_prompt(row)
            and _has(RESPONSE_COLUMNS, row)
            and _has(SCORE_COLUMNS, row)
            # The attributes hold more than a score that was made from them.
            and not HelpSteer2.fits(columns, row)
        )

    def convert(self, row: Row, source: str) -> Converted:
        """Return the canonical row, a group of one."""
        response = one_of(RESPONSE_COLUMNS, row, source)
        prompt, prompt_in = read_prompt(row, source)
        read = [*prompt_in, response]
        if self.weights is None:
            score_field = one_of(SCORE_COLUMNS, row, source)
            score = row[score_field]
            read.append(score_field)
        else:
            score_field = "a weighted column"
            score = weighted_sum(row, self.weights, source)
        text = answer_text(as_messages(row[response], response, source), response, source)
        answers = [Answer(text, score, response, score_field)]
        return self.canonical(row, source, prompt=prompt, answers=answers, read=read)


@dataclass(frozen=True, kw_only=True)
class Unpaired(PublicSchema):
    """Responses that are wanted or not, as for KTO; ``label`` or ``kto_tag`` scores 1 or 0.

    The response is ``completion``, ``response`` or ``output``, and the prompt has one of the names
    that `Pairs` reads; or the response is the last message of a conversation (``completion``,
    ``messages``, ``conversations`` or ``conversation``).
    """

    columns: ClassVar[str] = (
        "prompt and completion, or messages, with label or kto_tag (true or false); "
        "one response per row"
    )
    one_response_a_row: ClassVar[bool] = True

    @classmethod
    def fits(cls, columns: frozenset[str], row: Row) -> bool:
        """Whether there are one response, its prompt, and a label."""
        labels = [row[name] for name in LABEL_COLUMNS if name in row]
        return (
            len(labels) == 1
            and is_label(labels[0])
            and _response_in(row) is not None
            and not columns & {"chosen", "rejected"}
        )

    def convert(self, row: Row, source: str) -> Converted:
        """Return the canonical row, a group of one."""
        label_in = one_of(LABEL_COLUMNS, row, source)
        label = check_label(check_field(row, label_in, source), label_in, source)
        name = _response_in(row) or "completion"
        value = as_messages(check_field(row, name, source), name, source)
        prompt: object
        if is_conversation(value) and len(value) > 1:
            prompt, text = split_conversation(value, name, source)
            read: tuple[str, ...] = (name,)
        else:
            prompt, read = read_prompt(row, source)
            text = answer_text(value, name, source)
        answers = [Answer(text, float(label), name, label_in)]
        read = (*read, name, label_in)
        return self.canonical(row, source, prompt=prompt, answers=answers, read=read)


def _response_in(row: Row) -> str | None:
    """Return the column of an unpaired response: one of its own, or else a conversation."""
    names = COMPLETION_COLUMNS if has_prompt(row) else ("completion",)
    return next((name for name in (*names, *CONVERSATIONS) if row.get(name) is not None), None)


def _has(names: tuple[str, ...], row: Row) -> bool:
    """Whether one of the columns holds one value: no list, except one of messages."""
    values = [row[name] for name in names if name in row]
    return any(not is_list(value) or is_messages(value) for value in values)


def weighted_sum(row: Row, weights: Mapping[str, float], source: str) -> float | None:
    """Return the sum of weight times column over the columns named; None if one of them is null.

    Raises:
        DataError: if a column is missing, or holds no number.
    """
    total = 0.0
    for name, weight in weights.items():
        if name not in row:
            found = f"no such field among {sorted(map(str, row))}"
            raise bad_field(source, name, found, "a number", "Change the weights.")
        if row[name] is None:
            return None
        total += weight * check_number(row[name], name, source)
    return total


def _require_weights(weights: Mapping[str, float]) -> None:
    if not weights or not any(weights.values()):
        raise ValueError(f"weights must name columns, not all with 0, got {weights}.")
