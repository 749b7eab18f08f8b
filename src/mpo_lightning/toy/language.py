"""The toy language: requests, a grammar of short answers, and their gold scores.

Everything here is plain text processing, without PyTorch. A *request* names a topic and an aspect
("What is the price of the boat like?"); an *answer* is one or two short sentences with exactly
three places for a describing word, each of which is positive, neutral or negative. Whether the
answer is positive, on topic or repetitive decides the gold score. All other choices (tense,
hedging, punctuation, ...) are drawn independently of that.
"""

import random
import re
from collections.abc import Mapping, Sequence
from typing import Final


def _lexicon(text: str) -> tuple[str, ...]:
    return tuple(text.split())


TOPICS: Final = _lexicon(
    "tea bread soup cake garden river train bus car house school market park beach hotel shop "
    "film book song phone lamp chair coat clock ball boat farm bridge road town"
)
ASPECTS: Final = _lexicon("price size look sound style color shape story")
REQUESTS: Final = (
    "Tell me about the {aspect} of the {topic}.",
    "What is the {aspect} of the {topic} like?",
    "Please describe the {topic} and its {aspect}.",
    "How is the {aspect} of the {topic}?",
    "Write a line on the {topic}, mostly its {aspect}.",
    "I want to know more about the {topic}. How is its {aspect}?",
)

POSITIVE: Final = _lexicon("good great nice lovely sweet bright fresh fine")
NEUTRAL: Final = _lexicon("plain small round common local normal mild pale")
NEGATIVE: Final = _lexicon("bad poor dull nasty stale sad grim weak")
MOOD_WEIGHTS: Final = (0.3, 0.4, 0.3)
"""Probabilities of a positive, neutral and negative describing word."""
OFF_TOPIC: Final = 0.25
"""Probability that an answer is about another topic than the request."""
REPETITIVE: Final = 0.2
"""Probability that an answer uses its first describing word again."""

# Each symbol stands for weighted alternatives; "{NAME}" refers to another symbol. A, B and C are
# the describing words. No describing word or topic starts with a vowel, so "a" always fits.
GRAMMAR: Final[Mapping[str, Sequence[tuple[str, float]]]] = {
    "ANSWER": [("{OPEN}{FIRST}{SECOND}{END}", 1)],
    "OPEN": [("", 6), ("well, ", 1), ("so, ", 1), ("thanks, ", 1), ("please note, ", 1)],
    "FIRST": [
        ("{HEDGE}the {TOPIC} {IS} {VERY}{A} {JOIN} {B}{WAYS}", 4),
        ("I {FIND} the {TOPIC} {VERY}{A} {JOIN} {B}", 2),
        ("you {GET} a {VERY}{A}, {B} {TOPIC}", 2),
    ],
    "SECOND": [
        (". {WHOSE} {ASPECT} {IS} {VERY}{C}{WHEN}{WHERE}", 4),
        (". {IT_IS} {VERY}{C}{WHEN}{WHERE}", 2),
        (" with a {C} {ASPECT}{WHEN}{WHERE}", 2),
    ],
    "END": [(".", 5), ("!", 3), (", right?", 2)],
    "HEDGE": [("", 5), ("perhaps ", 1), ("maybe ", 1), ("I think ", 1)],
    "VERY": [("", 6), ("very ", 1), ("quite ", 1), ("really ", 1)],
    "JOIN": [("and", 5), ("but", 2), ("yet", 1)],
    "WAYS": [("", 6), (" in two ways", 1), (" in three ways", 1)],
    "WHOSE": [("The", 1), ("Its", 1)],
    "WHEN": [("", 6), (" today", 1), (" now", 1), (" lately", 1)],
    "WHERE": [("", 6), (" here", 1), (" there", 1)],
}
TENSES: Final[Sequence[tuple[float, Mapping[str, Sequence[tuple[str, float]]]]]] = (
    (
        0.6,
        {
            "IS": [("is", 1)],
            "FIND": [("find", 1)],
            "GET": [("get", 1)],
            "IT_IS": [("It is", 1), ("It's", 1)],
        },
    ),
    (
        0.4,
        {
            "IS": [("was", 1)],
            "FIND": [("found", 1)],
            "GET": [("got", 1)],
            "IT_IS": [("It was", 1)],
        },
    ),
)
LOWER_CASE_START: Final = 0.3

# Words that may be said twice. Intensifiers are among them so that gold ignores their number.
FUNCTION_WORDS: Final = _lexicon(
    "a the i you it its it's is was and but yet with in so to of very quite really"
)
_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")
_SYMBOL = re.compile(r"\{(\w+)\}")


def words(text: str) -> list[str]:
    """Return the words of `text`, lower-cased, without punctuation."""
    return _WORD.findall(text.lower())


def requests() -> list[tuple[str, str, str]]:
    """Return all requests as `(prompt, topic, aspect)`, in a fixed order."""
    return [
        (request.format(topic=topic, aspect=aspect), topic, aspect)
        for topic in TOPICS
        for aspect in ASPECTS
        for request in REQUESTS
    ]


def split_prompts(
    rng: random.Random, train: int, val: int, test: int
) -> tuple[list[str], list[str], list[str], list[str]]:
    """Split the prompts so that no (topic, aspect) pair is in two splits.

    Args:
        rng: Source of the shuffles.
        train: Number of training prompts.
        val: Number of validation prompts, each with a pair of its own.
        test: Number of held-out prompts, each with a pair of its own.

    Returns:
        The training, validation and test prompts, and the pool of all prompts over training pairs.
    """
    prompts: dict[tuple[str, str], list[str]] = {}
    for prompt, topic, aspect in requests():
        prompts.setdefault((topic, aspect), []).append(prompt)
    pairs = list(prompts)
    rng.shuffle(pairs)
    held = [rng.choice(prompts[pair]) for pair in pairs[: val + test]]
    pool = [prompt for pair in pairs[val + test :] for prompt in prompts[pair]]
    if train > len(pool):
        raise ValueError(f"only {len(pool)} training prompts are left, {train} were asked for")
    rng.shuffle(pool)
    return pool[:train], held[:val], held[val:], pool


def topic_of(prompt: str) -> str:
    """Return the topic that a request asks about.

    Raises:
        ValueError: If the prompt does not name exactly one topic.
    """
    named = {word for word in words(prompt) if word in TOPICS}
    if len(named) != 1:
        raise ValueError(f"the prompt must name exactly one topic, not {sorted(named)}: {prompt!r}")
    return named.pop()


def aspect_of(prompt: str) -> str:
    """Return the aspect that a request asks about."""
    return next(word for word in words(prompt) if word in ASPECTS)


def write_answer(prompt: str, rng: random.Random) -> str:
    """Draw one answer to `prompt` from the grammar.

    The describing words, the topic and the repetition, which make the gold score, are drawn
    independently of all other choices.
    """
    topic = topic_of(prompt)
    if rng.random() < OFF_TOPIC:
        topic = rng.choice([other for other in TOPICS if other != topic])
    slots = []
    for _ in range(3):
        mood = rng.choices((POSITIVE, NEUTRAL, NEGATIVE), MOOD_WEIGHTS)[0]
        slots.append(rng.choice(mood))
    if rng.random() < REPETITIVE:
        slots[rng.choice((1, 2))] = slots[0]
    tense = rng.choices([rules for _, rules in TENSES], [weight for weight, _ in TENSES])[0]
    fixed = dict(zip("ABC", slots, strict=True)) | {"TOPIC": topic, "ASPECT": aspect_of(prompt)}

    def expand(symbol: str) -> str:
        if symbol in fixed:
            return fixed[symbol]
        options = tense[symbol] if symbol in tense else GRAMMAR[symbol]
        text = rng.choices([text for text, _ in options], [weight for _, weight in options])[0]
        return _SYMBOL.sub(lambda match: expand(match[1]), text)

    text = expand("ANSWER")
    if rng.random() < LOWER_CASE_START:
        return text
    return text[0].upper() + text[1:]


def _answer_pattern() -> re.Pattern[str]:
    """Compile a regular expression for all answers: the grammar has no recursion."""
    adjectives = "|".join(POSITIVE + NEUTRAL + NEGATIVE)
    fixed = dict.fromkeys("ABC", adjectives) | {
        "TOPIC": "|".join(TOPICS),
        "ASPECT": "|".join(ASPECTS),
    }

    def expand(symbol: str, tense: Mapping[str, Sequence[tuple[str, float]]]) -> str:
        if symbol in fixed:
            return f"(?:{fixed[symbol]})"
        alternatives = []
        for text, _ in tense[symbol] if symbol in tense else GRAMMAR[symbol]:
            parts = _SYMBOL.split(text)  # literal, symbol, literal, symbol, ..., literal
            alternatives.append(
                "".join(
                    expand(part, tense) if i % 2 else re.escape(part)
                    for i, part in enumerate(parts)
                )
            )
        return f"(?:{'|'.join(alternatives)})"

    return re.compile("|".join(expand("ANSWER", tense) for _, tense in TENSES))


_ANSWER = _answer_pattern()


def is_grammatical(text: str) -> bool:
    """Whether the grammar can produce `text`, about any topic."""
    lowered = text[:1].lower() + text[1:]
    return bool(_ANSWER.fullmatch(text) or _ANSWER.fullmatch(lowered))


def gold_score(prompt: str, response: str) -> float:
    """Return the true preference of this world for a response.

    Gold is the number of positive words minus the number of negative words, plus 1 if the
    response names the topic of the prompt, minus 1 for every content word that the response has
    used before (so repeating a positive word earns nothing).

    Args:
        prompt: A request that names exactly one topic.
        response: The answer to score.

    Returns:
        The score. For answers of the grammar it is between -3 and 4 before repetitions are
        deducted.
    """
    said = words(response)
    content = [word for word in said if word not in FUNCTION_WORDS]
    positive = sum(word in POSITIVE for word in said)
    negative = sum(word in NEGATIVE for word in said)
    on_topic = topic_of(prompt) in said
    repeated = len(content) - len(set(content))
    return float(positive - negative + on_topic - repeated)


def gold_scores(prompt: str, responses: Sequence[str]) -> list[float]:
    """Return the `gold_score` of each response, as `mpo-lightning score --function` asks for it."""
    return [gold_score(prompt, response) for response in responses]
