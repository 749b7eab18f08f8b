"""LLaMA-Factory's preference files, alone and through its dataset_info.json."""

import json
from pathlib import Path
from typing import Any

import pytest

from mpo_lightning.data.groups import DataError
from mpo_lightning.data.reading import GroupReader
from mpo_lightning.data.schemas.pairs import Pairs
from mpo_lightning.data.schemas.single_response import Unpaired
from mpo_lightning.data.sources import open_source
from tests.data.schemas.rows import Row, as_row, error_of, group_of, said, write

USER = {"from": "human", "value": "Name a fruit."}
SHAREGPT: Row = {
    "conversations": [
        {"from": "human", "value": "Hello"},
        {"from": "gpt", "value": "Hi!"},
        USER,
    ],
    "chosen": {"from": "gpt", "value": "An apple."},
    "rejected": {"from": "gpt", "value": "A stone."},
}
TURNS = [said("user", "Hello"), said("assistant", "Hi!"), said("user", "Name a fruit.")]
GROUP: Row = {"prompt": TURNS, "responses": ["An apple.", "A stone."], "scores": [1.0, 0.0]}
OPENAI: Row = {
    "messages": TURNS,
    "chosen": said("assistant", "An apple."),
    "rejected": said("assistant", "A stone."),
}
ALPACA: Row = {
    "instruction": "Name a fruit.",
    "input": "It is red.",
    "chosen": "An apple.",
    "rejected": "A stone.",
}
ASKED = "Name a fruit.\nIt is red."


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (SHAREGPT, GROUP),
        (OPENAI, GROUP),
        (ALPACA, {**GROUP, "prompt": ASKED}),
        ({**ALPACA, "input": ""}, {**GROUP, "prompt": "Name a fruit."}),
        ({**ALPACA, "instruction": ""}, {**GROUP, "prompt": "It is red."}),
        ({**ALPACA, "history": []}, {**GROUP, "prompt": ASKED}),
        (
            {**ALPACA, "history": [["Hello", "Hi!"]]},
            {**GROUP, "prompt": [*TURNS[:2], said("user", ASKED)]},
        ),
    ],
)
def test_preferences(row: Row, expected: Row, tmp_path: Path) -> None:
    assert group_of([row], tmp_path) == expected
    assert GroupReader(write([row], tmp_path)).schema == Pairs()


@pytest.mark.parametrize(
    "rows",
    [
        [
            {"conversations": [USER, {"from": "gpt", "value": "An apple."}], "kto_tag": True},
            {"conversations": [USER, {"from": "gpt", "value": "A stone."}], "kto_tag": False},
        ],
        [
            {"messages": [TURNS[2], said("assistant", "An apple.")], "label": True},
            {"messages": [TURNS[2], said("assistant", "A stone.")], "label": False},
        ],
    ],
)
def test_kto_of_conversations(rows: list[Row], tmp_path: Path) -> None:
    assert group_of(rows, tmp_path) == {**GROUP, "prompt": TURNS[2:]}
    assert GroupReader(write(rows, tmp_path)).schema == Unpaired()


def test_kto_of_instructions(tmp_path: Path) -> None:
    asked = {"instruction": "Name a fruit.", "input": "It is red."}
    rows = [
        {**asked, "output": "An apple.", "kto_tag": True},
        {**asked, "output": "A stone.", "kto_tag": False},
        {**asked, "input": "It is green.", "output": "An apple.", "kto_tag": True},
    ]
    first, other = GroupReader(write(rows, tmp_path)).results()
    assert as_row(first) == {**GROUP, "prompt": ASKED}
    # Another input is another prompt.
    assert other.skipped == "with a single response"


CALL = {"name": "weather", "arguments": {"city": "Rome"}}


@pytest.mark.parametrize("content", [json.dumps(CALL), json.dumps([CALL])])
def test_roles_of_tools(content: str) -> None:
    row = {
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "Weather in Rome?"},
            {"from": "function_call", "value": content},
            {"from": "observation", "value": "Sunny"},
        ],
        "chosen": {"from": "gpt", "value": "Sunny."},
        "rejected": {"from": "gpt", "value": "No."},
    }
    calls = [{"type": "function", "function": CALL}]
    assert Pairs().convert(row, "x:1").row["prompt"] == [
        said("system", "Be brief."),
        said("user", "Weather in Rome?"),
        {"role": "assistant", "content": None, "tool_calls": calls},
        said("tool", "Sunny"),
    ]


def test_a_call_as_the_response(tmp_path: Path) -> None:
    """With its arguments as an object, as templates expect them."""
    call = {"from": "function_call", "value": json.dumps(CALL)}
    found = group_of([{**SHAREGPT, "chosen": call}], tmp_path)
    assert found["responses"] == [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": CALL}],
        },
        "A stone.",
    ]
    assert found["scores"] == [1.0, 0.0]


def test_system_and_tools_in_columns(tmp_path: Path) -> None:
    row = {**SHAREGPT, "system": "Be brief.", "tools": '[{"name": "weather", "parameters": {}}]'}
    (result,) = GroupReader(write([row], tmp_path)).results()
    assert as_row(result) == {**GROUP, "prompt": [said("system", "Be brief."), *TURNS]}
    assert result.group is not None
    assert result.group.template_arguments == {"tools": [{"name": "weather", "parameters": {}}]}


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({**SHAREGPT, "images": ["a.png"]}, ["images: found ['a.png']; expected no column"]),
        ({**SHAREGPT, "chosen": None}, ["chosen: found null"]),
        ({**SHAREGPT, "chosen": {"from": "human", "value": "Hm"}}, ["chosen: found", "'user'"]),
        ({**SHAREGPT, "chosen": {"from": "gpt", "value": ""}}, ["chosen: found ''"]),
        ({**SHAREGPT, "conversations": None}, ["conversations: found null"]),
        ({**SHAREGPT, "conversations": [USER, SHAREGPT["chosen"]]}, ["end with the user's"]),
        (
            {**SHAREGPT, "conversations": [{"from": "narrator", "value": "x"}, USER]},
            ["role: found 'narrator'"],
        ),
        (
            {**SHAREGPT, "conversations": [{"from": ["human"], "value": "x"}, USER]},
            ["role: found ['human']"],
        ),
        (
            {**SHAREGPT, "conversations": [USER, {"from": "function_call", "value": "{"}, USER]},
            ["conversations[1]: found '{'; expected a call in JSON"],
        ),
        ({**ALPACA, "rejected": 7}, ["rejected: found int 7; expected a text"]),
        ({**ALPACA, "instruction": None, "input": None}, ["instruction: found null"]),
        ({**ALPACA, "history": [["Hello"]]}, ["history[0]: found ['Hello']"]),
        ({**ALPACA, "history": "Hello"}, ["history: found str 'Hello'"]),
        ({**ALPACA, "question": "Which?"}, ["instruction and question: found prompts in all"]),
    ],
)
def test_a_bad_row_is_one_bad_row(bad: Row, words: list[str], tmp_path: Path) -> None:
    good = ALPACA if "instruction" in bad else SHAREGPT
    for rows in ([good, bad], [bad, good, good]):
        message = error_of(rows, tmp_path)
        assert message.startswith(f"{tmp_path}/rows.json:{rows.index(bad) + 1}: ")
        assert all(word in message for word in words)


@pytest.mark.parametrize("label", ["yes", 3, [True]])
def test_a_tag_is_true_or_false(label: Any, tmp_path: Path) -> None:
    good = {"conversations": [USER, {"from": "gpt", "value": "An apple."}], "kto_tag": True}
    message = error_of([good, {**good, "kto_tag": label}], tmp_path)
    assert f"kto_tag: found {label!r}; expected true or false" in message


# ----------------------------------------------------------------------------- dataset_info.json

TAGS = {
    "role_tag": "who",
    "content_tag": "what",
    "user_tag": "U",
    "assistant_tag": "A",
    "system_tag": "S",
    "observation_tag": "O",
    "function_tag": "F",
}
DESCRIBED: dict[str, tuple[Row, list[Row], Row]] = {
    "sharegpt": (
        {
            "formatting": "sharegpt",
            "ranking": True,
            "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
        },
        [SHAREGPT],
        GROUP,
    ),
    "alpaca, all columns by default": ({"ranking": True}, [ALPACA], {**GROUP, "prompt": ASKED}),
    "alpaca, other names": (
        {
            "ranking": True,
            "columns": {
                "prompt": "q",
                "query": "more",
                "chosen": "best",
                "rejected": "worst",
                "history": "before",
            },
        },
        [
            {
                "q": "Name a fruit.",
                "more": "It is red.",
                "best": "An apple.",
                "worst": "A stone.",
                "before": [["Hello", "Hi!"]],
                "id": 7,
                # Not described, so not the prompt.
                "prompt": "Something else.",
            }
        ],
        {**GROUP, "prompt": [*TURNS[:2], said("user", ASKED)], "id": 7},
    ),
    "tags": (
        {
            "formatting": "sharegpt",
            "ranking": True,
            "columns": {"messages": "talk", "chosen": "good", "rejected": "bad"},
            "tags": TAGS,
        },
        [
            {
                "talk": [
                    {"who": "S", "what": "Be brief."},
                    {"who": "U", "what": "Name a fruit."},
                ],
                "good": {"who": "A", "what": "An apple."},
                "bad": {"who": "A", "what": "A stone."},
                "instruction": "Something else.",
            }
        ],
        {**GROUP, "prompt": [said("system", "Be brief."), TURNS[2]]},
    ),
    "system prompts and tools": (
        {
            "formatting": "sharegpt",
            "ranking": True,
            "columns": {
                "messages": "conversations",
                "chosen": "chosen",
                "rejected": "rejected",
                "system": "sys",
                "tools": "functions",
            },
        },
        [{**SHAREGPT, "sys": "Be brief.", "functions": '[{"name": "weather"}]'}],
        {**GROUP, "prompt": [said("system", "Be brief."), *TURNS]},
    ),
    "two system prompts, of which the conversation's counts": (
        {
            "formatting": "sharegpt",
            "ranking": True,
            "columns": {
                "messages": "conversations",
                "chosen": "chosen",
                "rejected": "rejected",
                "system": "system",
            },
        },
        [
            {
                **SHAREGPT,
                "system": "Be kind.",
                "conversations": [
                    {"from": "system", "value": "Be brief."},
                    *SHAREGPT["conversations"],
                ],
            }
        ],
        {**GROUP, "prompt": [said("system", "Be brief."), *TURNS]},
    ),
    "kto": (
        {
            "formatting": "sharegpt",
            "columns": {"messages": "messages", "kto_tag": "label"},
            "tags": {
                "role_tag": "role",
                "content_tag": "content",
                "user_tag": "user",
                "assistant_tag": "assistant",
            },
        },
        [
            {"messages": [TURNS[2], said("assistant", "An apple.")], "label": True},
            {"messages": [TURNS[2], said("assistant", "A stone.")], "label": False},
        ],
        {**GROUP, "prompt": TURNS[2:]},
    ),
    "kto of texts": (
        {"columns": {"prompt": "prompt", "response": "completion", "kto_tag": "label"}},
        [
            {"prompt": "Name a fruit.", "completion": "An apple.", "label": True},
            {"prompt": "Name a fruit.", "completion": "A stone.", "label": False},
        ],
        {**GROUP, "prompt": "Name a fruit."},
    ),
}


def describe(described: Row, folder: Path) -> str:
    """Write a description beside rows.json, and name the data set as a source."""
    whole = {"other": {"file_name": "other.json"}, "mine": {"file_name": "rows.json", **described}}
    (folder / "dataset_info.json").write_text(json.dumps(whole), encoding="utf-8")
    return f"{folder}/dataset_info.json:mine"


@pytest.mark.parametrize("name", DESCRIBED)
def test_described_data_set(name: str, tmp_path: Path) -> None:
    described, rows, expected = DESCRIBED[name]
    path = write(rows, tmp_path)
    (result,) = GroupReader(describe(described, tmp_path)).results()
    assert as_row(result) == expected
    assert result.source == f"{path}:1"


def test_other_descriptions_of_a_file_are_other_data(tmp_path: Path) -> None:
    write([ALPACA], tmp_path)
    digests = {
        open_source(describe({"ranking": True, "columns": columns}, tmp_path)).digest
        for columns in (
            {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"},
            {"prompt": "instruction", "chosen": "rejected", "rejected": "chosen"},
        )
    }
    assert len(digests) == 2


def test_a_column_that_is_not_described_and_matters(tmp_path: Path) -> None:
    """LLaMA-Factory leaves it out without a word."""
    columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    rows = [{**ALPACA, "input": ""}, ALPACA, {**ALPACA, "input": None, "system": "Be brief."}]
    write(rows, tmp_path)
    results = GroupReader(describe({"ranking": True, "columns": columns}, tmp_path)).results()
    first, second, third = results
    assert as_row(first)["prompt"] == "Name a fruit."
    assert "rows.json:2: input: found a column that" in str(second.error)
    assert "dataset_info.json:mine does not name" in str(second.error)
    assert "rows.json:3: system: found a column" in str(third.error)


@pytest.mark.parametrize(
    ("described", "words"),
    [
        ({}, "describes no preferences"),
        ({"ranking": True, "num_samples": 5}, r"found the keys \['num_samples'\]"),
        ({"ranking": True, "columns": {"answer": "x"}}, r"\['columns.answer'\]"),
        ({"ranking": True, "tags": {"bot_tag": "x"}}, r"\['tags.bot_tag'\]"),
        ({"ranking": True, "formatting": "chatml"}, "found formatting 'chatml'"),
        ({"ranking": True, "columns": ["chosen"]}, r"columns: found \['chosen'\]; expected an obj"),
        ({"ranking": True, "tags": {"user_tag": 7}}, "tags: found {'user_tag': 7}; expected"),
        ({"ranking": True, "file_name": None}, "names neither file_name nor hf_hub_url"),
        ({"ranking": True, "file_name": "gone.json"}, r"gone.json: no such file"),
    ],
)
def test_description_that_cannot_be_followed(described: Row, words: str, tmp_path: Path) -> None:
    write([ALPACA], tmp_path)
    with pytest.raises(DataError, match=words):
        open_source(describe(described, tmp_path))


@pytest.mark.parametrize("name", ["dataset_info.json", "dataset_info.json:gone"])
def test_data_set_that_is_not_described(name: str, tmp_path: Path) -> None:
    describe({}, tmp_path)
    with pytest.raises(DataError, match=r"no data set '.*' among \['mine', 'other'\]\. Name one"):
        open_source(f"{tmp_path}/{name}")


def test_described_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(name: str, subset: str | None, split: str) -> Any:
        asked.append((name, subset, split))
        return datasets.Dataset.from_list([ALPACA])

    monkeypatch.setattr(datasets, "load_dataset", load)
    described = {"hf_hub_url": "org/pairs", "ms_hub_url": "a/b", "ranking": True, "subset": "en"}
    (result,) = GroupReader(describe({**described, "file_name": None}, tmp_path)).results()
    assert as_row(result)["prompt"] == ASKED
    assert asked == [("org/pairs", "en", "train")]
