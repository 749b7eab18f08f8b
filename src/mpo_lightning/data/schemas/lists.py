"""Formats whose rows hold all responses of a prompt, with their scores or ranks."""

import re
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import ClassVar, Literal

from mpo_lightning.data.groups import bad_field, check_field, check_number, is_list, show
from mpo_lightning.data.schemas.base import (
    Answer,
    Converted,
    OnBad,
    PublicSchema,
    Row,
    ScoredSchema,
    listed,
    one_of,
    records,
)
from mpo_lightning.data.schemas.conversations import (
    answer_text,
    has_leaked_turn,
    prompt_of,
    transcript,
)

__all__ = ["BestOf", "Generations", "Nectar", "Numbered", "OnPolicy", "Ranked"]

Spread = Literal["negative_rank", "normal"]


@dataclass(frozen=True, kw_only=True)
class OnPolicy(ScoredSchema):
    """Responses and scores of a reward model, as in princeton-nlp/llama3-ultrafeedback-armorm.

    The responses are in ``all_generated_responses`` (in some copies ``all_generated_resopnses``,
    or ``generated``), the scores in ``all_rm_scores`` (``rm_scores``, ``scores``, ``score``).
    ``chosen`` and ``rejected``, the best and the worst response, pass through.
    """

    columns: ClassVar[str] = "prompt, all_generated_responses, all_rm_scores"
    responses_in: ClassVar[tuple[str, ...]] = (
        "all_generated_responses",
        "all_generated_resopnses",
        "generated",
    )
    scores_in: ClassVar[tuple[str, ...]] = ("all_rm_scores", "rm_scores", "scores", "score")

    @classmethod
    def fits(cls, columns: frozenset[str], row: Row) -> bool:
        """Whether there are a list of responses and a list of scores."""
        return "prompt" in columns and all(
            any(is_list(row.get(name)) for name in names)
            for names in (cls.responses_in, cls.scores_in)
        )

    def convert(self, row: Row, source: str) -> Converted:
        """Return the canonical row."""
        responses_in = one_of(self.responses_in, row, source)
        scores_in = one_of(self.scores_in, row, source)
        answers = _answers(row, responses_in, scores_in, source)
        prompt, read = prompt_of(row, "prompt", source), ("prompt", responses_in, scores_in)
        return self.canonical(row, source, prompt=prompt, answers=answers, read=read)


def _answers(row: Row, responses_in: str, scores_in: str, source: str) -> list[Answer]:
    """Return the answers whose texts are the entries of one column, and scores of another."""
    responses = listed(row, responses_in, source)
    scores = listed(row, scores_in, source, len(responses))
    return [
        Answer(text, score, f"{responses_in}[{index}]", f"{scores_in}[{index}]")
        for index, (text, score) in enumerate(zip(responses, scores, strict=True))
    ]


@dataclass(frozen=True, kw_only=True)
class Generations(ScoredSchema):
    """``generations`` and their ``ratings``, as distilabel and argilla write them.

    The prompt is ``instruction``, or ``prompt``. A rating is null where the judge's answer could
    not be read.

    Args:
        unscored: what to do with a response without a rating: "drop" to leave it out, or "error".
    """

    unscored: OnBad = "drop"

    columns: ClassVar[str] = "instruction or prompt, generations, ratings"
    required: ClassVar[frozenset[str]] = frozenset({"generations", "ratings"})

    @classmethod
    def fits(cls, columns: frozenset[str], row: Row) -> bool:
        """Whether there are generations, ratings and a prompt."""
        return super().fits(columns, row) and bool(columns & {"instruction", "prompt"})

    def convert(self, row: Row, source: str) -> Converted:
        """Return the canonical row."""
        # After distilabel's step that makes pairs a row has both, and they are the same.
        prompt_in = "instruction" if row.get("instruction") is not None else "prompt"
        answers = _answers(row, "generations", "ratings", source)
        consumed = {"instruction", "prompt"} if _same_prompts(row) else {prompt_in}
        prompt, read = prompt_of(row, prompt_in, source), (*consumed, *self.required)
        return self.canonical(row, source, prompt=prompt, answers=answers, read=read)


def _same_prompts(row: Row) -> bool:
    return row.get("prompt") in (None, row.get("instruction"))


@dataclass(frozen=True, kw_only=True)
class Numbered(ScoredSchema):
    """One column per response: ``A0``, ``A1``, ... or ``generate_0``, ``generate_1``, ...

    The score of ``A0`` is ``score_A0`` or ``A0_score`` (ChenDRAG/ultrafeedback_reward), or the
    scores are a list, ``rm_scores``. Where both a response and its score are null, there is none.
    """

    columns: ClassVar[str] = (
        "prompt, A0, A1, ... with score_A0, ... or A0_score, ..., or generate_0, ... with rm_scores"
    )

    @classmethod
    def fits(cls, columns: frozenset[str], row: Row) -> bool:
        """Whether there are a first response and its score."""
        return "prompt" in columns and any(
            name in columns and bool(columns & {f"score_{name}", f"{name}_score", "rm_scores"})
            for name in ("A0", "generate_0")
        )

    def convert(self, row: Row, source: str) -> Converted:
        """Return the canonical row."""
        stem = "A" if "A0" in row else "generate_"
        names = _numbered(stem, row, source)
        read = ["prompt", *names]
        if "rm_scores" in row and f"score_{names[0]}" not in row and f"{names[0]}_score" not in row:
            read.append("rm_scores")
            scores = listed(row, "rm_scores", source, len(names))
            fields = [f"rm_scores[{index}]" for index in range(len(names))]
        else:
            fields = [one_of((f"score_{name}", f"{name}_score"), row, source) for name in names]
            scores = [row[name] for name in fields]
            read += fields
        prompt = prompt_of(row, "prompt", source)
        answers = [
            Answer(answer_text(row[name], name, source), score, name, field)
            for name, score, field in zip(names, scores, fields, strict=True)
            if row[name] is not None or score is not None
        ]
        return self.canonical(row, source, prompt=prompt, answers=answers, read=read)


def _numbered(stem: str, row: Row, source: str) -> list[str]:
    """Return the columns stem0, stem1, ... in the order of their numbers."""
    pattern = re.compile(re.escape(stem) + r"(0|[1-9]\d*)")
    numbers = sorted(int(found[1]) for name in row if (found := pattern.fullmatch(str(name))))
    if numbers != list(range(len(numbers))) or not numbers:
        field, given = f"{stem}0, {stem}1, ...", f"the numbers {numbers}"
        remedy = "Rename the columns (data.columns)."
        raise bad_field(source, field, given, "numbers from 0 without a gap", remedy)
    return [f"{stem}{number}" for number in numbers]


@dataclass(frozen=True, kw_only=True)
class _ByRank(ScoredSchema):
    """Format that ranks the responses of a prompt.

    Args:
        scores: "negative_rank" for minus the rank, or "normal" for the normal quantile of
            (n + 1/2 - rank) / n, where the best rank counts as 1; its spread does not grow with the
            number n of responses.
    """

    scores: Spread = "negative_rank"
    best: ClassVar[int] = 1

    def _score_of(self, rank: object, count: int, field: str, source: str) -> float | None:
        if rank is None:
            return None
        value = check_number(rank, field, source)
        place = value - self.best + 1
        if not 1 <= place <= count:
            expected = f"a rank from {self.best} to {count + self.best - 1}, for {count} responses"
            raise bad_field(source, field, f"rank {value:g}", expected, "Repair or remove the row.")
        if self.scores == "negative_rank":
            return -value
        return NormalDist().inv_cdf((count + 0.5 - place) / count)


@dataclass(frozen=True, kw_only=True)
class Nectar(_ByRank):
    """berkeley-nest/Nectar: seven answers per prompt, ranked, 1 the best.

    The prompt is a transcript, which becomes messages. ``models`` follows the responses.

    Args:
        leaked_turns: what to do with an answer in which another "Human:" or "Assistant:" turn
            begins a line. "keep" counts it, "drop" leaves it out, "error".
    """

    leaked_turns: Literal["keep", "drop", "error"] = "keep"

    columns: ClassVar[str] = "prompt, answers (of answer, rank)"
    required: ClassVar[frozenset[str]] = frozenset({"prompt", "answers"})

    def convert(self, row: Row, source: str) -> Converted:
        """Return the canonical row."""
        found = records(check_field(row, "answers", source), "answers", source)
        turns = transcript(check_field(row, "prompt", source), "prompt", source)
        if turns[-1] != {"role": "assistant", "content": ""}:
            end, expected = show(str(row["prompt"])[-30:]), r"'\n\nAssistant:' at the end"
            remedy = "Repair or remove the row."
            raise bad_field(source, "prompt", f"the end {end}", expected, remedy)
        models = [record.get("model") for record in found]
        answers = [
            self._answer(record, f"answers[{index}]", len(found), source)
            for index, record in enumerate(found)
        ]
        return self.canonical(row, source, prompt=turns[:-1], answers=answers, models=models)

    def _answer(self, record: Row, where: str, count: int, source: str) -> Answer:
        score = self._score_of(record.get("rank"), count, f"{where}.rank", source)
        answer = Answer(record.get("answer"), score, f"{where}.answer", f"{where}.rank")
        if not has_leaked_turn(answer.text):
            return answer
        if self.leaked_turns == "error":
            found = "another turn of the transcript in the answer"
            remedy = "Leave such answers out, or keep them (schema's `leaked_turns`)."
            raise bad_field(source, answer.text_field, found, "the answer alone", remedy)
        note = "with another turn of the transcript in it"
        if self.leaked_turns == "drop":
            return replace(answer, left_out=f"{note}, left out")
        return replace(answer, notes=(note,))


@dataclass(frozen=True, kw_only=True)
class Ranked(_ByRank):
    """``context`` and ranked ``completions``, as NeMo-RL reads them; rank 0 is the best."""

    columns: ClassVar[str] = "context, completions (of rank, completion)"
    required: ClassVar[frozenset[str]] = frozenset({"context", "completions"})
    best: ClassVar[int] = 0

    def convert(self, row: Row, source: str) -> Converted:
        """Return the canonical row."""
        completions = records(check_field(row, "completions", source), "completions", source)
        answers = []
        for index, completion in enumerate(completions):
            text_in, rank_in = f"completions[{index}].completion", f"completions[{index}].rank"
            text = answer_text(completion.get("completion"), text_in, source)
            score = self._score_of(completion.get("rank"), len(completions), rank_in, source)
            answers.append(Answer(text, score, text_in, rank_in))
        prompt = prompt_of(row, "context", source)
        return self.canonical(row, source, prompt=prompt, answers=answers)


@dataclass(frozen=True, kw_only=True)
class BestOf(PublicSchema):
    """allenai/reward-bench-2: lists of ``chosen`` and ``rejected`` texts; they score 1 and 0."""

    columns: ClassVar[str] = "prompt, chosen and rejected (lists of texts)"
    required: ClassVar[frozenset[str]] = frozenset({"prompt", "chosen", "rejected"})

    @classmethod
    def fits(cls, columns: frozenset[str], row: Row) -> bool:
        """Whether chosen and rejected are lists of texts."""
        return super().fits(columns, row) and all(
            _is_text_list(row[name]) for name in ("chosen", "rejected")
        )

    def convert(self, row: Row, source: str) -> Converted:
        """Return the canonical row."""
        prompt = prompt_of(row, "prompt", source)
        answers = [
            Answer(text, score, f"{name}[{index}]", name)
            for name, score in (("chosen", 1.0), ("rejected", 0.0))
            for index, text in enumerate(listed(row, name, source))
        ]
        return self.canonical(row, source, prompt=prompt, answers=answers)


def _is_text_list(value: object) -> bool:
    return is_list(value) and all(isinstance(entry, str) for entry in value)
