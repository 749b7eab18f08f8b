"""Formats with two responses per row, of which one is preferred."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from mpo_lightning.data.groups import bad_field, check_field, check_number, show, show_typed
from mpo_lightning.data.schemas.base import (
    Answer,
    Converted,
    OnBad,
    PublicSchema,
    Row,
    ScoredSchema,
    SkippedRow,
)
from mpo_lightning.data.schemas.conversations import (
    marked_turns,
    prompt_of,
    split_conversation,
    transcript,
)
from mpo_lightning.data.schemas.trainer_columns import (
    as_messages,
    has_prompt,
    is_conversation,
    is_response,
    read_prompt,
)

__all__ = [
    "Arena",
    "HelpSteer2Preference",
    "HelpSteer3",
    "Pairs",
    "SafePairs",
    "ScoredPairs",
    "TranscriptPairs",
    "TwoPrompts",
]

Notes = tuple[str, ...]
PAIR = ("chosen", "rejected")
PAIR_NAMES = (PAIR, ("chosen_response", "rejected_response"))
SCORE_COLUMNS = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
    ("rating_chosen", "rating_rejected"),
)
# Columns of formats with more responses per row, from which such pairs were made.
LARGER = frozenset(
    {
        "A0",
        "all_generated_resopnses",
        "all_generated_responses",
        "answers",
        "completions",
        "generate_0",
        "generated",
        "generations",
        "responses",
    }
)


def _pair_in(columns: Collection[str]) -> tuple[str, str] | None:
    """Return the columns of the chosen and the rejected response."""
    return next((names for names in PAIR_NAMES if set(names) <= set(columns)), None)


def _is_pair(columns: frozenset[str], row: Row) -> bool:
    """Whether chosen and rejected are one response each, without larger groups beside them."""
    names = _pair_in(columns)
    # distilabel's two generations of a pair have no column of ratings.
    larger = LARGER if "ratings" in columns else LARGER - {"generations"}
    return (
        names is not None and not columns & larger and all(is_response(row[name]) for name in names)
    )


def _scores_in(columns: frozenset[str]) -> list[tuple[str, str]]:
    return [names for names in SCORE_COLUMNS if columns >= set(names)]


def _is_transcript(row: Row) -> bool:
    return row.get("prompt") is None and all(
        str(row.get(name)).startswith("\n\nHuman:") for name in PAIR
    )


def _common_start(one: str, other: str) -> str:
    """Return the beginning that two texts share, up to white space."""
    length = 0
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        length += 1
    # White space belongs to the response, and no word is split.
    while length and not all(text[length : length + 1].isspace() for text in (one, other)):
        length -= 1
    return one[:length].rstrip()


@dataclass(frozen=True, kw_only=True)
class TwoPrompts(PublicSchema):
    """Format that may give each response a prompt of its own.

    Args:
        differing_prompts: what to do with a row whose responses answer different prompts: "error",
            or "drop" to leave it out.
    """

    differing_prompts: OnBad = "error"

    def _split(
        self, values: Iterable[object], names: Sequence[str], source: str
    ) -> tuple[list[dict[str, object]], list[object]]:
        """Return the prompt of several conversations, and their last messages' texts.

        Raises:
            DataError: if their prompts differ.
            SkippedRow: if they differ, and such rows are left out.
        """
        parts = [
            split_conversation(value, name, source)
            for value, name in zip(values, names, strict=True)
        ]
        first = parts[0][0]
        for name, (prompt, _) in zip(names, parts, strict=True):
            if prompt == first:
                continue
            if self.differing_prompts == "drop":
                raise SkippedRow("with responses to different prompts")
            found, expected = f"the prompt {show(prompt)}", f"that of {names[0]}, {show(first)}"
            remedy = (
                "Repair or remove the row, or leave such rows out (schema's "
                "`differing_prompts: drop`)."
            )
            raise bad_field(source, name, found, expected, remedy)
        return first, [response for _, response in parts]

    def _prompt_and_texts(
        self, row: Row, names: tuple[str, str], source: str
    ) -> tuple[object, list[object], tuple[Notes, Notes], tuple[str, ...]]:
        """Return prompt, both responses, notes on each, and the columns of the prompt.

        The prompt has columns of its own, or it is the messages before the last one of both
        conversations, or the beginning that both texts share.
        """
        values = [as_messages(check_field(row, name, source), name, source) for name in names]
        if all(map(is_conversation, values)):
            before, texts = self._split(values, names, source)
            if before:
                prompt = None if row.get("prompt") is None else prompt_of(row, "prompt", source)
                contents = [turn.get("content") for turn in before if turn.get("role") == "user"]
                if prompt is not None and prompt != before and prompt not in contents:
                    expected = f"what comes before the last message of chosen, {show(before)}"
                    remedy = "Repair the row, or drop the column."
                    raise bad_field(source, "prompt", show(prompt), expected, remedy)
                return before, texts, ((), ()), ("prompt",)
            prompt, read = read_prompt(row, source)
            return prompt, texts, ((), ()), read
        for name, value in zip(names, values, strict=True):
            if not isinstance(value, str):
                expected = "a text, or a list of messages, in both columns"
                raise bad_field(source, name, show_typed(value), expected, "Convert the column.")
        if has_prompt(row):
            prompt, read = read_prompt(row, source)
            repeat = ("that begins with its prompt",)
            chosen, rejected = (
                repeat if isinstance(prompt, str) and str(value).startswith(prompt) else ()
                for value in values
            )
            return prompt, values, (chosen, rejected), read
        start = _common_start(*map(str, values))
        if not start:
            expected = f"the beginning of {names[0]}, {show(values[0])}, which is the prompt"
            remedy = "Rename or add the column `prompt`."
            raise bad_field(source, names[1], show(values[1]), expected, remedy)
        note = ("to a prompt that is how chosen and rejected begin",)
        return start, [str(value)[len(start) :] for value in values], (note, note), ()

    def _pair_of(
        self, row: Row, source: str, scores: Sequence[object], scores_in: tuple[str, ...] = ()
    ) -> Converted:
        """Return the canonical row of ``chosen`` and ``rejected``.

        Args:
            row: the row.
            source: "file:row".
            scores: their scores.
            scores_in: columns of the scores. Defaults to those of the responses.
        """
        names = _pair_in(row) or PAIR
        prompt, texts, notes, prompt_in = self._prompt_and_texts(row, names, source)
        answers = [
            Answer(text, score, name, score_in, notes=note)
            for name, text, score, score_in, note in zip(
                names, texts, scores, scores_in or names, notes, strict=True
            )
        ]
        read = (*prompt_in, "prompt", *names, *scores_in)
        return self.canonical(row, source, prompt=prompt, answers=answers, read=read)


@dataclass(frozen=True, kw_only=True)
class Pairs(TwoPrompts):
    """``chosen`` and ``rejected``, the preference formats of most trainers; they score 1 and 0.

    Each is a text, a message or a conversation; ``chosen_response`` and ``rejected_response`` are
    other names. The prompt is ``prompt``, or has a name of LLaMA-Factory, axolotl, OpenRLHF or
    ms-swift: ``instruction`` (with a line ``input``), ``question``, ``query`` or ``input``, after
    the pairs of ``history``; or the conversation in ``messages``, ``conversations`` or
    ``conversation``. Without any of these the prompt is the messages before the last one, which
    must be the same for both; for texts it is the beginning that both share, up to white space
    (counted: answers may begin with the same words, too). Texts that begin with the prompt are left
    as they are and counted.
    """

    columns: ClassVar[str] = "chosen, rejected, prompt (or instruction, messages, ...) or not"

    @classmethod
    def fits(cls, columns: frozenset[str], row: Row) -> bool:
        """Whether there are one chosen and one rejected response, and no scores."""
        return _is_pair(columns, row) and not _scores_in(columns) and not _is_transcript(row)

    def convert(self, row: Row, source: str) -> Converted:
        """Return the canonical row."""
        return self._pair_of(row, source, (1.0, 0.0))


@dataclass(frozen=True, kw_only=True)
class ScoredPairs(TwoPrompts, ScoredSchema):
    """Pairs with scores, as in HuggingFaceH4/ultrafeedback_binarized; the rest is as for `Pairs`.

    The scores are in ``score_chosen``, ``chosen_score``, ``chosen_rating`` or ``chosen-rating``,
    and the same for rejected.
    """

    columns: ClassVar[str] = "as for Pairs, with score_chosen and score_rejected"

    @classmethod
    def fits(cls, columns: frozenset[str], row: Row) -> bool:
        """Whether there are one chosen and one rejected response, and scores."""
        return _is_pair(columns, row) and bool(_scores_in(columns))

    def convert(self, row: Row, source: str) -> Converted:
        """Return the canonical row."""
        found = _scores_in(frozenset(map(str, row)))
        if len(found) != 1:
            among = f"{found or 'none'} among {sorted(map(str, row))}"
            field, expected = "score_chosen, score_rejected", "one pair of score columns"
            remedy = "Rename columns (data.columns) so that one is left."
            raise bad_field(source, field, among, expected, remedy)
        return self._pair_of(row, source, [row[name] for name in found[0]], found[0])


@dataclass(frozen=True, kw_only=True)
class TranscriptPairs(TwoPrompts):
    """Anthropic/hh-rlhf: ``chosen`` and ``rejected`` are transcripts; they score 1 and 0.

    The prompt is all turns but the last, the assistant's. White space around a turn is
    not part of it.
    """

    columns: ClassVar[str] = "chosen, rejected (transcripts that begin with 'Human:')"

    @classmethod
    def fits(cls, columns: frozenset[str], row: Row) -> bool:
        """Whether chosen and rejected are transcripts."""
        return _is_pair(columns, row) and _is_transcript(row)

    def convert(self, row: Row, source: str) -> Converted:
        """Return the canonical row."""
        turns = (transcript(check_field(row, name, source), name, source) for name in PAIR)
        prompt, texts = self._split(turns, PAIR, source)
        answers = [
            Answer(text, score, name, name)
            for name, text, score in zip(PAIR, texts, (1.0, 0.0), strict=True)
        ]
        return self.canonical(row, source, prompt=prompt, answers=answers, read=PAIR)


@dataclass(frozen=True, kw_only=True)
class _ByStrength(PublicSchema):
    """Format with the strength of a preference, which the second response scores; the first 0.

    ``columns`` names those of prompt, first response, second response and strength.
    """

    def convert(self, row: Row, source: str) -> Converted:
        """Return the canonical row."""
        _, first, second, strength_in = self.columns.split(", ")
        strength = check_number(check_field(row, strength_in, source), strength_in, source)
        if abs(strength) > 3:
            expected, remedy = "a number from -3 to 3", "Repair or remove the row."
            raise bad_field(source, strength_in, f"{strength:g}", expected, remedy)
        answers = [
            Answer(row.get(name), score, name, strength_in)
            for name, score in ((first, 0.0), (second, strength))
        ]
        return self.canonical(row, source, prompt=self._prompt(row, source), answers=answers)

    def _prompt(self, row: Row, source: str) -> object:
        return prompt_of(row, "context", source)


@dataclass(frozen=True, kw_only=True)
class HelpSteer2Preference(_ByStrength):
    """Preferences of nvidia/HelpSteer2: the second response scores their strength, the first 0.

    The strength is above 0 where ``response_2`` is better; 0 is a tie and has no contrast. Prompts
    of several turns become messages.
    """

    columns: ClassVar[str] = "prompt, response_1, response_2, preference_strength"
    required: ClassVar[frozenset[str]] = frozenset(columns.split(", "))

    def _prompt(self, row: Row, source: str) -> object:
        return marked_turns(check_field(row, "prompt", source))


@dataclass(frozen=True, kw_only=True)
class HelpSteer3(_ByStrength):
    """nvidia/HelpSteer3: the second response scores ``overall_preference``, the first 0.

    The preference is above 0 where ``response2`` is better; 0 is a tie and has no contrast.
    """

    columns: ClassVar[str] = "context, response1, response2, overall_preference"
    required: ClassVar[frozenset[str]] = frozenset(columns.split(", "))


@dataclass(frozen=True, kw_only=True)
class SafePairs(PublicSchema):
    """PKU-Alignment/PKU-SafeRLHF: which of two responses is better, and which is safer.

    Args:
        weights: score of a response for being the better one ("better") and for being the safer one
            ("safer"), which add up.
    """

    weights: dict[str, float] = field(default_factory=lambda: {"better": 1.0, "safer": 0.0})

    columns: ClassVar[str] = "prompt, response_0, response_1, better_response_id, safer_response_id"
    required: ClassVar[frozenset[str]] = frozenset(columns.split(", "))
    ids: ClassVar[Mapping[str, str]] = {
        "better": "better_response_id",
        "safer": "safer_response_id",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.weights or set(self.weights) - set(self.ids):
            raise ValueError(f"weights must be of {', '.join(self.ids)}, got {self.weights}.")

    def convert(self, row: Row, source: str) -> Converted:
        """Return the canonical row."""
        scores = [0.0, 0.0]
        for name, weight in self.weights.items():
            column = self.ids[name]
            winner = check_number(check_field(row, column, source), column, source)
            if winner not in (0, 1):
                raise bad_field(source, column, f"{winner:g}", "0 or 1", "Repair the row.")
            scores[int(winner == 1)] += weight
        prompt, read = check_field(row, "prompt", source), ("prompt", "response_0", "response_1")
        answers = [
            Answer(row.get(name), score, name, "better_response_id")
            for name, score in zip(read[1:], scores, strict=True)
        ]
        return self.canonical(row, source, prompt=prompt, answers=answers, read=read)


@dataclass(frozen=True, kw_only=True)
class Arena(TwoPrompts):
    """lmsys/chatbot_arena_conversations and similar: the winner scores 1, the loser 0.

    Both score 0 where ``winner`` is "tie" or "tie (bothbad)", and have no contrast. Conversations
    of several turns usually differ before their last answer; see ``differing_prompts``.
    """

    columns: ClassVar[str] = "conversation_a, conversation_b, winner"
    required: ClassVar[frozenset[str]] = frozenset(columns.split(", "))
    scores: ClassVar[Mapping[str, tuple[float, float]]] = {
        "model_a": (1.0, 0.0),
        "model_b": (0.0, 1.0),
        "tie": (0.0, 0.0),
        "tie (bothbad)": (0.0, 0.0),
    }

    def convert(self, row: Row, source: str) -> Converted:
        """Return the canonical row."""
        names = ("conversation_a", "conversation_b")
        winner = check_field(row, "winner", source)
        if not isinstance(winner, str) or winner not in self.scores:
            expected = f"one of {', '.join(self.scores)}"
            raise bad_field(source, "winner", show(winner), expected, "Repair or remove the row.")
        turns = (check_field(row, name, source) for name in names)
        prompt, texts = self._split(turns, names, source)
        scores = self.scores[winner]
        answers = [
            Answer(text, score, name, "winner")
            for name, text, score in zip(names, texts, scores, strict=True)
        ]
        return self.canonical(row, source, prompt=prompt, answers=answers, read=names)
