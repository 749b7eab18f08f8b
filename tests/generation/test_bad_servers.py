"""Servers that answer wrongly, slowly or not at all, and what of a run nobody may read."""

import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from mpo_lightning.cli import main
from mpo_lightning.data.prompts import request
from mpo_lightning.errors import RolloutError
from mpo_lightning.generation.generate import Sampling
from mpo_lightning.generation.server import ServerConfig, ServerSampler, public_url
from tests.conftest import read_rows
from tests.generation.serving import serving

# Longer than what a message shows of a value.
KEY, PASSWORD, TOKEN = "sk-" + "0a1b2c3d4e5f" * 8, "pass:w/rd", "qz81-in-the-query"


class Server(ThreadingHTTPServer):
    """Sends what `reply` writes, whatever is asked.

    Attributes:
        url: to be given to clients.
        reply: writes to the client's connection.
        heads: path and headers of the requests.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.reply: Callable[[Handler], None] = lambda handler: None
        self.heads: list[tuple[str, dict[str, str]]] = []

    def handle_error(self, *_: Any) -> None:
        """Say nothing of clients that hang up."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.heads.append((self.path, dict(self.headers)))
        self.server.reply(self)

    def do_POST(self) -> None:
        self.do_GET()


def whole(content: bytes | object, status: int = 200) -> Callable[[Handler], None]:
    """Return a reply of a status and a content, made JSON unless it is bytes."""

    def reply(handler: Handler) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        handler.send_header("Retry-After", "0.01")
        handler.end_headers()
        handler.wfile.write(body)

    return reply


def raw(data: bytes) -> Callable[[Handler], None]:
    """Return a reply of these bytes, heads and all, after which the server hangs up."""
    return lambda handler: handler.wfile.write(data) and None


def choice(index: object = 0, **more: Any) -> dict[str, Any]:
    """Return a good response, with other fields or without those that are ...."""
    message = {"role": "assistant", "content": f"text {index}"}
    given = {"index": index, "finish_reason": "stop", "message": message, **more}
    return {name: value for name, value in given.items() if value is not ...}


def said(**message: Any) -> dict[str, Any]:
    return {"choices": [choice(0, message=message), choice(1)]}


def both(*choices: object) -> dict[str, Any]:
    return {"choices": list(choices)}


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpo_lightning.generation.server.PAUSES", (0.0, 0.0))


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(Server()) as served:
        yield served


def sampler(server: Server, **settings: Any) -> ServerSampler:
    settings = {"url": server.url, "model": "m", "retries": 1, "timeout": 20.0, **settings}
    return ServerSampler(ServerConfig(**settings), Sampling(n=2))


def error(server: Server, reply: Callable[[Handler], None], **settings: Any) -> str:
    """The one line that a server's reply ends in."""
    server.reply = reply
    with pytest.raises(RolloutError) as caught:
        sampler(server, **settings)([request("a", "prompts.jsonl:7")])
    text = str(caught.value)
    assert "\n" not in text
    assert text.isprintable()
    return text


GOOD = both(choice(0), choice(1))
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
# What is answered with status 200, and what is said of it after the row.
WRONG: dict[str, tuple[object, str]] = {
    "html": (b"<html>\n<b>Bad gateway</b>", r"the answer: found '<html>\n<b>Bad gateway</b>'"),
    "garbage": (b"\x1b[31m\x00\xff\xfe" * 9, r"the answer: found '\x1b[31m\x00"),
    "empty": (b"", "the answer: found ''"),
    "truncated": (json.dumps(GOOD).encode()[:-20], 'the answer: found \'{"choices"'),
    "not-utf-8": (json.dumps(GOOD).encode().replace(b"text", b"t\xe9xt"), "the answer: found '{"),
    "digits": (b'{"choices": ' + b"9" * 5000 + b"}", "the answer: found '{"),
    "nested": (b"[" * 100_000, "the answer: found '[[["),
    "null": (None, "the answer: found NoneType None; expected an object"),
    "list": ([GOOD], "the answer: found list [{'choices'"),
    "text": ("Hello", "the answer: found str 'Hello'"),
    "number": (7, "the answer: found int 7"),
    "error-object": (
        {"error": {"message": "no such model"}},
        "the answer: found the error 'no such model'",
    ),
    "error-list": ({"error": ["no"]}, "the answer: found the error ['no']"),
    "no-choices": ({"id": "1"}, "the answer: found {'id': '1'}; expected an object with choices"),
    "choices-null": ({"choices": None}, "choices: found NoneType None; expected a list"),
    "choices-object": ({"choices": {"0": choice()}}, "choices: found dict {'0'"),
    "choices-empty": (both(), "choices: found 0 responses; expected the 2 asked for, or one"),
    "choices-more": (both(*map(choice, range(3))), "choices: found 3 responses; expected the 2"),
    "choice-null": (both(choice(0), None), "choices[1]: found NoneType None; expected an object"),
    "choice-text": (both("a", "b"), "choices[0]: found str 'a'"),
    "index-missing": (both(choice(...), choice(1)), "choices: found the indices [None, 1]"),
    "index-null": (both(choice(0), choice(None)), "choices: found the indices [0, None]"),
    "index-text": (both(choice("0"), choice("1")), "choices: found the indices ['0', '1']"),
    "index-bool": (both(choice(False), choice(True)), "choices: found the indices [False, True]"),
    "index-number": (both(choice(0.0), choice(1.0)), "choices: found the indices [0.0, 1.0]"),
    "index-twice": (both(choice(0), choice(0)), "choices: found the indices [0, 0]; expected [0, "),
    "index-beyond": (both(choice(1), choice(2)), "choices: found the indices [1, 2]"),
    "message-missing": (both(choice(0, message=...), choice(1)), "choices[0].message: found NoneT"),
    "message-text": (both(choice(0), choice(1, message="a")), "choices[1].message: found str 'a'"),
    "message-list": (both(choice(0, message=[]), choice(1)), "choices[0].message: found list []"),
    "content-list": (
        said(content=[{"type": "text", "text": "a"}]),
        "choices[0].message.content: found list [{'type'",
    ),
    "content-number": (said(content=4), "choices[0].message.content: found int 4; expected a text"),
    "content-false": (said(content=False), "choices[0].message.content: found bool False"),
    "content-object": (said(content={}), "choices[0].message.content: found dict {}"),
    "reasoning-list": (said(reasoning=["a"]), "choices[0].message.reasoning: found list ['a']"),
    "calls-text": (said(tool_calls="add"), "choices[0].message.tool_calls: found str 'add'"),
    "calls-nulls": (said(tool_calls=[None]), "choices[0].message.tool_calls: found list [None]"),
    "calls-nameless": (
        said(tool_calls=[{"function": {}}]),
        "choices[0].message.tool_calls: found list [{'function'",
    ),
    "finish-null": (
        both(choice(0, finish_reason=None), choice(1)),
        "choices[0].finish_reason: fou",
    ),
    "finish-missing": (both(choice(0, finish_reason=...), choice(1)), "choices[0].finish_reason:"),
    "finish-number": (
        both(choice(0), choice(1, finish_reason=1)),
        "choices[1].finish_reason: found int 1; expected a word",
    ),
    "finish-list": (
        both(choice(0, finish_reason=["stop"]), choice(1)),
        "finish_reason: found list",
    ),
    "finish-control": (
        both(choice(0, finish_reason="\x1b]0;title\x07"), choice(1)),
        r"choices[0].finish_reason: found str '\x1b]0;title\x07'",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_answers_are_told_by_row_and_field(server: Server, case: str) -> None:
    content, expected = WRONG[case]
    text = error(server, whole(content))
    assert text.startswith(f"{server.url}: prompts.jsonl:7: ")
    assert expected in text
    assert len(server.heads) == 1


OK = b"HTTP/1.1 200 OK\r\n"
BROKEN = {
    "too-short": OK + b'Content-Length: 90\r\n\r\n{"choices": [',
    "chunk-cut": OK + b"Transfer-Encoding: chunked\r\n\r\nff\r\n{",
    "no-chunks": OK + b"Transfer-Encoding: chunked\r\n\r\n{}",
    "head-cut": OK + b"Content-Le",
    "no-head": b"Hello\x1b[31m\r\n",
    "nothing": b"",
    "two-lengths": OK + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "odd-length": OK + b"Content-Length: many\r\n\r\n{}",
    "not-gzip": OK + b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
    "long-head": OK + b"X: " + b"x" * 70_000 + b"\r\n\r\n{}",
    "circle": b"HTTP/1.1 307 Moved\r\nLocation: /v1/chat/completions\r\nContent-Length: 0\r\n\r\n",
    "nowhere": b"HTTP/1.1 307 Moved\r\nLocation: http://[\r\nContent-Length: 0\r\n\r\n",
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_connections_are_told_after_the_retries(server: Server, case: str) -> None:
    text = error(server, raw(BROKEN[case]))
    assert text.startswith(f"{server.url}: prompts.jsonl:7: ")
    assert ", after 1 retries. Finished parts stay" in text
    assert len(server.heads) >= 2


def test_a_length_below_the_answers(server: Server) -> None:
    body = json.dumps(GOOD).encode()
    text = error(server, raw(OK + b"Content-Length: 20\r\n\r\n" + body))
    # The rest is seen with its beginning, or after that was read as the whole.
    assert re.search(r"prompts\.jsonl:7: (the answer: found|ClientResponseError: 400)", text)


def drip(data: bytes, stop: threading.Event) -> Callable[[Handler], None]:
    """Return a reply of a byte each 50 ms, for ever."""

    def reply(handler: Handler) -> None:
        handler.wfile.write(data)
        while not stop.wait(0.05):
            handler.wfile.write(b" ")

    return reply


@pytest.mark.parametrize("start", ["content", "head"])
def test_an_answer_that_drips_ends(server: Server, start: str) -> None:
    """Each byte comes in time; the answer does not."""
    data = OK + (b"Content-Length: 100000\r\n\r\n" if start == "content" else b"X: ")
    stop, began = threading.Event(), time.monotonic()
    text = error(server, drip(data, stop), timeout=0.4, retries=0)
    stop.set()
    assert time.monotonic() - began < 5
    assert "prompts.jsonl:7: no whole answer within 0.4 seconds, after 0 retries" in text


def test_a_server_that_only_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        config = ServerConfig(url=url, timeout=0.3, retries=0)
        with pytest.raises(RolloutError, match="list of its models .*: no whole answer within 0.3"):
            ServerSampler(config, Sampling())


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        (None, "the answer: found NoneType None"),
        ({"data": None}, "data: found NoneType None; expected a list"),
        ({"data": ["m"]}, r"data\[0\]: found str 'm'; expected an object"),
        ({"data": [{"id": 3}]}, r"data\[0\]\.id: found int 3; expected a name"),
        ({"data": [{"id": "\ud800"}]}, r"data\[0\]\.id: found str '.ud800'; expected a name"),
        ({"data": [{"id": "\x1b[2J"}]}, r"data\[0\]\.id: found str '.x1b\[2J'"),
        ({"data": []}, "found no model; name the one to ask"),
    ],
)
def test_wrong_lists_of_models(server: Server, listed: object, expected: str) -> None:
    server.reply = whole(listed)
    what = r"the list of its models \(server\.model names none\)"
    with pytest.raises(RolloutError, match=f"^{server.url}: {what}: {expected}"):
        sampler(server, model=None)


def test_a_server_that_gives_one_response_is_asked_for_each(server: Server) -> None:
    server.reply = whole(both(choice(0)))
    (answers,) = sampler(server)([request("a")])
    assert [sample.text for sample in answers.samples] == ["text 0", "text 0"]
    assert len(server.heads) == 2


def test_half_characters_are_replaced_and_counted(
    server: Server,
    write_jsonl: Callable[..., str],
    tmp_path: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cut = [
        choice(0, message={"content": "whole \U0001f600, half \ud83d"}),
        choice(1, message={"content": "ok", "reasoning": "\udc00", "tool_calls": [CALL]}),
    ]
    server.reply = whole(both(*cut))
    out = str(tmp_path / "out")
    prompts = ["--prompts", write_jsonl([{"prompt": "a"}]), "--out", out, "--n", "2"]
    main(["sample", *prompts, "--server.url", server.url, "--server.model", "m"])
    ((_, row),) = read_rows(out)
    assert row["responses"] == [
        "whole \U0001f600, half \ufffd",
        {"role": "assistant", "content": "ok", "reasoning": "\ufffd", "tool_calls": [CALL]},
    ]
    shown = capsys.readouterr().out
    assert "noted: 2 responses with half characters, U+FFFD in their place" in shown


# -------------------------------------------------------------------------------------- secrets


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://localhost:8000/v1", "http://localhost:8000/v1"),
        ("https://user:word@host/v1", "https://***@host/v1"),
        ("https://token@host:1/v1", "https://***@host:1/v1"),
        ("https://user:w/r@d#?@host/v1", "https://***@host/v1"),
        ("user:word@host/v1", "***@host/v1"),
        ("https://host/v1?api_key=word", "https://host/v1?***"),
        ("https://user:word@host/v1?a=b#word", "https://***@host/v1?***"),
        ("https://host/v1#word", "https://host/v1?***"),
    ],
)
def test_public_url(url: str, expected: str) -> None:
    assert public_url(url) == expected


@pytest.mark.parametrize(
    "url",
    ["localhost:8000/v1", "ftp://user:word@host/v1", "http://", "http://user:word@[/v1", "", "/v1"],
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(RolloutError, match="server.url: found .*; expected an address") as caught:
        ServerSampler(ServerConfig(url=url, model="m"), Sampling())
    assert "word" not in str(caught.value)


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("inf"), float("nan")])
def test_timeouts_that_are_none(timeout: float) -> None:
    with pytest.raises(RolloutError, match="server.timeout above 0"):
        ServerConfig(url="http://host/v1", timeout=timeout)


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG)
    return caplog


@pytest.fixture
def secret_url(server: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
    quoted = PASSWORD.replace(":", "%3A").replace("/", "%2F")
    return server.url.replace("//", f"//someone:{quoted}@") + f"?api_key={TOKEN}"


def test_secrets_reach_the_server(server: Server, secret_url: str) -> None:
    server.reply = whole(GOOD)
    sampler(server, url=secret_url)([request("a")])
    sampler(server)([request("a")])
    (path, by_password), (_, by_key) = server.heads
    assert path == f"/v1/chat/completions?api_key={TOKEN}"
    # someone:pass:w/rd in base 64.
    assert by_password["Authorization"] == "Basic c29tZW9uZTpwYXNzOncvcmQ="
    assert by_key["Authorization"] == f"Bearer {KEY}"


ECHOES: dict[str, Callable[[Handler], None]] = {
    "refused": whole({"error": {"message": f"Wrong key {KEY}, {PASSWORD}, {TOKEN}"}}, 401),
    "busy": whole(f"{PASSWORD} {TOKEN} {KEY}".encode(), 503),
    "good-status": whole({"error": f"{PASSWORD} {TOKEN} {KEY}"}),
    "list": whole([KEY, PASSWORD, TOKEN]),
    "finish": whole(both(choice(0, finish_reason=[TOKEN, KEY]), choice(1))),
    "content": whole(said(content=[PASSWORD, KEY])),
    "moved": raw(
        f"HTTP/1.1 307 M\r\nLocation: http://[{TOKEN}{KEY}\r\nContent-Length: 0\r\n\r\n".encode()
    ),
    "hung-up": raw(b""),
}


@pytest.mark.parametrize("case", ECHOES)
def test_secrets_are_in_no_message_log_or_file(
    server: Server,
    secret_url: str,
    case: str,
    logged: pytest.LogCaptureFixture,
    tmp_path: Any,
) -> None:
    # The first part is well.
    replies = iter([whole(GOOD)] + [ECHOES[case]] * 2)

    def reply(handler: Handler) -> None:
        next(replies)(handler)

    server.reply = reply
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    prompts.write_text('{"prompt": "a"}\n{"prompt": "b"}\n', encoding="utf-8")
    command = [
        "sample",
        "--prompts",
        str(prompts),
        "--out",
        str(out),
        "--n",
        "2",
        "--server.model",
        "m",
    ]
    command += ["--rows_per_part", "1", "--server.retries", "1"]
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--server.url", secret_url])
    told = str(stopped.value)
    assert told.startswith(f"error: {public_url(secret_url)}: {prompts}:2: ")
    told += repr(ServerConfig(url=secret_url)) + logged.text
    written = {path.name: path.read_text(encoding="utf-8") for path in out.iterdir()}
    assert {"settings.json", "part-00000.jsonl", "part-00000.report.json"} <= set(written)
    told += "".join(written.values())
    # Beginnings, too: messages cut what they show.
    for secret in (KEY, PASSWORD, "pass%3Aw%2Frd", TOKEN):
        assert secret[:5] not in told


@pytest.mark.parametrize(
    "arguments",
    [
        ["--server.url", "URL", "--print_config"],
        ["--config", "CONFIG", "--print_config"],
        ["--config", "CONFIG", "--server.retries", "x"],
        ["--server", "URL"],
        ["--server.timeout", "URL"],
        ["--prompts", "URL", "--out", "out", "--server.url", "http://localhost:9/v1"],
        ["--config", "URL"],
        ["URL"],
    ],
    ids=" ".join,
)
def test_secrets_are_in_no_echo_of_settings(
    secret_url: str,
    arguments: list[str],
    tmp_path: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tmp_path / "server.yaml"
    config.write_text(f"server:\n  url: {secret_url}\n", encoding="utf-8")
    values = {"URL": secret_url, "CONFIG": str(config)}
    with pytest.raises(SystemExit) as stopped:
        main(["sample", *(values.get(each, each) for each in arguments)])
    told = f"{stopped.value} {''.join(capsys.readouterr())}"
    assert "127.0.0.1" not in told or "http://***@127.0.0.1" in told
    for secret in (PASSWORD, "pass%3A", TOKEN):
        assert secret[:5] not in told


def test_an_address_without_its_secrets_is_none(server: Server) -> None:
    with pytest.raises(RolloutError, match="server.url: found .* Give it whole"):
        sampler(server, url=server.url.replace("//", "//***@"))


def test_a_proxy_and_its_password(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = server.url.replace("//", "//someone:pass%3Aw%2Frd@").removesuffix("/v1")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", proxy)
    server.reply = whole(GOOD)
    far = sampler(server, url="http://far.example/v1")
    far([request("a")])
    ((path, headers),) = server.heads
    assert path == "http://far.example/v1/chat/completions"
    assert headers["Proxy-Authorization"] == "Basic c29tZW9uZTpwYXNzOncvcmQ="
    server.reply = whole(f"ask {PASSWORD}".encode(), 407)
    with pytest.raises(RolloutError, match="HTTP status 407: 'ask [*]{3}'"):
        far([request("a")])


def test_a_key_that_is_none(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-ключ")
    with pytest.raises(RolloutError, match="OPENAI_API_KEY: holds characters that no key") as told:
        sampler(server)
    assert "sk-" not in str(told.value)
