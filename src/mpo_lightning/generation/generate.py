"""Sampling of responses from a model in this process.

A prompt is computed once for all its responses, which share its keys and values. Each response has
its own random numbers, which depend on the seed, the prompt and the response's position among the
prompt's responses, and not on the rest of the batch.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from itertools import groupby
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mpo_lightning.batch import Message, PromptItem, Request, Response
from mpo_lightning.checks import check_settings
from mpo_lightning.data.conversation import REASONING
from mpo_lightning.data.limits import may_exceed, prompts_within
from mpo_lightning.data.rendering import special_tokens
from mpo_lightning.data.tokens import GroupTokenizer
from mpo_lightning.errors import RolloutError
from mpo_lightning.model.limits import limits_of

__all__ = ["Answers", "Done", "Generation", "ModelSampler", "PromptAnswer", "Sample", "Sampling"]

# What a parsed response may consist of.
MESSAGE = ("content", *REASONING, "tool_calls")

# Tokens after which the responses that have ended leave the batch.
ROUND = 16

# Tokens of a vocabulary whose probabilities are summed together before one is drawn.
BLOCK = 256

# Reason for which a prompt has no answer.
NO_ROOM = "with a prompt that leaves no room to answer"

# Called with the number of prompts or rows that are newly finished.
Done = Callable[[int], None]


def ignore(count: int) -> None:
    """Ignore how many are finished."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Settings with which predict answers prompts, with one response each.

    Args:
        max_new_tokens: limit on a response, its end of turn included; one that reaches it is marked
            ``truncated``.
        temperature: divisor of the logits; 0 takes the most likely token.
        top_p: sample from the smallest set of tokens with this probability mass; 1 for all (arXiv
            1904.09751).
        top_k: sample from this many most likely tokens; 0 for all.
        seed: seed of the random numbers.
        special_tokens: what to do with a response that has special tokens in its midst, such as
            those of channels or of another turn, around which its text would be glued together:
            "drop" leaves it out, "keep" keeps the text without them, or "error". Where the
            tokenizer says how to parse its responses (``response_template``), they become messages
            with reasoning and content instead.
    """

    max_new_tokens: int = 1024
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    special_tokens: Literal["drop", "keep", "error"] = "drop"

    def __post_init__(self) -> None:
        check_settings(self)
        if not 0 <= self.temperature < float("inf"):
            raise RolloutError(f"temperature must be at least 0, got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise RolloutError(f"top_p must be in (0, 1], got {self.top_p}.")
        if self.top_k < 0:
            raise RolloutError(f"top_k must be at least 0, got {self.top_k}.")
        if self.max_new_tokens < 1:
            raise RolloutError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}.")

    def sampling(self) -> "Sampling":
        """Return the settings for a sampler."""
        return Sampling(n=1, **asdict(self))


@dataclass(frozen=True, kw_only=True)
class Sampling(Generation):
    """Settings of sampling: those of `Generation`, with defaults for several responses.

    Args:
        n: responses to each prompt.
    """

    n: int = 8
    temperature: float = 1.0
    max_new_tokens: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n < 1:
            raise RolloutError(f"n must be at least 1, got {self.n}.")
        if self.temperature == 0 and self.n > 1:
            raise RolloutError(
                f"temperature is 0, so all {self.n} responses would be the same. Set n to 1, or "
                "raise the temperature."
            )


@dataclass(frozen=True)
class Sample:
    """One response.

    Attributes:
        text: the assistant's words, without template and end of turn; of a message its content.
        finish: "stop" if it ended its turn, "length" if it was cut at the limit, or another reason
            that a server gave.
        special_tokens: number of special tokens inside the response, which the text leaves out.
        ids: its tokens, end of turn included; empty from a server.
        message: the assistant's message, where it has more than content.
        half_characters: number of halves of characters that a server sent, U+FFFD in their place.
    """

    text: str
    finish: str
    special_tokens: int = 0
    ids: tuple[int, ...] = ()
    message: Message | None = None
    half_characters: int = 0

    @property
    def response(self) -> Response:
        """The response as a row holds it."""
        return self.text if self.message is None else self.message

    @property
    def empty(self) -> bool:
        """Whether it says nothing after its reasoning, and calls no tool."""
        return not self.text.strip() and not (self.message or {}).get("tool_calls")

    def is_dropped(self, rule: str, source: str) -> bool:
        """Return whether a rule, ``special_tokens`` of `Generation`, leaves the response out.

        Raises:
            RolloutError: if it makes it an error.
        """
        if rule == "error" and self.special_tokens:
            raise RolloutError(
                f"{source}: found a response with special tokens in its midst, {self.text[:60]!r} "
                "without them. Leave such responses out (special_tokens: drop), or keep the text."
            )
        return rule == "drop" and self.special_tokens > 0


@dataclass(frozen=True)
class Answers:
    """Result of one request.

    Attributes:
        samples: the responses.
        refused: the reason why there are none.
        limit: limit on their tokens, lower than the setting where the model's context leaves less;
            None from a server.
        notes: differences between the prompt and its tokens; none from a server.
    """

    samples: tuple[Sample, ...] = ()
    refused: str | None = None
    limit: int | None = None
    notes: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------ sampling


class ModelSampler:
    """Sampler with a model in memory.

    Args:
        model: a causal language model of transformers, with its adapters.
        tokenizer: tokenizer with the rules of training.
        sampling: settings of sampling.
        responses_per_batch: responses that are generated together.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: GroupTokenizer,
        sampling: Sampling,
        *,
        responses_per_batch: int = 64,
    ) -> None:
        if responses_per_batch < 1:
            raise RolloutError(f"responses_per_batch must be >= 1, got {responses_per_batch}.")
        self.model = model
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.responses_per_batch = responses_per_batch
        stops = model.generation_config.eos_token_id
        stops = stops if isinstance(stops, list) else [stops]
        stops += [tokenizer.end_of_turn, tokenizer.tokenizer.eos_token_id]
        self.stops = sorted({stop for stop in stops if stop is not None})
        # Tokens that decoding leaves out.
        self.special = set(special_tokens(tokenizer.tokenizer).values())
        self.limits = limits_of(model.config)
        # None if the model has no limit.
        self.context = self.limits.positions

    def __call__(self, requests: Sequence[Request], done: Done = ignore) -> list[Answers]:
        """Answer the requests.

        Args:
            requests: prompts with their keys.
            done: called with the number of newly answered requests.

        Raises:
            DataError: for all prompts together that cannot be tokenised, or hold a token beyond the
                model's embedding.
            RolloutError: if the model's logits are not numbers.
        """
        prompts = prompts_within(requests, self.tokenizer, self.limits.tokens)
        answers = self.answer(prompts, [request.key for request in requests], done)
        return [
            replace(answer, notes=self.tokenizer.prompt_notes(request))
            for answer, request in zip(answers, requests, strict=True)
        ]

    def check(self, requests: Iterable[Request]) -> None:
        """Check that the model has all tokens of some prompts.

        Raises:
            DataError: for all prompts together that hold a token beyond the model's embedding.
        """
        if may_exceed(self.tokenizer.tokenizer, self.limits.tokens):
            prompts_within(requests, self.tokenizer, self.limits.tokens)

    def answer(
        self, prompts: Sequence[list[int]], keys: Sequence[bytes], done: Done = ignore
    ) -> list[Answers]:
        """Answer tokenised prompts.

        Args:
            prompts: token ids of each prompt.
            keys: 16 bytes for each prompt, which with the seed decide its random numbers.
            done: called with the number of newly answered prompts.

        Raises:
            RolloutError: if the model's logits are not numbers.
        """
        answers: list[Answers] = [Answers(refused=NO_ROOM)] * len(prompts)
        limits = [self._limit(len(prompt)) for prompt in prompts]
        fitting = [index for index, limit in enumerate(limits) if limit > 0]
        done(len(prompts) - len(fitting))
        # Similar lengths share a batch, so that there is little padding. So do equal limits only: a
        # response must not depend on the prompts beside its own.
        fitting.sort(key=lambda index: len(prompts[index]))
        size = max(1, self.responses_per_batch // self.sampling.n)
        for limit, of_limit in groupby(fitting, limits.__getitem__):
            alike = list(of_limit)
            for batch in (alike[at : at + size] for at in range(0, len(alike), size)):
                found = self._batch([prompts[i] for i in batch], [keys[i] for i in batch], limit)
                for index, samples in zip(batch, found, strict=True):
                    answers[index] = Answers(tuple(samples), limit=limit)
                done(len(batch))
        return answers

    def _limit(self, prompt: int) -> int:
        """Return the limit on new tokens after a prompt of some tokens: what the context leaves."""
        limit = self.sampling.max_new_tokens
        return limit if self.context is None else min(limit, self.context - prompt)

    @torch.inference_mode()
    def _batch(self, prompts: list[list[int]], keys: list[bytes], limit: int) -> list[list[Sample]]:
        """Sample the responses to a batch of prompts, of at most ``limit`` tokens."""
        device, width = self.model.device, max(map(len, prompts))
        pad = self.stops[0]
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
        known = torch.tensor(
            [[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device
        )
        results: list[list[Sample]] = [[] for _ in prompts]
        with _generates_plainly(self.model):
            cache = self._computed_prompts(ids, known)
            most = max(1, self.responses_per_batch // len(prompts))
            for first in range(0, self.sampling.n, most):
                slots = range(first, min(first + most, self.sampling.n))
                last = slots.stop == self.sampling.n
                rows = self._responses(
                    ids, known, keys, slots, cache, limit=limit, keep_cache=not last
                )
                for number, row in enumerate(rows):
                    place = number // len(slots)
                    results[place].append(self._sample(row, prompts[place]))
        return results

    def _computed_prompts(self, ids: Tensor, known: Tensor) -> Any:
        """Compute keys and values of all but the prompts' last tokens.

        None if there are none, or they cannot be repeated for several responses.
        """
        from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

        if ids.shape[1] < 2:
            return None
        # The token generated here is not in the cache.
        cache = self.model.generate(
            input_ids=ids[:, :-1],
            attention_mask=known[:, :-1],
            generation_config=self._settings(1, return_dict_in_generate=True),
        ).past_key_values
        repeatable = {DynamicLayer, DynamicSlidingWindowLayer}
        if type(cache) is DynamicCache and {type(layer) for layer in cache.layers} <= repeatable:
            return cache
        # For example states of recurrent layers: each response computes its prompt itself.
        return None

    def _responses(
        self,
        ids: Tensor,
        known: Tensor,
        keys: list[bytes],
        slots: range,
        cache: Any,
        *,
        limit: int,
        keep_cache: bool,
    ) -> list[list[int]]:
        """Generate some of each prompt's responses, as tokens, prompt after prompt."""
        from transformers import LogitsProcessorList

        width, count = ids.shape[1], len(slots)
        draw = _Draw(self.sampling, keys, slots, ids)
        # Without a cache, for example of recurrent layers, no response can leave.
        most = limit
        if cache is not None:
            most = ROUND
            cache = copy.deepcopy(cache) if keep_cache else cache
            cache.batch_repeat_interleave(count)
            _give_room(cache)
        ids, known = ids.repeat_interleave(count, 0), known.repeat_interleave(count, 0)
        stops = torch.tensor(self.stops, device=ids.device)
        rows: list[list[int]] = [[]] * len(ids)
        going = torch.arange(len(ids), device=ids.device)
        while True:
            more: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
            found = self.model.generate(
                input_ids=ids,
                attention_mask=known,
                generation_config=self._settings(
                    min(most, width + limit - ids.shape[1]), return_dict_in_generate=True
                ),
                logits_processor=LogitsProcessorList([*draw.warpers, draw]),
                **more,
            )
            ids = found.sequences
            stays = ~torch.isin(ids[:, width:], stops).any(1) & (ids.shape[1] < width + limit)
            for row, tokens in zip(
                going[~stays].tolist(), ids[~stays, width:].tolist(), strict=True
            ):
                rows[row] = tokens
            if not stays.any():
                break
            known = torch.nn.functional.pad(known, (0, ids.shape[1] - known.shape[1]), value=1)
            going, ids, known = going[stays], ids[stays], known[stays]
            cache.batch_select_indices(stays.nonzero()[:, 0])
            draw.keep(stays)
        draw.check()
        return rows

    def _settings(self, max_new_tokens: int, **more: Any) -> Any:
        from transformers import GenerationConfig

        return GenerationConfig(
            # _Draw, a logits processor, draws the token.
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=self.stops,
            pad_token_id=self.stops[0],
            use_cache=True,
            **more,
        )

    def _sample(self, row: list[int], prompt: list[int]) -> Sample:
        end = next((place for place, token in enumerate(row) if token in self.stops), None)
        words = row if end is None else row[:end]
        ids = row if end is None else row[: end + 1]
        text: str = self.tokenizer.tokenizer.decode(words, skip_special_tokens=True)
        special = sum(token in self.special for token in words)
        message = self._message(words, prompt) if special else None
        if message is not None:
            text, special = message["content"], 0
            message = message if message.keys() - {"role", "content"} else None
        return Sample(
            # The limit may cut inside a character of several tokens.
            text=text.rstrip("\N{REPLACEMENT CHARACTER}") if end is None else text,
            finish="length" if end is None else "stop",
            special_tokens=special,
            ids=tuple(ids),
            message=message,
        )

    def _message(self, ids: list[int], prompt: list[int]) -> Message | None:
        """Parse a response as its tokenizer says; None if it does not say, or that fails."""
        tokenizer = self.tokenizer.tokenizer
        if getattr(tokenizer, "response_template", None) is None:
            return None
        try:
            # A response may be anything: parsers of JSON in it fail with a ValueError.
            parsed = tokenizer.parse_response(ids, prefix=prompt)
        except ValueError:
            return None
        known = {name: parsed[name] for name in MESSAGE if parsed.get(name)}
        message = {"content": "", **known, "role": "assistant"}
        said = [str(part) for part in message.values()]
        # What its fields do not know is still there.
        glued = any(token in part for token in special_tokens(tokenizer) for part in said)
        whole = known and isinstance(message["content"], str) and not glued
        return message if whole else None


@contextmanager
def _generates_plainly(model: Any) -> Iterator[None]:
    """Set aside the model's own generation settings, such as penalties."""
    from transformers import GenerationConfig

    own, training = model.generation_config, model.training
    model.generation_config = GenerationConfig()
    model.eval()
    try:
        yield
    finally:
        model.generation_config = own
        model.train(training)


def _give_room(cache: Any) -> None:
    """Let a cache's layers grow in place; as they are, each token copies all before it."""
    from transformers.cache_utils import DynamicLayer

    class Growing(DynamicLayer):  # type: ignore[misc]
        """Layer with room for more tokens behind its keys and values."""

        keys: Tensor
        values: Tensor
        room: tuple[Tensor, Tensor] | None = None

        def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            begin = self.get_seq_length()
            end = begin + keys.shape[-2]
            if self.room is None or self.room[0].shape[-2] < end:
                self.room = _roomy(self.keys, end), _roomy(self.values, end)
            for room, new in zip(self.room, (keys, values), strict=True):
                room[..., begin:end, :] = new
            self.keys, self.values = (room[..., :end, :] for room in self.room)
            return self.keys, self.values

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices)
            self.room = None

    for place, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            growing = Growing()
            growing.__dict__.update(layer.__dict__)
            cache.layers[place] = growing


def _roomy(states: Tensor, end: int) -> Tensor:
    """Return a copy of keys or values, with room for ROUND tokens from ``end``."""
    *outer, length, size = states.shape
    room = states.new_empty(*outer, end + ROUND, size)
    room[..., :length, :] = states
    return room


class _Draw:
    """Logits processor that draws each row's token with that row's own random number.

    It leaves one token possible, which greedy decoding then takes.
    """

    def __init__(self, sampling: Sampling, keys: list[bytes], slots: range, ids: Tensor) -> None:
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        self.greedy = sampling.temperature == 0
        self.width = ids.shape[1]
        self.warpers: list[Any] = []
        if not self.greedy and sampling.temperature != 1:
            self.warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if not self.greedy and sampling.top_k:
            self.warpers.append(TopKLogitsWarper(sampling.top_k))
        if not self.greedy and sampling.top_p < 1:
            self.warpers.append(TopPLogitsWarper(sampling.top_p))
        rows = [
            _uniforms(sampling.seed, key, slot, sampling.max_new_tokens)
            for key in keys
            for slot in slots
        ]
        self.uniforms = torch.from_numpy(np.stack(rows)).to(ids.device)
        self.broken = torch.zeros((), dtype=torch.bool, device=ids.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores that leave one token possible."""
        step = input_ids.shape[1] - self.width
        if self.greedy:
            self.broken |= scores.isnan().any()
            return scores
        # The inverse of the cumulative distribution at the row's number: first among blocks of
        # tokens, then within one. Sums are in double precision, for vocabularies of any size.
        mass = (scores - scores.amax(-1, keepdim=True)).exp()
        padded = torch.nn.functional.pad(mass, (0, -mass.shape[1] % BLOCK))
        blocks = padded.reshape(len(mass), -1, BLOCK)
        ends = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
        # Not written as ends <= 0, which is False for NaN.
        self.broken |= ~(ends[:, -1] > 0).all()
        step = min(step, self.uniforms.shape[1] - 1)
        at = self.uniforms[:, step, None] * ends[:, -1:]
        block = _first_beyond(at, ends)
        at = at - torch.nn.functional.pad(ends, (1, 0)).gather(1, block)
        within = blocks[torch.arange(len(blocks), device=blocks.device), block[:, 0]]
        place = block * BLOCK + _first_beyond(at, within.double().cumsum(-1))
        place = place.clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, place, 0.0)

    def keep(self, rows: Tensor) -> None:
        """Keep the random numbers of some rows, given as a mask."""
        self.uniforms = self.uniforms[rows]

    def check(self) -> None:
        """Check that all logits were numbers.

        Raises:
            RolloutError: if some were not.
        """
        if bool(self.broken):
            raise RolloutError(
                "The model's logits are not numbers. Load it in another dtype "
                "(model.dtype: bfloat16 or float32)."
            )


def _first_beyond(at: Tensor, ends: Tensor) -> Tensor:
    """Return where each row's cumulative sum first exceeds a value, at a place that has mass."""
    last = torch.searchsorted(ends, ends[:, -1:].contiguous())
    # NaN is beyond all places.
    last = last.clamp(max=ends.shape[1] - 1)
    return torch.searchsorted(ends, at, right=True).minimum(last)


def _uniforms(seed: int, key: bytes, slot: int, count: int) -> np.ndarray[Any, np.dtype[Any]]:
    """Return a response's random numbers in [0, 1)."""
    content = seed.to_bytes(16, "little", signed=True) + key + slot.to_bytes(8, "little")
    digest = blake2b(content, digest_size=16).digest()
    generator = np.random.Philox(key=int.from_bytes(digest, "little"))
    return np.random.Generator(generator).random(count)


class PromptAnswer:
    """A prompt and its answer, as ``predict_step`` returns them.

    A plain class: Lightning takes the dataclasses apart that a step returns.

    Attributes:
        item: the prompt.
        answers: its one response, or why there is none.
    """

    def __init__(self, item: PromptItem, answers: Answers) -> None:
        self.item = item
        self.answers = answers
