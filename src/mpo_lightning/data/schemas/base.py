"""What a schema is: which columns a data set has, and how a row becomes the canonical row."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from mpo_lightning.data.groups import (
    DataError,
    check_number,
    check_text,
    is_list,
    show,
)

__all__ = [
    "Answer",
    "Converted",
    "OnBad",
    "PublicSchema",
    "Row",
    "Schema",
    "ScoredSchema",
    "SkippedRow",
    "bad_field",
    "is_text_list",
    "listed",
    "one_of",
    "records",
    "require_choice",
    "value_of",
    "weighted_sum",
]

Row = Mapping[str, object]
OnBad = Literal["error", "drop"]


class SkippedRow(Exception):  # noqa: N818 (it is no error: the row is counted and reported)
    """A row that a schema leaves out by its settings; the message is the reason."""


@dataclass(frozen=True)
class Converted:
    """A row in canonical form.

    Attributes:
        row: ``prompt``, ``responses``, ``scores``, optionally ``truncated``, and other columns,
            which pass through.
        notes: what was changed or is odd, one entry a response; counted in the report.
    """

    row: dict[str, object]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Schema(ABC):
    """How rows of one public shape are read.

    Subclass it for a shape of your own; ``class_path`` in a configuration names the subclass.
    """

    # Shown where no schema fits.
    columns: ClassVar[str]
    # True where a row holds one response; rows with the same prompt make a group then, in the order
    # of the file, and `convert` gives each as a group of one.
    one_response_a_row: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def fits(cls, columns: frozenset[str], row: Row) -> bool:
        """Whether rows with these columns are of this shape; ``row`` is the first of them."""

    @abstractmethod
    def convert(self, row: Row, source: str) -> Converted:
        """The canonical row.

        Args:
            row: as it was read, columns renamed where the user asked for it.
            source: "file:row", for messages.

        Raises:
            DataError: naming the row, the field, what was found, what was expected and what to do.
            SkippedRow: if the settings leave the row out.
        """


@dataclass(frozen=True)
class Answer:
    """A response as a schema found it.

    Attributes:
        text: the response, not yet checked.
        score: its score, not yet checked; None where there is none.
        text_field: where the text stands, for messages.
        score_field: where the score stands.
        left_out: why a setting leaves the response out.
        notes: what was changed in it or is odd.
    """

    text: object
    score: object
    text_field: str
    score_field: str
    left_out: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PublicSchema(Schema):
    """A shape that public data sets have.

    Columns that a schema does not read pass through. Where responses were left out, the column
    ``kept`` says which of the row's responses remain, counted from 0.

    Args:
        empty: what to do with a response without text: "error", or "drop" to leave it out.
    """

    empty: OnBad = "error"

    def __post_init__(self) -> None:
        require_choice("empty", self.empty, OnBad)

    def canonical(
        self,
        row: Row,
        source: str,
        *,
        prompt: object,
        answers: Sequence[Answer],
        read: Sequence[str],
        added: Row | None = None,
    ) -> Converted:
        """The canonical row of what a schema found.

        Args:
            row: the row.
            source: "file:row".
            prompt: text or messages.
            answers: the responses in the row's order.
            read: columns that are not to pass through.
            added: further columns, lists with one entry an answer.

        Raises:
            DataError: if a response or score cannot be used.
            SkippedRow: if fewer responses than a group needs are left.
        """
        kept: list[int] = []
        texts: list[str] = []
        scores: list[float] = []
        notes: list[str] = []
        for index, answer in enumerate(answers):
            reason = answer.left_out or self._reason_to_leave_out(answer)
            notes += [*answer.notes, *([reason] if reason else [])]
            if reason is None:
                kept.append(index)
                texts.append(self._text(answer, source))
                scores.append(self._score(answer, source))
        least = 1 if self.one_response_a_row else 2
        if len(kept) < least:
            raise SkippedRow(_reason_of_too_few(answers, notes, self.one_response_a_row))
        extra = {name: value for name, value in row.items() if name not in read}
        for name in ("prompt", "responses", "scores"):
            if extra.pop(name, None) is not None:
                raise bad_field(
                    source,
                    name,
                    "a column that this schema does not read and would cover",
                    "no other column of this name",
                    f"Rename it, data.columns: {{{name}: ...}}.",
                )
        truncated = extra.get("truncated")
        if self.one_response_a_row and truncated is not None:
            extra["truncated"] = [truncated]
        extra |= {name: [values[index] for index in kept] for name, values in _lists(added)}
        if len(kept) < len(answers):
            extra["kept"] = kept
            if is_list(truncated) and len(truncated) == len(answers):
                extra["truncated"] = [truncated[index] for index in kept]
        fields: dict[str, object] = {"prompt": prompt, "responses": texts, "scores": scores}
        return Converted({**fields, **extra}, tuple(notes))

    def _reason_to_leave_out(self, answer: Answer) -> str | None:
        if self.empty == "drop" and _is_blank(answer.text):
            return "without text, left out"
        return None

    def _text(self, answer: Answer, source: str) -> str:
        if _is_blank(answer.text):
            raise bad_field(
                source,
                answer.text_field,
                show(answer.text),
                "a text that is not empty",
                "Remove the response, or leave such responses out (schema's `empty: drop`).",
            )
        return check_text(answer.text, answer.text_field, source)

    def _score(self, answer: Answer, source: str) -> float:
        if answer.score is None:
            raise bad_field(
                source,
                answer.score_field,
                "null",
                "a finite number",
                "Score the response, or leave such responses out (schema's `unscored: drop`).",
            )
        return check_number(answer.score, answer.score_field, source)


@dataclass(frozen=True, kw_only=True)
class ScoredSchema(PublicSchema):
    """A shape with a score for each response, which may be null.

    Args:
        empty: what to do with a response without text: "error", or "drop" to leave it out.
        unscored: what to do with a response that has no score (null): "error" or "drop".
    """

    unscored: OnBad = "error"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("unscored", self.unscored, OnBad)

    def _reason_to_leave_out(self, answer: Answer) -> str | None:
        if self.unscored == "drop" and answer.score is None:
            return "without a score, left out"
        return super()._reason_to_leave_out(answer)


def _is_blank(text: object) -> bool:
    return text is None or (isinstance(text, str) and not text.strip())


def _reason_of_too_few(answers: Sequence[Answer], notes: Sequence[str], one_a_row: bool) -> str:
    if one_a_row:
        return notes[-1]
    few = "a single response" if len(answers) == 1 else "no responses"
    return "with fewer than two responses that can be used" if len(answers) > 1 else f"with {few}"


def _lists(added: Row | None) -> list[tuple[str, Sequence[object]]]:
    return [(name, values) for name, values in (added or {}).items() if is_list(values)]


# ---------------------------------------------------------------------------- fields of a row


def bad_field(source: str, field: str, found: str, expected: str, remedy: str) -> DataError:
    """An error about one field of one row."""
    return DataError.of_field(source, field, found=found, expected=expected, remedy=remedy)


def value_of(row: Row, name: str, source: str) -> object:
    """What stands in a column.

    Raises:
        DataError: if the row has no such column, or null in it.
    """
    if row.get(name) is None:
        found = "null" if name in row else f"no such field among {sorted(map(str, row))}"
        raise bad_field(source, name, found, "a value", "Repair or remove the row.")
    return row[name]


def one_of(names: Sequence[str], row: Row, source: str) -> str:
    """The one column of these names that the row has.

    Raises:
        DataError: if it has none of them, or several.
    """
    found = [name for name in names if name in row]
    if len(found) != 1:
        raise bad_field(
            source,
            " or ".join(names),
            f"{found or 'none'} among {sorted(map(str, row))}",
            "one of these columns",
            "Rename columns (data.columns) so that one is left.",
        )
    return found[0]


def listed(row: Row, name: str, source: str, count: int | None = None) -> Sequence[object]:
    """The list in a column.

    Args:
        row: the row.
        name: the column.
        source: "file:row".
        count: how many entries it must have: one for each response.

    Raises:
        DataError: if it is no list, or of another length.
    """
    value = value_of(row, name, source)
    if not is_list(value):
        found = f"{type(value).__name__} {show(value)}"
        raise bad_field(source, name, found, "a list, an entry a response", "Convert the column.")
    if count is not None and len(value) != count:
        raise bad_field(
            source,
            name,
            f"{len(value)} entries for {count} responses",
            "one for each response",
            "Repair the row: which belongs to which response cannot be guessed.",
        )
    return value


def records(value: object, field: str, source: str) -> list[dict[str, object]]:
    """A list of objects, which ``datasets`` may give as an object of lists.

    Raises:
        DataError: if it is neither.
    """
    if isinstance(value, Mapping) and value and all(map(is_list, value.values())):
        lengths = {name: len(entries) for name, entries in value.items()}
        if len(set(lengths.values())) > 1:
            raise bad_field(
                source,
                field,
                f"lists of different lengths, {show(lengths)}",
                "an object of equally long lists",
                "Repair the row.",
            )
        names = list(map(str, value))
        return [
            dict(zip(names, entries, strict=True)) for entries in zip(*value.values(), strict=True)
        ]
    if not is_list(value):
        found = f"{type(value).__name__} {show(value)}"
        raise bad_field(source, field, found, "a list of objects", "Convert the column.")
    for index, entry in enumerate(value):
        if not isinstance(entry, Mapping):
            found = f"{type(entry).__name__} {show(entry)}"
            raise bad_field(source, f"{field}[{index}]", found, "an object", "Repair the row.")
    return [{str(name): part for name, part in entry.items()} for entry in value]  # type: ignore[attr-defined]


def is_text_list(value: object) -> bool:
    """Whether a value is a list of texts; an empty list may be one."""
    return is_list(value) and all(isinstance(entry, str) for entry in value)


def weighted_sum(
    row: Row, weights: Mapping[str, float], source: str, prefix: str = ""
) -> float | None:
    """Attributes of a response, combined: the sum of weight times value; None if one is null.

    Raises:
        DataError: if an attribute is missing, or no number.
    """
    total = 0.0
    for name, weight in weights.items():
        if name not in row:
            found = f"no such field among {sorted(map(str, row))}"
            raise bad_field(source, prefix + name, found, "a number", "Change the weights.")
        if row[name] is None:
            return None
        total += weight * check_number(row[name], prefix + name, source)
    return total


def require_choice(name: str, value: str, annotation: object) -> None:
    """Refuse a setting that is none of its choices."""
    choices = get_args(annotation)
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")
