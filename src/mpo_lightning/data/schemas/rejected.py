"""ms-swift's preference format: a conversation, and what would have been worse at its end."""

from dataclasses import dataclass
from typing import Any, ClassVar

from mpo_lightning.data.groups import bad_field, check_field, is_list, show
from mpo_lightning.data.schemas.base import Answer, Converted, Row, one_of
from mpo_lightning.data.schemas.pairs import TwoPrompts
from mpo_lightning.data.schemas.trainer_columns import (
    CONVERSATIONS,
    conversation,
    is_conversation,
    read_prompt,
)

__all__ = ["Rejected"]

RESPONSES = ("response", "output", "completion")
# Columns that change a prompt, and that may differ for the rejected response.
OF_PROMPTS = ("tools", "images", "videos", "audios", "objects")
Turns = list[dict[str, Any]]
REJECTED = ("rejected_response", "rejected_messages")


@dataclass(frozen=True, kw_only=True)
class Rejected(TwoPrompts):
    """ms-swift: ``messages`` with ``rejected_response`` or ``rejected_messages``.

    The last message is the chosen response and scores 1. ``rejected_response`` is a text, a list
    of texts, or the messages that take the place of all after the user's last one;
    ``rejected_messages`` is a whole conversation, or a list of them. Each scores 0. In place of
    ``messages`` there may be ``query`` (or another name of the prompt that `Pairs` reads) and
    ``response``.
    """

    columns: ClassVar[str] = "messages (or query, response), rejected_response or rejected_messages"

    @classmethod
    def fits(cls, columns: frozenset[str], row: Row) -> bool:
        """Whether there are a rejected response or conversation, and no chosen one."""
        return any(row.get(name) is not None for name in REJECTED) and not columns & {
            "chosen",
            "chosen_response",
        }

    def convert(self, row: Row, source: str) -> Converted:
        """Return the canonical row."""
        for name in OF_PROMPTS:
            part = row.get(f"rejected_{name}")
            if part and part != row.get(name):
                found, expected = f"others than in {name}", "one prompt for all responses"
                remedy = "Remove the column or the row."
                raise bad_field(source, f"rejected_{name}", found, expected, remedy)
        whole, read = _chosen(row, source)
        given_in = [name for name in REJECTED if row.get(name) is not None]
        rejected_in = one_of(given_in, row, source) if given_in else REJECTED[0]
        value = check_field(row, rejected_in, source)
        fields, given = [rejected_in], [value]
        if is_list(value) and not is_conversation(value):
            fields, given = [f"{rejected_in}[{at}]" for at in range(len(value))], list(value)
        before: Turns = []
        if rejected_in == "rejected_response":
            users = [index for index, turn in enumerate(whole) if turn.get("role") == "user"]
            before = whole[: max(users, default=-1) + 1]
        others = [
            before + _turns(each, field, source) for field, each in zip(fields, given, strict=True)
        ]
        names = [read[0], *fields]
        prompt, texts = self._split([whole, *others], names, source)
        scores = [1.0, *[0.0] * len(others)]
        answers = [
            Answer(text, score, name, name)
            for name, text, score in zip(names, texts, scores, strict=True)
        ]
        read = (*read, *REJECTED)
        return self.canonical(row, source, prompt=prompt, answers=answers, read=read)


def _chosen(row: Row, source: str) -> tuple[Turns, tuple[str, ...]]:
    """Return the conversation with the chosen response, and its columns."""
    found = [name for name in CONVERSATIONS if row.get(name) is not None]
    if found:
        name = one_of(found, row, source)
        if isinstance(row[name], str):
            expected = "a list of messages"
            raise bad_field(source, name, show(row[name]), expected, "Convert the column.")
        return _turns(row[name], name, source), (name,)
    prompt, prompt_in = read_prompt(row, source)
    name = one_of(RESPONSES, row, source)
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return _turns(before, prompt_in[0], source) + _turns(row[name], name, source), (
        name,
        *prompt_in,
    )


def _turns(value: object, field: str, source: str) -> Turns:
    """Return the messages of a conversation, or of a text, which is the assistant's."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    if not is_conversation(value):
        expected = "a text, a list of texts, or messages"
        raise bad_field(source, field, show(value), expected, "Repair or remove the row.")
    return conversation(value, field, source)
