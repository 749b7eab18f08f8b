"""Rendering with chat templates of many families, and what is found out about every text."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mpo_lightning.data.groups import DataError
from mpo_lightning.data.rendering import ChatRenderer, RenderingRules
from mpo_lightning.data.report import DataReport
from mpo_lightning.data.rows import check_row
from mpo_lightning.data.tokens import GroupTokenizer
from tests.conftest import CHAT_TEMPLATE, make_tokenizer
from tests.data.chat_templates import FAMILIES, tokenizer_of

DOCS = Path(__file__).parents[2] / "docs" / "chat-templates.md"
USER = {"role": "user", "content": "Why?"}
TOOL = {"type": "function", "function": {"name": "calc", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "calc", "arguments": {"sum": "2+2"}}}


def said(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def tokenize(tokenizer: Any, row: dict[str, Any], **settings: Any) -> tuple[Any, DataReport]:
    """Tokenise a row x:1 with scores 0, 1, ... unless it has some."""
    scored = {"prompt": "Why?", "scores": list(range(len(row["responses"]))), **row}
    report = DataReport("x", groups=1)
    make = GroupTokenizer.without_limit(tokenizer, "auto", **settings)
    return make(check_row(scored, "x:1"), report), report


def texts(tokenizer: Any, row: dict[str, Any], **settings: Any) -> tuple[str, list[str]]:
    group, _ = tokenize(tokenizer, row, **settings)
    return tokenizer.decode(group.prompt), [tokenizer.decode(ids) for ids in group.responses]


def with_template(template: str) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


# ------------------------------------------------------------------------------- the families

THINK = "<think>\nhm\n</think>\n\n"
# Columns of the table: a row of which the template has to render something.
ASKED: dict[str, dict[str, Any]] = {
    "system": {"system": "Be brief.", "responses": ["So.", "No."]},
    "empty system": {"prompt": [{"role": "system", "content": ""}, USER], "responses": ["a", "b"]},
    "tools": {"tools": [TOOL], "responses": ["So.", "No."]},
    "tool calls": {"responses": [said("Wait.", tool_calls=[CALL]), "No."]},
    "`<think>` in the text": {"responses": [f"{THINK}So.", f"{THINK}No."]},
    "reasoning as a field": {"responses": [said("So.", reasoning_content="hm"), "No."]},
    "reasoning of earlier turns": {
        "prompt": [USER, said(f"{THINK}So."), USER],
        "responses": ["a", "b"],
    },
    "two users' turns": {"prompt": [USER, USER], "responses": ["a", "b"]},
    "white space": {"responses": ["  So.\n", "No."]},
}


def fate(tokenizer: Any, row: dict[str, Any]) -> str:
    """What becomes of a row, in one word."""
    try:
        _, report = tokenize(tokenizer, row, rendering=RenderingRules.counting())
    except DataError:
        return "refused"
    if any("leaves out" in reason for reason in report.changed):
        return "left out"
    return "changed" if any("white space" in reason for reason in report.changed) else "kept"


def before_answers(tokenizer: Any) -> str:
    """Text that goes before an answer without being part of the generation prompt."""
    try:
        header = ChatRenderer(tokenizer)([USER], ["So.", "No."], "x:1").before_answers
    except DataError:
        return "-"
    return f"`{json.dumps(header)}`".replace("|", r"\|") if header else "-"


def table() -> list[list[str]]:
    """The table of docs/chat-templates.md, as the package sees the families."""
    lines = []
    for family in FAMILIES:
        tokenizer = tokenizer_of(family)
        dated = "no" if ChatRenderer(tokenizer).date is None else "yes"
        fates = [fate(tokenizer, row) for row in ASKED.values()]
        lines.append([family, *fates, before_answers(tokenizer), dated])
    return lines


def test_table_of_families_is_the_one_in_the_documentation() -> None:
    assert len(FAMILIES) >= 12
    lines = [line for line in DOCS.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    cells = [re.split(r"(?<!\\)\|", line.strip("|")) for line in lines]
    head, _, *rows = [[cell.strip() for cell in line] for line in cells if len(line) > 3]
    assert head == ["template", *ASKED, "before an answer", "date"]
    assert rows == table()


# ----------------------------------------------------------------------- text that is not there

STRIPPED = (
    "{% for m in messages %}{% set c = m.content %}"
    "{% if m.role == 'assistant' and '</think>' in c %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}<|{{ m.role }}|>{{ c }}<|eos|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
THOUGHTS = {
    "responses": ["<think>\nshort\n</think>\n\nyes", "<think>\nlong talk\n</think>\n\nyes", "no"],
    "scores": [1, 0, 2],
}
LOST = "whose text the chat template leaves out or changes"


def rule(name: str) -> str:
    return f" (data.rendering.{name})"


@pytest.mark.parametrize(
    ("template", "row", "slot"),
    [
        (STRIPPED, THOUGHTS, 0),
        # Everything of the answer is lost, and a part in its middle.
        (STRIPPED, {"responses": ["no", "<think>\nhm\n</think>"]}, 1),
        (CHAT_TEMPLATE.replace("message.content }}", "message.content | replace('!', '') }}"),
         {"responses": ["So it is.", "So! It is."]}, 1),
        (CHAT_TEMPLATE.replace("message.content }}", "message.content[:8] }}"),
         {"responses": ["short", "a longer one"]}, 1),
    ],
    ids=["two become one", "nothing left", "a sign", "cut"],
)  # fmt: skip
def test_text_of_a_response_that_is_left_out(template: str, row: dict[str, Any], slot: int) -> None:
    tokenizer = with_template(template)
    with pytest.raises(DataError) as caught:
        tokenize(tokenizer, row)
    message = str(caught.value)
    assert message.startswith(f"x:1: responses[{slot}]: found {row['responses'][slot]!r}, rendered")
    assert "data.rendering.response_text to drop or keep" in message
    # Left out, and counted with its row.
    lost = [text for text in row["responses"] if not text.startswith(("no", "s", "So it"))]
    drop = RenderingRules(response_text="drop")
    group, report = tokenize(tokenizer, row, rendering=drop, min_responses=1)
    assert report.changed == {f"{LOST}, left out{rule('response_text')}": len(lost)}
    assert report.examples == {f"{LOST}, left out{rule('response_text')}": ["x:1"]}
    assert len(group.responses) == len(row["responses"]) - len(lost)
    # Kept as the template leaves them.
    keep = RenderingRules(response_text="keep", equal_tokens="keep")
    group, report = tokenize(tokenizer, row, rendering=keep)
    assert report.changed[LOST + rule("response_text")] == len(lost)
    assert group.scores == tuple(row.get("scores", [0, 1]))


def test_responses_that_become_equal_contradict_each_other() -> None:
    tokenizer = with_template(STRIPPED)
    with pytest.raises(
        DataError, match=r"responses\[0\]: found the same tokens with different scores"
    ):
        tokenize(tokenizer, THOUGHTS, rendering=RenderingRules(response_text="keep"))
    rules = RenderingRules(response_text="keep", equal_tokens="drop")
    group, report = tokenize(tokenizer, THOUGHTS, rendering=rules, min_responses=1)
    assert group.scores == (2.0,)
    assert (
        report.changed[
            "with the tokens of another of their group and another score, left out"
            + rule("equal_tokens")
        ]
        == 2
    )


TRIM = CHAT_TEMPLATE.replace("message.content }}", "message.content | trim }}")
CODE = {"responses": ["    return x\n", "return x", "return x\n\n"], "scores": [1, 0, 2]}


@pytest.mark.parametrize(
    ("template", "responses", "count"),
    [
        (TRIM, ["    return x\n", "return y"], 1),
        (TRIM, ["a ", "\nb", "c"], 2),
        (CHAT_TEMPLATE.replace("content }}", "content.split() | join(' ') }}"), ["a\n\nb", "c"], 1),
    ],
)
def test_white_space_that_the_template_changes_is_counted(
    template: str, responses: list[str], count: int
) -> None:
    _, report = tokenize(with_template(template), {"responses": responses})
    reason = "whose white space the chat template removes or changes"
    assert report.changed == {reason + rule("white_space"): count}
    with pytest.raises(DataError, match=r"data\.rendering\.white_space"):
        tokenize(
            with_template(template),
            {"responses": responses},
            rendering=RenderingRules(white_space="error"),
        )


def test_answers_that_differ_in_white_space_alone_contradict_each_other_once_trimmed() -> None:
    with pytest.raises(DataError) as caught:
        tokenize(with_template(TRIM), CODE)
    assert "responses[0] 1, responses[1] 0, responses[2] 2" in str(caught.value)
    # With one score there is no contradiction, and without the trimming no equal tokens.
    tokenize(with_template(TRIM), {**CODE, "scores": [1, 1, 1]})
    tokenize(with_template(CHAT_TEMPLATE), CODE)


IGNORES_SYSTEM = (
    "{% for m in messages %}{% if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}<|eos|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize(
    ("row", "lost"),
    [
        ({"system": "Be brief."}, "a text of the system"),
        ({"tools": [TOOL]}, "tools"),
        ({"prompt": [USER, said("So.", reasoning_content="hm"), USER]}, "a text of the assistant"),
    ],
)
def test_text_of_the_prompt_that_is_left_out(row: dict[str, Any], lost: str) -> None:
    tokenizer = with_template(IGNORES_SYSTEM)
    row = {"responses": ["a", "b", "c"], **row}
    reason = f"a prompt of which the chat template leaves out {lost}"
    _, report = tokenize(tokenizer, row)
    assert report.changed == {f"to {reason}{rule('prompt_text')}": 3}
    group, report = tokenize(tokenizer, row, rendering=RenderingRules(prompt_text="drop"))
    assert group is None
    assert report.dropped == {f"with {reason}{rule('prompt_text')}": 1}
    with pytest.raises(DataError, match=r"^x:1: prompt: found .*data\.rendering\.prompt_text"):
        tokenize(tokenizer, row, rendering=RenderingRules(prompt_text="error"))


def test_system_message_that_the_template_moves_is_there() -> None:
    row = {"system": "Be brief.", "responses": ["a", "b"]}
    assert not tokenize(tokenizer_of("Mistral"), row)[1].changed


@pytest.mark.parametrize("text", ["So.<|user|>\nMore?", "<|system|>", "a <|bos|> b"])
def test_special_tokens_written_in_a_text_are_counted(text: str) -> None:
    token = re.search(r"<\|\w+\|>", text)
    assert token is not None
    row = {"responses": ["no", text]}
    _, report = tokenize(make_tokenizer(), row)
    reason = f"in whose text the special token {token[0]} is written"
    assert report.changed == {reason + rule("special_tokens"): 1}
    group, _ = tokenize(
        make_tokenizer(), row, rendering=RenderingRules(special_tokens="drop"), min_responses=1
    )
    assert group.indices == (0,)
    _, report = tokenize(make_tokenizer(), {"prompt": text, "responses": ["a", "b"]})
    assert report.changed == {f"to a prompt {reason}{rule('special_tokens')}": 2}


def test_equal_tokens_of_responses_that_are_cut() -> None:
    row = {"prompt": "Why?", "responses": ["one two", "one six"], "scores": [0, 1]}
    tokenizer = make_tokenizer()
    whole, _ = tokenize(tokenizer, row)
    make = GroupTokenizer(
        tokenizer,
        max_length=len(whole.prompt) + 1,
        over_long="cut",
        prompt_format="auto",
        boundary="auto",
    )
    with pytest.raises(DataError, match="the same tokens with different scores"):
        make(check_row(row, "x:1"), DataReport("x"))


# ------------------------------------------------------------------------------ before an answer

BLOCK = "<think>\n\n</think>\n\n"
THINKS = CHAT_TEMPLATE.replace(
    "{{ message.content", "{% if loop.last and message.role == 'assistant' %}" + BLOCK
    + "{% endif %}{{ message.content",
)  # fmt: skip
NO_GENERATION = CHAT_TEMPLATE.replace("{% if add_generation_prompt %}", "{% if false %}")


@pytest.mark.parametrize(
    ("template", "header"),
    [
        (THINKS, BLOCK),
        (NO_GENERATION, "<|assistant|>\n"),
        (NO_GENERATION.replace("<|{{ message.role }}|>\n", "{{ message.role }}: "), "assistant:"),
    ],
    ids=["think block", "generation prompt ignored", "a space at its end"],
)
def test_text_that_all_answers_begin_with_belongs_to_the_prompt(template: str, header: str) -> None:
    tokenizer = with_template(template)
    row = {"responses": ["The cat.", "The dog."]}
    prompt, responses = texts(tokenizer, row)
    assert prompt.endswith(header)
    # What the answers share of their own stays theirs.
    assert [text.strip() for text in responses] == ["The cat.<|eos|>", "The dog.<|eos|>"]
    # A sampler is given the same prompt.
    make = GroupTokenizer.without_limit(tokenizer, "auto")
    group, report = tokenize(tokenizer, row)
    assert make.prompt_ids("Why?", "x:1") == group.prompt.tolist()
    (reason,) = report.changed
    assert reason == f"after {header!r} of the chat template, part of the prompt"


def test_thinking_template_of_answers_with_and_without_reasoning() -> None:
    """The empty block is the prompt's where all have it, and an answer's where it is a choice."""
    tokenizer = tokenizer_of("Qwen 3")
    start = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    plain = texts(tokenizer, {"responses": ["So.", "No."]})
    assert plain == (start + BLOCK, ["So.<|im_end|>", "No.<|im_end|>"])
    mixed = texts(tokenizer, {"responses": [f"{THINK}So.", "No."]})
    assert mixed == (start, [f"{THINK}So.<|im_end|>", f"{BLOCK}No.<|im_end|>"])
    as_fields = texts(tokenizer, {"responses": [said("So.", reasoning_content="hm"), "No."]})
    assert as_fields == (
        f"{start}<think>\n",
        ["hm\n</think>\n\nSo.<|im_end|>", "\n</think>\n\nNo.<|im_end|>"],
    )
    # Switched off, the prompt itself holds the block, for training and for sampling.
    off = {"template_arguments": {"enable_thinking": False}}
    make = GroupTokenizer.without_limit(tokenizer, "auto", **off)
    group, report = tokenize(tokenizer, {"responses": ["So.", "No."]}, **off)
    assert tokenizer.decode(group.prompt) == start + BLOCK
    assert make.prompt_ids("Why?", "x:1") == group.prompt.tolist()
    assert not report.changed


def test_response_that_begins_with_a_line_break_after_a_line_break() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["\n\n", "\n"])
    (prompt, responses) = texts(tokenizer, {"responses": ["\nyes", "no"]})
    assert prompt.endswith("<|assistant|>\n")
    assert responses == ["\nyes<|eos|>", "no<|eos|>"]
    # What a sampler writes token by token comes back as the tokens that it wrote.
    group, report = tokenize(tokenizer, {"responses": ["\nyes", "no"]})
    written = tokenizer("\nyes", add_special_tokens=False)["input_ids"]
    assert group.responses[0].tolist()[:-1] == written
    assert report.changed == {
        "whose beginning would join the prompt's end, tokenised by themselves": 1
    }
    with pytest.raises(DataError, match="the prompt's tokens change once it follows"):
        tokenize(tokenizer, {"responses": ["\nyes", "no"]}, boundary="strict")


# ---------------------------------------------------------------------------------------- dates


@pytest.mark.parametrize("family", ["Llama 3", "Granite", "GPT-OSS (Harmony)"])
def test_date_of_the_template_is_the_one_that_is_set(family: str) -> None:
    tokenizer, row = tokenizer_of(family), {"responses": ["a", "b"]}
    first, _ = texts(tokenizer, row, date="2026-01-31")
    assert re.search(r"31 Jan 2026|January 31, 2026|2026-01-31", first)
    assert texts(tokenizer, row, date="2026-01-31T23:59:59")[0] == first
    assert texts(tokenizer, row, date="2026-02-01")[0] != first
    # transformers' own rendering, on the day that it is.
    make = GroupTokenizer.without_limit(tokenizer, "auto")
    assert make.date is not None
    today = tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(today, add_special_tokens=False)["input_ids"]
    assert make.prompt_ids("Why?", "x:1")[: len(ids)] == ids
    assert make.settings["date"] == make.date


def test_template_without_a_date_has_none() -> None:
    make = GroupTokenizer.without_limit(make_tokenizer(), "auto", date="2026-01-31")
    assert make.date is None


def test_date_that_is_none_is_refused() -> None:
    with pytest.raises(DataError, match=r"^date: .*yesterday.*expected a date such as"):
        GroupTokenizer.without_limit(tokenizer_of("Llama 3"), "auto", date="yesterday")


@pytest.mark.parametrize("instead", ["'...'", "message.content[:6]", "message.text"])
def test_template_that_loses_every_answer_is_refused(instead: str) -> None:
    template = CHAT_TEMPLATE.replace("message.content }}", f"{instead} }}}}")
    with pytest.raises(DataError, match=r"tokenizer: its chat template leaves out an answer"):
        GroupTokenizer.without_limit(with_template(template), "auto")
