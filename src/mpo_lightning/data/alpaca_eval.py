"""AlpacaEval's folders of results, and answers of several models joined by their instruction."""

from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeGuard

from mpo_lightning.data.groups import DataError
from mpo_lightning.data.row_source import RawRow, RowSource, Values, digest_of

__all__ = ["joined_if_answers", "result_files", "without_raw_completions"]

ANSWER = frozenset({"instruction", "output", "generator"})


def result_files(folder: Path, annotator: str = "") -> list[Path]:
    """Return the files of a folder of results, of one model or of several.

    A model's folder has ``model_outputs.json``, and a folder for each annotator with
    ``annotations.json``, which has the answers as well. Answers of models that the annotator has
    not judged come last.

    Args:
        folder: the folder of the results, of a model, or of an annotator.
        annotator: name of the annotator's folders. Defaults to the only one there is.

    Returns:
        the files; none if the folder holds no such results.

    Raises:
        DataError: if there is no such annotator, or several and none is named.
    """
    judged = sorted(
        path for deeper in ("", "*/", "*/*/") for path in folder.glob(f"{deeper}annotations.json")
    )
    answers = sorted(
        path for deeper in ("", "*/") for path in folder.glob(f"{deeper}model_outputs.json")
    )
    annotators = sorted({path.parent.name for path in judged})
    if annotator and annotator not in annotators:
        if not judged and not answers:
            return []
        raise DataError(f"{folder}: no annotations of {annotator!r} among {annotators}.")
    if len(annotators) > 1 and not annotator:
        raise DataError(
            f"{folder}: holds annotations of {annotators}, whose scores have nothing in common. "
            f"Name one of them after a colon, {folder}:{annotators[0]}."
        )
    judged = [path for path in judged if path.parent.name == (annotator or annotators[0])]
    models = {path.parent.parent for path in judged}
    return judged + [path for path in answers if path.parent not in models]


def without_raw_completions(source: RowSource) -> RowSource:
    """Drop what the judge wrote from annotations that are in memory: it takes most of it."""
    for row in source.values if isinstance(source, Values) else ():
        if isinstance(row, dict) and {"output_2", "preference"} <= row.keys():
            row.pop("raw_completion", None)
    return source


def joined_if_answers(source: RowSource) -> RowSource:
    """Join the rows of a source by instruction if they are answers that nobody has judged."""
    _, first = source[0]
    if isinstance(first, Mapping) and set(first) >= ANSWER and "preference" not in first:
        return _Joined(source)
    return source


class _Joined(RowSource):
    """Answers to one instruction as one row, with ``prompt``, ``responses`` and ``models``.

    Further columns are kept where all of an instruction's answers have the same value. A row that
    is no answer stays as it is.
    """

    def __init__(self, source: RowSource) -> None:
        self.source = source
        self.name = source.name
        self.digest = digest_of("joined", source.digest)
        groups: dict[object, array[int]] = {}
        for number, (_, row) in enumerate(source.rows(0, len(source))):
            key = row["instruction"] if is_answer(row) else number
            groups.setdefault(key, array("q")).append(number)
        self.groups = list(groups.values())

    def __len__(self) -> int:
        return len(self.groups)

    def rows(self, start: int, stop: int) -> Iterator[tuple[str, RawRow]]:
        """Yield the rows, named by their first answer."""
        for numbers in self.groups[start:stop]:
            found = [self.source[number] for number in numbers]
            answers = [row for _, row in found if is_answer(row)]
            yield found[0][0], _join(answers) if answers else found[0][1]


def is_answer(row: object) -> TypeGuard[Mapping[str, object]]:
    """Whether a row is an answer of a model."""
    return isinstance(row, Mapping) and set(row) >= ANSWER and isinstance(row["instruction"], str)


def _join(answers: Sequence[Mapping[str, object]]) -> dict[str, object]:
    first = answers[0]
    shared = {
        name: value
        for name, value in first.items()
        if name not in ANSWER and all(answer.get(name) == value for answer in answers)
    }
    return {
        "prompt": first["instruction"],
        "responses": [answer["output"] for answer in answers],
        "models": [answer["generator"] for answer in answers],
        **shared,
    }
