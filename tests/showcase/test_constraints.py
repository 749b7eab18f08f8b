"""Verifiable constraints: what meets each kind, reading them back, and IFEval's own verdict."""

import random
from importlib.util import find_spec
from itertools import combinations

import pytest

from mpo_lightning.errors import RolloutError
from mpo_lightning.rollouts.scorers import FunctionScorer, Scorable
from mpo_lightning.showcase.constraints import (
    CONFLICTS,
    HELD_OUT,
    KINDS,
    TRAINED,
    Constraint,
    constraints_of,
    draw,
    score,
)

# Kind, values, texts that meet it, texts that do not.
CASES = [
    ("words-at-most", {"number": 3}, ["One two three.", "well-known x"], ["One, two, three, 4."]),
    ("words-at-least", {"number": 3}, ["One two three.", "a well-known"], ["One two."]),
    (
        "sentences",
        {"number": 2},
        [
            "One.",
            "no end at all",
            "Dr. Who came, e.g. today!",
            "It cost 3.50 in all.",
            'He said "x."',
        ],
        ["One. Two.", "What? Me", "One.\nTwo.", "Wait... what?"],
    ),
    (
        "bullets",
        {"number": 2},
        ["* a\n* b", "Such as:\n- a\n  - b\nEnd.", "- a\n* b"],
        ["* a", "* a\n* b\n* c", "**a**\n**b**", "1. a\n2. b", "a * b\nc - d"],
    ),
    (
        "include-words",
        {"words": ("time", "small")},
        ["A small time.", "TIME is SMALL", "sometimes smaller"],
        ["time", "A sm all time."],
    ),
    (
        "forbid-words",
        {"words": ("can", "you")},
        ["A canoe is your boat.", "None."],
        ["We CAN.", "It is you!", "can't"],
    ),
    ("word-frequency", {"word": "time", "number": 2}, ["Time, sometimes."], ["time and tide"]),
    (
        "ending",
        {"phrase": "Enjoy it."},
        ["So: enjoy it.", '"Well. Enjoy it."', "Enjoy it. \n"],
        ["Enjoy it", "Enjoy it. Now.", "Enjoy it.)"],
    ),
    ("quotation-marks", {}, ['"All of it."', ' "x"\n'], ['"', '"A" b', 'a "b"', "'a'"]),
    (
        "paragraphs",
        {"number": 2},
        ["a\n***\nb", "a *** b", "***\na\n***\nb\n***"],
        ["a\n\nb", "a\n***\nb\n***\nc", "a\n***\n\n***\nb", "a\n***\n", "a\n---\nb"],
    ),
    (
        "highlights",
        {"number": 2},
        ["*a* and *b*", "**a** and *b*"],
        ["*a*", "**a**", "* a\n* b", "** **", "*a\nb* c"],
    ),
    (
        "capitals",
        {"number": 2},
        ["A GREAT day", "I said: NO!", "WELL-KNOWN U.S. towns"],
        ["GREAT", "Great Day", "GREAt NO", "1 2 3"],
    ),
    ("title", {}, ["<<On tea>>\nText"], ["<On tea>", "<<>>", "<< >>", "<<On\ntea>>"]),
    ("postscript", {}, ["Bye.\nP.S. More", "Bye. p. s. More"], ["Bye. PS: more", "Bye."]),
    (
        "placeholders",
        {"number": 2},
        ["Dear [name], on [date]", "[][]"],
        ["Dear [name]", "(name) {date}", "[a\nb] [c\nd]"],
    ),
]


def test_every_kind_has_cases() -> None:
    assert [name for name, *_ in CASES] == list(KINDS)
    assert (len(TRAINED), len(HELD_OUT)) == (12, 3)


@pytest.mark.parametrize(("name", "values", "met", "missed"), CASES, ids=list(KINDS))
def test_what_meets_a_constraint(
    name: str, values: dict[str, int], met: list[str], missed: list[str]
) -> None:
    constraint = Constraint(KINDS[name], values)
    assert [text for text in met if not constraint.is_met(text)] == []
    assert [text for text in [*missed, "", " \n"] if constraint.is_met(text)] == []


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_sentences_are_read_back(kind: object) -> None:
    rng = random.Random(0)
    for _ in range(20):
        (drawn,) = draw([kind], rng, count=1)  # type: ignore[list-item]
        prompt = f"Tell me about tea. {drawn.sentence}"
        assert constraints_of(prompt) == [drawn]
        messages = [{"role": "system", "content": "x"}, {"role": "user", "content": prompt}]
        assert constraints_of(messages) == [drawn]


def test_several_are_read_back_in_their_order() -> None:
    rng = random.Random(1)
    for _ in range(100):
        drawn = draw(TRAINED, rng)
        assert constraints_of(" ".join(each.sentence for each in drawn)) == drawn


def test_no_prompt_has_a_conflict() -> None:
    rng = random.Random(2)
    pairs = set()
    for _ in range(2000):
        first, second = (each.kind.name for each in draw(TRAINED, rng))
        assert first != second
        pairs.add(frozenset((first, second)))
    names = [kind.name for kind in TRAINED]
    # All others come.
    assert pairs == {frozenset(pair) for pair in combinations(names, 2)} - CONFLICTS
    assert {name for pair in CONFLICTS for name in pair} <= set(KINDS)


def test_score_is_the_share_met() -> None:
    prompt = "Greet me. Use at most 3 words. Wrap your whole answer in double quotation marks."
    responses = ['"Hello, you."', "Hello, you.", "Hello, you and all others.", ""]
    assert score(prompt, responses) == [1, 0.5, 0, 0]
    scorer = FunctionScorer("mpo_lightning.showcase.constraints:score")
    item = Scorable([{"role": "user", "content": prompt}], responses, "x.jsonl:1", {})
    assert scorer([item]) == [[1, 0.5, 0, 0]]


def test_prompt_without_a_constraint_is_an_error() -> None:
    with pytest.raises(RolloutError, match="'Name a fruit.' has none of the sentences"):
        score("Name a fruit.", ["An apple."])


# ------------------------------------------------------------------------------ IFEval's checkers

TEXT = (
    "Bread is simple. You need flour, water and time! Do not hurry on a first day: people "
    "can learn it in 2.5 hours. Is it WORTH it? I think so.\n\nWith Dr. Baker's help, it will be."
)


def texts() -> list[str]:
    """A few hundred, some of each form."""
    rng = random.Random(0)
    words = TEXT.split(" ")
    forms = ("*{}*", "**{}**", '"{}"', "[{}]", "<<{}>>", "\n* {}", "\n- {}", "\n***\n{}", "{}. {}")
    found = [text for _, _, met, missed in CASES for text in (*met, *missed)]
    for _ in range(200):
        part = words[: rng.randrange(1, len(words))]
        for _ in range(rng.randrange(4)):
            place = rng.randrange(len(part))
            word = part[place].upper() if rng.random() < 0.3 else part[place]
            part[place] = rng.choice(forms).format(word, word)
        text = " ".join(part)
        ending = rng.choice(KINDS["ending"].choices["phrase"])
        found.append(rng.choice(["{}", '"{}"', "{} P.S. Bye", "{} " + str(ending)]).format(text))
    return found


def has_their_checkers() -> bool:
    if find_spec("lm_eval") is None or find_spec("langdetect") is None:
        return False
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        return False
    return find_spec("immutabledict") is not None


@pytest.mark.skipif(not has_their_checkers(), reason="needs lm_eval[ifeval] and nltk's punkt_tab")
@pytest.mark.filterwarnings("ignore")
def test_the_harness_says_the_same() -> None:
    """They split sentences by a trained model; all other kinds are told by a rule."""
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT

    rng = random.Random(0)
    differ, met = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    for text in texts():
        for kind in KINDS.values():
            (constraint,) = draw([kind], rng, count=1)
            theirs = INSTRUCTION_DICT[kind.instruction](kind.instruction)
            theirs.build_description(**constraint.arguments)
            verdict = bool(text.strip()) and bool(theirs.check_following(text))
            met[kind.name] += verdict
            differ[kind.name] += constraint.is_met(text) != verdict
    assert all(0 < count < len(texts()) for count in met.values()), met
    assert differ.pop("sentences") < 0.05 * len(texts())
    assert not any(differ.values()), differ
