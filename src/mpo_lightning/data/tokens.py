"""Groups to token ids: template, prompt/response boundary, end of turn, length limit.

The rules and their reasons:

- A rendered chat template already has its special tokens; it is tokenised without adding more.
- The prompt's ids must begin the ids of prompt + response, for each response. Where they do not, a
  sampler that was given the prompt could not have produced those ids: an error, never a slice.
- The end of the turn is part of the response and is learned. Text that a template writes after it
  is not.
- A response that was cut, here to the limit or when it was generated, has no end of turn.
- The limit applies to each response by itself, whatever the lengths of the others.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, fields
from hashlib import sha256
from typing import Any, Literal, Self

import torch

from mpo_lightning.batch import Message, Prompt, TokenGroup
from mpo_lightning.data.groups import DataError, PreferenceGroup, as_messages, bad_field
from mpo_lightning.data.report import DataReport
from mpo_lightning.data.score_scales import Keep, select_responses

__all__ = [
    "Boundary",
    "GroupTokenizer",
    "OverLong",
    "PromptFormat",
    "load_tokenizer",
    "tokenizer_digest",
]

OverLong = Literal["drop_group", "drop_response", "cut", "error"]
PromptFormat = Literal["auto", "chat", "text"]
Boundary = Literal["strict", "separate"]

_SENTINEL = "sentinel"


def tokenizer_digest(tokenizer: Any) -> str:
    """Return a digest of what decides the tokens of a text; the tokenizer's folder does not."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = {
        "vocabulary": sorted(tokenizer.get_vocab().items()) if backend is None else None,
        "backend": None if backend is None else backend.to_str(),
        "template": tokenizer.chat_template,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    }
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> Any:
    """Load a Hugging Face tokenizer from a folder or hub id.

    Raises:
        DataError: if there is none, or it has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise DataError(
            f"no tokenizer can be loaded from {path}: {error}", field="tokenizer"
        ) from error
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"{path} has no end-of-sequence token, so a response's end cannot be learned. Set "
            "eos_token in its tokenizer_config.json.",
            field="tokenizer",
        )
    return tokenizer


@dataclass(eq=False, repr=False)
class GroupTokenizer:
    """Tokenizer of checked groups.

    Its settings are described at `PreferenceDataModule`. A prompt that is a text is one user
    message in the chat format. With the boundary "separate" a response is tokenised as a sampler
    would have produced it.

    Args:
        tokenizer: a Hugging Face tokenizer with an end-of-sequence token.
        min_responses: a group with fewer remaining responses is dropped. A contrast needs two.

    Raises:
        DataError: if the format needs a chat template that the tokenizer lacks.
    """

    tokenizer: Any
    _: KW_ONLY
    max_length: int
    over_long: OverLong
    prompt_format: PromptFormat
    boundary: Boundary
    max_responses: int | None = None
    keep_responses: Keep = "first"
    min_responses: int = 2

    def __post_init__(self) -> None:
        tokenizer = self.tokenizer
        has_template = tokenizer.chat_template is not None
        if self.prompt_format == "chat" and not has_template:
            raise DataError(
                "the tokenizer has no chat template. Set its chat_template, or use text in the "
                "place of chat.",
                field="prompt_format",
            )
        self.chat = self.prompt_format in ("auto", "chat") and has_template
        if self.chat:
            self._end, self._after_end = self._learn_end_of_turn()
        else:
            self._end, self._after_end = tokenizer.eos_token_id, None
            bos = tokenizer.bos_token_id
            adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
            self._text_start = [bos] if adds_bos else []

    @classmethod
    def without_limit(
        cls, tokenizer: Any, prompt_format: PromptFormat, boundary: Boundary = "strict"
    ) -> Self:
        """Return a tokenizer that neither cuts nor drops; see the class for the arguments."""
        return cls(
            tokenizer,
            max_length=sys.maxsize,
            over_long="error",
            prompt_format=prompt_format,
            boundary=boundary,
        )

    @property
    def settings(self) -> dict[str, object]:
        """Settings that decide the token ids of a group, beside the tokenizer's content."""
        names = (field.name for field in fields(self) if field.name != "tokenizer")
        return {name: getattr(self, name) for name in names}

    def __call__(self, group: PreferenceGroup, report: DataReport) -> TokenGroup | None:
        """Tokenise a group; the report counts what is dropped or cut. None if the group is dropped.

        Raises:
            DataError: if the group cannot be tokenised.
        """
        count = len(group.responses)
        repeats = count - len(set(group.responses))
        report.note("repeat another response of their group", group.source, repeats)
        indices = list(range(count))
        if self.max_responses is not None:
            indices = select_responses(group.scores, self.max_responses, self.keep_responses)
            beyond = count - len(indices)
            report.note("beyond max_responses left out", group.source, beyond)
        prompt, responses = self._encode(group, indices)
        room = self.max_length - len(prompt)
        if room < 1:
            if self.over_long == "error":
                raise self._too_long(group.source, "prompt", f"{len(prompt)}", "fewer than")
            report.drop("with a prompt beyond max_length", group.source)
            return None
        within: dict[int, list[int]] = {}
        for index, ids in zip(indices, responses, strict=True):
            if len(ids) > room:
                if self.over_long == "error":
                    found = f"{len(prompt)} + {len(ids)}"
                    raise self._too_long(group.source, f"responses[{index}]", found, "at most")
                if self.over_long == "drop_group":
                    report.drop("with a response beyond max_length", group.source)
                    return None
                if self.over_long == "drop_response":
                    report.note("beyond max_length dropped", group.source)
                    continue
                report.note("cut to max_length", group.source)
            within[index] = ids[:room]
        if len(within) < self.min_responses:
            report.drop("with too few responses within max_length", group.source)
            return None
        report.keep(len(within))
        return TokenGroup(
            prompt=torch.tensor(prompt),
            responses=tuple(map(torch.tensor, within.values())),
            scores=tuple(group.scores[index] for index in within),
            source=group.source,
            # Parquet and datasets rows may hold dates and other values that JSON has no form for.
            extra=json.dumps(group.extra, default=str),
            indices=tuple(within),
        )

    def _too_long(self, source: str, field: str, tokens: str, limit: str) -> DataError:
        expected = f"{limit} {self.max_length} (data.max_length)"
        remedy = "Raise the limit, or set data.over_long."
        return bad_field(source, field, f"{tokens} tokens", expected, remedy)

    # ------------------------------------------------------------------------------- sampling

    @property
    def end_of_turn(self) -> int:
        """Token that ends a response."""
        end: int = self._end
        return end

    def prompt_ids(self, prompt: Prompt, source: str) -> list[int]:
        """Return the tokens of a prompt alone, for a sampler; they are the same as in training.

        Raises:
            DataError: if it cannot be tokenised.
        """
        return self._encode(PreferenceGroup(prompt, [], [], source, {}), [])[0]

    # ------------------------------------------------------------------------------- encoding

    def _ids(self, texts: list[str]) -> list[list[int]]:
        encoded = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [list(ids) for ids in encoded]

    def _encode(
        self, group: PreferenceGroup, indices: list[int]
    ) -> tuple[list[int], list[list[int]]]:
        """Return the ids of the prompt and of the responses with these indices."""
        if self.chat:
            prompt_text, whole_texts = self._render(group, indices)
            start: list[int] = []
        else:
            if not isinstance(group.prompt, str):
                remedy = "The tokenizer has no chat template, or data.prompt_format is text."
                raise bad_field(group.source, "prompt", "a conversation", "a text", remedy)
            prompt_text, start = group.prompt, self._text_start
            whole_texts = [prompt_text + group.responses[index] for index in indices]
        if self.boundary == "strict":
            prompt, responses = self._strict(prompt_text, whole_texts, group.source, indices)
        else:
            tails = [whole[len(prompt_text) :] for whole in whole_texts]
            prompt, *responses = self._ids([prompt_text, *tails])
        if start and prompt[:1] != start:
            prompt = start + prompt
        bos = self.tokenizer.bos_token_id
        if bos is not None and prompt[:2] == [bos, bos]:
            found = "two beginning-of-sequence tokens"
            remedy = "The prompt's text and the template both write it: remove it from the text."
            raise bad_field(group.source, "prompt", found, "one", remedy)
        truncated = group.truncated or [False] * len(group.responses)
        closed = [
            self._close(ids, group.source, index, cut=truncated[index])
            for ids, index in zip(responses, indices, strict=True)
        ]
        return prompt, closed

    def _strict(
        self, prompt_text: str, whole_texts: list[str], source: str, indices: list[int]
    ) -> tuple[list[int], list[list[int]]]:
        prompt, *wholes = self._ids([prompt_text, *whole_texts])
        for index, whole in zip(indices, wholes, strict=True):
            if whole[: len(prompt)] != prompt:
                at = _first_difference(prompt, whole)
                tokens = self.tokenizer.convert_ids_to_tokens
                raise bad_field(
                    source,
                    f"responses[{index}]",
                    f"the prompt's tokens change once it follows: {tokens(prompt[at:])} "
                    f"become {tokens(whole[at : len(prompt) + 1])}",
                    "the prompt's tokens to begin the tokens of prompt + response",
                    "Move white space at the boundary from the prompt into the responses, "
                    "or set data.boundary: separate.",
                )
        return prompt, [whole[len(prompt) :] for whole in wholes]

    def _render(self, group: PreferenceGroup, indices: list[int]) -> tuple[str, list[str]]:
        messages = as_messages(group.prompt)
        try:
            prompt = self._template(messages, add_generation_prompt=True)
            wholes = [
                self._template(
                    [*messages, {"role": "assistant", "content": group.responses[index]}]
                )
                for index in indices
            ]
        # A template reports what it does not accept (a role, an order) as a TemplateError.
        except _template_error() as error:
            found = f"the chat template refuses it ({error})"
            expected = "a conversation that the template accepts"
            remedy = "Change the roles or their order, or the template."
            raise bad_field(group.source, "prompt", found, expected, remedy) from error
        for index, whole in zip(indices, wholes, strict=True):
            if not whole.startswith(prompt):
                same = _first_difference(prompt, whole)
                raise bad_field(
                    group.source,
                    f"responses[{index}]",
                    f"{whole[same : same + 40]!r} in the rendered answer where the rendered "
                    f"prompt has {prompt[same : same + 40]!r}",
                    "an answer that begins with its prompt",
                    "The chat template's generation prompt is not part of an answer that it "
                    "renders: use a template for training.",
                )
        return prompt, wholes

    def _template(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        text: str = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return text

    # ---------------------------------------------------------------------------- end of turn

    def _learn_end_of_turn(self) -> tuple[int, int | None]:
        """Find the token that ends an answer in the template, and how many tokens follow it.

        The second is None if the template writes no special token after an answer; the
        end-of-sequence token is then appended.
        """
        messages = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": _SENTINEL},
        ]
        try:
            suffix = self._template(messages).rpartition(_SENTINEL)[2]
        except _template_error() as error:
            raise DataError(
                "its chat template refuses a user's message with an assistant's answer "
                f"({error}). Use a template for chats, or prompt_format: text.",
                field="tokenizer",
            ) from error
        (ids,) = self._ids([suffix])
        special = set(self.tokenizer.all_special_ids)
        special |= {i for i, t in self.tokenizer.added_tokens_decoder.items() if t.special}
        position = next((i for i, token in enumerate(ids) if token in special), None)
        if position is None:
            return self.tokenizer.eos_token_id, None
        return ids[position], len(ids) - position - 1

    def _close(self, ids: list[int], source: str, index: int, *, cut: bool) -> list[int]:
        if self._after_end is None:
            closed = ids if ids[-1:] == [self._end] else [*ids, self._end]
        else:
            closed = ids[: len(ids) - self._after_end]
        field, tokens = f"responses[{index}]", self.tokenizer.convert_ids_to_tokens
        if closed[-1:] != [self._end]:
            found = f"tokens that end with {tokens(closed[-3:])}"
            expected = f"the end-of-turn token {tokens(self._end)}"
            remedy = "The chat template ends this answer in another way than a plain one."
            raise bad_field(source, field, found, expected, remedy)
        if closed[-2:] == [self._end, self._end]:
            remedy = "The response's text and the template both write it: remove it from the text."
            raise bad_field(source, field, "two end-of-turn tokens", "one", remedy)
        return closed[:-1] if cut else closed


def _first_difference(prompt: Sequence[object], whole: Sequence[object]) -> int:
    pairs = enumerate(zip(prompt, whole, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(prompt), len(whole)))


def _template_error() -> type[Exception]:
    from jinja2 import TemplateError

    return TemplateError
