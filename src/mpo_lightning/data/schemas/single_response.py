"""Formats with one response per row; the rows of a prompt make a group."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from mpo_lightning.data.groups import bad_field, check_field, check_number, is_list, show
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
    prompt_of,
)

__all__ = ["HelpSteer2", "ScoredResponses", "Unpaired"]

ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
# Weights of NVIDIA's reward model of 70 billion parameters, in the order of the attributes.
WEIGHTS_70B = (0.65, 0.8, 0.45, 0.55, -0.4)
RESPONSE_COLUMNS = ("response", "completion")
SCORE_COLUMNS = ("score", "reward", "rating")


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

    The score is the column ``score``, ``reward`` or ``rating``, or a sum over several columns.

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
            "prompt" in columns
            and _has(RESPONSE_COLUMNS, row)
            and _has(SCORE_COLUMNS, row)
            # The attributes hold more than a score that was made from them.
            and not HelpSteer2.fits(columns, row)
        )

    def convert(self, row: Row, source: str) -> Converted:
        """Return the canonical row, a group of one."""
        response = one_of(RESPONSE_COLUMNS, row, source)
        read = ["prompt", response]
        if self.weights is None:
            score_field = one_of(SCORE_COLUMNS, row, source)
            score = row[score_field]
            read.append(score_field)
        else:
            score_field = "a weighted column"
            score = weighted_sum(row, self.weights, source)
        prompt = prompt_of(row, "prompt", source)
        text = answer_text(row[response], response, source)
        answers = [Answer(text, score, response, score_field)]
        return self.canonical(row, source, prompt=prompt, answers=answers, read=read)


@dataclass(frozen=True, kw_only=True)
class Unpaired(PublicSchema):
    """TRL's unpaired format: ``prompt``, ``completion`` and ``label``, which scores 1 or 0."""

    columns: ClassVar[str] = "prompt, completion, label (true or false); one response per row"
    required: ClassVar[frozenset[str]] = frozenset({"prompt", "completion", "label"})
    one_response_a_row: ClassVar[bool] = True

    @classmethod
    def fits(cls, columns: frozenset[str], row: Row) -> bool:
        """Whether there are a prompt, a completion and a label."""
        return super().fits(columns, row) and isinstance(row["label"], bool)

    def convert(self, row: Row, source: str) -> Converted:
        """Return the canonical row, a group of one."""
        label = check_field(row, "label", source)
        if not isinstance(label, bool):
            raise bad_field(source, "label", show(label), "true or false", "Repair the row.")
        completion = answer_text(row.get("completion"), "completion", source)
        answers = [Answer(completion, float(label), "completion", "label")]
        prompt = prompt_of(row, "prompt", source)
        return self.canonical(row, source, prompt=prompt, answers=answers)


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
