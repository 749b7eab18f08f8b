"""Groups to token ids: template, prompt/response boundary, end of turn, length limit.

The rules and their reasons:

- A rendered chat template already has its special tokens; it is tokenised without adding more.
- What a template writes before every answer of a group belongs to the prompt.
- The prompt's ids begin the ids of prompt + response, for each response. Where they would not, the
  response is tokenised by itself: a sampler that was given the prompt could write no other tokens.
- The end of the turn is part of the response and is learned. Text that a template writes after it
  is not.
- A response that was cut, here to the limit or when it was generated, has no end of turn.
- The limit applies to each response by itself, whatever the lengths of the others.
- Every difference between data and tokens is counted; `RenderingRules` say what else happens.
"""

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Self

import torch

from mpo_lightning.batch import Prompt, Request, TokenGroup
from mpo_lightning.checks import check_settings
from mpo_lightning.data.conversation import as_messages, response_text
from mpo_lightning.data.groups import DataError, PreferenceGroup, bad_field, show
from mpo_lightning.data.rendering import (
    ChatRenderer,
    Finding,
    Rendered,
    RenderingRules,
    first_difference,
    special_tokens,
)
from mpo_lightning.data.report import DataReport
from mpo_lightning.data.score_scales import Keep, select_responses
from mpo_lightning.digests import check_folder
from mpo_lightning.files import in_transformers

__all__ = [
    "SETTING",
    "Boundary",
    "GroupTokenizer",
    "OverLong",
    "PromptFormat",
    "load_tokenizer",
    "tokenizer_digest",
]

OverLong = Literal["drop_group", "drop_response", "cut", "error"]
PromptFormat = Literal["auto", "chat", "text"]
Boundary = Literal["auto", "strict", "separate"]

# Token ids of responses by their positions in the row.
Ids = dict[int, list[int]]

JOINED = "whose beginning would join the prompt's end, tokenised by themselves"
# Name of a rule of `RenderingRules` in messages begins with it.
SETTING = "data.rendering."
# What each rule expects, as errors say it.
EXPECTED = {
    "prompt_text": "a template that renders it",
    "response_text": "an answer that holds the response's text",
    "white_space": "the text's own white space",
    "special_tokens": "a text without it",
    "equal_tokens": "different tokens, or one score",
}


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
    """Load a Hugging Face tokenizer from a folder, a GGUF file or a hub id.

    Raises:
        DamagedError: if one of its files is not what was written.
        DataError: if there is none, or it has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    check_folder(Path(path).expanduser(), large=False)
    try:
        path, in_file = in_transformers(os.path.expanduser(path))
        tokenizer = AutoTokenizer.from_pretrained(
            path, trust_remote_code=trust_remote_code, **in_file
        )
    except (OSError, ValueError, ImportError) as error:
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
    message in the chat format.

    Args:
        tokenizer: a Hugging Face tokenizer with an end-of-sequence token.
        min_responses: a group with fewer remaining responses is dropped. A contrast needs two.

    Attributes:
        date: the date that the chat template writes; None if it writes none.

    Raises:
        DataError: if the format needs a chat template that the tokenizer lacks, or the template
            cannot be used.
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
    rendering: RenderingRules = RenderingRules()  # noqa: RUF009 (frozen)
    template_arguments: Mapping[str, object] = field(default_factory=dict)
    date: str | None = None

    def __post_init__(self) -> None:
        check_settings(self)
        tokenizer = self.tokenizer
        has_template = tokenizer.chat_template is not None
        if self.prompt_format == "chat" and not has_template:
            raise DataError(
                "the tokenizer has no chat template. Set its chat_template, or use text in the "
                "place of chat.",
                field="prompt_format",
            )
        special = special_tokens(tokenizer)
        written = sorted(filter(None, special), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, written)) or "(?!)")
        self._renderer: ChatRenderer | None = None
        self._text_start: list[int] = []
        if self.prompt_format in ("auto", "chat") and has_template:
            self._renderer = ChatRenderer(tokenizer, self.template_arguments, self.date)
            self.date = self._renderer.date
            self._end, self._after_end = self._learn_end_of_turn(self._renderer.suffix, special)
        else:
            self.date = None
            self._end, self._after_end = tokenizer.eos_token_id, None
            bos = tokenizer.bos_token_id
            if bos is not None and tokenizer("a")["input_ids"][:1] == [bos]:
                self._text_start = [bos]

    @classmethod
    def without_limit(
        cls, tokenizer: Any, prompt_format: PromptFormat, boundary: Boundary = "auto", **more: Any
    ) -> Self:
        """Return a tokenizer that neither cuts nor drops; see the class for the arguments."""
        return cls(
            tokenizer,
            max_length=sys.maxsize,
            over_long="error",
            prompt_format=prompt_format,
            boundary=boundary,
            **more,
        )

    @property
    def settings(self) -> dict[str, object]:
        """Settings that decide the token ids of a group, beside the tokenizer's content."""
        names = (field.name for field in fields(self) if field.name != "tokenizer")
        return {name: getattr(self, name) for name in names} | {"rendering": vars(self.rendering)}

    def __call__(self, group: PreferenceGroup, report: DataReport) -> TokenGroup | None:
        """Tokenise a group; the report counts what is dropped or cut. None if the group is dropped.

        Raises:
            DataError: if the group cannot be tokenised.
        """
        count = len(group.responses)
        repeats = count - len({response_text(each) for each in group.responses})
        report.note("repeat another response of their group", group.source, repeats)
        indices = list(range(count))
        if self.max_responses is not None:
            indices = select_responses(group.scores, self.max_responses, self.keep_responses)
            beyond = count - len(indices)
            report.note("beyond max_responses left out", group.source, beyond)
        prompt, responses, findings = self._encode(group, indices)
        kept = self._by_rules(
            findings, group.source, dict(zip(indices, responses, strict=True)), report
        )
        kept = None if kept is None else self._within_limit(prompt, kept, group.source, report)
        if kept is not None:
            same = list(_contradictions(kept, group.scores))
            kept = self._by_rules(same, group.source, kept, report)
        if kept is None:
            return None
        if len(kept) < self.min_responses:
            report.drop("with too few responses left", group.source)
            return None
        report.keep(len(kept))
        return TokenGroup(
            prompt=torch.tensor(prompt),
            responses=tuple(map(torch.tensor, kept.values())),
            scores=tuple(group.scores[index] for index in kept),
            source=group.source,
            # Parquet and datasets rows may hold dates and other values that JSON has no form for.
            extra=json.dumps(group.extra, default=str),
            indices=tuple(kept),
        )

    def _within_limit(
        self, prompt: list[int], responses: Ids, source: str, report: DataReport
    ) -> Ids | None:
        """Return the responses that the limit leaves, cut or whole; None if it drops the group.

        Raises:
            DataError: if a length beyond the limit is an error.
        """
        room = self.max_length - len(prompt)
        if room < 1:
            if self.over_long == "error":
                raise self._too_long(source, "prompt", f"{len(prompt)}", "fewer than")
            report.drop("with a prompt beyond max_length", source)
            return None
        within: Ids = {}
        for index, ids in responses.items():
            if len(ids) > room:
                if self.over_long == "error":
                    found = f"{len(prompt)} + {len(ids)}"
                    raise self._too_long(source, f"responses[{index}]", found, "at most")
                if self.over_long == "drop_group":
                    report.drop("with a response beyond max_length", source)
                    return None
                if self.over_long == "drop_response":
                    report.note("beyond max_length dropped", source)
                    continue
                report.note("cut to max_length", source)
            within[index] = ids[:room]
        return within

    def _by_rules(
        self, findings: Sequence[Finding], source: str, responses: Ids, report: DataReport
    ) -> Ids | None:
        """Return the responses that the rules leave; None if they drop the group.

        Raises:
            DataError: if a finding is an error.
        """
        out: set[int] = set()
        # Several messages of a prompt may have the same fault.
        for finding in dict.fromkeys(findings):
            if self._leaves_out(finding, source, report, len(responses)):
                if finding.slot is None:
                    return None
                out.add(finding.slot)
        return {index: ids for index, ids in responses.items() if index not in out}

    def _leaves_out(
        self, finding: Finding, source: str, report: DataReport, responses: int
    ) -> bool:
        """Whether a rule leaves out the response, or the group; counts it.

        Raises:
            DataError: if it is an error.
        """
        action = "keep" if finding.kind is None else getattr(self.rendering, finding.kind)
        of_prompt = finding.slot is None
        if finding.kind is not None and action == "error":
            where = "prompt" if of_prompt else f"responses[{finding.slot}]"
            remedy = (
                "Use another chat template, or repair the row; or set "
                f"{SETTING}{finding.kind} to drop or keep."
            )
            raise bad_field(source, where, finding.found, EXPECTED[finding.kind], remedy)
        rule = "" if finding.kind is None else f" ({SETTING}{finding.kind})"
        if action == "drop" and of_prompt:
            report.drop(f"with {finding.reason}{rule}", source)
        elif action == "drop":
            report.note(f"{finding.reason}, left out{rule}", source)
        elif of_prompt:
            report.note(f"to {finding.reason}{rule}", source, responses)
        else:
            report.note(f"{finding.reason}{rule}", source)
        return bool(action == "drop")

    def _too_long(self, source: str, field: str, tokens: str, limit: str) -> DataError:
        expected = f"{limit} {self.max_length} (data.max_length, or the model's positions)"
        remedy = "Raise data.max_length if the model has more positions, or set data.over_long."
        return bad_field(source, field, f"{tokens} tokens", expected, remedy)

    # ------------------------------------------------------------------------------- sampling

    @property
    def end_of_turn(self) -> int:
        """Token that ends a response."""
        end: int = self._end
        return end

    def prompt_ids(
        self, prompt: Prompt, source: str, template_arguments: Mapping[str, object] | None = None
    ) -> list[int]:
        """Return the tokens of a prompt alone, for a sampler; they are the same as in training.

        Raises:
            DataError: if it cannot be tokenised.
        """
        if self._renderer is None:
            text = self._plain_prompt(prompt, source, template_arguments)
        else:
            text = self._renderer.prompt(prompt, source, template_arguments)
        return self._started(self._ids([text])[0], source)

    def prompt_notes(self, request: Request) -> tuple[str, ...]:
        """Return what differs between a prompt and its tokens, each once."""
        if self._renderer is None:
            return ()
        lost = self._renderer.lost_in_prompt(request.prompt, request.template_arguments)
        found = [*lost, *self._written_specials(request.prompt, ())]
        return tuple(dict.fromkeys(finding.reason for finding in found))

    # ------------------------------------------------------------------------------- encoding

    def _ids(self, texts: list[str]) -> list[list[int]]:
        encoded = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [list(ids) for ids in encoded]

    def _encode(
        self, group: PreferenceGroup, indices: list[int]
    ) -> tuple[list[int], list[list[int]], list[Finding]]:
        """Return the ids of the prompt and of the responses with these indices.

        Also what differs from the data, with the responses' indices as slots.
        """
        chosen, source = [group.responses[index] for index in indices], group.source
        arguments = group.template_arguments
        if self._renderer is not None:
            rendered = self._renderer(group.prompt, chosen, source, arguments)
        else:
            text = self._plain_prompt(group.prompt, source, arguments)
            rendered = Rendered(text, [_plain_text(e, i, source) for i, e in enumerate(chosen)])
        findings = [*rendered.findings]
        if self._renderer is not None:
            # A text format has no other way to write them.
            findings += self._written_specials(group.prompt, chosen)
        if rendered.before_answers:
            written = show(rendered.before_answers)
            reason = f"after {written} of the chat template, part of the prompt"
            findings += [Finding(None, slot, reason, "") for slot in range(len(chosen))]
        if self.boundary == "separate":
            prompt, *responses = self._ids([rendered.prompt, *rendered.answers])
        else:
            prompt, *wholes = self._ids(
                [rendered.prompt, *(rendered.prompt + each for each in rendered.answers)]
            )
            responses = [ids[len(prompt) :] for ids in wholes]
            for slot, ids in enumerate(wholes):
                if ids[: len(prompt)] != prompt:
                    (responses[slot],) = self._ids([rendered.answers[slot]])
                    self._check_apart(prompt, ids, responses[slot], source, indices[slot])
                    findings.append(Finding(None, slot, JOINED, ""))
        truncated = group.truncated or [False] * len(group.responses)
        closed = [
            self._close(ids, source, index, cut=truncated[index])
            for ids, index in zip(responses, indices, strict=True)
        ]
        placed = [f if f.slot is None else replace(f, slot=indices[f.slot]) for f in findings]
        return self._started(prompt, source), closed, placed

    def _started(self, prompt: list[int], source: str) -> list[int]:
        """Return a prompt's ids with the beginning of the sequence, once."""
        if self._text_start and prompt[:1] != self._text_start:
            prompt = self._text_start + prompt
        bos = self.tokenizer.bos_token_id
        if bos is not None and prompt[:2] == [bos, bos]:
            found = "two beginning-of-sequence tokens"
            remedy = "The prompt's text and the template both write it: remove it from the text."
            raise bad_field(source, "prompt", found, "one", remedy)
        return prompt

    def _plain_prompt(
        self, prompt: Prompt, source: str, arguments: Mapping[str, object] | None
    ) -> str:
        remedy = "The tokenizer has no chat template, or data.prompt_format is text."
        if not isinstance(prompt, str):
            raise bad_field(source, "prompt", "a conversation", "a text", remedy)
        if arguments:
            found = f"arguments of a chat template, {', '.join(arguments)}"
            raise bad_field(source, "prompt", found, "a text alone", remedy)
        return prompt

    def _written_specials(self, prompt: Prompt, responses: Sequence[Any]) -> Iterator[Finding]:
        """Yield the special tokens that are written in a prompt or in responses."""
        texts: list[tuple[int | None, str]] = [
            (None, response_text(message)) for message in as_messages(prompt)
        ]
        texts += [(slot, response_text(each)) for slot, each in enumerate(responses)]
        for slot, text in texts:
            written = self._special.search(text)
            if written is not None:
                where = "a prompt" if slot is None else "responses"
                reason = f"in whose text the special token {written[0]} is written"
                reason = f"a prompt {reason}" if slot is None else reason
                found = f"the special token {written[0]}, written in the text of {where}"
                yield Finding("special_tokens", slot, reason, found)

    def _check_apart(
        self, prompt: list[int], whole: list[int], response: list[int], source: str, index: int
    ) -> None:
        """Check that a response that is tokenised by itself continues the prompt's text.

        Raises:
            DataError: if it does not, or each response's tokens must follow the prompt's.
        """
        decode = partial(self.tokenizer.decode, clean_up_tokenization_spaces=False)
        if self.boundary == "auto" and decode(prompt + response) == decode(whole):
            return
        at = first_difference(prompt, whole)
        tokens = self.tokenizer.convert_ids_to_tokens
        raise bad_field(
            source,
            f"responses[{index}]",
            f"the prompt's tokens change once it follows: {tokens(prompt[at:])} "
            f"become {tokens(whole[at : len(prompt) + 1])}",
            "the prompt's tokens to begin the tokens of prompt + response",
            "Move white space at the boundary from the prompt into the responses, "
            f"or set data.boundary: {'auto' if self.boundary == 'strict' else 'separate'}.",
        )

    # ---------------------------------------------------------------------------- end of turn

    def _learn_end_of_turn(self, suffix: str, special: Mapping[str, int]) -> tuple[int, int | None]:
        """Find the token that ends an answer in the template, and how many tokens follow it.

        The second is None if the template writes no special token after an answer; the
        end-of-sequence token is then appended.
        """
        (ids,) = self._ids([suffix])
        known = set(special.values())
        position = next((i for i, token in enumerate(ids) if token in known), None)
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


def _plain_text(response: Any, index: int, source: str) -> str:
    if isinstance(response, str):
        return response
    remedy = "The tokenizer has no chat template, or data.prompt_format is text."
    raise bad_field(source, f"responses[{index}]", show(response), "a text", remedy)


def _contradictions(
    responses: Mapping[int, list[int]], scores: Sequence[float]
) -> Iterator[Finding]:
    """Yield the responses that have the tokens of another one and another score."""
    same: dict[tuple[int, ...], list[int]] = {}
    for index, ids in responses.items():
        same.setdefault(tuple(ids), []).append(index)
    for indices in same.values():
        if len({scores[index] for index in indices}) > 1:
            listed = ", ".join(f"responses[{index}] {scores[index]:g}" for index in indices)
            for index in indices:
                found = f"the same tokens with different scores ({listed})"
                reason = "with the tokens of another of their group and another score"
                yield Finding("equal_tokens", index, reason, found)
