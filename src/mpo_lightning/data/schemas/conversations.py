"""Conversations in public data: messages, transcripts in one text, prompts inside responses."""

import re
from collections.abc import Mapping

from mpo_lightning.data.groups import bad_field, check_field, is_list, show, show_typed
from mpo_lightning.data.schemas.base import Row, records

__all__ = [
    "answer_text",
    "has_leaked_turn",
    "is_messages",
    "marked_turns",
    "messages",
    "prompt_of",
    "split_conversation",
    "transcript",
]

TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
LEAKED_TURN = re.compile(r"^\s*(?:Human|Assistant):", re.MULTILINE)
MARKER = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")
MESSAGE_KEYS = ("role", "content")
ROLE_OF = {"Human": "user", "User": "user", "Assistant": "assistant"}


def is_messages(value: object) -> bool:
    """Whether a value is a conversation: a list of objects, or an object of lists."""
    if isinstance(value, Mapping):
        return {"role", "content"} <= set(value) and all(map(is_list, value.values()))
    return is_list(value) and bool(value) and all(isinstance(part, Mapping) for part in value)


def messages(value: object, field: str, source: str) -> list[dict[str, object]]:
    """Return the messages of a conversation, without further fields that are null.

    Arrow gives every message all fields that any message of the file has. Other faults of a
    message are found when the row is checked.
    """
    return [
        {name: part for name, part in message.items() if part is not None or name in MESSAGE_KEYS}
        for message in records(value, field, source)
    ]


def prompt_of(row: Row, name: str, source: str) -> object:
    """Return the prompt in a column: a text, or messages.

    Raises:
        DataError: if the column is missing or null.
    """
    value = check_field(row, name, source)
    return messages(value, name, source) if is_messages(value) else value


def answer_text(value: object, field: str, source: str) -> object:
    """Return a response that is a text, or a conversation of one assistant message.

    Raises:
        DataError: if it is a longer conversation, or another role's message.
    """
    if not is_messages(value):
        return value
    turns = messages(value, field, source)
    if len(turns) != 1 or turns[0].get("role") != "assistant":
        found = f"messages of {show([turn.get('role') for turn in turns])}"
        remedy = "Keep the response; what comes before it belongs into the prompt."
        raise bad_field(source, field, found, "the assistant's message alone", remedy)
    return _answer(turns[0])


def _answer(message: dict[str, object]) -> object:
    """Return the text of a message, or the message if it has more than that."""
    content = message.get("content")
    return message if message.keys() - {"role", "content"} or is_list(content) else content


def split_conversation(
    value: object, field: str, source: str
) -> tuple[list[dict[str, object]], object]:
    """Return the prompt (all messages but the last) and the response (the last one).

    Raises:
        DataError: if the last message is not the assistant's.
    """
    turns = messages(value, field, source)
    if not turns or turns[-1].get("role") != "assistant":
        found = f"a conversation that ends with {show(turns[-1].get('role') if turns else None)}"
        expected = "the assistant's message at the end"
        raise bad_field(source, field, found, expected, "Repair or remove the row.")
    return turns[:-1], _answer(turns[-1])


def transcript(text: object, field: str, source: str) -> list[dict[str, object]]:
    r"""Return the messages of a text such as ``\n\nHuman: Hello\n\nAssistant: Hi``.

    White space around a turn is not part of it. The last message may be empty: the place of the
    answer.

    Raises:
        DataError: if the text does not begin with a turn.
    """
    start = TURN.match(text) if isinstance(text, str) else None
    if not isinstance(text, str) or start is None:
        expected = r"a transcript that begins with '\n\nHuman:'"
        raise bad_field(source, field, show_typed(text), expected, "Repair or remove the row.")
    parts = TURN.split(text)[1:]
    return [
        {"role": ROLE_OF[role], "content": content.strip()}
        for role, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def marked_turns(text: object) -> object:
    """Return the messages of a prompt with ``<extra_id_1>User`` marks, or a text without them.

    The first turn is the user's and carries no mark.
    """
    if not isinstance(text, str) or not MARKER.search(text):
        return text
    first, *rest = MARKER.split(text)
    turns = [{"role": "user", "content": first}] if first.strip() else []
    return turns + [
        {"role": ROLE_OF[role], "content": content}
        for role, content in zip(rest[::2], rest[1::2], strict=True)
    ]


def has_leaked_turn(text: object) -> bool:
    """Whether an answer contains the beginning of another turn of its transcript."""
    return isinstance(text, str) and LEAKED_TURN.search(text) is not None
