"""Rendering of conversations with a chat template, and what became of every text in it.

A template may write text before an answer, leave text out, trim it, or depend on the date. Each
rendering is compared with what a template writes around an answer that it leaves as it is:

- Text that it writes before all answers of a group belongs to the prompt.
- An answer whose text is not in the rendered answer has lost text; likewise a prompt's message.
- A template that asks for the time gets one date, which is part of a run's identity.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, Self

from mpo_lightning.batch import Message, Prompt, Response
from mpo_lightning.checks import check_settings
from mpo_lightning.data.conversation import REASONING, as_message, as_messages
from mpo_lightning.data.groups import DataError, bad_field, show

__all__ = [
    "Action",
    "ChatRenderer",
    "Finding",
    "Rendered",
    "RenderingRules",
    "first_difference",
    "now",
    "special_tokens",
]

Action = Literal["keep", "drop", "error"]
Kind = Literal["prompt_text", "response_text", "white_space", "special_tokens", "equal_tokens"]

# An answer that no template changes.
PLAIN = "sentinel"
# An answer whose beginning some templates take for reasoning.
REASONED = "<think>\nsentinel\n</think>\n\nsentinel"
# An answer with reasoning in a field of its own.
THOUGHT: Message = {"role": "assistant", "content": PLAIN, "reasoning_content": PLAIN}
# Name under which transformers gives templates the time.
CLOCK = "strftime_now"
# Before a template, it takes the place of that function: a fixed date's texts, by their directives.
FIXED_CLOCK = (
    "{%- macro strftime_now(format) -%}{%- set made = namespace(text=format) -%}"
    "{%- for directive, text in directives.items() -%}"
    "{%- set made.text = made.text.replace(directive, text) -%}"
    "{%- endfor -%}{{- made.text -}}{%- endmacro %}{{ '' }}"
)
DIRECTIVES = [f"%{flag}{letter}" for flag in ("-", "") for letter in "aAbBcdHIjmMpSuUVwWxXyYzZFTDe"]


@dataclass(frozen=True, kw_only=True)
class RenderingRules:
    """What to do where tokens are not what the data say: "keep", "drop" or "error".

    All of it is counted. "drop" leaves out the response, or the group where it is the prompt.

    Args:
        prompt_text: a text of the prompt (a system message, tools, earlier reasoning) that the chat
            template leaves out.
        response_text: a text of a response (reasoning, tool calls) that the chat template leaves
            out.
        white_space: white space of a response that the chat template removes or adds.
        special_tokens: special tokens that are written in a prompt or response, and work as such.
        equal_tokens: responses of one group that have the same tokens and different scores.
    """

    prompt_text: Action = "keep"
    response_text: Action = "error"
    white_space: Action = "keep"
    special_tokens: Action = "keep"
    equal_tokens: Action = "error"

    def __post_init__(self) -> None:
        check_settings(self)

    @classmethod
    def counting(cls) -> Self:
        """Return rules by which everything is kept and counted."""
        return cls(**dict.fromkeys(cls.__dataclass_fields__, "keep"))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Finding:
    """Difference between data and tokens.

    Attributes:
        kind: the setting of `RenderingRules` that decides; None where nothing needs to be decided.
        slot: position of the response; None for the prompt.
        reason: description of such responses or prompts, for reports.
        found: description of this one, for errors; no part of its identity.
    """

    kind: Kind | None
    slot: int | None
    reason: str
    found: str = field(compare=False)


@dataclass(frozen=True)
class Rendered:
    """A group as text.

    Attributes:
        prompt: everything before the answers.
        answers: the text that follows it, for each response.
        before_answers: end of the prompt that the template writes only together with an answer.
        findings: differences from the data.
    """

    prompt: str
    answers: list[str]
    before_answers: str = ""
    findings: list[Finding] = field(default_factory=list)


def now() -> str:
    """Return date and time, to the second, in the local time zone."""
    return datetime.now().isoformat(timespec="seconds")


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Return all special tokens with their ids; ``all_special_tokens`` may not list all of them."""
    added = tokenizer.added_tokens_decoder.items()
    own = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return {**dict(own), **{token.content: number for number, token in added if token.special}}


class ChatRenderer:
    """Renderer of conversations with a tokenizer's chat template.

    Args:
        tokenizer: a tokenizer with a chat template.
        arguments: arguments of the template for all conversations, such as ``enable_thinking``; a
            row's own go before.
        date: date and time that the template gets, in ISO 8601. Defaults to the present.
        whose: the template, for messages.

    Attributes:
        date: the date, if the template asks for one; else None.
        suffix: text that the template writes after a plain answer.

    Raises:
        DataError: if the template refuses a plain conversation, or the date is none.
    """

    def __init__(
        self,
        tokenizer: Any,
        arguments: Mapping[str, object] | None = None,
        date: str | None = None,
        whose: str = "the chat template",
    ) -> None:
        self.tokenizer = tokenizer
        self.whose = whose
        self.arguments = dict(arguments or {})
        template = tokenizer.chat_template
        texts = template.values() if isinstance(template, Mapping) else [template]
        self.date = date or now() if any(CLOCK in text for text in texts) else None
        try:
            time = None if self.date is None else datetime.fromisoformat(self.date)
        except ValueError as error:
            expected = "a date such as 2026-01-31 or 2026-01-31T12:00:00"
            raise DataError(f"{error}; expected {expected}.", field="date") from error
        self._directives = {each: time.strftime(each) for each in DIRECTIVES} if time else {}
        self._parts = False
        # Text around the answers of the last group, which is tried first.
        self._around = ("", "")
        self.suffix = self._learn_plain_answer()

    def _learn_plain_answer(self) -> str:
        messages = [{"role": "user", "content": "a"}]
        try:
            plain = self._template(messages, PLAIN)
            if PLAIN not in plain:
                # Templates of models that see images may read lists of parts only.
                self._parts = True
                plain = self._template(messages, PLAIN)
        except template_error() as error:
            raise DataError(
                "its chat template refuses a user's message with an assistant's answer "
                f"({error}). Use a template for chats, or prompt_format: text.",
                field="tokenizer",
            ) from error
        # A template for texts writes the list itself.
        if PLAIN not in plain or "{'type'" in plain:
            raise DataError(
                f"its chat template leaves out an answer ({PLAIN!r} becomes {show(plain)}). Use a "
                "template for training, or prompt_format: text.",
                field="tokenizer",
            )
        return plain.rpartition(PLAIN)[2]

    # -------------------------------------------------------------------------------- rendering

    def prompt(
        self, prompt: Prompt, source: str, arguments: Mapping[str, object] | None = None
    ) -> str:
        """Render a prompt for a sampler; it ends with what the template writes before any answer.

        Raises:
            DataError: if the template refuses it.
        """
        messages = as_messages(prompt)
        with refusals(source, self.whose):
            text = self._template(messages, None, arguments)
            headers = [
                _between(text, self._template(messages, answer, arguments), start)
                for answer, start in ((PLAIN, PLAIN), (REASONED, REASONED), (THOUGHT, PLAIN))
            ]
        # Where an answer does not begin with its prompt, training says so.
        return text + _shared_start([header for header in headers if header is not None])

    def lost_in_prompt(
        self, prompt: Prompt, arguments: Mapping[str, object] | None = None
    ) -> list[Finding]:
        """Return the texts of a prompt that are not in its rendering as they are."""
        messages = as_messages(prompt)
        return list(self._of_prompt(messages, self._template(messages, None, arguments), arguments))

    def __call__(
        self,
        prompt: Prompt,
        responses: Sequence[Response],
        source: str,
        arguments: Mapping[str, object] | None = None,
    ) -> Rendered:
        """Render a prompt with its responses.

        Args:
            prompt: a text, or the conversation before the answer.
            responses: the answers.
            source: "file:row", for messages.
            arguments: the row's arguments of the template.

        Raises:
            DataError: if the template refuses it, or an answer does not begin with its prompt.
        """
        messages = as_messages(prompt)
        with refusals(source, self.whose):
            text = self._template(messages, None, arguments)
            wholes = [self._template(messages, each, arguments) for each in responses]
        for slot, whole in enumerate(wholes):
            if not whole.startswith(text):
                same = first_difference(text, whole)
                raise bad_field(
                    source,
                    f"responses[{slot}]",
                    f"{whole[same : same + 40]!r} in the rendered answer where the rendered "
                    f"prompt has {text[same : same + 40]!r}",
                    "an answer that begins with its prompt",
                    "The chat template's generation prompt is not part of an answer that it "
                    "renders: use a template for training.",
                )
        tails = [whole[len(text) :] for whole in wholes]
        before, after = self._around
        if not all(
            isinstance(each, str) and tail == before + each + after
            for each, tail in zip(responses, tails, strict=True)
        ):
            with refusals(source, self.whose):
                plain = self._template(messages, PLAIN, arguments)[len(text) :]
            before, _, after = plain.rpartition(PLAIN)
            self._around = (before, after)
        findings = [*self._of_prompt(messages, text, arguments)]
        headers = []
        for slot, (each, tail) in enumerate(zip(responses, tails, strict=True)):
            header, finding = _compare(each, slot, text, tail, (before, after))
            headers.append(header)
            findings += [finding] if finding else []
        shared = _shared_start(headers)
        return Rendered(text + shared, [tail[len(shared) :] for tail in tails], shared, findings)

    def _template(
        self,
        messages: Sequence[Message],
        answer: Response | None,
        arguments: Mapping[str, object] | None = None,
    ) -> str:
        """Render messages with an answer, or with the generation prompt if there is none."""
        given = {**self.arguments, **(arguments or {})}
        if self._directives:
            template = self.tokenizer.get_chat_template(None, given.get("tools"))
            fixed = {"chat_template": FIXED_CLOCK + template, "directives": self._directives}
            given = {**given, **fixed}
        whole = [*messages] if answer is None else [*messages, as_message(answer)]
        if self._parts:
            whole = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in whole]
        text: str = self.tokenizer.apply_chat_template(
            whole, tokenize=False, add_generation_prompt=answer is None, **given
        )
        return text

    def _of_prompt(
        self, messages: Sequence[Message], text: str, arguments: Mapping[str, object] | None
    ) -> Iterator[Finding]:
        """Yield what a rendered prompt lacks."""
        at = 0
        squeezed = ""
        for message in messages:
            for piece in _pieces(message):
                found = text.find(piece, at)
                # Some templates move the system message behind others.
                if found >= 0 or text.find(piece) >= 0:
                    at = max(at, found + len(piece))
                    continue
                squeezed = squeezed or _squeeze(text)
                found_text = f"{show(piece)}, which the chat template does not render as it is"
                if _squeeze(piece) in squeezed:
                    reason = "a prompt of which the chat template changes white space"
                    yield Finding("white_space", None, reason, found_text)
                else:
                    yield _lost(f"a text of the {message['role']}", found_text)
        tools: Any = {**self.arguments, **(arguments or {})}.get("tools") or ()
        for tool in tools:
            name = tool.get("function", tool).get("name")
            if isinstance(name, str) and name not in text:
                yield _lost("tools", f"the tool {name}, which the chat template does not render")


def _lost(what: str, found: str) -> Finding:
    reason = f"a prompt of which the chat template leaves out {what}"
    return Finding("prompt_text", None, reason, found)


def _between(prompt: str, whole: str, answer: str) -> str | None:
    """Return the text between a rendered prompt and its answer; None if either is not there."""
    before, found, _ = whole[len(prompt) :].partition(answer)
    return before if found and whole.startswith(prompt) else None


def _compare(
    response: Response, slot: int, prompt: str, tail: str, around: tuple[str, str]
) -> tuple[str, Finding | None]:
    """Find a response in its rendered answer.

    Args:
        response: the response.
        slot: its position.
        prompt: the rendered prompt.
        tail: the rendered answer after it.
        around: text that the template writes before and after a plain answer.

    Returns:
        the text before the answer, and what became of the answer if it is not there as it is.
    """
    before, after = around
    if isinstance(response, str) and tail == before + response + after:
        return before, None
    body = prompt + tail.removesuffix(after)
    header = before[: first_difference(before, tail)]
    pieces = list(_pieces(as_message(response)))
    where = [body.rfind(piece) for piece in pieces]
    # A generation prompt may hold the beginning of an answer, which is more than white space.
    inside = [
        at >= len(prompt)
        or (at + len(piece) > len(prompt) and bool(body[at : len(prompt)].strip()))
        for at, piece in zip(where, pieces, strict=True)
    ]
    if all(inside):
        # What a template writes around reasoning and calls, the model writes.
        return header[: max(0, min(where) - len(prompt))], None
    squeezed, start = _squeeze(body), len(_squeeze(prompt))
    shown = f"{show(response)}, rendered as {show(tail)}"
    for piece, found in zip(pieces, inside, strict=True):
        if not found:
            small = _squeeze(piece)
            at = squeezed.rfind(small)
            if at < 0 or at + len(small) <= start:
                reason = "whose text the chat template leaves out or changes"
                return header, Finding("response_text", slot, reason, shown)
    reason = "whose white space the chat template removes or changes"
    return header, Finding("white_space", slot, reason, shown)


def _pieces(message: Message) -> Iterator[str]:
    """Yield the texts of a message that should be in its rendering, none empty."""
    for name in (*REASONING, "content"):
        if message.get(name):
            yield message[name]
    for call in message.get("tool_calls", ()):
        inner = call.get("function", call)
        yield inner["name"]
        yield from _leaves(inner["arguments"])


def _leaves(value: object) -> Iterator[str]:
    """Yield the texts and numbers in the arguments of a call, as JSON writes them."""
    if isinstance(value, Mapping):
        for part in value.values():
            yield from _leaves(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part)
    elif isinstance(value, str) and value.isascii() and json.dumps(value) == f'"{value}"':
        if value:
            yield value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)


def first_difference(one: Sequence[object], other: Sequence[object]) -> int:
    """Return the number of items with which two sequences begin alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _shared_start(texts: Sequence[str]) -> str:
    """Return the beginning that all of some texts share, without spaces at its end.

    Tokenizers join a space with the word that follows, so it belongs to the answer.
    """
    # All others lie between the first and the last in order.
    shared = min(texts)[: first_difference(min(texts), max(texts))] if texts else ""
    return shared.rstrip(" ")


def _squeeze(text: str) -> str:
    """Return a text without white space."""
    return "".join(text.split())


@contextmanager
def refusals(source: str, whose: str) -> Iterator[None]:
    """Make a template's refusal of a conversation an error of its row.

    Args:
        source: "file:row", for messages.
        whose: name of the template, for messages.

    Raises:
        DataError: for a template's error.
    """
    try:
        yield
    # A template reports what it does not accept (a role, an order) as a TemplateError.
    except template_error() as error:
        found = f"{whose} refuses it ({error})"
        expected = "a conversation that the template accepts"
        remedy = "Change the roles or their order, or the template."
        raise bad_field(source, "prompt", found, expected, remedy) from error


def template_error() -> type[Exception]:
    """Return the class of errors of chat templates."""
    from jinja2 import TemplateError

    return TemplateError
