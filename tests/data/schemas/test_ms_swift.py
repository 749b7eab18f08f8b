"""ms-swift's preference files."""

from pathlib import Path

import pytest

from mpo_lightning.data.reading import GroupReader
from mpo_lightning.data.schemas.rejected import Rejected
from mpo_lightning.data.schemas.single_response import Unpaired
from tests.data.schemas.rows import Row, as_row, error_of, group_of, results, said, write

SYSTEM = said("system", "You are a calculator.")
ASKED = [SYSTEM, said("user", "1 + 1?"), said("assistant", "2"), said("user", "And 1 more?")]
MESSAGES = [*ASKED, said("assistant", "3")]
ROW: Row = {"messages": MESSAGES, "rejected_response": "I don't know."}
GROUP: Row = {"prompt": ASKED, "responses": ["3", "I don't know."], "scores": [1.0, 0.0]}
THREE: Row = {"prompt": ASKED, "responses": ["3", "4", "No."], "scores": [1.0, 0.0, 0.0]}
NO = said("assistant", "I don't know.")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (ROW, GROUP),
        ({**ROW, "rejected_response": [NO]}, GROUP),
        ({**ROW, "rejected_response": ["4", "No."]}, THREE),
        ({"messages": MESSAGES, "rejected_messages": [*ASKED, NO]}, GROUP),
        (
            {
                "messages": MESSAGES,
                "rejected_messages": [
                    [*ASKED, said("assistant", "4")],
                    [*ASKED, said("assistant", "No.")],
                ],
            },
            THREE,
        ),
        ({**ROW, "rejected_messages": None, "images": []}, {**GROUP, "images": []}),
        # ShareGPT's keys.
        (
            {
                "conversations": [{"from": t["role"], "value": t["content"]} for t in MESSAGES],
                "rejected_response": "I don't know.",
            },
            GROUP,
        ),
        (
            {
                "system": "You are a calculator.",
                "conversation": [
                    {"human": "1 + 1?", "assistant": "2"},
                    {"human": "And 1 more?", "assistant": "3"},
                ],
                "rejected_response": "I don't know.",
            },
            GROUP,
        ),
        ({**ROW, "rejected_score": 2}, {**GROUP, "rejected_score": 2}),
        # Query and response, with the turns before them.
        (
            {
                "query": "And 1 more?",
                "response": "3",
                "history": [["1 + 1?", "2"]],
                "rejected_response": "I don't know.",
            },
            {**GROUP, "prompt": ASKED[1:]},
        ),
        (
            {"instruction": "Add.", "input": "1 + 2", "output": "3", "rejected_response": "No."},
            {"prompt": [said("user", "Add.\n1 + 2")], "responses": ["3", "No."], "scores": [1, 0]},
        ),
    ],
)
def test_preferences(row: Row, expected: Row, tmp_path: Path) -> None:
    assert group_of([row], tmp_path) == expected
    assert GroupReader(write([row], tmp_path)).schema == Rejected()


def test_kto(tmp_path: Path) -> None:
    rows = [
        {"messages": [*ASKED, NO], "label": False},
        {"messages": MESSAGES, "label": True},
        # Without the system message the conversation is another one.
        {"messages": MESSAGES[1:], "label": True},
    ]
    first, other = results(rows, tmp_path)
    assert as_row(first) == {
        "prompt": ASKED,
        "responses": ["I don't know.", "3"],
        "scores": [0.0, 1.0],
    }
    assert other.skipped == "with a single response"
    assert GroupReader(write(rows, tmp_path)).schema == Unpaired()


CALLS = [
    said("tool_call", '{"name": "air", "arguments": {"city": "Beijing"}}'),
    said("tool_call", '{"name": "air", "arguments": {"city": "Shanghai"}}'),
    said("tool_response", '{"aqi": 10}'),
    said("tool_response", '{"aqi": 72}'),
]


def test_calls_of_tools() -> None:
    before = [said("user", "How is the air?"), *CALLS]
    row = {
        "messages": [*before, said("assistant", "Good.")],
        "rejected_messages": [*before, said("assistant", "Bad.")],
    }
    converted = Rejected().convert(row, "x:1").row
    assert converted["responses"] == ["Good.", "Bad."]
    assert converted["prompt"] == [
        said("user", "How is the air?"),
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"type": "function", "function": {"name": "air", "arguments": {"city": city}}}
                for city in ("Beijing", "Shanghai")
            ],
        },
        said("tool", '{"aqi": 10}'),
        said("tool", '{"aqi": 72}'),
    ]


def test_a_rejected_response_that_calls_no_tool_answers_another_prompt(tmp_path: Path) -> None:
    """It takes the place of all that follows the user's last message, as in ms-swift."""
    row = {
        "messages": [said("user", "How is the air?"), *CALLS, said("assistant", "Good.")],
        "rejected_response": "Bad.",
    }
    message = error_of([ROW, row], tmp_path)
    assert "rows.json:2: rejected_response: found the prompt" in message
    _, dropped = results([ROW, row], tmp_path, Rejected(differing_prompts="drop"))
    assert dropped.skipped == "with responses to different prompts"


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({**ROW, "messages": None}, "messages: found null"),
        ({**ROW, "messages": ASKED}, "messages: found a conversation that ends with 'user'"),
        ({**ROW, "messages": "Hi"}, "messages: found 'Hi'; expected a list of messages"),
        ({**ROW, "rejected_response": 3}, "rejected_response: found 3; expected a text"),
        ({**ROW, "rejected_response": ""}, "rejected_response: found ''"),
        ({**ROW, "rejected_response": ["4", None]}, "rejected_response[1]: found None"),
        ({**ROW, "rejected_response": [said("user", "No.")]}, "ends with 'user'"),
        ({**ROW, "rejected_response": []}, "with a single response"),
        (
            {"messages": MESSAGES, "rejected_messages": [said("user", "2 + 2?"), NO]},
            "rejected_messages: found the prompt",
        ),
        ({**ROW, "rejected_messages": [*ASKED, NO]}, "one of these columns"),
        ({**ROW, "rejected_response": None}, "rejected_response: found null"),
        ({**ROW, "rejected_images": ["a.png"]}, "rejected_images: found others than in images"),
        ({**ROW, "rejected_tools": [{"name": "f"}]}, "rejected_tools: found others than in tools"),
    ],
)
def test_a_bad_row_is_one_bad_row(bad: Row, words: str, tmp_path: Path) -> None:
    for rows in ([ROW, bad], [bad, ROW, ROW]):
        found = results(rows, tmp_path)
        (wrong,) = [each for each in found if each.group is None]
        assert wrong.source == f"{tmp_path}/rows.json:{rows.index(bad) + 1}"
        assert words in (wrong.skipped or str(wrong.error))
