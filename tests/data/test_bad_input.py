"""What a user may hand over that cannot be used, and what is said of it.

One table over files, encodings, rows, schemas and the length limit, each through a real file and
the real reader. More of each kind, alone: fields of the canonical row in test_groups.py, files in
test_sources.py, boundaries and templates in test_tokens.py, whole runs in test_datamodule.py.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from mpo_lightning.data.groups import DataError
from mpo_lightning.data.reading import GroupReader
from mpo_lightning.data.report import DataReport
from mpo_lightning.data.rows import check_row
from mpo_lightning.data.schemas.base import Schema
from mpo_lightning.data.schemas.lists import Generations, Nectar, OnPolicy
from mpo_lightning.data.schemas.pairs import Arena, Pairs, TranscriptPairs
from mpo_lightning.data.schemas.single_response import ScoredResponses
from mpo_lightning.data.schemas.ultrafeedback import UltraFeedback
from mpo_lightning.data.tokens import GroupTokenizer
from tests.conftest import make_tokenizer

GOOD: dict[str, Any] = {"prompt": "Why?", "responses": ["a", "b"], "scores": [1.0, 2.0]}
GOOD_LINE = json.dumps(GOOD).encode()
USER = {"role": "user", "content": "Why?"}
ANSWER = {"role": "assistant", "content": "So."}
PAIR: dict[str, Any] = {"chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "No."}]}
ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")
RATED = {"Rating": "4", "Rationale": "Fine."}
COMPLETION: dict[str, Any] = {
    "response": "So.",
    "overall_score": 7.0,
    "annotations": dict.fromkeys(
        ("instruction_following", "honesty", "truthfulness", "helpfulness"), RATED
    ),
}


@dataclass(frozen=True)
class Bad:
    """One bad input and what must be said of it: all words, in the message or the reason."""

    content: Any
    words: tuple[str, ...]
    # The row and the field where it is one row's.
    place: str = "1"
    name: str = "data.jsonl"
    schema: Schema | None = None
    columns: dict[str, str] = field(default_factory=dict)
    skipped: bool = False


def good(**changes: Any) -> dict[str, Any]:
    return {**GOOD, **changes}


def on_policy(responses: Any, scores: Any) -> dict[str, Any]:
    return {"prompt": "Why?", "all_generated_responses": responses, "all_rm_scores": scores}


def ultrafeedback(**changes: Any) -> dict[str, Any]:
    return {"instruction": "Why?", "completions": [COMPLETION, {**COMPLETION, **changes}]}


def nectar(prompt: str = "\n\nHuman: Why?\n\nAssistant:", rank: Any = 2.0) -> dict[str, Any]:
    answers = [{"answer": "a", "rank": 1.0}, {"answer": "b", "rank": rank}]
    return {"prompt": prompt, "answers": answers}


def arena(**changes: Any) -> dict[str, Any]:
    pair = {"conversation_a": PAIR["chosen"], "conversation_b": PAIR["rejected"]}
    return {**pair, "winner": "tie", **changes}


def hh(chosen: str, rejected: str) -> dict[str, Any]:
    return {"chosen": chosen, "rejected": rejected}


HH = "\n\nHuman: Why?\n\nAssistant: So."
TABLE: dict[str, Bad] = {
    # ------------------------------------------------------------------------- files, encodings
    "empty file": Bad(b"", ("holds no rows",), ""),
    "blank lines only": Bad(b"\n \n\t\n", ("holds no rows",), ""),
    "unknown suffix": Bad(b"a,b\n", ("suffix '.xls'", ".jsonl"), "", "data.xls"),
    "no Parquet": Bad(GOOD_LINE, ("cannot be read as Parquet",), "", "data.parquet"),
    "object in .json": Bad(GOOD_LINE, ("found dict", "an array", ".jsonl"), "", "data.json"),
    "array in .jsonl": Bad(b"[" + GOOD_LINE + b"]", ("JSON array", "Rename the file to .json")),
    "cut line": Bad(GOOD_LINE + b"\n" + GOOD_LINE[:-5], ("not valid JSON", "may be cut"), "2"),
    "two objects on a line": Bad(GOOD_LINE + b" " + GOOD_LINE, ("Extra data at column",)),
    "Latin-1": Bad(b'{"prompt": "gr\xf6\xdfer"}', ("not UTF-8", "0xf6", "Save the file as UTF-8")),
    "UTF-16": Bad(GOOD_LINE.decode().encode("utf-16"), ("not UTF-8", "0xff at 0")),
    "single quotes": Bad(b"{'prompt': 'Why?'}", ("not valid JSON", "double quotes")),
    "key twice": Bad(
        b'{"prompt": "A?", "prompt": "B?", "responses": ["a", "b"], "scores": [1, 2]}',
        ("keys ['prompt'] twice", "each once", "rename"),
    ),
    "nested too deeply": Bad(b'{"prompt": ' + b"[" * 100_000, ("cannot be read", "recursion")),
    "number too long": Bad(b'{"scores": [' + b"9" * 5000 + b"]}", ("cannot be read", "digits")),
    "column twice": Bad(
        pyarrow.table([["a"], ["b"]], names=["prompt", "prompt"]),
        ("columns ['prompt'] twice", "Rename"),
        "",
        "data.parquet",
    ),
    # ------------------------------------------------------------------------------ rows, fields
    "row a number": Bad(b"3", ("row: found int 3", "an object")),
    "row null": Bad(GOOD_LINE + b"\nnull", ("row: found NoneType None", "an object"), "2"),
    "field missing in a later row": Bad(
        [GOOD, {"prompt": "Why?"}], ("responses: ", "no such"), "2"
    ),
    "prompt null": Bad([good(prompt=None)], ("prompt: found null",)),
    "prompt bytes in Parquet": Bad(
        pyarrow.Table.from_pylist([good(prompt=b"Why?")]),
        ("prompt: found bytes", "a text or a list"),
        name="data.parquet",
    ),
    "unknown role": Bad([good(prompt=[{**USER, "role": "human"}])], ("prompt[0].role", "'human'")),
    "last role": Bad([good(prompt=[USER, ANSWER])], ("prompt[1].role", "end with the user's")),
    "message with a weight": Bad([good(prompt=[{**USER, "weight": 1}])], ("prompt[0]", "'weight'")),
    "messages of unequal lists": Bad(
        [good(prompt={"role": ["user"], "content": []})],
        ("prompt: found lists of different lengths", "'content': 0"),
    ),
    "half a character": Bad(
        b'{"prompt": "Why?", "responses": ["a", "b\\ud83d"], "scores": [1, 2]}',
        ("responses[1]: found half a character", "cut the text"),
    ),
    "one response": Bad([good(responses=["a"], scores=[1])], ("responses: found 1", "at least 2")),
    "empty response": Bad([good(responses=["a", ""])], ("responses[1]: found ''", "Remove")),
    # ----------------------------------------------------------------------------------- scores
    "NaN": Bad(
        b'{"prompt": "A", "responses": ["a", "b"], "scores": [NaN, 1]}', ("scores[0]", "nan")
    ),
    "beyond a float": Bad(
        b'{"prompt": "A", "responses": ["a", "b"], "scores": [1e999, 1]}', ("scores[0]", "inf")
    ),
    "score a text": Bad([good(scores=["a", 2])], ("scores[0]: found 'a'", "a finite number")),
    "score a bool": Bad([good(scores=[True, 2])], ("scores[0]: found True", "a finite number")),
    "score too few": Bad([good(scores=[1])], ("scores: found 1 scores for 2", "cannot be guessed")),
    "truncated a bool": Bad([good(truncated=True)], ("truncated: found bool True", "a list")),
    "truncated of numbers": Bad([good(truncated=[0, 1])], ("truncated[0]: found 0", "true or fal")),
    "truncated too short": Bad([good(truncated=[True])], ("truncated: found 1 entries for 2",)),
    # ---------------------------------------------------------------------------------- schemas
    "unknown columns": Bad([{"q": "A?", "a": "b"}], ("['a', 'q'] fit no schema", "data.columns")),
    "two shapes": Bad(
        [{**GOOD, "generations": ["a", "b"], "ratings": [1, 2]}],
        ("fit Canonical and Generations", "data.schema"),
    ),
    "absent column renamed": Bad([GOOD], ("renames ['nope']",), columns={"nope": "prompt"}),
    "renamed onto another": Bad(
        [good(id="x")], ("columns that are there already",), columns={"id": "prompt"}
    ),
    "named schema without its columns": Bad(
        [GOOD], ("all_generated_responses or", "found none among"), schema=OnPolicy()
    ),
    "more scores than responses": Bad(
        [on_policy(["a", "b"], [1, 2, 3])], ("all_rm_scores: found 3 entries for 2 responses",)
    ),
    "score null": Bad(
        [on_policy(["a", "b"], [1.0, None])], ("all_rm_scores[1]: found null", "unscored: drop")
    ),
    "one response generated": Bad(
        [on_policy(["a"], [1.0])], ("with a single response",), skipped=True
    ),
    "rating no number": Bad(
        [{"instruction": "A?", "generations": ["a", "b"], "ratings": ["4", "good"]}],
        ("ratings[1]: found 'good'", "a finite number"),
        schema=Generations(),
    ),
    "all ratings null": Bad(
        [{"instruction": "A?", "generations": ["a", "b"], "ratings": [None, None]}],
        ("fewer than two responses that can be used",),
        skipped=True,
    ),
    "completions a text": Bad(
        [{"instruction": "A?", "completions": "abc"}], ("completions: found str 'abc'", "a list")
    ),
    "completion a text": Bad(
        [{"instruction": "A?", "completions": ["abc"]}], ("completions[0]: found str", "an object")
    ),
    "completion without response": Bad(
        [ultrafeedback(response=None)], ("completions[1].response: found None", "empty: drop")
    ),
    "overall_score null": Bad(
        [ultrafeedback(overall_score=None)], ("completions[1].overall_score: found null",)
    ),
    "rating of an aspect": Bad(
        [ultrafeedback(annotations={"honesty": {"Rating": "high"}})],
        ("completions[1].annotations.honesty.Rating: found 'high'", "'N/A'"),
        schema=UltraFeedback(score="aspects"),
    ),
    "rating beyond its scale": Bad(
        [ultrafeedback(annotations={"honesty": {"Rating": "10"}})],
        ("honesty.Rating: found 10", "1 to 5"),
        schema=UltraFeedback(score="aspects"),
    ),
    "no transcript": Bad([nectar(prompt="Why?")], ("prompt: found str 'Why?'", "Human:")),
    "transcript without its end": Bad(
        [nectar(prompt="\n\nHuman: Why?")], ("prompt: found the end", "Assistant:")
    ),
    "empty turn": Bad(
        [nectar(prompt="\n\nHuman: \n\nAssistant:")], ("prompt[0].content: found ''",)
    ),
    "rank 0": Bad([nectar(rank=0.0)], ("answers[1].rank: found rank 0", "from 1 to 2")),
    "rank beyond": Bad([nectar(rank=8)], ("answers[1].rank: found rank 8",), schema=Nectar()),
    "numbers with a gap": Bad(
        [{"prompt": "A?", "A0": "a", "A2": "b", "score_A0": 1, "score_A2": 2}],
        ("the numbers [0, 2]", "without a gap"),
    ),
    "number without score": Bad(
        [{"prompt": "A?", "A0": "a", "A1": "b", "score_A0": 1}],
        ("score_A1 or A1_score: found none",),
    ),
    "different prompts": Bad(
        [{**PAIR, "rejected": [{**USER, "content": "How?"}, ANSWER]}],
        ("rejected: found the prompt", "How?", "that of chosen", "differing_prompts: drop"),
    ),
    "different prompts, left out": Bad(
        [{**PAIR, "rejected": [{**USER, "content": "How?"}, ANSWER]}],
        ("with responses to different prompts",),
        schema=Pairs(differing_prompts="drop"),
        skipped=True,
    ),
    "conversation without answer": Bad(
        [{**PAIR, "rejected": [USER]}], ("rejected: found a conversation that ends with 'user'",)
    ),
    "text against conversation": Bad(
        [{**PAIR, "rejected": "No."}], ("chosen: found list", "in both columns")
    ),
    "prompt that is another's": Bad(
        [{**PAIR, "prompt": "When?"}], ("prompt: found 'When?'", "before the last message")
    ),
    "texts that share no beginning": Bad(
        [{"chosen": "Yes.", "rejected": "No."}], ("rejected: found 'No.'", "column `prompt`")
    ),
    "transcripts of different prompts": Bad(
        [hh(HH, HH.replace("Why", "How"))], ("rejected: found the prompt", "that of chosen")
    ),
    "transcript that ends with Human": Bad(
        [hh(HH, HH + "\n\nHuman: Go on")], ("rejected: found a conversation that ends with 'user'",)
    ),
    "transcript without answer": Bad(
        [hh(HH, HH.removesuffix(" So."))], ("rejected: found ''",), schema=TranscriptPairs()
    ),
    "winner": Bad([arena(winner="both")], ("winner: found 'both'", "model_a, model_b, tie")),
    "winner null": Bad([arena(winner=None)], ("winner: found null",), schema=Arena()),
    "preference out of range": Bad(
        [{"context": [USER], "response1": "a", "response2": "b", "overall_preference": -100}],
        ("overall_preference: found -100", "-3 to 3"),
    ),
    "neither response better": Bad(
        [
            {
                "prompt": "A?",
                "response_0": "a",
                "response_1": "b",
                "better_response_id": 2,
                "safer_response_id": 0,
            }
        ],
        ("better_response_id: found 2", "0 or 1"),
    ),
    "attribute that is not there": Bad(
        [{"prompt": "A?", "response": "a", "helpful": 1}],
        ("humour: found no such field", "weights"),
        schema=ScoredResponses(weights={"humour": 1.0}),
    ),
    "one row for a prompt": Bad(
        [{"prompt": "A?", "response": "a", "score": 1}], ("with a single response",), skipped=True
    ),
    "label null": Bad(
        [
            {"prompt": "A?", "completion": "a", "label": True},
            {"prompt": "A?", "completion": "b", "label": False},
            {"prompt": "A?", "completion": "c", "label": None},
        ],
        ("label: found null",),
        "3",
    ),
    "truncated in some rows of a prompt": Bad(
        [
            {"prompt": "A?", "response": "a", "score": 1, "truncated": True},
            {"prompt": "A?", "response": "b", "score": 2},
        ],
        ("truncated: found null in some rows", "in each, or in none"),
    ),
}


def written(bad: Bad, folder: Path) -> Path:
    path = folder / bad.name
    if isinstance(bad.content, bytes):
        path.write_bytes(bad.content)
    elif isinstance(bad.content, list):
        path.write_text("".join(json.dumps(row) + "\n" for row in bad.content), encoding="utf-8")
    else:
        pyarrow.parquet.write_table(bad.content, path)
    return path


@pytest.mark.parametrize("what", TABLE)
def test_what_is_said_of_bad_input(what: str, tmp_path: Path) -> None:
    bad = TABLE[what]
    path = written(bad, tmp_path)
    try:
        outcomes = list(GroupReader(str(path), schema=bad.schema, columns=bad.columns).results())
        said = [(o.source, o.skipped, o.error) for o in outcomes if o.group is None]
        ((source, skipped, error),) = said
        message = skipped if bad.skipped else str(error)
        assert (skipped is not None) == bad.skipped
        assert source == f"{path}:{bad.place}"
    except DataError as error:
        # What is wrong with the whole source is said at once.
        message = str(error)
        assert not bad.skipped
    assert message is not None
    if not bad.skipped:
        assert message.startswith(f"{path}:{bad.place}" if bad.place else str(path))
    for word in bad.words:
        assert word in message


def test_the_table_is_long() -> None:
    assert len(TABLE) >= 40
    assert len({bad.words for bad in TABLE.values()}) >= 40


# Settings, prompt, responses, and what is said; a prompt of 6 tokens, responses of 2 and 7.
TOKENS: dict[str, tuple[dict[str, Any], Any, list[str], str]] = {
    "prompt as long as the limit": (
        {"over_long": "error", "max_length": 6},
        "<|user|>" * 6,
        ["a", "b"],
        r"x:1: prompt: found 6 tokens",
    ),
    "response beyond the limit": (
        {"over_long": "error", "max_length": 12},
        "<|user|>" * 6,
        ["<|user|>", "<|user|>" * 6],
        r"x:1: responses\[1\]: found 6 \+ 7 tokens; expected at most 12",
    ),
    "nothing left": (
        {"over_long": "drop_group", "max_length": 1},
        "<|user|>" * 6,
        ["a", "b"],
        r"No group of x can be used\.\n.*\n.*1 with a prompt beyond max_length",
    ),
    "conversation without template": ({}, [USER], ["a", "b"], r"x:1: prompt"),
    "space at the end of the prompt": ({}, "Why ", ["a tree", "b"], r"x:1: responses\[0\]"),
    "response that ends twice": ({}, "Why?", ["a<|eos|><|eos|>", "b"], r"x:1: responses\[0\]"),
    "chat without template": ({"prompt_format": "chat"}, "Why?", ["a", "b"], "chat template"),
}


@pytest.mark.parametrize("what", TOKENS)
def test_what_is_said_of_bad_tokens(what: str) -> None:
    settings, prompt, responses, words = TOKENS[what]
    row = {"prompt": prompt, "responses": responses, "scores": [1.0, 2.0]}
    group, report = check_row(row, "x:1"), DataReport("x", groups=1)
    defaults = {"max_length": 1000, "over_long": "error", "prompt_format": "auto"}
    others = {"boundary": "strict"}
    tokenizer = make_tokenizer(chat=False)
    with pytest.raises(DataError, match=words):  # noqa: PT012 (dropped or refused)
        GroupTokenizer(tokenizer, **{**defaults, **others, **settings})(group, report)
        report.check()
