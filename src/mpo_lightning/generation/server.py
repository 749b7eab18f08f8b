"""Sampling of responses from a server with an OpenAI-compatible interface, such as vLLM's."""

import os
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Any

from mpo_lightning.batch import Request
from mpo_lightning.checks import check_settings
from mpo_lightning.data.conversation import REASONING, as_messages
from mpo_lightning.errors import RolloutError
from mpo_lightning.generation.generate import NO_ROOM, Answers, Done, Sample, Sampling, ignore

__all__ = ["ServerConfig", "ServerSampler"]

# Signs of special tokens in a server's text: written out, or left out between GPT-OSS's channels.
GLUED = re.compile(
    r"<\|[\w-]+\|>|^(?:analysis|commentary).*assistant(?:analysis|commentary|final)", re.DOTALL
)
# Words with which servers report that prompt and answer do not fit the model's context.
TOO_LONG = ("context_length_exceeded", "maximum context length", "max_model_len")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Server that answers chats; its API key, if it needs one, is the variable OPENAI_API_KEY.

    Args:
        url: its address, up to and including ``/v1``.
        model: name of the model on the server. Defaults to the only one that is served.
        concurrency: number of simultaneous requests.
        retries: number of times that a request is repeated after a failed connection, a time-out or
            an answer that the server is busy or broken, with growing pauses.
        timeout: seconds until a request counts as failed.
    """

    url: str | None = None
    model: str | None = None
    concurrency: int = 32
    retries: int = 5
    timeout: float = 600.0

    def __post_init__(self) -> None:
        check_settings(self)


class ServerSampler:
    """Sampler that asks a server, which renders its model's chat template itself.

    Args:
        config: the server.
        sampling: settings of sampling. Each request has its own seed, which depends on this seed
            and the prompt; servers may ignore it.

    Attributes:
        model: name of the model on the server.

    Raises:
        RolloutError: if the client is not installed, the server cannot be reached or does not serve
            the model.
    """

    def __init__(self, config: ServerConfig, sampling: Sampling) -> None:
        try:
            import openai
        except ImportError as error:
            raise RolloutError(
                "server.url needs the openai client: pip install openai (or mpo-lightning[server])."
            ) from error
        if config.url is None:
            raise RolloutError("server.url: name the server's address, up to and including /v1.")
        if config.concurrency < 1 or config.retries < 0:
            raise RolloutError(
                "server.concurrency must be at least 1 and server.retries at least 0."
            )
        self.config = config
        self.sampling = sampling
        self._errors = openai
        # The client needs a key even if the server does not.
        key = os.environ.get("OPENAI_API_KEY", "none")
        self._client = openai.OpenAI(
            base_url=config.url, api_key=key, max_retries=config.retries, timeout=config.timeout
        )
        self.model = self._served_model()

    def _served_model(self) -> str:
        try:
            served = [model.id for model in self._client.models.list()]
        except self._errors.OpenAIError as error:
            raise self._failed(error, "the list of its models") from error
        wanted = self.config.model
        if wanted is None and len(served) == 1:
            return served[0]
        if wanted not in served:
            asked = "server.model" if wanted is None else f"server.model {wanted}"
            raise RolloutError(
                f"{asked}: {self.config.url} serves {', '.join(served) or 'nothing'}; name one."
            )
        return wanted

    def __call__(self, requests: Sequence[Request], done: Done = ignore) -> list[Answers]:
        """Answer the requests, as `ModelSampler`; stop at the first that fails after all retries.

        Raises:
            RolloutError: naming the server, the row and the failure.
        """
        failed = threading.Event()

        def answer(request: Request) -> Answers:
            if failed.is_set():
                return Answers()
            try:
                answers = self._answer(request)
            except BaseException:
                failed.set()
                raise
            done(1)
            return answers

        with ThreadPoolExecutor(self.config.concurrency) as pool:
            return list(pool.map(answer, requests))

    def _answer(self, request: Request) -> Answers:
        sampling, prompt = self.sampling, request.prompt
        messages: Any = as_messages(prompt)
        content = sampling.seed.to_bytes(16, "little", signed=True) + request.key
        # Not all servers accept more than 31 bits.
        seed = int.from_bytes(blake2b(content, digest_size=4).digest(), "little") >> 1
        # top_k is not part of OpenAI's interface.
        more: dict[str, Any] = {"top_k": sampling.top_k} if sampling.top_k else {}
        arguments = dict(request.template_arguments)
        tools: Any = arguments.pop("tools", None)
        if arguments:
            more["chat_template_kwargs"] = arguments
        create = partial(
            self._client.chat.completions.create,
            model=self.model,
            messages=messages,
            n=sampling.n,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=seed,
            extra_body=more,
            **({"tools": tools} if tools else {}),
        )
        try:
            try:
                reply: Any = create(max_tokens=sampling.max_new_tokens)
            except self._errors.BadRequestError as error:
                if not _is_too_long(error):
                    raise
                # Without a limit an answer gets what the prompt leaves of the context.
                reply = create()
        except self._errors.BadRequestError as error:
            if _is_too_long(error):
                return Answers(refused=NO_ROOM)
            raise self._failed(error, request.source) from error
        except self._errors.OpenAIError as error:
            raise self._failed(error, request.source) from error
        if len(reply.choices or ()) != sampling.n:
            raise RolloutError(
                f"{self.config.url}: {request.source}: gave {len(reply.choices or ())} responses, "
                f"asked for {sampling.n}. The server must support n."
            )
        choices = sorted(reply.choices, key=lambda choice: choice.index)
        return Answers(tuple(map(_sample, choices)))

    def _failed(self, error: Exception, what: str) -> RolloutError:
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        return RolloutError(
            f"{self.config.url}: {what}: {type(error).__name__}: {error}{cause}, after "
            f"{self.config.retries} retries where those could help. Finished parts stay; start the "
            "same command again to continue."
        )


def _is_too_long(error: Exception) -> bool:
    return any(sign in str(error) for sign in TOO_LONG)


def _sample(choice: Any) -> Sample:
    """Return a server's answer; one that calls a tool ends with the call."""
    text, finish = choice.message.content or "", choice.finish_reason
    given = choice.message.model_dump(exclude_none=True)
    more = {name: given[name] for name in (*REASONING, "tool_calls") if given.get(name)}
    return Sample(
        text,
        "stop" if finish == "tool_calls" and "tool_calls" in more else finish,
        special_tokens=len(GLUED.findall(text)),
        message={"role": "assistant", "content": text, **more} if more else None,
    )
