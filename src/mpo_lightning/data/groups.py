"""The canonical row and its check: ``prompt``, ``responses``, ``scores``."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from mpo_lightning.errors import UserError

__all__ = [
    "DataError",
    "Message",
    "PreferenceGroup",
    "check_prompt",
    "check_responses",
    "check_row",
    "check_rows",
    "collect_errors",
]

Message = dict[str, str]
Item = TypeVar("Item")
Result = TypeVar("Result")

ROLES = ("system", "user", "assistant", "tool")
LAST_ROLES = ("user", "tool")
SHOWN_ERRORS = 10


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
    """

    prompt: str | list[Message]
    responses: list[str]
    scores: list[float]
    source: str
    extra: dict[str, object]

    @property
    def has_contrast(self) -> bool:
        """Whether the scores differ: without it there is no chosen and no rejected set."""
        return len(set(self.scores)) > 1


def _show(value: object, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _is_list(value: object) -> bool:
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


def check_prompt(prompt: object, source: str) -> str | list[Message]:
    """The prompt of a row: a text, or messages that end with the user's or a tool's.

    Raises:
        DataError: naming the row, the field, what was found, what was expected and what to do.
    """

    def fail(field: str, found: str, expected: str, remedy: str) -> DataError:
        return DataError.of_field(source, field, found=found, expected=expected, remedy=remedy)

    if isinstance(prompt, str):
        if not prompt.strip():
            raise fail("prompt", _show(prompt), "a text", "Remove the row or restore its prompt.")
        _check_characters(prompt, "prompt", source)
        return prompt
    if not _is_list(prompt):
        raise fail(
            "prompt",
            f"{type(prompt).__name__} {_show(prompt)}",
            'a text or a list of {"role", "content"} messages',
            "Convert the column.",
        )
    messages: list[Message] = []
    for index, message in enumerate(prompt):  # type: ignore[arg-type, var-annotated]
        field = f"prompt[{index}]"
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise fail(field, _show(message), '{"role", "content"}', "Keep these two keys only.")
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise fail(f"{field}.role", _show(role), f"one of {', '.join(ROLES)}", "Rename it.")
        if not isinstance(content, str) or not content.strip():
            raise fail(f"{field}.content", _show(content), "a text", "Remove the empty message.")
        _check_characters(content, f"{field}.content", source)
        messages.append({"role": role, "content": content})
    if not messages:
        raise fail("prompt", "no messages", "at least one", "Remove the row or restore its prompt.")
    if messages[-1]["role"] not in LAST_ROLES:
        raise fail(
            f"prompt[{len(messages) - 1}].role",
            _show(messages[-1]["role"]),
            "the prompt to end with the user's (or a tool's) message",
            "Move a last assistant message into `responses`.",
        )
    return messages


def check_responses(responses: object, source: str) -> list[str]:
    """The responses of a row: at least two texts, none empty.

    Raises:
        DataError: naming the row, the field, what was found, what was expected and what to do.
    """
    if not _is_list(responses):
        raise DataError.of_field(
            source,
            "responses",
            found=f"{type(responses).__name__} {_show(responses)}",
            expected="a list of texts",
            remedy="Collect the prompt's responses in one list.",
        )
    texts: list[str] = []
    for index, text in enumerate(responses):  # type: ignore[arg-type, var-annotated]
        if not isinstance(text, str) or not text.strip():
            raise DataError.of_field(
                source,
                f"responses[{index}]",
                found=_show(text),
                expected="a text that is not empty",
                remedy="Remove the response and its score.",
            )
        _check_characters(text, f"responses[{index}]", source)
        texts.append(text)
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
    if not _is_list(scores):
        raise DataError.of_field(
            source,
            "scores",
            found=f"{type(scores).__name__} {_show(scores)}",
            expected="a list of numbers",
            remedy="Give one score for each response.",
        )
    values: list[float] = []
    for index, score in enumerate(scores):  # type: ignore[arg-type, var-annotated]
        is_number = isinstance(score, int | float) and not isinstance(score, bool)
        # Not isfinite, which fails on an integer too large for a float.
        if not is_number or not abs(score) <= sys.float_info.max:
            raise DataError.of_field(
                source,
                f"scores[{index}]",
                found=_show(score),
                expected="a finite number",
                remedy="Score the response again, or remove it with its score.",
            )
        values.append(float(score))
    if len(values) != count:
        raise DataError.of_field(
            source,
            "scores",
            found=f"{len(values)} scores for {count} responses",
            expected="one score for each response",
            remedy="Repair the row: which score belongs to which response cannot be guessed.",
        )
    return values


def check_row(row: object, source: str) -> PreferenceGroup:
    """Check one canonical row.

    Args:
        row: a mapping with ``prompt``, ``responses`` and ``scores``; other columns pass through.
        source: "file:row", for messages.

    Raises:
        DataError: naming the row, the field, what was found, what was expected and what to do.
    """
    if not isinstance(row, Mapping):
        raise DataError.of_field(
            source,
            "row",
            found=f"{type(row).__name__} {_show(row)}",
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
    extra = {str(k): v for k, v in row.items() if k not in ("prompt", "responses", "scores")}
    return PreferenceGroup(prompt, responses, scores, source, extra)


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


def check_rows(rows: Iterable[tuple[str, object]]) -> list[PreferenceGroup]:
    """Check every ``(source, row)``; all bad rows are reported together.

    Raises:
        DataError: if any row is bad.
    """
    return collect_errors(rows, lambda item: check_row(item[1], item[0]))
