"""Base of schemas: the columns that a data set has, and how a row becomes the canonical row."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from mpo_lightning.batch import Response
from mpo_lightning.checks import check_settings
from mpo_lightning.data.conversation import check_response
from mpo_lightning.data.groups import (
    bad_field,
    check_field,
    check_list,
    check_number,
    is_list,
    show,
    show_typed,
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
    "listed",
    "one_of",
    "records",
]

Row = Mapping[str, object]
OnBad = Literal["error", "drop"]
Contradicting = Literal["error", "drop", "scores"]


class SkippedRow(Exception):  # noqa: N818 (no error: the row is counted and reported)
    """A row that a schema leaves out because of its settings; the message is the reason."""


@dataclass(frozen=True)
class Converted:
    """A row in canonical form.

    Attributes:
        row: ``prompt``, ``responses``, ``scores``, optionally ``truncated``, and other columns,
            which pass through.
        notes: changes and oddities, one entry per response; counted in the report.
    """

    row: dict[str, object]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Schema(ABC):
    """Format of rows, and their conversion to canonical rows.

    Subclass it for a format of your own; ``class_path`` in a configuration names the subclass. A
    setting whose annotation is a ``Literal`` is checked.
    """

    # Description of the columns, shown where no schema fits.
    columns: ClassVar[str]
    # Columns by which the format is recognised; `fits` can be overridden where they do not suffice.
    required: ClassVar[frozenset[str]]
    # True where a row holds one response: rows with the same prompt then make a group, in the order
    # of the file, and `convert` returns each as a group of one.
    one_response_a_row: ClassVar[bool] = False

    def gather(self, rows: Sequence[Converted], source: str) -> Sequence[Converted]:
        """Return the rows of one prompt, with one response each, in the order of its group.

        Args:
            rows: what `convert` made of the prompt's rows, where ``one_response_a_row``.
            source: "file:row" of the first, for messages.

        Raises:
            DataError: if they cannot be one group.
        """
        return rows

    def __post_init__(self) -> None:
        check_settings(self)

    @classmethod
    def fits(cls, columns: frozenset[str], row: Row) -> bool:
        """Whether rows with these columns have this format; ``row`` is the first of them."""
        return columns >= cls.required

    @abstractmethod
    def convert(self, row: Row, source: str) -> Converted:
        """Return the canonical row.

        Args:
            row: the row, its columns renamed where the user asked for it.
            source: "file:row", for messages.

        Raises:
            DataError: naming the row, the field, what was found, what was expected and what to do.
            SkippedRow: if the settings leave the row out.
        """


@dataclass(frozen=True)
class Answer:
    """A response as a schema found it.

    Attributes:
        text: the response, a text or a message, not yet checked.
        score: its score, not yet checked; None if it has none.
        text_field: the column of the text, for messages.
        score_field: the column of the score.
        left_out: reason why a setting leaves the response out.
        notes: changes and oddities.
    """

    text: object
    score: object
    text_field: str
    score_field: str
    left_out: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PublicSchema(Schema):
    """Format of a public data set.

    Columns that a schema does not read pass through. Where responses were left out, the column
    ``kept_responses`` has the positions of the others in the row, counted from 0.

    Args:
        empty: what to do with a response without text: "error", or "drop" to leave it out.
    """

    empty: OnBad = "error"

    def canonical(
        self,
        row: Row,
        source: str,
        *,
        prompt: object,
        answers: Sequence[Answer],
        read: Collection[str] | None = None,
        models: Sequence[object] = (),
    ) -> Converted:
        """Return the canonical row of a prompt and its answers.

        Args:
            row: the row.
            source: "file:row".
            prompt: text or messages.
            answers: the responses in the row's order.
            read: columns that are not to pass through. Defaults to the ``required``.
            models: model of each answer; where one is known, they become the column ``models``.

        Raises:
            DataError: if a response or score cannot be used.
            SkippedRow: if fewer responses than a group needs are left.
        """
        remaining: list[int] = []
        texts: list[Response] = []
        scores: list[float] = []
        notes: list[str] = []
        for index, answer in enumerate(answers):
            reason = answer.left_out or self._reason_to_leave_out(answer)
            notes += [*answer.notes, *([reason] if reason else [])]
            if reason is None:
                remaining.append(index)
                texts.append(self._text(answer, source))
                scores.append(self._score(answer, source))
        least = 1 if self.one_response_a_row else 2
        if len(remaining) < least:
            raise SkippedRow(_reason_of_too_few(answers, notes, self.one_response_a_row))
        read = self.required if read is None else read
        extra = {name: value for name, value in row.items() if name not in read}
        for name in ("prompt", "responses", "scores"):
            if extra.pop(name, None) is not None:
                found = "a column that this schema does not read and would cover"
                remedy = f"Rename it, data.columns: {{{name}: ...}}."
                raise bad_field(source, name, found, "no other column of this name", remedy)
        truncated = extra.get("truncated")
        if self.one_response_a_row and truncated is not None:
            extra["truncated"] = [truncated]
        if any(models):
            extra["models"] = [models[index] for index in remaining]
        if len(remaining) < len(answers):
            extra["kept_responses"] = remaining
            if is_list(truncated) and len(truncated) == len(answers):
                extra["truncated"] = [truncated[index] for index in remaining]
        found_columns = {"prompt": prompt, "responses": texts, "scores": scores}
        notes += self._compared(row, source, answers, dict(zip(remaining, scores, strict=True)))
        return Converted({**found_columns, **extra}, tuple(notes))

    def _compared(
        self, row: Row, source: str, answers: Sequence[Answer], scores: Mapping[int, float]
    ) -> list[str]:
        """Compare the scores, by position of the answer, with the row's other columns.

        Returns:
            notes on what differs.
        """
        return []

    def _reason_to_leave_out(self, answer: Answer) -> str | None:
        if self.empty == "drop" and _is_blank(answer.text):
            return "without text, left out"
        return None

    def _text(self, answer: Answer, source: str) -> Response:
        if _is_blank(answer.text):
            remedy = "Remove the response, or leave such responses out (schema's `empty: drop`)."
            expected = "a text that is not empty"
            raise bad_field(source, answer.text_field, show(answer.text), expected, remedy)
        return check_response(answer.text, answer.text_field, source)

    def _score(self, answer: Answer, source: str) -> float:
        if answer.score is None:
            remedy = "Score the response, or leave such responses out (schema's `unscored: drop`)."
            raise bad_field(source, answer.score_field, "null", "a finite number", remedy)
        return check_number(answer.score, answer.score_field, source)


@dataclass(frozen=True, kw_only=True)
class ScoredSchema(PublicSchema):
    """Format with a score for each response, which may be null.

    Args:
        unscored: what to do with a response without a score (or rank): "error", or "drop" to leave
            it out.
        contradicting: what to do with a row whose ``chosen`` response does not have the highest
            score, or whose ``rejected`` one scores higher: "error", "drop" to leave the row out, or
            "scores" to go by the scores and count it.
    """

    unscored: OnBad = "error"
    contradicting: Contradicting = "error"

    def _compared(
        self, row: Row, source: str, answers: Sequence[Answer], scores: Mapping[int, float]
    ) -> list[str]:
        """Compare the scores with the columns ``chosen`` and ``rejected``.

        Raises:
            DataError: if they contradict each other.
            SkippedRow: if they do, and such a row is left out.
        """
        found = _contradiction(row, answers, scores)
        if found is None:
            return []
        if self.contradicting == "drop":
            raise SkippedRow("whose scores contradict chosen and rejected")
        if self.contradicting == "error":
            remedy = (
                "Repair the row, leave such rows out or go by their scores (schema's "
                "`contradicting`: drop or scores), or go by chosen and rejected (schema Pairs)."
            )
            raise bad_field(source, *found, remedy)
        return [f"called {found[0]}, against their scores"]

    def _reason_to_leave_out(self, answer: Answer) -> str | None:
        if self.unscored == "drop" and answer.score is None:
            return "without a score, left out"
        return super()._reason_to_leave_out(answer)


_CALLED = {"chosen", "rejected", "chosen_response", "rejected_response"}


def _contradiction(
    row: Row, answers: Sequence[Answer], scores: Mapping[int, float]
) -> tuple[str, str, str] | None:
    """Return where scores contradict ``chosen`` and ``rejected``: field, found and expected."""
    if not _CALLED & row.keys():
        return None
    best, least = max(scores.values()), min(scores.values())

    def called(column: str) -> list[float]:
        text = _last_text(row.get(column))
        return [
            scores[index]
            for index in scores
            if column == answers[index].text_field or _last_text(answers[index].text) == text
        ]

    chosen, rejected = (
        name if name in row else f"{name}_response" for name in ("chosen", "rejected")
    )
    if found := called(chosen):
        if max(found) == best:
            return None
        return chosen, f"the score {max(found):g}", f"the highest, {best:g}"
    if (found := called(rejected)) and min(found) == best > least:
        return rejected, f"the highest score, {best:g}", "a lower one"
    return None


def _last_text(value: object) -> object:
    """Return the text of a response that is a text, or the last message of a conversation."""
    if is_list(value) and value:
        value = value[-1]
    if isinstance(value, Mapping):
        value = value.get("content", value.get("value"))
    return value


def _is_blank(text: object) -> bool:
    if isinstance(text, Mapping):
        return not any(value for name, value in text.items() if name not in ("role", "name"))
    return text is None or (isinstance(text, str) and not text.strip())


def _reason_of_too_few(answers: Sequence[Answer], notes: Sequence[str], one_a_row: bool) -> str:
    if one_a_row:
        return notes[-1]
    few = "a single response" if len(answers) == 1 else "no responses"
    return "with fewer than two responses that can be used" if len(answers) > 1 else f"with {few}"


# ---------------------------------------------------------------------------- fields of a row


def one_of(names: Sequence[str], row: Row, source: str) -> str:
    """Return the one of several columns that the row has.

    Raises:
        DataError: if it has none of them, or more than one.
    """
    found = [name for name in names if name in row]
    if len(found) != 1:
        among = f"{found or 'none'} among {sorted(map(str, row))}"
        remedy = "Rename columns (data.columns) so that one is left."
        raise bad_field(source, " or ".join(names), among, "one of these columns", remedy)
    return found[0]


def listed(row: Row, name: str, source: str, count: int | None = None) -> Sequence[object]:
    """Return the list in a column.

    Args:
        row: the row.
        name: the column.
        source: "file:row".
        count: number of entries that it must have, one per response. Defaults to any.

    Raises:
        DataError: if it is no list, or has another length.
    """
    value, expected = check_field(row, name, source), "a list with one entry per response"
    value = check_list(value, name, source, expected, "Convert the column.")
    if count is not None and len(value) != count:
        found = f"{len(value)} entries for {count} responses"
        remedy = "Repair the row: which belongs to which response cannot be guessed."
        raise bad_field(source, name, found, "one for each response", remedy)
    return value


def records(value: object, field: str, source: str) -> list[dict[str, object]]:
    """Return a list of objects, which ``datasets`` may give as an object of lists.

    Raises:
        DataError: if it is neither.
    """
    if isinstance(value, Mapping) and value and all(map(is_list, value.values())):
        lengths = {name: len(entries) for name, entries in value.items()}
        if len(set(lengths.values())) > 1:
            found = f"lists of different lengths, {show(lengths)}"
            raise bad_field(
                source, field, found, "an object of equally long lists", "Repair the row."
            )
        names = list(map(str, value))
        return [
            dict(zip(names, entries, strict=True)) for entries in zip(*value.values(), strict=True)
        ]
    entries = check_list(value, field, source, "a list of objects", "Convert the column.")
    result = []
    for index, entry in enumerate(entries):
        if not isinstance(entry, Mapping):
            found = show_typed(entry)
            raise bad_field(source, f"{field}[{index}]", found, "an object", "Repair the row.")
        result.append({str(name): part for name, part in entry.items()})
    return result
