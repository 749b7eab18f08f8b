"""openbmb/UltraFeedback: four answers with an overall score and four rated aspects each."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from mpo_lightning.data.groups import bad_field, check_field, check_number, show
from mpo_lightning.data.schemas.base import Answer, Converted, Row, ScoredSchema, records

__all__ = ["UltraFeedback"]

ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")
WrongTens = Literal["flag", "repair", "drop", "error"]
Record = dict[str, object]


@dataclass(frozen=True, kw_only=True)
class UltraFeedback(ScoredSchema):
    """openbmb/UltraFeedback as its authors publish it.

    The prompt is ``instruction``. The ``custom_system_prompt`` of a completion is not part of it:
    it differs between the completions of one prompt. ``models`` follows the responses; the other
    parts of ``completions`` do not pass through.

    About 2000 answers of the first release have an ``overall_score`` of 10 that stands for 1
    (OpenBMB/UltraFeedback#8). A 10 counts as wrong where the aspects' mean is 4 of 5 or less.

    Args:
        score: "overall" takes overall_score (1 to 10), "aspects" the weighted mean of the ratings
            of the four aspects (1 to 5), without those that are "N/A".
        aspect_weights: weight of each aspect in that mean, none negative.
        wrong_tens: what to do with a wrong 10. "flag" keeps it and counts it; "repair" takes 1
            where the aspects' mean is 2 or less, as the authors' correction does, and above that
            the mean, stretched from 1..5 to 1..10; "drop" leaves the response out; "error".
    """

    score: Literal["overall", "aspects"] = "overall"
    aspect_weights: dict[str, float] = field(default_factory=lambda: dict.fromkeys(ASPECTS, 1.0))
    wrong_tens: WrongTens = "flag"

    columns: ClassVar[str] = "instruction, completions (of response, overall_score, annotations)"
    required: ClassVar[frozenset[str]] = frozenset({"instruction", "completions"})

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = sorted(set(self.aspect_weights) - set(ASPECTS))
        weights = self.aspect_weights.values()
        if unknown or min(weights, default=0.0) < 0 or not sum(weights) > 0:
            raise ValueError(
                f"aspect_weights must give {', '.join(ASPECTS)} weights of 0 or more, not all 0, "
                f"got {self.aspect_weights}."
            )

    def convert(self, row: Row, source: str) -> Converted:
        """Return the canonical row."""
        completions = records(check_field(row, "completions", source), "completions", source)
        models = [completion.get("model") for completion in completions]
        prompt = check_field(row, "instruction", source)
        answers = [
            self._answer(completion, f"completions[{index}]", source)
            for index, completion in enumerate(completions)
        ]
        if any(models) and row.get("models") not in (None, models):
            note = "of a row whose column `models` names others than its completions, replaced"
            answers = [replace(answer, notes=(*answer.notes, note)) for answer in answers]
        read = (*self.required, "models") if any(models) else self.required
        return self.canonical(row, source, prompt=prompt, answers=answers, read=read, models=models)

    def _answer(self, completion: Record, where: str, source: str) -> Answer:
        text, text_field = completion.get("response"), f"{where}.response"
        if self.score == "aspects":
            ratings, notes = _ratings(completion, where, source, self.aspect_weights)
            mean = _mean(ratings, self.aspect_weights)
            return Answer(text, mean, text_field, f"{where}.annotations", notes=notes)
        score_field = f"{where}.overall_score"
        answer = Answer(text, completion.get("overall_score"), text_field, score_field)
        if answer.score != 10:
            return answer
        weights = dict.fromkeys(ASPECTS, 1.0)
        mean = _mean(_ratings(completion, where, source, weights)[0], weights)
        if mean is None:
            return replace(answer, notes=("with a 10 that no rated aspect can confirm",))
        return answer if mean > 4 else self._wrong_ten(answer, mean, source)

    def _wrong_ten(self, answer: Answer, mean: float, source: str) -> Answer:
        note = "with a 10 that its aspects contradict"
        if self.wrong_tens == "error":
            found = f"10, and aspects of {mean:g} on average (of 5)"
            expected = "aspects above 4 where the score is 10"
            remedy = "Repair or drop such scores (schema's `wrong_tens`), or take the aspects."
            raise bad_field(source, answer.score_field, found, expected, remedy)
        if self.wrong_tens == "drop":
            return replace(answer, left_out=f"{note}, left out")
        if self.wrong_tens == "repair":
            repaired = 1.0 if mean <= 2 else 1 + (mean - 1) * 9 / 4
            return replace(answer, score=repaired, notes=(f"{note}, scored by them",))
        return replace(answer, notes=(note,))


def _ratings(
    completion: Record, where: str, source: str, wanted: Mapping[str, float]
) -> tuple[dict[str, float], tuple[str, ...]]:
    """Return the ratings of the wanted aspects, and a note where one of them is not rated."""
    annotations = completion.get("annotations")
    if not isinstance(annotations, Mapping):
        field, expected = f"{where}.annotations", "an object of rated aspects"
        remedy = "Repair or remove the row."
        raise bad_field(source, field, show(annotations), expected, remedy)
    ratings: dict[str, float] = {}
    for aspect in wanted:
        name = f"{where}.annotations.{aspect}"
        entry = annotations.get(aspect)
        rating = entry.get("Rating") if isinstance(entry, Mapping) else None
        # The struct of an aspect that was not rated is null.
        if rating is not None and rating != "N/A":
            ratings[aspect] = _rating(rating, f"{name}.Rating", source)
    missing = len(ratings) < len(wanted)
    return ratings, ("with aspects that are not rated",) if missing else ()


def _rating(rating: object, name: str, source: str) -> float:
    if isinstance(rating, str):
        try:
            rating = float(rating)
        except ValueError:
            expected, remedy = "a number, or 'N/A'", "Repair or remove the row."
            raise bad_field(source, name, show(rating), expected, remedy) from None
    value = check_number(rating, name, source)
    if not 1 <= value <= 5:
        raise bad_field(source, name, f"{value:g}", "1 to 5", "Repair or remove the row.")
    return value


def _mean(ratings: Mapping[str, float], weights: Mapping[str, float]) -> float | None:
    total = sum(weights[aspect] for aspect in ratings)
    if not total > 0:
        return None
    return sum(weights[aspect] * rating for aspect, rating in ratings.items()) / total
