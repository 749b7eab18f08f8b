"""Constraints on an answer that a program can verify, of the kind of IFEval (arXiv 2311.07911).

A constraint is a sentence in the prompt: ``Use at most 40 words.`` A scorer is given nothing but
the prompt, so constraints are read back from the sentences themselves, by the templates that wrote
them. Each has IFEval's instruction id and arguments as well, with which lm-evaluation-harness's
checkers verify the same answers.
"""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any, Final, NamedTuple

from mpo_lightning.errors import RolloutError

__all__ = [
    "CONFLICTS",
    "HELD_OUT",
    "KINDS",
    "TRAINED",
    "Constraint",
    "Kind",
    "constraints_of",
    "draw",
    "score",
    "text_of",
]

Value = int | str | tuple[str, ...]
Values = Mapping[str, Value]


class Field(NamedTuple):
    """How a value of a template is written, found and read."""

    pattern: str
    write: Callable[[Any], str]
    read: Callable[[str], Value]


QUOTED: Final = Field(r'"[^"]+"', '"{}"'.format, lambda text: text.strip('"'))
FIELDS: Final = {
    "number": Field(r"\d+", str, int),
    "word": QUOTED,
    "phrase": QUOTED,
    "words": Field(
        r'"[^"]+"(?: and "[^"]+")*',
        lambda words: " and ".join(f'"{word}"' for word in words),
        lambda text: tuple(re.findall(r'"([^"]+)"', text)),
    ),
}


@dataclass(frozen=True)
class Kind:
    """A kind of constraint.

    Attributes:
        name: its name.
        template: its sentence, with fields of `FIELDS`.
        choices: values that a field is drawn from.
        met: whether a text that is not blank meets it, given the fields' values.
        instruction: IFEval's instruction id.
        arguments: IFEval's arguments, given the fields' values.
    """

    name: str
    template: str
    choices: Mapping[str, Sequence[Value]]
    met: Callable[[str, Any], bool]
    instruction: str
    arguments: Callable[[Any], dict[str, Any]]

    @property
    def pattern(self) -> re.Pattern[str]:
        """The sentence's regular expression, a group for each field."""
        parts = [
            re.escape(literal) + (f"(?P<{name}>{FIELDS[name].pattern})" if name else "")
            for literal, name, _, _ in Formatter().parse(self.template)
        ]
        return re.compile("".join(parts))


@dataclass(frozen=True)
class Constraint:
    """A kind with its values.

    Attributes:
        kind: the kind.
        values: value of each field of the kind's template.
    """

    kind: Kind
    values: Values

    @property
    def sentence(self) -> str:
        """The sentence of the prompt."""
        written = {name: FIELDS[name].write(value) for name, value in self.values.items()}
        return self.kind.template.format(**written)

    @property
    def arguments(self) -> dict[str, Any]:
        """IFEval's arguments, which go with its ``kind.instruction``."""
        return self.kind.arguments(self.values)

    def is_met(self, response: str) -> bool:
        """Whether a response meets the constraint; a blank one meets none."""
        return bool(response.strip()) and self.kind.met(response, self.values)


# ------------------------------------------------------------------------------------ counting

# What does not end a sentence though a full stop follows.
ABBREVIATIONS: Final = re.compile(
    r"(?:\b(?:mr|mrs|ms|dr|prof|st|vs|e\.g|i\.e|u\.s)|(?:^|\s)[a-z])\.$", re.IGNORECASE
)
# What may stand between its end and the next space: closing marks, two of them typographic.
CLOSING: Final = "\"')]*\u201d\u2019"
SENTENCE_END: Final = re.compile(rf"[.!?]+[{re.escape(CLOSING)}]*(?=\s)")


def count_words(text: str) -> int:
    """Count runs of letters, digits and underscores, as IFEval does."""
    return len(re.findall(r"\w+", text))


def count_sentences(text: str) -> int:
    """Count sentences: they end in a full stop, exclamation or question mark before a space."""
    text = text.strip()
    ends = (text[: found.end()].rstrip(CLOSING) for found in SENTENCE_END.finditer(text))
    return bool(text) + sum(not ABBREVIATIONS.search(before) for before in ends)


def count_bullets(text: str) -> int:
    """Count lines that begin with a dash, or with an asterisk that no other follows."""
    return len(re.findall(r"^[^\S\n]*(?:\*[^*\n]|-)", text, re.M))


def count_highlights(text: str) -> int:
    """Count parts between asterisks, one or two on each side, that are not blank."""
    single = re.findall(r"\*([^\n*]*)\*", text)
    double = re.findall(r"\*\*([^\n*]*)\*\*", text)
    return sum(bool(part.strip()) for part in (*single, *double))


def count_capitals(text: str) -> int:
    """Count words without a small letter; "I" and "A" are such words, as in IFEval."""
    return sum(word.isupper() for word in re.findall(r"\w+(?:[-./]\w+)*", text))


def count_paragraphs(text: str) -> int:
    """Count paragraphs between three asterisks; 0 if one between two dividers is blank."""
    parts = re.split(r"\s?\*\*\*\s?", text)
    if not all(part.strip() for part in parts[1:-1]):
        return 0
    return sum(bool(part.strip()) for part in parts)


def _has(word: str, text: str) -> bool:
    return re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) is not None


def _is_quoted(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


# --------------------------------------------------------------------------------------- kinds

DEMANDED: Final = ("time", "people", "water", "simple", "first", "day", "small", "learn", "place")
DEMANDED_PAIRS: Final = tuple(
    (DEMANDED[i], DEMANDED[(i + 4) % len(DEMANDED)]) for i in range(len(DEMANDED))
)
FORBIDDEN_PAIRS: Final = (
    *(("can", "also"), ("you", "important"), ("with", "will"), ("your", "help")),
    *(("make", "for"), ("or", "need"), ("from", "should"), ("and", "more")),
)
ENDINGS: Final = (
    "That is all.",
    "Have a nice day!",
    "What do you think?",
    "Enjoy it.",
    "Try it today.",
    "See you soon.",
)

TRAINED: Final = (
    Kind(
        "words-at-most",
        "Use at most {number} words.",
        {"number": (15, 20, 25, 30, 40)},
        lambda text, of: count_words(text) <= of["number"],
        "length_constraints:number_words",
        lambda of: {"relation": "less than", "num_words": of["number"] + 1},
    ),
    Kind(
        "words-at-least",
        "Use at least {number} words.",
        {"number": (30, 35, 40, 45, 50)},
        lambda text, of: count_words(text) >= of["number"],
        "length_constraints:number_words",
        lambda of: {"relation": "at least", "num_words": of["number"]},
    ),
    Kind(
        "sentences",
        "Write fewer than {number} sentences.",
        {"number": (2, 3, 4)},
        lambda text, of: count_sentences(text) < of["number"],
        "length_constraints:number_sentences",
        lambda of: {"relation": "less than", "num_sentences": of["number"]},
    ),
    Kind(
        "bullets",
        "Give exactly {number} bullet points in markdown, each on a line that begins with *.",
        {"number": (2, 3, 4)},
        lambda text, of: count_bullets(text) == of["number"],
        "detectable_format:number_bullet_lists",
        lambda of: {"num_bullets": of["number"]},
    ),
    Kind(
        "include-words",
        "Include the words {words}.",
        {"words": DEMANDED_PAIRS},
        # A part of a longer word is enough, as in IFEval.
        lambda text, of: all(word in text.lower() for word in of["words"]),
        "keywords:existence",
        lambda of: {"keywords": list(of["words"])},
    ),
    Kind(
        "forbid-words",
        "Do not use the words {words}.",
        {"words": FORBIDDEN_PAIRS},
        lambda text, of: not any(_has(word, text) for word in of["words"]),
        "keywords:forbidden_words",
        lambda of: {"forbidden_words": list(of["words"])},
    ),
    Kind(
        "word-frequency",
        "Use the word {word} at least {number} times.",
        {"word": DEMANDED, "number": (2, 3)},
        lambda text, of: text.lower().count(of["word"]) >= of["number"],
        "keywords:frequency",
        lambda of: {"relation": "at least", "keyword": of["word"], "frequency": of["number"]},
    ),
    Kind(
        "ending",
        "Finish with exactly these words, and nothing after them: {phrase}",
        {"phrase": ENDINGS},
        lambda text, of: text.strip().strip('"').lower().endswith(of["phrase"].lower()),
        "startend:end_checker",
        lambda of: {"end_phrase": of["phrase"]},
    ),
    Kind(
        "quotation-marks",
        "Wrap your whole answer in double quotation marks.",
        {},
        lambda text, _: _is_quoted(text),
        "startend:quotation",
        lambda _: {},
    ),
    Kind(
        "paragraphs",
        "Write exactly {number} paragraphs, with a line of three asterisks *** between them.",
        {"number": (2, 3)},
        lambda text, of: count_paragraphs(text) == of["number"],
        "length_constraints:number_paragraphs",
        lambda of: {"num_paragraphs": of["number"]},
    ),
    Kind(
        "highlights",
        "Highlight at least {number} parts of your answer in markdown, *like this*.",
        {"number": (2, 3)},
        lambda text, of: count_highlights(text) >= of["number"],
        "detectable_format:number_highlighted_sections",
        lambda of: {"num_highlights": of["number"]},
    ),
    Kind(
        "capitals",
        "Write at least {number} words in CAPITAL letters.",
        {"number": (2, 3, 4)},
        lambda text, of: count_capitals(text) >= of["number"],
        "change_case:capital_word_frequency",
        lambda of: {"capital_relation": "at least", "capital_frequency": of["number"]},
    ),
)
"""Kinds that are trained and tested."""

HELD_OUT: Final = (
    Kind(
        "title",
        "Give your answer a title in double angle brackets, such as <<A title>>.",
        {},
        lambda text, _: re.search(r"<<[^\n]*[^\s<>][^\n]*>>", text) is not None,
        "detectable_format:title",
        lambda _: {},
    ),
    Kind(
        "postscript",
        "At the end add a postscript that begins with P.S.",
        {},
        lambda text, _: re.search(r"p\.\s?s\.", text, re.IGNORECASE) is not None,
        "detectable_content:postscript",
        lambda _: {"postscript_marker": "P.S."},
    ),
    Kind(
        "placeholders",
        "Use at least {number} placeholders in square brackets, such as [name].",
        {"number": (2, 3)},
        lambda text, of: len(re.findall(r"\[.*?\]", text)) >= of["number"],
        "detectable_content:number_placeholders",
        lambda of: {"num_placeholders": of["number"]},
    ),
)
"""Kinds that are tested and never trained."""

KINDS: Final = {kind.name: kind for kind in (*TRAINED, *HELD_OUT)}

CONFLICTS: Final = frozenset(
    frozenset(pair)
    for pair in (
        # Two limits of one count.
        ("words-at-most", "words-at-least"),
        # An answer of few words has no room for them.
        ("words-at-most", "paragraphs"),
        ("words-at-most", "bullets"),
        # Points of a list, and paragraphs, are no sentences to count.
        ("sentences", "bullets"),
        ("sentences", "paragraphs"),
        # The demanded words are a sentence more.
        ("sentences", "ending"),
        # Asterisks of the one count for the other.
        ("highlights", "bullets"),
        ("highlights", "paragraphs"),
        ("bullets", "paragraphs"),
        # One word demanded by both.
        ("include-words", "word-frequency"),
        # Words that the other would forbid.
        ("forbid-words", "ending"),
    )
)
"""Kinds that do not stand in one prompt; no kind stands there twice."""


# ------------------------------------------------------------------------- drawing and reading


def draw(kinds: Sequence[Kind], rng: random.Random, count: int = 2) -> list[Constraint]:
    """Draw constraints of different kinds that do not conflict.

    Args:
        kinds: kinds to draw from.
        rng: source of random numbers.
        count: number of constraints.
    """
    chosen: list[Kind] = []
    while len(chosen) < count:
        able = [
            kind
            for kind in kinds
            if all(
                kind is not other and {kind.name, other.name} not in CONFLICTS for other in chosen
            )
        ]
        chosen.append(rng.choice(able))
    return [
        Constraint(kind, {name: rng.choice(values) for name, values in kind.choices.items()})
        for kind in chosen
    ]


def text_of(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """Return a prompt's text, which is that of its last message."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def constraints_of(prompt: str | Sequence[Mapping[str, Any]]) -> list[Constraint]:
    """Read the constraints of a prompt, in their order.

    Args:
        prompt: text, or messages, whose last one counts.

    Raises:
        RolloutError: if there is none.
    """
    text = text_of(prompt)
    found = []
    for kind in KINDS.values():
        for match in kind.pattern.finditer(text):
            values = {name: FIELDS[name].read(value) for name, value in match.groupdict().items()}
            found.append((match.start(), Constraint(kind, values)))
    if not found:
        raise RolloutError(
            f"The prompt {text[:60]!r} has none of the sentences of "
            "mpo_lightning.showcase.constraints. Score it with a function of your own."
        )
    return [constraint for _, constraint in sorted(found, key=lambda each: each[0])]


def score(prompt: str | Sequence[Mapping[str, Any]], responses: Sequence[str]) -> list[float]:
    """Return the share of the prompt's constraints that each response meets, from 0 to 1.

    It is the function that ``mpo-lightning score --function`` asks for.
    """
    asked = constraints_of(prompt)
    return [sum(each.is_met(text) for each in asked) / len(asked) for text in responses]
