"""AlpacaEval: a judge's preference between an answer and the baseline's, for several models."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

from mpo_lightning.data.groups import bad_field, check_field, check_number
from mpo_lightning.data.schemas.base import (
    Answer,
    Converted,
    OnBad,
    Row,
    ScoredSchema,
    SkippedRow,
)

__all__ = ["AlpacaEval"]

BASELINE = 0.5
OF_RESPONSES = ("responses", "scores", "models")
# Columns that pass through; further ones, such as the judge's own words, do not.
SHARED = ("dataset", "datasplit", "annotator", "input")


@dataclass(frozen=True, kw_only=True)
class AlpacaEval(ScoredSchema):
    """Annotations of AlpacaEval: rows with one instruction make a group.

    An answer (``output_2``) scores the probability that it is preferred to the baseline's
    (``output_1``), which is ``preference`` minus 1; the baseline is in the group once and scores
    1/2, as does a draw, which older annotations write as 0. A preference is null where the judge's
    answer could not be read. Rows of answers that were not judged (``output``, ``generator``) may
    be among them. ``models`` follows the responses; ``dataset``, ``datasplit`` and ``annotator``
    pass through.

    Args:
        unscored: what to do with an answer that has no preference: "drop" to leave it out, or
            "error".
    """

    unscored: OnBad = "drop"

    columns: ClassVar[str] = (
        "instruction, output_1, output_2, preference; one comparison with the baseline per row"
    )
    required: ClassVar[frozenset[str]] = frozenset(columns.partition(";")[0].split(", "))
    one_response_a_row: ClassVar[bool] = True

    def convert(self, row: Row, source: str) -> Converted:
        """Return the canonical row of the answer, with the baseline's before it if it is judged.

        The score of an answer that is to be left out is None, and a note says why.
        """
        prompt = check_field(row, "instruction", source)
        shared = {name: row[name] for name in SHARED if name in row}

        def single(output_in: str, model: object, score: float | None) -> Converted:
            answer = Answer(row.get(output_in), score, output_in, "preference")
            reason = self._reason_to_leave_out(answer)
            if reason is not None and output_in != "output_1":
                left_out = _row({"prompt": prompt, **shared}, [answer.text], [None], [model])
                return replace(left_out, notes=(reason,))
            found = self.canonical(shared, source, prompt=prompt, answers=[answer])
            return Converted({**found.row, "models": [model]})

        if "preference" not in row:
            return single("output", row.get("generator"), None)
        answer = single("output_2", row.get("generator_2"), _score(row["preference"], source))
        # Its name has no number in some files.
        of_baseline = row.get("generator_1", row.get("generator"))
        baseline = single("output_1", of_baseline, BASELINE)
        columns = [_of(baseline.row, name) + _of(answer.row, name) for name in OF_RESPONSES]
        return replace(_row(answer.row, *columns), notes=answer.notes)

    def gather(self, rows: Sequence[Converted], source: str) -> Sequence[Converted]:
        """Return the baseline's answer once, and then the others.

        Raises:
            DataError: if the answers were compared with different ones, or by different judges.
            SkippedRow: if none of them was judged.
        """
        judged = [row.row for row in rows if len(_of(row.row, "responses")) > 1]
        for field, found in (
            ("output_1", {repr(_of(row, "responses")[0]) for row in judged}),
            ("annotator", {repr(row.get("annotator")) for row in judged}),
        ):
            if len(found) > 1:
                shown = f"{len(found)} to one instruction, {' and '.join(sorted(found))[:120]}"
                expected = "the same for all, as their scores are compared"
                remedy = "Read those that were judged in the same way."
                raise bad_field(source, field, shown, expected, remedy)
        if not judged:
            raise SkippedRow(rows[0].notes[0])
        baseline = _single(judged[0], 0)
        singles, notes = [baseline], list[str]()
        for row in rows:
            answer = _single(row.row, -1)
            # The baseline may have been compared with itself, and its answers may be there as well.
            if all(answer[name] == baseline[name] for name in ("responses", "models")):
                continue
            notes += row.notes
            if answer["scores"] != [None]:
                singles.append(answer)
        return [Converted(baseline, tuple(notes)), *map(Converted, singles[1:])]


def _row(shared: Row, *columns: list[Any]) -> Converted:
    return Converted({**shared, **dict(zip(OF_RESPONSES, columns, strict=True))})


def _of(row: Row, name: str) -> list[Any]:
    return cast("list[Any]", row[name])


def _single(row: Row, index: int) -> dict[str, Any]:
    """Return one response of a row as a row."""
    responses, scores, models = (_of(row, name)[index] for name in OF_RESPONSES)
    return {**row, "responses": [responses], "scores": [scores], "models": models}


def _score(preference: object, source: str) -> float | None:
    """Return the probability that an answer is preferred to the baseline's."""
    if preference is None:
        return None
    value = check_number(preference, "preference", source)
    if value != 0 and not 1 <= value <= 2:
        expected = "1 to 2 (or 0, a draw)"
        raise bad_field(source, "preference", f"{value:g}", expected, "Repair or remove the row.")
    return value - 1 if value else BASELINE
