"""The check of the canonical row, and what its messages say."""

import re
from typing import Any

import numpy as np
import pytest
import torch

from mpo_lightning.data.conversation import as_messages, as_text
from mpo_lightning.data.groups import (
    DataError,
    PreferenceGroup,
    check_object,
    collect_errors,
)
from mpo_lightning.data.rows import check_row

ROW: dict[str, Any] = {"prompt": "Why?", "responses": ["a", "b"], "scores": [1.0, 2.0]}
USER = {"role": "user", "content": "Why?"}


def row(**changes: Any) -> dict[str, Any]:
    return {**ROW, **changes}


def without(field: str) -> dict[str, Any]:
    return {name: value for name, value in ROW.items() if name != field}


# What is wrong: the row, the field that the message names, and what it says was found and expected.
MALFORMED: dict[str, tuple[Any, str, str, str]] = {
    "no prompt": (without("prompt"), "prompt", "no such field among ['responses'", "a value"),
    "no responses": (without("responses"), "responses", "among ['prompt', 'scores']", "a value"),
    "no scores": (without("scores"), "scores", "no such field", "a value"),
    "prompt null": (row(prompt=None), "prompt", "null", "a value"),
    "responses null": (row(responses=None), "responses", "null", "a value"),
    "scores null": (row(scores=None), "scores", "null", "a value"),
    "prompt empty": (row(prompt=""), "prompt", "''", "a text"),
    "prompt blank": (row(prompt=" \n\t"), "prompt", r"' \n\t'", "a text"),
    "prompt a number": (row(prompt=3), "prompt", "int 3", "a text or a list"),
    "prompt bytes": (row(prompt=b"Why?"), "prompt", "bytes b'Why?'", "a text or a list"),
    "prompt one message": (row(prompt=USER), "prompt", "dict {'role'", "a text or a list"),
    "prompt no messages": (row(prompt=[]), "prompt", "no messages", "at least one"),
    "prompt a list of texts": (row(prompt=["Why?"]), "prompt[0]", "'Why?'", '{"role", "content"}'),
    "prompt half a character": (row(prompt="Why\ud83d?"), "prompt", r"'\ud83d', at 3", "whole"),
    "message without role": (
        row(prompt=[USER, {"content": "Why?"}]),
        "prompt[1]",
        "{'content': 'Why?'}",
        '{"role", "content"}',
    ),
    "message without content": (
        row(prompt=[{"role": "user"}]),
        "prompt[0]",
        "{'role': 'user'}",
        '{"role", "content"}',
    ),
    "message with another key": (
        row(prompt=[{**USER, "weight": 1}]),
        "prompt[0]",
        "the keys ['weight'] in",
        '{"role", "content"}',
    ),
    "unknown role": (
        row(prompt=[{**USER, "role": "human"}]),
        "prompt[0].role",
        "'human'",
        "one of system, developer, user, assistant, tool",
    ),
    "role not a text": (row(prompt=[{**USER, "role": 1}]), "prompt[0].role", "1", "one of system"),
    "content empty": (
        row(prompt=[USER, {"role": "user", "content": " "}]),
        "prompt[1].content",
        "' '",
        "a text",
    ),
    "content null": (
        row(prompt=[{**USER, "content": None}]),
        "prompt[0].content",
        "None",
        "a text",
    ),
    "content half a character": (
        row(prompt=[{**USER, "content": "\udc00"}]),
        "prompt[0].content",
        r"'\udc00', at 0",
        "whole",
    ),
    "last message the assistant's": (
        row(prompt=[USER, {"role": "assistant", "content": "So."}]),
        "prompt[1].role",
        "'assistant'",
        "end with the user's",
    ),
    "last message the system's": (
        row(prompt=[{"role": "system", "content": "Be brief."}]),
        "prompt[0].role",
        "'system'",
        "end with the user's",
    ),
    "responses a text": (row(responses="ab"), "responses", "str 'ab'", "a list of texts"),
    "responses an object": (row(responses={"a": 1}), "responses", "dict", "a list of texts"),
    "no response": (row(responses=[], scores=[]), "responses", "0 response(s)", "at least 2"),
    "one response": (row(responses=["a"], scores=[1]), "responses", "1 response(s)", "at least 2"),
    "response empty": (row(responses=["a", ""]), "responses[1]", "''", "not empty"),
    "response blank": (row(responses=["\n", "b"]), "responses[0]", r"'\n'", "not empty"),
    "response a number": (row(responses=["a", 2]), "responses[1]", "2", "a text"),
    "response null": (row(responses=["a", None]), "responses[1]", "None", "a text"),
    "response a user's": (row(responses=["a", USER]), "responses[1].role", "'user'", "'assistant'"),
    "response two messages": (
        row(responses=["a", [USER, USER]]),
        "responses[1]",
        "[{'role'",
        "a text",
    ),
    "response half a character": (
        row(responses=["a", "b\ud83d"]),
        "responses[1]",
        r"'\ud83d', at 1",
        "whole",
    ),
    "scores a number": (row(scores=1.0), "scores", "float 1.0", "a list of numbers"),
    "scores a text": (row(scores="12"), "scores", "str '12'", "a list of numbers"),
    "score null": (row(scores=[1.0, None]), "scores[1]", "None", "a finite number"),
    "score a text": (row(scores=["high", 2.0]), "scores[0]", "'high'", "a finite number"),
    "score NaN as text": (row(scores=["nan", 2.0]), "scores[0]", "'nan'", "a finite number"),
    "score too large": (row(scores=["1e999", 2.0]), "scores[0]", "inf", "a finite number"),
    "score a bool": (row(scores=[True, 2.0]), "scores[0]", "True", "a finite number"),
    "score a list": (row(scores=[1.0, [2.0]]), "scores[1]", "[2.0]", "a finite number"),
    "score NaN": (row(scores=[1.0, float("nan")]), "scores[1]", "nan", "a finite number"),
    "score infinite": (row(scores=[float("inf"), 2.0]), "scores[0]", "inf", "a finite number"),
    "score minus infinite": (row(scores=[1, float("-inf")]), "scores[1]", "-inf", "a finite"),
    "score beyond a float": (row(scores=[1, 10**400]), "scores[1]", "1000000", "a finite number"),
    "too few scores": (row(scores=[1.0]), "scores", "1 scores for 2 responses", "one score for"),
    "too many scores": (row(scores=[1, 2, 3]), "scores", "3 scores for 2 responses", "one score"),
    "truncated a bool": (row(truncated=True), "truncated", "bool True", "a list of true and false"),
    "truncated a number": (row(truncated=[True, 1]), "truncated[1]", "1", "true or false"),
    "truncated null inside": (row(truncated=[True, None]), "truncated[1]", "None", "true or false"),
    "too few truncated": (row(truncated=[True]), "truncated", "1 entries for 2", "one for each"),
    "row a list": ([1, 2], "row", "list [1, 2]", "an object with prompt, responses and scores"),
    "row a text": ("Why?", "row", "str 'Why?'", "an object with"),
    "row null": (None, "row", "NoneType None", "an object with"),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_row_is_named_with_found_expected_and_remedy(what: str) -> None:
    bad, field, found, expected = MALFORMED[what]
    with pytest.raises(DataError) as caught:
        check_row(bad, "my.jsonl:7")
    parts = re.fullmatch(
        r"my\.jsonl:7: (?P<field>\S+): found (?P<found>.+); expected (?P<expected>.+?)\. "
        r"(?P<remedy>[A-Z].+\.)",
        str(caught.value),
    )
    assert parts is not None, str(caught.value)
    assert parts["field"] == field
    assert found in parts["found"]
    assert expected in parts["expected"]


def test_long_values_are_shortened_in_messages() -> None:
    with pytest.raises(DataError) as caught:
        check_row(row(responses="word " * 1000), "my.jsonl:7")
    assert len(str(caught.value)) < 300


def test_good_row_passes_as_it_is() -> None:
    conversation = [
        {"role": "system", "content": "Be brief."},
        USER,
        {"role": "assistant", "content": "Why not?"},
        {"role": "tool", "content": "42"},
    ]
    # Whole characters outside the basic plane are no half ones.
    given = row(
        prompt=conversation, responses=[" a\n", "b", "b \U0001f600"], scores=[3, -0.5, 1e300]
    )
    group = check_row(given, "my.jsonl:7")
    assert group == PreferenceGroup(
        prompt=conversation,
        responses=[" a\n", "b", "b \U0001f600"],
        scores=[3.0, -0.5, 1e300],
        source="my.jsonl:7",
        extra={},
    )


@pytest.mark.parametrize("given", [[1, -2], ["1", " -2.0 "], ["1e0", "-.2e1"]])
def test_scores_become_float(given: list[Any]) -> None:
    scores = check_row(row(scores=given), "x:1").scores
    assert scores == [1.0, -2.0]
    assert all(type(score) is float for score in scores)


def test_other_columns_pass_through_untouched() -> None:
    extra = {"prompt_id": "p1", "logps": [-1.5, -2.5], "nested": {"a": [None]}, "score": None}
    assert check_row(row(**extra), "x:1").extra == extra


@pytest.mark.parametrize("truncated", [None, [False, True]])
def test_truncated_is_a_field_of_its_own(truncated: Any) -> None:
    group = check_row(row(truncated=truncated), "x:1")
    assert group.truncated == truncated
    assert group.extra == {}
    assert check_row(ROW, "x:1").truncated is None


def test_a_text_is_one_user_message() -> None:
    assert as_messages("Why?") == [USER]
    assert as_messages([USER]) == [USER]
    assert as_text("Why?") == as_text([USER]) == "Why?"
    system = {"role": "system", "content": "Be brief."}
    assert as_text([system, USER]) is None
    assert as_text([{"role": "tool", "content": "42"}]) is None


def test_a_row_that_could_not_be_read_keeps_its_error() -> None:
    with pytest.raises(DataError, match="^x:1: not UTF-8$"):
        check_object(DataError("x:1: not UTF-8"), "x:1", "an object")


def check_rows(rows: list[tuple[str, Any]]) -> list[PreferenceGroup]:
    return collect_errors(rows, lambda item: check_row(item[1], item[0]))


def numbered(rows: list[Any]) -> list[tuple[str, Any]]:
    return [(f"x:{number}", each) for number, each in enumerate(rows, start=1)]


def test_good_rows_keep_their_order() -> None:
    groups = check_rows(numbered([row(prompt=f"Why {number}?") for number in range(5)]))
    assert [group.prompt for group in groups] == [f"Why {number}?" for number in range(5)]
    assert [group.source for group in groups] == [f"x:{number}" for number in range(1, 6)]


def test_one_bad_row_is_the_message() -> None:
    with pytest.raises(DataError, match=r"^x:2: prompt: found ''"):
        check_rows(numbered([ROW, row(prompt=""), ROW]))


@pytest.mark.parametrize("bad", [2, 10, 11, 25])
def test_all_bad_rows_are_counted_and_ten_shown(bad: int) -> None:
    rows = [each for _ in range(bad) for each in (ROW, row(prompt=""))]
    with pytest.raises(DataError) as caught:
        check_rows(numbered(rows))
    title, *lines = str(caught.value).splitlines()
    assert title.startswith(f"{bad} rows ")
    named = [match[1] for line in lines if (match := re.match(r" +(x:\d+): prompt: found", line))]
    assert named == [f"x:{2 * number}" for number in range(1, min(bad, 10) + 1)]
    assert lines[len(named) :] == ([f"  ... and {bad - 10} more"] if bad > 10 else [])


@pytest.mark.parametrize(
    "scores",
    [
        [np.float32(0.5), np.int64(1)],
        [np.float16(0.5), np.array(1)],
        [torch.tensor(0.5), torch.tensor(1)],
        np.array([0.5, 1.0]),
        torch.tensor([0.5, 1.0], dtype=torch.bfloat16),
    ],
    ids=str,
)
def test_numbers_of_numpy_and_torch_are_scores(scores: Any) -> None:
    cut = [np.bool_(True), torch.tensor(False)]
    for truncated in (cut, np.array([True, False]), torch.tensor([True, False])):
        given = row(responses=["So.", "No."], scores=scores, truncated=truncated)
        group = check_row(given, "x:1")
        assert group.scores == [0.5, 1.0]
        assert all(type(score) is float for score in group.scores)
        assert group.truncated == [True, False]
    for wrong in (np.nan, torch.inf, np.bool_(True)):
        given = row(responses=["So.", "No."], scores=[scores[0], np.array(wrong)])
        with pytest.raises(DataError, match=r"x:1: scores\[1\]: .*; expected a finite number"):
            check_row(given, "x:1")
