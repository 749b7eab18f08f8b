"""The canonical row and its check: ``prompt``, ``responses``, ``scores``; ``truncated``."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard, TypeVar

from mpo_lightning.batch import Message, Prompt
from mpo_lightning.errors import UserError

__all__ = [
    "DataError",
    "PreferenceGroup",
    "check_number",
    "check_prompt",
    "check_responses",
    "check_row",
    "check_text",
    "collect_errors",
    "is_list",
    "show",
]

Item = TypeVar("Item")
Result = TypeVar("Result")

ROLES = ("system", "user", "assistant", "tool")
LAST_ROLES = ("user", "tool")
SHOWN_ERRORS = 10
FIELDS = ("prompt", "responses", "scores", "truncated")


class DataError(UserError, ValueError):
    """Data that cannot be used as it is; the message says where, what was found and what to do."""

    @classmethod
    def of_field(
        cls, source: str, field: str, *, found: str, expected: str, remedy: str
    ) -> "DataError":
        """An error about one field of one row.

        Args:
            source: "file:row".
            field: the column, with an index where it is a list.
            found: what stands there.
            expected: what should.
            remedy: what to do.
        """
        return cls(f"{source}: {field}: found {found}; expected {expected}. {remedy}")


@dataclass(frozen=True)
class PreferenceGroup:
    """One prompt with its scored responses, checked.

    Attributes:
        prompt: the prompt's text, or the conversation before the answer.
        responses: the answers, at least two, none empty.
        scores: one finite number a response; higher is better.
        source: "file:row".
        extra: the row's other columns, untouched.
        truncated: for each response whether its generation hit a limit, so that it has no end; None
            where the row does not say.
    """

    prompt: Prompt
    responses: list[str]
    scores: list[float]
    source: str
    extra: dict[str, object]
    truncated: list[bool] | None = None


def show(value: object, limit: int = 60) -> str:
    """A value as messages show it."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def is_list(value: object) -> TypeGuard[Sequence[object]]:
    """Whether a value is a list, of whatever kind; a text is none."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _check_characters(text: str, field: str, source: str) -> None:
    """Refuse half a surrogate pair: JSON escapes can leave one, no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError.of_field(
            source,
            field,
            found=f"half a character, {text[error.start]!r}, at {error.start}",
            expected="whole characters",
            remedy="Something cut the text inside a character: repair or remove it.",
        ) from error


def check_text(value: object, field: str, source: str) -> str:
    """The text of a response.

    Raises:
        DataError: if it is none, or empty.
    """
    if not isinstance(value, str) or not value.strip():
        raise DataError.of_field(
            source,
            field,
            found=show(value),
            expected="a text that is not empty",
            remedy="Remove the response and its score.",
        )
    _check_characters(value, field, source)
    return value


def check_number(value: object, field: str, source: str) -> float:
    """A score.

    Raises:
        DataError: if it is no number, or not finite.
    """
    # Not isfinite, which fails on an integer too large for a float.
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or not abs(value) <= sys.float_info.max
    ):
        raise DataError.of_field(
            source,
            field,
            found=show(value),
            expected="a finite number",
            remedy="Score the response again, or remove it with its score.",
        )
    return float(value)


def check_prompt(prompt: object, source: str) -> Prompt:
    """The prompt of a row: a text, or messages that end with the user's or a tool's.

    Raises:
        DataError: naming the row, the field, what was found, what was expected and what to do.
    """

    def fail(field: str, found: str, expected: str, remedy: str) -> DataError:
        return DataError.of_field(source, field, found=found, expected=expected, remedy=remedy)

    if isinstance(prompt, str):
        if not prompt.strip():
            raise fail("prompt", show(prompt), "a text", "Remove the row or restore its prompt.")
        _check_characters(prompt, "prompt", source)
        return prompt
    if not is_list(prompt):
        raise fail(
            "prompt",
            f"{type(prompt).__name__} {show(prompt)}",
            'a text or a list of {"role", "content"} messages',
            "Convert the column.",
        )
    messages: list[Message] = []
    for index, message in enumerate(prompt):
        field = f"prompt[{index}]"
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise fail(field, show(message), '{"role", "content"}', "Keep these two keys only.")
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise fail(f"{field}.role", show(role), f"one of {', '.join(ROLES)}", "Rename it.")
        if not isinstance(content, str) or not content.strip():
            raise fail(f"{field}.content", show(content), "a text", "Remove the empty message.")
        _check_characters(content, f"{field}.content", source)
        messages.append({"role": role, "content": content})
    if not messages:
        raise fail("prompt", "no messages", "at least one", "Remove the row or restore its prompt.")
    if messages[-1]["role"] not in LAST_ROLES:
        raise fail(
            f"prompt[{len(messages) - 1}].role",
            show(messages[-1]["role"]),
            "the prompt to end with the user's (or a tool's) message",
            "Move a last assistant message into `responses`.",
        )
    return messages


def check_responses(responses: object, source: str) -> list[str]:
    """The responses of a row: at least two texts, none empty.

    Raises:
        DataError: naming the row, the field, what was found, what was expected and what to do.
    """
    if not is_list(responses):
        raise DataError.of_field(
            source,
            "responses",
            found=f"{type(responses).__name__} {show(responses)}",
            expected="a list of texts",
            remedy="Collect the prompt's responses in one list.",
        )
    texts: list[str] = []
    for index, text in enumerate(responses):
        texts.append(check_text(text, f"responses[{index}]", source))
    if len(texts) < 2:
        raise DataError.of_field(
            source,
            "responses",
            found=f"{len(texts)} response(s)",
            expected="at least 2 for one prompt",
            remedy="Remove the row, or sample more responses for its prompt.",
        )
    return texts


def _check_scores(scores: object, count: int, source: str) -> list[float]:
    if not is_list(scores):
        raise DataError.of_field(
            source,
            "scores",
            found=f"{type(scores).__name__} {show(scores)}",
            expected="a list of numbers",
            remedy="Give one score for each response.",
        )
    values: list[float] = []
    for index, score in enumerate(scores):
        values.append(check_number(score, f"scores[{index}]", source))
    if len(values) != count:
        raise DataError.of_field(
            source,
            "scores",
            found=f"{len(values)} scores for {count} responses",
            expected="one score for each response",
            remedy="Repair the row: which score belongs to which response cannot be guessed.",
        )
    return values


def _check_truncated(truncated: object, count: int, source: str) -> list[bool]:
    if not is_list(truncated):
        raise DataError.of_field(
            source,
            "truncated",
            found=f"{type(truncated).__name__} {show(truncated)}",
            expected="a list of true and false",
            remedy="Say of each response whether its generation hit the limit.",
        )
    values: list[bool] = []
    for index, value in enumerate(truncated):
        if not isinstance(value, bool):
            raise DataError.of_field(
                source,
                f"truncated[{index}]",
                found=show(value),
                expected="true or false",
                remedy="Say whether the response's generation hit the limit, or drop the column.",
            )
        values.append(value)
    if len(values) != count:
        raise DataError.of_field(
            source,
            "truncated",
            found=f"{len(values)} entries for {count} responses",
            expected="one for each response",
            remedy="Repair the row, or drop the column.",
        )
    return values


def check_row(row: object, source: str) -> PreferenceGroup:
    """Check one canonical row.

    Args:
        row: a mapping with ``prompt``, ``responses`` and ``scores``, optionally ``truncated``;
            other columns pass through.
        source: "file:row", for messages.

    Raises:
        DataError: naming the row, the field, what was found, what was expected and what to do.
    """
    if not isinstance(row, Mapping):
        raise DataError.of_field(
            source,
            "row",
            found=f"{type(row).__name__} {show(row)}",
            expected="an object with prompt, responses and scores",
            remedy="Write one object a row.",
        )
    for field in ("prompt", "responses", "scores"):
        if row.get(field) is None:
            found = "null" if field in row else f"no such field among {sorted(map(str, row))}"
            raise DataError.of_field(
                source, field, found=found, expected="a value", remedy="Rename or add the field."
            )
    prompt = check_prompt(row["prompt"], source)
    responses = check_responses(row["responses"], source)
    scores = _check_scores(row["scores"], len(responses), source)
    # Null where other rows of the file have it.
    truncated = row.get("truncated")
    if truncated is not None:
        truncated = _check_truncated(truncated, len(responses), source)
    extra = {str(name): value for name, value in row.items() if name not in FIELDS}
    return PreferenceGroup(prompt, responses, scores, source, extra, truncated)


def collect_errors(items: Iterable[Item], check: Callable[[Item], Result]) -> list[Result]:
    """Apply a check to every item and raise once, with the first errors and the number of all.

    Raises:
        DataError: if any item failed.
    """
    results: list[Result] = []
    errors: list[str] = []
    for item in items:
        try:
            results.append(check(item))
        except DataError as error:
            errors.append(str(error))
    if len(errors) == 1:
        raise DataError(errors[0])
    if errors:
        shown = "\n".join(f"  {line}" for line in errors[:SHOWN_ERRORS])
        more = f"\n  ... and {len(errors) - SHOWN_ERRORS} more" * (len(errors) > SHOWN_ERRORS)
        raise DataError(f"{len(errors)} rows cannot be used:\n{shown}{more}")
    return results
