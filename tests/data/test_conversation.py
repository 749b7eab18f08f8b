"""What belongs to a conversation: messages, their parts, and the columns beside the prompt."""

import json
from typing import Any

import pytest

from mpo_lightning.batch import Message
from mpo_lightning.data.conversation import check_conversation, parse_texts, response_text
from mpo_lightning.data.groups import DataError
from mpo_lightning.data.prompts import PromptSource
from mpo_lightning.data.reading import GroupReader
from mpo_lightning.data.rows import check_row
from mpo_lightning.data.schemas.pairs import Pairs
from mpo_lightning.data.sources import open_rows
from mpo_lightning.data.writing import canonical_row

USER: Message = {"role": "user", "content": "2+2?"}
BRIEF: Message = {"role": "system", "content": "Be brief."}
TOOL = {"type": "function", "function": {"name": "calc", "parameters": {"type": "object"}}}
FUNCTION = {"name": "calc", "arguments": {"sum": "2+2"}}
CALL = {"type": "function", "function": FUNCTION}
WITH_NULL = {"sum": "2+2", "n": None}


def said(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def row(**changes: Any) -> dict[str, Any]:
    return {"prompt": "2+2?", "responses": ["4", "5"], "scores": [1, 0], **changes}


def groups_of(*rows: dict[str, Any]) -> list[Any]:
    results = list(GroupReader(open_rows(list(rows), "x")).results())
    for result in results:
        if result.error is not None:
            raise result.error
    return [result.group for result in results if result.group is not None]


# --------------------------------------------------------------------- reasoning and tool calls


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ({"reasoning_content": "two and two"}, {"reasoning_content": "a guess"}),
        ({"reasoning": "two and two"}, {}),
        ({"thinking": "two and two", "tool_calls": None}, {"thinking": None}),
        ({"tool_calls": [CALL]}, {}),
    ],
)
def test_reasoning_and_calls_of_a_response_stay(
    chosen: dict[str, Any], rejected: dict[str, Any]
) -> None:
    pair = {"prompt": [USER], "chosen": [said("4", **chosen)], "rejected": [said("4", **rejected)]}
    (group,) = groups_of(pair)
    wanted = [
        {name: value for name, value in said("4", **more).items() if value is not None}
        for more in (chosen, rejected)
    ]
    assert group.responses == [each if len(each) > 2 else "4" for each in wanted]
    # They are written so that they read back.
    (again,) = groups_of(json.loads(json.dumps(canonical_row(group))))
    assert again.responses == group.responses


@pytest.mark.parametrize(
    "calls",
    [
        [{"type": "function", "function": {"name": "calc", "arguments": '{"sum": "2+2"}'}}],
        json.dumps([CALL]),
        # As Arrow fills the fields of other rows.
        [{"type": "function", "id": None, "function": {**FUNCTION, "arguments": WITH_NULL}}],
    ],
)  # fmt: skip
def test_arguments_of_calls_are_objects(calls: Any) -> None:
    answer = said(None, tool_calls=calls)
    (group,) = groups_of({"prompt": [USER], "chosen": [answer], "rejected": [said("4")]})
    assert group.responses == [said("", tool_calls=[CALL]), "4"]


def test_calls_and_reasoning_in_a_prompt() -> None:
    prompt = [
        USER,
        said(None, reasoning_content="ask", tool_calls=[{**CALL, "id": "c1"}]),
        {"role": "tool", "content": "4", "tool_call_id": "c1", "name": "calc"},
    ]
    group = check_row(row(prompt=prompt), "x:1")
    assert group.prompt == [USER, {**prompt[1], "content": ""}, prompt[2]]


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (said("4", tool_calls=[{"name": 3}]), r"responses\[0\]\.tool_calls\[0\]"),
        (said("4", tool_calls=["calc()"]), r"responses\[0\]\.tool_calls\[0\]"),
        (said("4", tool_calls="calc()"), r"responses\[0\]\.tool_calls"),
        (said("4", tool_calls=[{"name": "calc", "arguments": "2+2"}]), r".*\.arguments"),
        (said("4", reasoning_content=["hm"]), r"responses\[0\]\.reasoning_content"),
        (said("4", audio={"id": "a"}), r"responses\[0\]"),
        (said("", reasoning_content=" "), r"responses\[0\]\.content"),
    ],
)
def test_messages_that_cannot_be_used_are_refused(message: Any, field: str) -> None:
    with pytest.raises(DataError, match=f"^x:1: {field}: found"):
        check_row(row(responses=[message, "5"]), "x:1")


def test_a_response_as_text() -> None:
    assert response_text("4") == "4"
    answer = said("4", reasoning_content="two and two", tool_calls=[CALL])
    assert response_text(answer) == f"two and two\n4\n{json.dumps(CALL)}"


# --------------------------------------------------------------------------- contents


@pytest.mark.parametrize("role", ["system", "developer"])
def test_an_empty_system_message_is_legal(role: str) -> None:
    empty = {"role": role, "content": ""}
    prompt = [empty, USER]
    assert check_row(row(prompt=prompt), "x:1").prompt == prompt
    pair = {"chosen": [*prompt, said("4")], "rejected": [*prompt, said("5")]}
    assert groups_of(pair)[0].prompt == prompt


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]
    asked = {"role": "user", "content": parts}
    assert check_row(row(prompt=[asked]), "x:1").prompt == [USER]
    answer = said([{"type": "text", "text": "4"}])
    (group,) = groups_of({"chosen": [asked, answer], "rejected": [asked, said("5")]})
    assert (group.prompt, group.responses) == ([USER], ["4", "5"])
    assert check_row(row(responses=[answer, [said("5")]]), "x:1").responses == ["4", "5"]


@pytest.mark.parametrize(
    "part", [{"type": "image"}, {"type": "image_url", "image_url": "a.png"}, "2?", {"type": "text"}]
)
def test_other_parts_are_refused(part: Any) -> None:
    prompt = [{"role": "user", "content": [{"type": "text", "text": "2+"}, part]}]
    with pytest.raises(DataError, match=r"^x:1: prompt\[0\]\.content\[1\]: found .*Only texts"):
        check_row(row(prompt=prompt), "x:1")


# --------------------------------------------------------------------- columns beside the prompt


@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message"])
@pytest.mark.parametrize("prompt", ["2+2?", [USER], [BRIEF, USER]])
def test_system_column_is_the_first_message(name: str, prompt: Any) -> None:
    group = check_row(row(prompt=prompt, **{name: "Be brief."}), "x:1")
    assert group.prompt == [BRIEF, USER]
    assert group.extra == {}


@pytest.mark.parametrize("nothing", [None, ""])
def test_empty_system_column_changes_nothing(nothing: Any) -> None:
    assert check_row(row(system=nothing, system_prompt=nothing), "x:1").prompt == "2+2?"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"prompt": [BRIEF, USER], "system": "Be long."}, "system"),
        ({"system": "Be long.", "system_prompt": "Be brief."}, "system_prompt"),
        ({"system": ["Be long."]}, "system"),
        ({"tools": "calc"}, "tools"),
        ({"tools": ["calc"]}, r"tools\[0\]"),
        ({"chat_template_kwargs": "thinking"}, "chat_template_kwargs"),
        ({"history": [["a", "b"]]}, "history"),
        ({"input": "Say it in French."}, "input"),
        ({"images": ["a.png"]}, "images"),
        ({"documents": [{"text": "a"}]}, "documents"),
        ({"context": "A book."}, "context"),
    ],
)
def test_columns_that_would_change_the_prompt_are_refused_by_name(
    changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(DataError, match=f"^x:1: {field}: found "):
        check_row(row(**changes), "x:1")


def test_columns_that_are_empty_or_in_the_prompt_pass() -> None:
    more = {"history": [], "images": None, "input": "2+2?", "context": ""}
    assert check_row(row(**more), "x:1").extra == more


def test_tools_and_arguments_go_to_the_template() -> None:
    more = {"tools": [{**TOOL, "strict": None}], "chat_template_kwargs": {"enable_thinking": False}}
    group = check_row(row(**more), "x:1")
    assert group.template_arguments == {"tools": [TOOL], "enable_thinking": False}
    assert check_row(canonical_row(group), "x:1") == group


@pytest.mark.parametrize("schema", ["pair", "scored pair", "generations", "on policy"])
def test_every_format_reads_them(schema: str) -> None:
    columns: dict[str, Any] = {
        "pair": {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
        "scored pair": {
            "prompt": "2+2?", "chosen": "4", "rejected": "5", "score_chosen": 1, "score_rejected": 0
        },
        "generations": {"instruction": "2+2?", "generations": ["4", "5"], "ratings": [1, 0]},
        "on policy": {
            "prompt": "2+2?", "all_generated_responses": ["4", "5"], "all_rm_scores": [1, 0]
        },
    }[schema]  # fmt: skip
    (group,) = groups_of({**columns, "system": "Be brief.", "tools": json.dumps([TOOL])})
    assert group.prompt == [BRIEF, USER]
    assert group.template_arguments == {"tools": [TOOL]}
    assert group.responses == ["4", "5"]


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("system", ["French", "English"]),
        ("system_prompt", ["French", None]),
        ("tools", [[TOOL], []]),
        ("chat_template_kwargs", [{"enable_thinking": True}, {"enable_thinking": False}]),
    ],
)
def test_answers_to_different_conversations_make_different_groups(
    column: str, values: list[Any]
) -> None:
    rows = [
        {"prompt": "Hi", "response": f"{number} {place}", "score": number, column: value}
        for number in range(2)
        for place, value in enumerate(values)
    ]
    groups = groups_of(*rows)
    assert [group.responses for group in groups] == [["0 0", "1 0"], ["0 1", "1 1"]]
    assert groups[0] != groups[1]


# --------------------------------------------------------------------------- structure in texts


@pytest.mark.parametrize("write", [json.dumps, str, lambda value: f" {json.dumps(value)}\n"])
def test_messages_that_are_written_as_text_are_messages(write: Any) -> None:
    pair = {"prompt": [BRIEF, USER], "chosen": [said("it's 4")], "rejected": [said("5")]}
    texts = {name: write(value) for name, value in pair.items()}
    reader = GroupReader(open_rows([texts], "x"))
    (result,) = reader.results()
    assert isinstance(reader.schema, Pairs)
    assert result.group is not None
    assert result.group.prompt == [BRIEF, USER]
    assert result.group.responses == ["it's 4", "5"]
    assert result.notes == tuple(
        f"of a row whose {name} is a list written as text" for name in pair
    )


def test_lists_that_are_written_as_text_are_lists() -> None:
    (group,) = groups_of(row(responses='["4", "5"]', scores="[1, 0.5]", truncated="[true, false]"))
    assert (group.responses, group.scores) == (["4", "5"], [1.0, 0.5])
    assert group.truncated == [True, False]


@pytest.mark.parametrize("text", ['["a", "b"]', "{'a': 1}", '[{"name": "calc"}]', "[not a list"])
def test_prompts_that_are_structure_stay_texts(text: str) -> None:
    assert groups_of(row(prompt=text))[0].prompt == text


@pytest.mark.parametrize(
    "text",
    [
        "[{'role': 'user', 'content': '2+2?'}\n {'role': 'user', 'content': 'a'}]",
        '[{"role": "user", "content": "2+',
        "[{'content': '2+2?', 'role': user}]",
    ],
)
def test_text_that_looks_like_messages_and_is_none_is_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"^x:1: prompt: found .*expected messages: a list"):
        parse_texts({"prompt": text}, "x:1")


# ------------------------------------------------------------------------------ prompts alone


def test_prompts_to_answer_have_them_too() -> None:
    rows = [
        {"prompt": "2+2?", "system": "Be brief.", "tools": [TOOL]},
        {"prompt": "2+2?", "system": "Be brief."},
        {"instruction": json.dumps([USER])},
    ]
    source = PromptSource(open_rows(rows, "x"))
    requests = [request for request, _, _ in source.rows(0, 3)]
    assert [each.prompt for each in requests] == [[BRIEF, USER], [BRIEF, USER], [USER]]
    assert requests[0].template_arguments == {"tools": [TOOL]}
    # Their random numbers differ, since the prompts do.
    assert len({each.key for each in requests}) == 3
    with pytest.raises(DataError, match="history"):
        PromptSource(open_rows([{"prompt": "a", "history": [["b", "c"]]}], "x"))


def test_conversation_of_a_named_column() -> None:
    assert check_conversation({"instruction": "a", "system": "b"}, "x:1", "instruction")[0] == [
        {"role": "system", "content": "b"},
        {"role": "user", "content": "a"},
    ]
