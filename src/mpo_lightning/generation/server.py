"""Sampling of responses from a server with an OpenAI-compatible interface, such as vLLM's."""

import asyncio
import json
import os
import random
import re
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any, TypeVar
from urllib.request import getproxies, proxy_bypass

import aiohttp
from yarl import URL

from mpo_lightning.batch import Request
from mpo_lightning.checks import check_settings
from mpo_lightning.data.conversation import REASONING, as_messages
from mpo_lightning.data.groups import DataError, bad_field, show, show_typed
from mpo_lightning.errors import RolloutError
from mpo_lightning.generation.generate import NO_ROOM, Answers, Done, Sample, Sampling, ignore

__all__ = ["ServerConfig", "ServerSampler", "public_url"]

# Signs of special tokens in a server's text: written out, or left out between GPT-OSS's channels.
GLUED = re.compile(
    r"<\|[\w-]+\|>|^(?:analysis|commentary).*assistant(?:analysis|commentary|final)", re.DOTALL
)
# Words with which servers report that prompt and answer do not fit the model's context.
TOO_LONG = ("context_length_exceeded", "maximum context length", "max_model_len")
# Statuses, beside those of 500 and above, of what may pass: time-outs, conflicts, limits on rates.
PASSING = frozenset({408, 409, 429})
# Seconds before a first and a last repetition.
PAUSES = (0.5, 8.0)
HALF_CHARACTER = re.compile("[\ud800-\udfff]")
REASON = re.compile(r"\w[\w -]{0,40}")
REMEDY = "Name a server with OpenAI's interface for chats (server.url), or repair this one."

Result = TypeVar("Result")


def public_url(url: str) -> str:
    """Return an address as it may be said and stored: without user, password and query."""
    shown = re.sub(r"^([\w+.-]*://)?.*@", r"\1***@", url, flags=re.DOTALL)
    return re.sub(r"[?#].*", "?***", shown, flags=re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Server that answers chats; its API key, if it needs one, is the variable OPENAI_API_KEY.

    Args:
        url: its address, up to and including ``/v1``.
        model: name of the model on the server. Defaults to the only one that it lists.
        concurrency: number of simultaneous requests.
        retries: number of times that a request is repeated after a failed connection, a time-out or
            an answer that the server is busy or broken, with growing pauses.
        timeout: seconds within which a request's whole answer must have come.
    """

    url: str | None = field(default=None, repr=False)
    model: str | None = None
    concurrency: int = 32
    retries: int = 5
    timeout: float = 600.0

    def __post_init__(self) -> None:
        check_settings(self)
        if self.concurrency < 1 or self.retries < 0 or not 0 < self.timeout < float("inf"):
            raise RolloutError(
                "server.concurrency must be at least 1, server.retries at least 0, and "
                f"server.timeout above 0; got {self.concurrency}, {self.retries} and "
                f"{self.timeout}."
            )


class ServerSampler:
    """Sampler that asks a server, which renders its model's chat template itself.

    Args:
        config: the server.
        sampling: settings of sampling. Each request has its own seed, which depends on this seed
            and the prompt; servers may ignore it.

    Attributes:
        model: name of the model on the server.

    Raises:
        RolloutError: if the address or the key cannot be used, the server cannot be reached, does
            not answer as it should, or does not serve the model.
    """

    def __init__(self, config: ServerConfig, sampling: Sampling) -> None:
        self.config = config
        self.sampling = sampling
        given = config.url or ""
        self._shown = public_url(given)
        try:
            self._url = URL(given)
        except ValueError:
            # Its message would repeat the address.
            self._url = URL()
        if self._url.scheme not in {"http", "https"} or not self._url.host:
            raise RolloutError(
                f"server.url: found {self._shown!r}; expected an address that begins with http:// "
                "or https:// and ends with /v1."
            )
        if "***" in given:
            raise RolloutError(
                f"server.url: found {self._shown!r}, of which a message or saved settings left "
                "out what is secret. Give it whole."
            )
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not (key.isascii() and key.isprintable()):
            raise RolloutError("OPENAI_API_KEY: holds characters that no key has.")
        proxy = None if proxy_bypass(self._url.host) else getproxies().get(self._url.scheme)
        # A user and a password in the address stand in the place of the key.
        self._options: dict[str, Any] = {"proxy": proxy}
        if key and not self._url.user:
            self._options["headers"] = {"Authorization": f"Bearer {key}"}
        self._secrets = _secrets(key, self._url, proxy)
        # Servers answer for models that they do not list, or list by another name.
        self.model = config.model or self._run(self._only_model)

    def _run(self, work: Callable[[aiohttp.ClientSession], Coroutine[Any, Any, Result]]) -> Result:
        """Run work with a session, in a thread: here an event loop may run, as in a notebook."""
        begun: list[Callable[[], object]] = []

        async def whole() -> Result:
            loop, task = asyncio.get_running_loop(), asyncio.current_task()
            assert task is not None
            begun.append(lambda: loop.call_soon_threadsafe(task.cancel))
            async with aiohttp.ClientSession(
                # A connection that is kept may be closed by the server while it is taken up again.
                connector=aiohttp.TCPConnector(limit=0, force_close=True),
                timeout=aiohttp.ClientTimeout(total=self.config.timeout),
            ) as session:
                return await work(session)

        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(asyncio.run, whole())
            try:
                return running.result()
            except KeyboardInterrupt:
                for cancel in begun:
                    cancel()
                raise

    async def _only_model(self, session: aiohttp.ClientSession) -> str:
        what = "the list of its models (server.model names none)"
        status, content = await self._reply(session, what, "models")
        if status != 200:
            raise self._failed(what, f"HTTP status {status}: {_error(content)}")
        try:
            served = _models(content, what)
        except DataError as error:
            raise self._failed(str(error)) from None
        if len(served) != 1:
            names = ", ".join(served) or "no model"
            raise self._failed(what, f"found {names}; name the one to ask (server.model)")
        return served[0]

    def __call__(self, requests: Sequence[Request], done: Done = ignore) -> list[Answers]:
        """Answer the requests, as `ModelSampler`; stop at the first that fails after all retries.

        Raises:
            RolloutError: naming the server, the row and the failure.
        """

        async def answer_all(session: aiohttp.ClientSession) -> list[Answers]:
            free = asyncio.Semaphore(self.config.concurrency)

            async def answer(request: Request) -> Answers:
                async with free:
                    answers = await self._answer(session, request)
                done(1)
                return answers

            tasks = [asyncio.create_task(answer(request)) for request in requests]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

        return self._run(answer_all)

    async def _answer(self, session: aiohttp.ClientSession, request: Request) -> Answers:
        count = self.sampling.n
        answers = await self._responses(session, request, count, 0)
        # A server that does not know n gives one response: the others are asked for one by one.
        while answers.refused is None and (have := len(answers.samples)) < count:
            more = await self._responses(session, request, 1, have)
            answers = replace(more, samples=answers.samples + more.samples)
        return answers

    async def _responses(
        self, session: aiohttp.ClientSession, request: Request, n: int, first: int
    ) -> Answers:
        """Ask for n responses to a prompt, the first of which has a number among all of them."""
        sampling, source = self.sampling, request.source
        seed = sampling.seed.to_bytes(16, "little", signed=True) + request.key
        seed += first.to_bytes(4, "little") if first else b""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": as_messages(request.prompt),
            "n": n,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            # Not all servers accept more than 31 bits.
            "seed": int.from_bytes(blake2b(seed, digest_size=4).digest(), "little") >> 1,
        }
        arguments = dict(request.template_arguments)
        # The last two are not part of OpenAI's interface.
        more = {
            "tools": arguments.pop("tools", None),
            "top_k": sampling.top_k,
            "chat_template_kwargs": arguments,
        }
        body |= {name: value for name, value in more.items() if value}
        path = "chat/completions"
        limited = {**body, "max_tokens": sampling.max_new_tokens}
        status, content = await self._reply(session, source, path, limited)
        if _is_too_long(status, content):
            # Without a limit an answer gets what the prompt leaves of the context.
            status, content = await self._reply(session, source, path, body)
        if _is_too_long(status, content):
            return Answers(refused=NO_ROOM)
        if status != 200:
            raise self._failed(source, f"HTTP status {status}: {_error(content)}")
        try:
            return Answers(_samples(content, n, source))
        except DataError as error:
            raise self._failed(str(error)) from None

    async def _reply(
        self,
        session: aiohttp.ClientSession,
        what: str,
        path: str,
        body: Mapping[str, Any] | None = None,
    ) -> tuple[int, bytes]:
        """Return status and content of a reply; what may pass is tried again.

        Raises:
            RolloutError: if there is none after all retries.
        """
        url = (self._url / path).with_query(self._url.query)
        pause, longest = PAUSES
        for left in reversed(range(self.config.retries + 1)):
            wait = min(pause, longest) * random.uniform(0.75, 1)
            try:
                async with session.request(
                    "GET" if body is None else "POST", url, json=body, **self._options
                ) as response:
                    status, content = response.status, await response.read()
                if status < 500 and status not in PASSING:
                    return status, content
                failure = f"HTTP status {status}: {_error(content)}"
                wait = _asked_pause(response.headers.get("Retry-After"), wait)
            except TimeoutError:
                failure = f"no whole answer within {self.config.timeout:g} seconds"
            except (aiohttp.ClientError, OSError) as error:
                failure = f"{type(error).__name__}: {error}"
            if left:
                await asyncio.sleep(wait)
            pause *= 2
        tried = f"{failure}, after {self.config.retries} retries"
        raise self._failed(what, tried)

    def _failed(self, *parts: str) -> RolloutError:
        """Return an error that says nothing secret, in one line."""
        text = ": ".join(parts)
        for secret in self._secrets:
            text = text.replace(secret, "***")
            # Of one that `show` has cut a beginning is left.
            for length in range(len(secret) - 1, 3, -1):
                text = text.replace(f"{secret[:length]}...", "***...")
        text = "".join(
            letter if letter.isprintable() else repr(letter)[1:-1]
            for letter in " ".join(text.split())
        )
        return RolloutError(
            f"{self._shown}: {text.rstrip('.')}. Finished parts stay; start the same command again "
            "to continue."
        )


def _secrets(key: str, url: URL, proxy: str | None) -> list[str]:
    """Return what no message may hold, the longest first: keys, passwords and the query."""
    found = {key}
    # Short names and values are versions and the like, and would be found in words.
    unsure = [*url.query.values(), url.raw_query_string]
    for address in filter(None, (url, URL(proxy) if proxy else None)):
        found |= {address.password or "", address.raw_password or ""}
        unsure.append(address.user or "")
    found |= {each for each in unsure if len(each) > 5}
    return sorted(found - {""}, key=len, reverse=True)


def _asked_pause(asked: str | None, otherwise: float) -> float:
    """Return the pause that a server asks for, if that is a minute at most, in seconds."""
    return float(asked) if asked and re.fullmatch(r"[0-5]?\d(\.\d+)?", asked) else otherwise


# ----------------------------------------------------------------------------- what servers answer


def _error(content: bytes) -> str:
    """Return a server's words on what is wrong, as messages show them."""
    try:
        said = json.loads(content)
    except (ValueError, RecursionError):
        said = content.decode(errors="replace")
    for name in ("error", "message"):
        said = said.get(name, said) if isinstance(said, dict) else said
    return show(said, limit=300)


def _is_too_long(status: int, content: bytes) -> bool:
    return status == 400 and any(sign.encode() in content for sign in TOO_LONG)


def _entries(content: bytes, name: str, source: str) -> list[Any]:
    """Return the list of objects that a reply holds under a name.

    Raises:
        DataError: if it holds none.
    """
    try:
        reply = json.loads(content)
    except (ValueError, RecursionError):
        found = show(content.decode(errors="replace"))
        raise bad_field(source, "the answer", found, "an object in JSON", REMEDY) from None
    if not isinstance(reply, dict):
        raise bad_field(source, "the answer", show_typed(reply), "an object in JSON", REMEDY)
    if name not in reply:
        found = f"the error {_error(content)}" if "error" in reply else show(reply)
        raise bad_field(source, "the answer", found, f"an object with {name}", REMEDY)
    entries = reply[name]
    if not isinstance(entries, list):
        raise bad_field(source, name, show_typed(entries), "a list", REMEDY)
    for place, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise bad_field(source, f"{name}[{place}]", show_typed(entry), "an object", REMEDY)
    return entries


def _models(content: bytes, source: str) -> list[str]:
    """Return the names of the models that a server lists.

    Raises:
        DataError: if they are no list of names.
    """
    names = [entry.get("id") for entry in _entries(content, "data", source)]
    for place, name in enumerate(names):
        # Half a character is not printable either.
        if not (isinstance(name, str) and name.isprintable() and name):
            raise bad_field(source, f"data[{place}].id", show_typed(name), "a name", REMEDY)
    return names


def _samples(content: bytes, n: int, source: str) -> tuple[Sample, ...]:
    """Return the responses that a server's answer holds, in the order of their indices.

    Args:
        content: the answer, as it came.
        n: number of responses that were asked for; the server may give one instead.
        source: "file:row".

    Raises:
        DataError: naming the row, the field, what was found and what was expected.
    """
    choices = _entries(content, "choices", source)
    count = len(choices)
    if count not in {1, n}:
        expected = f"the {n} asked for" if n == 1 else f"the {n} asked for, or one"
        raise bad_field(source, "choices", f"{count} responses", expected, REMEDY)
    indices = [choice.get("index") for choice in choices]
    if any(type(index) is not int for index in indices) or sorted(indices) != list(range(count)):
        expected = f"{list(range(count))} in any order"
        raise bad_field(source, "choices", f"the indices {show(indices)}", expected, REMEDY)
    choices.sort(key=lambda choice: choice["index"])
    return tuple(_sample(choice, f"choices[{choice['index']}]", source) for choice in choices)


def _sample(choice: Mapping[str, Any], where: str, source: str) -> Sample:
    """Return a server's response; one that calls a tool ends with the call.

    Raises:
        DataError: naming the row, the field, what was found and what was expected.
    """

    def require(fits: bool, name: str, found: object, expected: str) -> None:
        if not fits:
            raise bad_field(source, f"{where}.{name}", show_typed(found), expected, REMEDY)

    finish, given = choice.get("finish_reason"), choice.get("message")
    require(
        isinstance(finish, str) and REASON.fullmatch(finish) is not None,
        "finish_reason",
        finish,
        "a word",
    )
    require(isinstance(given, dict), "message", given, "an object")
    # Characters of which a limit on bytes or tokens has cut a half.
    whole, halves = HALF_CHARACTER.subn("\ufffd", json.dumps(given, ensure_ascii=False))
    message = json.loads(whole)
    for name in ("content", *REASONING):
        text = message.get(name)
        require(text is None or isinstance(text, str), f"message.{name}", text, "a text or null")
    calls = message.get("tool_calls")
    require(calls is None or _are_calls(calls), "message.tool_calls", calls, "calls of functions")
    text = message.get("content") or ""
    more = {name: message[name] for name in (*REASONING, "tool_calls") if message.get(name)}
    return Sample(
        text,
        "stop" if finish == "tool_calls" and calls else str(finish),
        special_tokens=len(GLUED.findall(text)),
        message={"role": "assistant", "content": text, **more} if more else None,
        half_characters=halves,
    )


def _are_calls(calls: object) -> bool:
    """Whether a value is a list of tool calls, each of a function with a name."""
    functions: Iterable[Any] = (
        (call.get("function") if isinstance(call, dict) else None for call in calls)
        if isinstance(calls, list)
        else [None]
    )
    return all(isinstance(each, dict) and isinstance(each.get("name"), str) for each in functions)
