"""Columns, keys and roles under which other trainers' files hold a conversation."""

import json
from collections.abc import Mapping
from typing import Any, TypeGuard

from mpo_lightning.data.groups import bad_field, check_field, check_list, is_list, show, show_typed
from mpo_lightning.data.schemas.base import Row
from mpo_lightning.data.schemas.conversations import is_messages, messages, prompt_of

__all__ = [
    "CONVERSATIONS",
    "as_messages",
    "check_label",
    "conversation",
    "has_prompt",
    "is_conversation",
    "is_label",
    "is_response",
    "read_prompt",
]

# Columns that hold a prompt as a text (or messages), and those that hold a conversation.
PROMPTS = ("prompt", "instruction", "question", "query")
CONVERSATIONS = ("messages", "conversations", "conversation")
ALL_PROMPTS = (*PROMPTS, "input", *CONVERSATIONS)
# Keys of a message.
KEYS = (("role", "content"), ("from", "value"))
# Keys of a message and its answer in one object, with their roles.
EXCHANGE = {"human": "user", "assistant": "assistant"}
# Roles that need no translation.
USUAL = ("system", "user", "assistant", "tool")
CALLS = ("function_call", "tool_call")
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
LABELS: dict[object, bool] = {True: True, False: False, "true": True, "false": False}


def is_label(value: object) -> bool:
    """Whether a value is true or false, also as 1 or 0 and as the text of one of these."""
    return _label(value) is not None


def check_label(value: object, field: str, source: str) -> bool:
    """Return a label that says whether a response is wanted.

    Raises:
        DataError: if it is neither true nor false.
    """
    label = _label(value)
    if label is None:
        raise bad_field(source, field, show(value), "true or false", "Repair the row.")
    return label


def _label(value: object) -> bool | None:
    if isinstance(value, str):
        value = {"1": True, "0": False}.get(value.strip(), value.strip().lower())
    return LABELS.get(value) if isinstance(value, bool | int | float | str) else None


# ----------------------------------------------------------------------------------- conversations


def as_messages(value: object, field: str, source: str) -> object:
    """Return one message, or several, as a list of messages; anything else as it is."""
    if isinstance(value, Mapping) and not is_conversation(value):
        value = [value]
    return conversation(value, field, source) if is_conversation(value) else value


def is_response(value: object) -> bool:
    """Whether a value is a text, one message, or several."""
    single = isinstance(value, Mapping) and any({*keys} <= set(value) for keys in KEYS)
    return isinstance(value, str) or single or is_conversation(value)


def is_conversation(value: object) -> TypeGuard[Any]:
    """Whether a value is a list of messages, whatever their keys, or an object of lists."""
    if isinstance(value, Mapping):
        return any({*keys} <= set(value) for keys in KEYS) and all(map(is_list, value.values()))
    return is_messages(value)


def conversation(value: object, field: str, source: str) -> list[dict[str, Any]]:
    """Return messages under the keys ``role`` and ``content``, with the roles of chat templates.

    Keys may be ShareGPT's ``from`` and ``value``, or ``human`` and ``assistant`` in one object;
    roles also those of LLaMA-Factory and ms-swift. Calls of tools that such a role has written as
    JSON become ``tool_calls``; those that follow each other are made at once.

    Raises:
        DataError: if it is no list of messages, or a call cannot be read.
    """
    given = messages(value, field, source)
    if all(message.get("role") in USUAL for message in given):
        return given
    turns: list[dict[str, Any]] = []
    calling = False
    for index, message in enumerate(given):
        turn = dict(message)
        if turn.keys() == EXCHANGE.keys():
            turns += [{"role": role, "content": turn[key]} for key, role in EXCHANGE.items()]
            continue
        for ours, theirs in zip(*KEYS, strict=True):
            if theirs in turn and ours not in message:
                turn[ours] = turn.pop(theirs)
        role = turn.get("role")
        if role in CALLS:
            calls = _calls(turn.get("content"), f"{field}[{index}]", source)
            if calling:
                turns[-1]["tool_calls"] += calls
            else:
                turns.append({"role": "assistant", "content": None, "tool_calls": calls})
        else:
            turns.append(turn | {"role": ROLES.get(str(role), role)})
        calling = role in CALLS
    return turns


def _calls(content: object, field: str, source: str) -> list[dict[str, object]]:
    """Return the calls that a message has written as ``{"name", "arguments"}``, one or several."""
    found = content
    if isinstance(content, str):
        try:
            found = json.loads(content)
        except ValueError:
            found = None
    calls: list[dict[str, object]] = []
    for call in found if is_list(found) else [found]:
        if not isinstance(call, Mapping) or not {"name", "arguments"} <= set(call):
            expected = 'a call in JSON, {"name": ..., "arguments": ...}, or a list of them'
            raise bad_field(source, field, show(content), expected, "Repair or remove the row.")
        calls.append({"type": "function", "function": dict(call)})
    return calls


# ------------------------------------------------------------------------------------------ prompts


def has_prompt(row: Row) -> bool:
    """Whether a row has a column that `read_prompt` reads, though it may be null."""
    return any(name in row for name in ALL_PROMPTS)


def read_prompt(row: Row, source: str) -> tuple[object, tuple[str, ...]]:
    """Return the prompt of a row, and the columns that it is in.

    It is ``prompt``; or else ``instruction``, to which a line with ``input`` is added,
    ``question``, ``query`` or ``input``, and before these the turns of ``history``; or else a
    conversation: ``messages``, ``conversations`` or ``conversation``.

    Raises:
        DataError: if there is none, or it cannot be said which it is.
    """
    if row.get("prompt") is not None:
        names: tuple[str, ...] = ("prompt",)
    else:
        names = tuple(name for name in PROMPTS if row.get(name) is not None)
        if not names or names == ("instruction",):
            names += ("input",) if row.get("input") is not None else ()
    if not names:
        names = tuple(name for name in CONVERSATIONS if row.get(name) is not None)
    if not names:
        check_field(row, next((name for name in ALL_PROMPTS if name in row), "prompt"), source)
    if len(names) > 1 and names != ("instruction", "input"):
        remedy = "Rename or remove all but one of them (data.columns)."
        raise bad_field(source, " and ".join(names), "prompts in all of them", "one", remedy)
    values = [as_messages(prompt_of(row, name, source), name, source) for name in names]
    if len(values) == 1 and not isinstance(values[0], str):
        return values[0], names
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, str):
            raise bad_field(source, name, show_typed(value), "a text", "Convert the column.")
    prompt = "\n".join(str(value) for value in values if value)
    read = (*names, "history", *(["input"] if names[0] == "instruction" else []))
    if row.get("history"):
        turns = _history(row["history"], source)
        return [*turns, {"role": "user", "content": prompt}], read
    return prompt, read


def _history(value: object, source: str) -> list[dict[str, object]]:
    """Return the messages of a list of pairs, each of what was said and what was answered."""
    expected, remedy = "a list of pairs, [prompt, response]", "Convert the column."
    turns: list[dict[str, object]] = []
    for index, pair in enumerate(check_list(value, "history", source, expected, remedy)):
        if not is_list(pair) or len(pair) != 2:
            raise bad_field(source, f"history[{index}]", show(pair), expected, remedy)
        turns += [
            {"role": role, "content": text}
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
    return turns
