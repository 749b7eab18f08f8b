"""Groups to token ids: template, prompt/response boundary, end of turn, length limit.

The rules, and why they are rules:

- A rendered chat template already holds its special tokens; it is tokenised without adding more.
- The prompt's ids must begin the ids of prompt + response, for each response. Where they do not, a
  sampler that was given the prompt could not have produced those ids: an error, never a slice.
- What ends the turn is inside the response and is learned. What a template writes after it is not.
- A response that was cut, here to the limit or when it was generated, has no end of turn.
- The limit is each response's own: the length of a sibling has no say.
"""

import json
from collections.abc import Sequence
from hashlib import sha256
from typing import Any, Literal, NamedTuple

import torch

from mpo_lightning.batch import Message, TokenGroup
from mpo_lightning.data.groups import DataError, PreferenceGroup
from mpo_lightning.data.report import DataReport
from mpo_lightning.data.score_scales import Keep, select_responses

__all__ = [
    "Boundary",
    "GroupTokenizer",
    "OverLong",
    "PromptFormat",
    "TokenIds",
    "load_tokenizer",
    "token_group",
    "tokenizer_digest",
]

OverLong = Literal["drop_group", "drop_response", "cut", "error"]
PromptFormat = Literal["auto", "chat", "text"]
Boundary = Literal["strict", "separate"]

_SENTINEL = "sentinel"


def tokenizer_digest(tokenizer: Any) -> str:
    """Of all that decides which tokens a text becomes, wherever the tokenizer lies."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = {
        "vocabulary": sorted(tokenizer.get_vocab().items()) if backend is None else None,
        "backend": None if backend is None else backend.to_str(),
        "template": tokenizer.chat_template,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    }
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> Any:
    """A Hugging Face tokenizer from a folder or hub id.

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


class TokenIds(NamedTuple):
    """A group's token ids.

    Attributes:
        prompt: ids of the rendered prompt.
        responses: ids of each response that is kept.
        indices: the place of each of them in its row.
    """

    prompt: list[int]
    responses: list[list[int]]
    indices: list[int]


def token_group(group: PreferenceGroup, ids: TokenIds) -> TokenGroup:
    """A checked group with its token ids, as a batch takes it."""
    return TokenGroup(
        prompt=torch.tensor(ids.prompt),
        responses=tuple(map(torch.tensor, ids.responses)),
        scores=tuple(group.scores[index] for index in ids.indices),
        source=group.source,
        # Parquet and datasets rows may hold dates and the like, which JSON has no form for.
        extra=json.dumps(group.extra, default=str),
        indices=tuple(ids.indices),
    )


class GroupTokenizer:
    """Turns checked groups into token ids.

    Args:
        tokenizer: a Hugging Face tokenizer with an end-of-sequence token.
        max_length: limit on prompt + response, in tokens.
        over_long: what to do with a response beyond the limit: drop its group, drop the response
            (the others are compared among themselves), cut it, or stop with an error. A prompt that
            leaves no room drops its group, or is an error.
        prompt_format: "chat" renders with the tokenizer's chat template (a text prompt is one user
            message); "text" writes prompt and response one after the other; "auto" is chat where
            the tokenizer has a template.
        boundary: "strict" wants the prompt's ids to begin the ids of prompt + response; "separate"
            tokenises the two apart, as a sampler saw them.
        max_responses: responses of a group that are kept at most; all if none.
        keep_responses: which; see `select_responses`.
        min_responses: a group of which fewer remain is dropped. A contrast needs two.

    Raises:
        DataError: if the format needs a chat template that the tokenizer lacks.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int,
        over_long: OverLong,
        prompt_format: PromptFormat,
        boundary: Boundary,
        max_responses: int | None = None,
        keep_responses: Keep = "first",
        min_responses: int = 2,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.over_long = over_long
        self.boundary = boundary
        self.prompt_format: PromptFormat = prompt_format
        self.max_responses = max_responses
        self.keep_responses: Keep = keep_responses
        self.min_responses = min_responses
        has_template = tokenizer.chat_template is not None
        if prompt_format == "chat" and not has_template:
            raise DataError(
                "the tokenizer has no chat template. Set its chat_template, or use text in the "
                "place of chat.",
                field="prompt_format",
            )
        self.chat = prompt_format == "chat" or (prompt_format == "auto" and has_template)
        if self.chat:
            self._end, self._after_end = self._learn_end_of_turn()
        else:
            self._end, self._after_end = tokenizer.eos_token_id, None
            bos = tokenizer.bos_token_id
            adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
            self._text_start = [bos] if adds_bos else []

    @property
    def settings(self) -> dict[str, object]:
        """All that decides what a group becomes, beside the tokenizer's own content."""
        return {
            "max_length": self.max_length,
            "over_long": self.over_long,
            "prompt_format": self.prompt_format,
            "boundary": self.boundary,
            "max_responses": self.max_responses,
            "keep_responses": self.keep_responses,
            "min_responses": self.min_responses,
        }

    def __call__(self, group: PreferenceGroup, report: DataReport) -> TokenIds | None:
        """Tokenise a group; the report counts what is dropped or cut. None if the group is dropped.

        Raises:
            DataError: if the group cannot be tokenised.
        """
        report.note(
            "repeat another response of their group",
            group.source,
            len(group.responses) - len(set(group.responses)),
        )
        places = list(range(len(group.responses)))
        if self.max_responses is not None:
            places = select_responses(group.scores, self.max_responses, self.keep_responses)
            beyond = len(group.responses) - len(places)
            report.note("beyond max_responses left out", group.source, beyond)
        prompt, responses = self._encode(group, places)
        budget = self.max_length - len(prompt)
        if budget < 1:
            self._long_prompt(group, len(prompt), report)
            return None
        kept: list[tuple[int, list[int]]] = []
        for index, ids in zip(places, responses, strict=True):
            if len(ids) > budget:
                if self.over_long == "error":
                    raise DataError.of_field(
                        group.source,
                        f"responses[{index}]",
                        found=f"{len(prompt)} + {len(ids)} tokens",
                        expected=f"at most {self.max_length} (data.max_length)",
                        remedy="Raise the limit, or set data.over_long.",
                    )
                if self.over_long == "drop_group":
                    report.drop("with a response beyond max_length", group.source)
                    return None
                if self.over_long == "drop_response":
                    report.note("beyond max_length dropped", group.source)
                    continue
                report.note("cut to max_length", group.source)
            kept.append((index, ids[:budget]))
        if len(kept) < self.min_responses:
            report.drop("with too few responses within max_length", group.source)
            return None
        report.kept += 1
        report.responses += len(kept)
        return TokenIds(prompt, [ids for _, ids in kept], [index for index, _ in kept])

    def _long_prompt(self, group: PreferenceGroup, length: int, report: DataReport) -> None:
        if self.over_long == "error":
            raise DataError.of_field(
                group.source,
                "prompt",
                found=f"{length} tokens",
                expected=f"fewer than {self.max_length} (data.max_length)",
                remedy="Raise the limit, or set data.over_long.",
            )
        report.drop("with a prompt beyond max_length", group.source)

    # ------------------------------------------------------------------------------- sampling

    @property
    def end_of_turn(self) -> int:
        """The token that ends a response."""
        end: int = self._end
        return end

    def prompt_ids(self, prompt: str | list[Message], source: str) -> list[int]:
        """Tokens of a prompt alone, as a sampler is given it; in training they are the same.

        Raises:
            DataError: if it cannot be tokenised.
        """
        return self._encode(PreferenceGroup(prompt, [], [], source, {}), [])[0]

    # ------------------------------------------------------------------------------- encoding

    def _ids(self, texts: list[str]) -> list[list[int]]:
        encoded = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [list(ids) for ids in encoded]

    def _encode(
        self, group: PreferenceGroup, places: list[int]
    ) -> tuple[list[int], list[list[int]]]:
        if self.chat:
            prompt_text, whole_texts = self._render(group, places)
            start: list[int] = []
        else:
            if not isinstance(group.prompt, str):
                raise DataError.of_field(
                    group.source,
                    "prompt",
                    found="a conversation",
                    expected="a text",
                    remedy="The tokenizer has no chat template, or data.prompt_format is text.",
                )
            prompt_text, start = group.prompt, self._text_start
            whole_texts = [prompt_text + group.responses[place] for place in places]
        if self.boundary == "strict":
            prompt, responses = self._strict(prompt_text, whole_texts, group.source, places)
        else:
            tails = [whole[len(prompt_text) :] for whole in whole_texts]
            prompt, *responses = self._ids([prompt_text, *tails])
        if start and prompt[:1] != start:
            prompt = start + prompt
        bos = self.tokenizer.bos_token_id
        if bos is not None and prompt[:2] == [bos, bos]:
            raise DataError.of_field(
                group.source,
                "prompt",
                found="two beginning-of-sequence tokens",
                expected="one",
                remedy="The prompt's text and the template both write it: remove it from the text.",
            )
        truncated = group.truncated or [False] * len(group.responses)
        closed = [
            self._close(ids, group.source, place, cut=truncated[place])
            for ids, place in zip(responses, places, strict=True)
        ]
        return prompt, closed

    def _strict(
        self, prompt_text: str, whole_texts: list[str], source: str, places: list[int]
    ) -> tuple[list[int], list[list[int]]]:
        prompt, *wholes = self._ids([prompt_text, *whole_texts])
        for index, whole in zip(places, wholes, strict=True):
            if whole[: len(prompt)] != prompt:
                at = _first_difference(prompt, whole)
                tokens = self.tokenizer.convert_ids_to_tokens
                raise DataError.of_field(
                    source,
                    f"responses[{index}]",
                    found=f"the prompt's tokens change once it follows: {tokens(prompt[at:])} "
                    f"become {tokens(whole[at : len(prompt) + 1])}",
                    expected="the prompt's tokens to begin the tokens of prompt + response",
                    remedy="Move white space at the boundary from the prompt into the responses, "
                    "or set data.boundary: separate.",
                )
        return prompt, [whole[len(prompt) :] for whole in wholes]

    def _render(self, group: PreferenceGroup, places: list[int]) -> tuple[str, list[str]]:
        messages = group.prompt
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        try:
            prompt = self._template(messages, add_generation_prompt=True)
            wholes = [
                self._template(
                    [*messages, {"role": "assistant", "content": group.responses[place]}]
                )
                for place in places
            ]
        # A template reports what it does not accept (a role, an order) as a TemplateError.
        except _template_error() as error:
            raise DataError.of_field(
                group.source,
                "prompt",
                found=f"the chat template refuses it ({error})",
                expected="a conversation that the template accepts",
                remedy="Change the roles or their order, or the template.",
            ) from error
        for place, whole in zip(places, wholes, strict=True):
            if not whole.startswith(prompt):
                same = _first_difference(prompt, whole)
                raise DataError.of_field(
                    group.source,
                    f"responses[{place}]",
                    found=f"{whole[same : same + 40]!r} in the rendered answer where the rendered "
                    f"prompt has {prompt[same : same + 40]!r}",
                    expected="an answer that begins with its prompt",
                    remedy="The chat template's generation prompt is not part of an answer that it "
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
        """The token that the template ends an answer with, and how many tokens it writes after it.

        None for the second means that the template writes no special token after an answer; the
        end-of-sequence token is appended then.
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
        if closed[-1:] != [self._end]:
            raise DataError.of_field(
                source,
                f"responses[{index}]",
                found=f"tokens that end with {self.tokenizer.convert_ids_to_tokens(closed[-3:])}",
                expected=f"the end-of-turn token {self.tokenizer.convert_ids_to_tokens(self._end)}",
                remedy="The chat template ends this answer in another way than a plain one.",
            )
        if closed[-2:] == [self._end, self._end]:
            raise DataError.of_field(
                source,
                f"responses[{index}]",
                found="two end-of-turn tokens",
                expected="one",
                remedy="The response's text and the template both write it: remove it from the "
                "text.",
            )
        return closed[:-1] if cut else closed


def _first_difference(prompt: Sequence[object], whole: Sequence[object]) -> int:
    pairs = enumerate(zip(prompt, whole, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(prompt), len(whole)))


def _template_error() -> type[Exception]:
    from jinja2 import TemplateError

    return TemplateError
