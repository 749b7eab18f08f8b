"""A group of scored responses, and the checks of fields with their errors."""

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard, TypeVar

from mpo_lightning.batch import Prompt, Response
from mpo_lightning.checks import plain
from mpo_lightning.errors import UserError

__all__ = [
    "SHOWN_ERRORS",
    "DataError",
    "PreferenceGroup",
    "bad_field",
    "check_characters",
    "check_field",
    "check_list",
    "check_number",
    "check_object",
    "check_text",
    "collect_errors",
    "error_lines",
    "is_list",
    "show",
    "show_typed",
]

Item = TypeVar("Item")
Result = TypeVar("Result")

SHOWN_ERRORS = 10
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


class DataError(UserError, ValueError):
    """Data that cannot be used as it is; the message says where, what was found and what to do."""


@dataclass(frozen=True)
class PreferenceGroup:
    """One prompt with its scored responses, checked.

    Attributes:
        prompt: the prompt's text, or the conversation before the answer.
        responses: the answers, at least two, none empty: texts, or the assistant's messages where
            they have reasoning or tool calls besides their content.
        scores: one finite number per response; higher is better.
        source: "file:row".
        extra: the row's other columns, unchanged.
        truncated: for each response whether its generation hit a limit, so that it has no end; None
            where the row does not say.
        template_arguments: arguments of the chat template, such as ``tools``.
    """

    prompt: Prompt
    responses: list[Response]
    scores: list[float]
    source: str
    extra: dict[str, object]
    truncated: list[bool] | None = None
    template_arguments: dict[str, object] = field(default_factory=dict)


# ---------------------------------------------------------------------------------------- errors


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
    # Most values are lists and numbers of Python, which the test of their type tells fastest.
    value = value if type(value) is list else plain(value)
    if not is_list(value):
        raise bad_field(source, field, show_typed(value), expected, remedy)
    return value


def check_characters(text: str, field: str, source: str) -> None:
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
    check_characters(value, field, source)
    return value


def check_number(value: object, field: str, source: str) -> float:
    """Return a score; a number that is written as a text is that number.

    Raises:
        DataError: if it is no number, or not finite.
    """
    value = value if type(value) is float else plain(value)
    if isinstance(value, str) and NUMBER.fullmatch(value.strip()):
        value = float(value)
    # Not isfinite, which fails on an integer too large for a float.
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or not abs(value) <= sys.float_info.max
    ):
        remedy = "Score the response again, or remove it with its score."
        raise bad_field(source, field, show(value), "a finite number", remedy)
    return float(value)
