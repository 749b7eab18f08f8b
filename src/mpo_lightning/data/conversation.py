"""Check of conversations: prompts, responses, and the columns that change how they are rendered."""

import json
from ast import literal_eval
from collections.abc import Mapping, Sequence
from typing import Any

from mpo_lightning.batch import Message, Prompt, Response
from mpo_lightning.data.groups import (
    bad_field,
    check_characters,
    check_field,
    check_list,
    check_text,
    is_list,
    show,
    show_typed,
)

__all__ = [
    "CONTEXT",
    "REASONING",
    "as_message",
    "as_messages",
    "as_text",
    "check_conversation",
    "check_prompt",
    "check_response",
    "check_responses",
    "context_columns",
    "parse_texts",
    "response_text",
]

ROLES = ("system", "developer", "user", "assistant", "tool")
LAST_ROLES = ("user", "tool")
# Names under which chat templates and data sets know an assistant's reasoning.
REASONING = ("reasoning_content", "reasoning", "thinking")
KEYS = ("role", "content", *REASONING, "tool_calls", "tool_call_id", "name")
# Columns that change how a prompt is rendered, and that are read with every format.
SYSTEM = ("system", "system_prompt", "system_message")
CONTEXT = (*SYSTEM, "tools", "chat_template_kwargs")
# Columns that would change the prompt, if anything read them.
UNREAD = frozenset(
    {
        *("history", "chat_history", "conversation_history", "input", "inputs", "context"),
        *("documents", "functions"),
        *("image", "images", "video", "videos", "audio", "audios"),
    }
)
# Columns that hold a list or an object: as a text they can be nothing else.
STRUCTURED = frozenset(
    {
        *("responses", "scores", "truncated", "tools", "chat_template_kwargs", "history"),
        *("answers", "completions", "generations", "ratings", "generated", "rm_scores"),
        *("all_generated_responses", "all_generated_resopnses", "all_rm_scores"),
    }
)


# --------------------------------------------------------------------------------------- messages


def check_prompt(prompt: object, source: str) -> Prompt:
    """Return a prompt: a text, or messages that end with the user's or a tool's.

    Raises:
        DataError: naming the row, the field, what was found, what was expected and what to do.
    """
    restore = "Remove the row or restore its prompt."
    if isinstance(prompt, str):
        if not prompt.strip():
            raise bad_field(source, "prompt", show(prompt), "a text", restore)
        check_characters(prompt, "prompt", source)
        return prompt
    expected = 'a text or a list of {"role", "content"} messages'
    messages = [
        _check_message(message, f"prompt[{index}]", source)
        for index, message in enumerate(
            check_list(prompt, "prompt", source, expected, "Convert the column.")
        )
    ]
    if not messages:
        raise bad_field(source, "prompt", "no messages", "at least one", restore)
    if messages[-1]["role"] not in LAST_ROLES:
        raise bad_field(
            source,
            f"prompt[{len(messages) - 1}].role",
            show(messages[-1]["role"]),
            "the prompt to end with the user's (or a tool's) message",
            "Move a last assistant message into `responses`.",
        )
    return messages


def _check_message(message: object, field: str, source: str) -> Message:
    """Return a message with text as content, without fields that are null."""
    expected = '{"role", "content"}'
    if not isinstance(message, Mapping) or not {"role"} <= set(message):
        raise bad_field(source, field, show(message), expected, "Repair the message.")
    given = {str(name): value for name, value in message.items() if value is not None}
    unknown = sorted(set(given) - set(KEYS))
    if unknown:
        remedy = f"Remove other keys; besides these two, {', '.join(KEYS[2:])} are rendered."
        found = f"the keys {unknown} in {show(message)}"
        raise bad_field(source, field, found, expected, remedy)
    role = given.get("role")
    if role not in ROLES:
        expected = f"one of {', '.join(ROLES)}"
        raise bad_field(source, f"{field}.role", show(message["role"]), expected, "Rename it.")
    checked: Message = {"role": role}
    for name in REASONING:
        if _check_part(given.get(name, ""), f"{field}.{name}", source).strip():
            checked[name] = given[name]
    if given.get("tool_calls"):
        checked["tool_calls"] = _check_calls(given["tool_calls"], f"{field}.tool_calls", source)
    # An answer may consist of reasoning or calls alone; an empty system message is legal.
    can_be_empty = role in ("system", "developer") or (role == "assistant" and len(checked) > 1)
    if "content" not in message and not can_be_empty:
        raise bad_field(source, field, show(message), expected, "Repair the message.")
    content = _joined_parts(given.get("content", ""), f"{field}.content", source)
    if not content.strip() and not can_be_empty:
        remedy = "Remove the empty message."
        raise bad_field(source, f"{field}.content", show(message["content"]), "a text", remedy)
    checked = {"role": role, "content": content, **checked}
    for name in ("tool_call_id", "name"):
        if name in given:
            checked[name] = _check_part(given[name], f"{field}.{name}", source)
    return checked


def _check_part(text: object, field: str, source: str) -> str:
    if not isinstance(text, str):
        raise bad_field(source, field, show_typed(text), "a text", "Convert or remove it.")
    check_characters(text, field, source)
    return text


def _joined_parts(content: object, field: str, source: str) -> str:
    """Return the text of a content, which may be a list of text parts."""
    if not is_list(content):
        return _check_part(content, field, source)
    texts = []
    for index, part in enumerate(content):
        where = f"{field}[{index}]"
        kind = part.get("type", "text") if isinstance(part, Mapping) else None
        if not isinstance(part, Mapping) or kind != "text" or "text" not in part:
            remedy = "Only texts are trained on: remove other parts, or the row."
            raise bad_field(source, where, show(part), 'a part {"type": "text", "text"}', remedy)
        texts.append(_check_part(part["text"], f"{where}.text", source))
    return "".join(texts)


def _check_calls(calls: object, field: str, source: str) -> list[dict[str, Any]]:
    """Return tool calls whose arguments are objects, as chat templates expect them."""
    expected, remedy = 'a list of {"function": {"name", "arguments"}}', "Repair the calls."
    checked = []
    given = _parsed(calls) if isinstance(calls, str) else calls
    for index, call in enumerate(check_list(given, field, source, expected, remedy)):
        where = f"{field}[{index}]"
        outer: Mapping[str, Any] = call if isinstance(call, Mapping) else {}
        inner = outer.get("function", outer)
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            raise bad_field(source, where, show(call), expected, remedy)
        arguments = inner.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _parsed(arguments)
        if not isinstance(arguments, Mapping):
            found = show(inner["arguments"])
            raise bad_field(source, f"{where}.arguments", found, "an object, or its JSON", remedy)
        function = {**inner, "arguments": arguments}
        whole = {**outer, "function": function} if "function" in outer else function
        checked.append(_without_nulls(whole))
    return checked


def _without_nulls(value: Any) -> Any:
    """Return a value without the nulls with which Arrow fills fields that other rows have."""
    if isinstance(value, Mapping):
        return {str(k): _without_nulls(part) for k, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if is_list(value) else value


# -------------------------------------------------------------------------------------- responses


def check_response(response: object, field: str, source: str) -> Response:
    """Return a response: a text, or the assistant's message if it has more than content.

    Raises:
        DataError: naming the row, the field, what was found, what was expected and what to do.
    """
    # Texts are by far the most, and quick to tell.
    if not isinstance(response, str) and is_list(response) and len(response) == 1:
        response = response[0] if isinstance(response[0], Mapping) else response
    if isinstance(response, str) or not isinstance(response, Mapping):
        return check_text(response, field, source)
    message = _check_message(response, field, source)
    if message["role"] != "assistant":
        remedy = "What comes before the answer belongs into the prompt."
        raise bad_field(source, f"{field}.role", show(message["role"]), "'assistant'", remedy)
    extra = message.keys() - {"role", "content"}
    return message if extra else check_text(message["content"], f"{field}.content", source)


def check_responses(responses: object, source: str) -> list[Response]:
    """Return the responses of a row: at least two, none empty.

    Raises:
        DataError: naming the row, the field, what was found, what was expected and what to do.
    """
    remedy = "Collect the prompt's responses in one list."
    given = check_list(responses, "responses", source, "a list of texts", remedy)
    checked = [
        check_response(each, f"responses[{index}]", source) for index, each in enumerate(given)
    ]
    if len(checked) < 2:
        found, expected = f"{len(checked)} response(s)", "at least 2 for one prompt"
        remedy = "Remove the row, or sample more responses for its prompt."
        raise bad_field(source, "responses", found, expected, remedy)
    return checked


def as_message(response: Response) -> Message:
    """Return a response as the assistant's message."""
    return {"role": "assistant", "content": response} if isinstance(response, str) else response


def response_text(response: Response) -> str:
    """Return all that a response says as one text: reasoning, content and tool calls."""
    if isinstance(response, str):
        return response
    parts = [response[name] for name in (*REASONING, "content") if response.get(name)]
    return "\n".join([*parts, *map(json.dumps, response.get("tool_calls", ()))])


def as_messages(prompt: Prompt) -> list[Message]:
    """Return a prompt as a conversation: a text is one user message."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def as_text(prompt: Prompt) -> str | None:
    """Return a prompt as a text, or None if it is more than one user message."""
    if isinstance(prompt, str):
        return prompt
    single = [message["role"] for message in prompt] == ["user"]
    return str(prompt[0]["content"]) if single else None


# ---------------------------------------------------------------------- columns beside the prompt


def check_conversation(
    row: Mapping[str, object], source: str, prompt: str = "prompt"
) -> tuple[Prompt, dict[str, object]]:
    """Return a row's prompt and the arguments of the chat template that renders it.

    The columns ``system`` (or ``system_prompt``, ``system_message``), ``tools`` and
    ``chat_template_kwargs`` are read with the prompt.

    Args:
        row: the row.
        source: "file:row", for messages.
        prompt: the prompt's column.

    Raises:
        DataError: if one of them cannot be used, or a column that nothing reads would change the
            prompt.
    """
    checked = _with_system(check_prompt(check_field(row, prompt, source), source), row, source)
    for name in sorted(UNREAD & row.keys() - {prompt}):
        value = row[name]
        said = "\n".join(str(message["content"]) for message in as_messages(checked))
        if not value or (isinstance(value, str) and value.strip() in said):
            continue
        found, expected = show(value), "no column that would change the prompt and is not read"
        remedy = (
            f"Write it into the prompt, or rename it (data.columns: {{{name}: ...}}) as a remark."
        )
        raise bad_field(source, name, found, expected, remedy)
    arguments: dict[str, object] = {}
    more = row.get("chat_template_kwargs")
    if more is not None:
        if not isinstance(more, Mapping):
            expected, remedy = "an object", "Convert or remove the column."
            raise bad_field(source, "chat_template_kwargs", show_typed(more), expected, remedy)
        arguments |= _without_nulls(more)
    tools = row.get("tools")
    if tools:
        given = check_list(tools, "tools", source, "a list of objects", "Convert the column.")
        for index, tool in enumerate(given):
            if not isinstance(tool, Mapping):
                remedy = "Describe each tool by its JSON schema."
                raise bad_field(source, f"tools[{index}]", show_typed(tool), "an object", remedy)
        arguments["tools"] = _without_nulls(given)
    return checked, arguments


def _with_system(prompt: Prompt, row: Mapping[str, object], source: str) -> Prompt:
    given = {name: row[name] for name in SYSTEM if row.get(name) not in (None, "")}
    if not given:
        return prompt
    for name, text in given.items():
        _check_part(text, name, source)
    (name, text), *others = given.items()
    for other, another in others:
        if another != text:
            remedy = "Keep one of the columns, or rename the other (data.columns)."
            raise bad_field(source, other, f"another text than in {name}", "one", remedy)
    messages = as_messages(prompt)
    if messages[0]["role"] not in ("system", "developer"):
        return [{"role": "system", "content": text}, *messages]
    if messages[0]["content"] != text:
        found = f"{show(text)} beside the prompt's own {show(messages[0]['content'])}"
        remedy = "Keep one of them, or rename the column (data.columns) if it is a remark."
        raise bad_field(source, name, found, "one system prompt", remedy)
    return messages


def context_columns(arguments: Mapping[str, object]) -> dict[str, object]:
    """Return the columns from which `check_conversation` reads these arguments."""
    more = {name: value for name, value in arguments.items() if name != "tools"}
    columns = {"tools": arguments.get("tools"), "chat_template_kwargs": more}
    return {name: value for name, value in columns.items() if value}


# ----------------------------------------------------------------------------- structure in texts


def parse_texts(row: Mapping[Any, object], source: str) -> tuple[Mapping[Any, object], list[str]]:
    """Parse lists and messages that are written as texts, as JSON or as ``str()`` writes them.

    Args:
        row: the row.
        source: "file:row", for messages.

    Returns:
        the row, and the names of the columns that were parsed.

    Raises:
        DataError: if a text looks like messages and is none.
    """
    parsed: dict[Any, object] = {}
    for name, value in row.items():
        if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
            continue
        found = _parsed(value)
        if found is None:
            if _looks_like_messages(value):
                expected = "messages: a list, or its JSON"
                remedy = "Convert the column to lists of messages, or repair the text."
                raise bad_field(source, str(name), show(value), expected, remedy)
        elif name in STRUCTURED or _are_messages(found):
            parsed[name] = found
    return {**row, **parsed} if parsed else row, list(map(str, parsed))


def _parsed(text: str) -> Any:
    """Return the list or object that a text holds as JSON or as a Python literal, else None."""
    try:
        found = json.loads(text)
    except ValueError:
        try:
            found = literal_eval(text.strip())
        # Deeply nested texts exhaust memory or recursion.
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    except RecursionError:
        return None
    return found if isinstance(found, list | dict) else None


def _are_messages(value: object) -> bool:
    messages: Sequence[object] = value if is_list(value) else [value]
    return bool(messages) and all(
        isinstance(each, Mapping)
        and ({"role", "content"} <= each.keys() or {"from", "value"} <= each.keys())
        for each in messages
    )


def _looks_like_messages(text: str) -> bool:
    start = "".join(text[:60].split())
    return start.startswith(("[{'role'", '[{"role"', "[{'content'", '[{"content"'))
