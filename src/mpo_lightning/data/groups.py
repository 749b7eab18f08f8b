"""Check of one group: ``prompt``, ``responses``, ``scores``, optionally ``truncated``."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard, TypeVar

from mpo_lightning.batch import Message, Prompt
from mpo_lightning.errors import UserError

__all__ = [
    "SHOWN_ERRORS",
    "DataError",
    "PreferenceGroup",
    "as_messages",
    "as_text",
    "bad_field",
    "check_field",
    "check_list",
    "check_number",
    "check_object",
    "check_prompt",
    "check_responses",
    "check_row",
    "check_text",
    "collect_errors",
    "error_lines",
    "is_list",
    "show",
    "show_typed",
]

Item = TypeVar("Item")
Result = TypeVar("Result")

ROLES = ("system", "user", "assistant", "tool")
LAST_ROLES = ("user", "tool")
SHOWN_ERRORS = 10
FIELDS = ("prompt", "responses", "scores", "truncated")


class DataError(UserError, ValueError):
    """Data that cannot be used as it is; the message says where, what was found and what to do."""


@dataclass(frozen=True)
class PreferenceGroup:
    """One prompt with its scored responses, checked.

    Attributes:
        prompt: the prompt's text, or the conversation before the answer.
        responses: the answers, at least two, none empty.
        scores: one finite number per response; higher is better.
        source: "file:row".
        extra: the row's other columns, unchanged.
        truncated: for each response whether its generation hit a limit, so that it has no end; None
            where the row does not say.
    """

    prompt: Prompt
    responses: list[str]
    scores: list[float]
    source: str
    extra: dict[str, object]
    truncated: list[bool] | None = None


# -------------------------------------------------------------------------------------- messages


def bad_field(source: str, field: str, found: str, expected: str, remedy: str) -> DataError:
    """Return the error for one field of one row.

    Args:
        source: "file:row".
        field: the column, with an index where it is a list.
        found: the value that was found.
        expected: the kind of value that was expected.
        remedy: advice, a sentence.
    """
    return DataError(f"{source}: {field}: found {found}; expected {expected}. {remedy}")


def error_lines(errors: Sequence[str], count: int) -> list[str]:
    """Return the lines that report rows which cannot be used.

    Args:
        errors: messages of the first such rows.
        count: number of all of them.
    """
    shown = errors[:SHOWN_ERRORS]
    more = [f"  ... and {count - len(shown):,} more"] if count > len(shown) else []
    return [f"{count:,} rows cannot be used:", *(f"  {error}" for error in shown), *more]


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
    if errors:
        raise DataError(
            errors[0] if len(errors) == 1 else "\n".join(error_lines(errors, len(errors)))
        )
    return results


def show(value: object, limit: int = 60) -> str:
    """Return a value as messages show it."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def show_typed(value: object) -> str:
    """Return a value as messages show it, after the name of its type."""
    return f"{type(value).__name__} {show(value)}"


# ----------------------------------------------------------------------------------------- checks


def is_list(value: object) -> TypeGuard[Sequence[object]]:
    """Whether a value is a sequence of any type, except a string."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def check_object(row: object, source: str, expected: str) -> Mapping[str, Any]:
    """Return a row that is an object.

    Args:
        row: the row as a source gave it, or the error that the source gave in its place.
        source: "file:row", for messages.
        expected: description of such a row, for messages.

    Raises:
        DataError: the row's own error, or one that says what it is.
    """
    if isinstance(row, DataError):
        raise row
    if not isinstance(row, Mapping):
        raise bad_field(source, "row", show_typed(row), expected, "Write one object per row.")
    return row


def check_field(
    row: Mapping[str, object], name: str, source: str, remedy: str = "Rename or add the field."
) -> object:
    """Return the value of a column.

    Raises:
        DataError: if the row has no such column, or null in it.
    """
    if row.get(name) is None:
        found = "null" if name in row else f"no such field among {sorted(map(str, row))}"
        raise bad_field(source, name, found, "a value", remedy)
    return row[name]


def check_list(
    value: object, field: str, source: str, expected: str, remedy: str
) -> Sequence[object]:
    """Return a value that is a list.

    Raises:
        DataError: if it is none.
    """
    if not is_list(value):
        raise bad_field(source, field, show_typed(value), expected, remedy)
    return value


def _check_characters(text: str, field: str, source: str) -> None:
    """Refuse lone surrogates: JSON escapes can leave one, and no tokenizer accepts it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise bad_field(
            source,
            field,
            f"half a character, {text[error.start]!r}, at {error.start}",
            "whole characters",
            "Something cut the text inside a character: repair or remove it.",
        ) from error


def check_text(value: object, field: str, source: str) -> str:
    """Return the text of a response.

    Raises:
        DataError: if it is no text, or empty.
    """
    if not isinstance(value, str) or not value.strip():
        expected, remedy = "a text that is not empty", "Remove the response and its score."
        raise bad_field(source, field, show(value), expected, remedy)
    _check_characters(value, field, source)
    return value


def check_number(value: object, field: str, source: str) -> float:
    """Return a score.

    Raises:
        DataError: if it is no number, or not finite.
    """
    # Not isfinite, which fails on an integer too large for a float.
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or not abs(value) <= sys.float_info.max
    ):
        remedy = "Score the response again, or remove it with its score."
        raise bad_field(source, field, show(value), "a finite number", remedy)
    return float(value)


def check_prompt(prompt: object, source: str) -> Prompt:
    """Return a prompt: a text, or messages that end with the user's or a tool's.

    Raises:
        DataError: naming the row, the field, what was found, what was expected and what to do.
    """
    restore = "Remove the row or restore its prompt."
    if isinstance(prompt, str):
        if not prompt.strip():
            raise bad_field(source, "prompt", show(prompt), "a text", restore)
        _check_characters(prompt, "prompt", source)
        return prompt
    expected = 'a text or a list of {"role", "content"} messages'
    messages = [
        _check_message(message, f"prompt[{index}]", source)
        for index, message in enumerate(
            check_list(prompt, "prompt", source, expected, "Convert the column.")
        )
    ]
    if not messages:
        raise bad_field(source, "prompt", "no messages", "at least one", restore)
    if messages[-1]["role"] not in LAST_ROLES:
        raise bad_field(
            source,
            f"prompt[{len(messages) - 1}].role",
            show(messages[-1]["role"]),
            "the prompt to end with the user's (or a tool's) message",
            "Move a last assistant message into `responses`.",
        )
    return messages


def _check_message(message: object, field: str, source: str) -> Message:
    if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
        remedy = "Keep these two keys only."
        raise bad_field(source, field, show(message), '{"role", "content"}', remedy)
    role, content = message["role"], message["content"]
    if role not in ROLES:
        expected = f"one of {', '.join(ROLES)}"
        raise bad_field(source, f"{field}.role", show(role), expected, "Rename it.")
    if not isinstance(content, str) or not content.strip():
        remedy = "Remove the empty message."
        raise bad_field(source, f"{field}.content", show(content), "a text", remedy)
    _check_characters(content, f"{field}.content", source)
    return {"role": role, "content": content}


def check_responses(responses: object, source: str) -> list[str]:
    """Return the responses of a row: at least two texts, none empty.

    Raises:
        DataError: naming the row, the field, what was found, what was expected and what to do.
    """
    remedy = "Collect the prompt's responses in one list."
    given = check_list(responses, "responses", source, "a list of texts", remedy)
    texts = [check_text(text, f"responses[{index}]", source) for index, text in enumerate(given)]
    if len(texts) < 2:
        found, expected = f"{len(texts)} response(s)", "at least 2 for one prompt"
        remedy = "Remove the row, or sample more responses for its prompt."
        raise bad_field(source, "responses", found, expected, remedy)
    return texts


def _check_scores(scores: object, count: int, source: str) -> list[float]:
    remedy = "Give one score for each response."
    given = check_list(scores, "scores", source, "a list of numbers", remedy)
    values = [check_number(score, f"scores[{index}]", source) for index, score in enumerate(given)]
    if len(values) != count:
        found = f"{len(values)} scores for {count} responses"
        remedy = "Repair the row: which score belongs to which response cannot be guessed."
        raise bad_field(source, "scores", found, "one score for each response", remedy)
    return values


def _check_truncated(truncated: object, count: int, source: str) -> list[bool]:
    remedy = "Say for each response whether its generation hit the limit, or drop the column."
    given = check_list(truncated, "truncated", source, "a list of true and false", remedy)
    for index, value in enumerate(given):
        if not isinstance(value, bool):
            field = f"truncated[{index}]"
            raise bad_field(source, field, show(value), "true or false", remedy)
    if len(given) != count:
        found = f"{len(given)} entries for {count} responses"
        remedy = "Repair the row, or drop the column."
        raise bad_field(source, "truncated", found, "one for each response", remedy)
    return [bool(value) for value in given]


def check_row(row: object, source: str) -> PreferenceGroup:
    """Check one canonical row.

    Args:
        row: a mapping with ``prompt``, ``responses`` and ``scores``, optionally ``truncated``;
            other columns pass through.
        source: "file:row", for messages.

    Raises:
        DataError: naming the row, the field, what was found, what was expected and what to do.
    """
    row = check_object(row, source, "an object with prompt, responses and scores")
    given = {name: check_field(row, name, source) for name in ("prompt", "responses", "scores")}
    prompt = check_prompt(given["prompt"], source)
    responses = check_responses(given["responses"], source)
    scores = _check_scores(given["scores"], len(responses), source)
    # Null where other rows of the file have it.
    truncated = row.get("truncated")
    if truncated is not None:
        truncated = _check_truncated(truncated, len(responses), source)
    extra = {str(name): value for name, value in row.items() if name not in FIELDS}
    return PreferenceGroup(prompt, responses, scores, source, extra, truncated)


# ------------------------------------------------------------------------------ text and messages


def as_messages(prompt: Prompt) -> list[Message]:
    """Return a prompt as a conversation: a text is one user message."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def as_text(prompt: Prompt) -> str | None:
    """Return a prompt as a text, or None if it is more than one user message."""
    if isinstance(prompt, str):
        return prompt
    return prompt[0]["content"] if [m["role"] for m in prompt] == ["user"] else None
