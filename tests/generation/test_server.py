"""A server's answers: a small HTTP server that speaks the protocol, with its errors."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from mpo_lightning.cli import main
from mpo_lightning.data.prompts import request
from mpo_lightning.errors import RolloutError
from mpo_lightning.generation.generate import Sample, Sampling
from mpo_lightning.generation.server import ServerConfig, ServerSampler
from tests.conftest import read_rows
from tests.generation.serving import serving

TOO_LONG = {
    "message": "This model's maximum context length is 64 tokens. However, you requested 90.",
    "type": "BadRequestError",
    "code": 400,
}


class Server(ThreadingHTTPServer):
    """Answers with words that depend on the messages, the seed and the choice's number.

    Attributes:
        url: to be given to clients.
        requests: bodies of the requests for chats.
        failures: statuses to answer with before the server is well.
        models: names of those that it lists.
        only_one: whether it gives one response, however many are asked for.
        well_for: so many requests, then it fails once.
        pause: seconds before an answer.
        most_at_once: of requests for chats.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.lock = threading.Lock()
        self.requests: list[dict[str, Any]] = []
        self.failures: list[int] = []
        self.models = ["small-model"]
        self.only_one = False
        self.pause = 0.0
        self.well_for: int | None = None
        # Parts of each message, in the place of its own or beside them.
        self.more: dict[str, Any] = {}
        self.at_once = self.most_at_once = 0


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        # Retries of tests need not wait.
        self.send_header("Retry-After", "0.001")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        model = {"object": "model", "created": 0, "owned_by": "tests"}
        models = [{"id": name, **model} for name in self.server.models]
        self.answer(200, {"object": "list", "data": models})

    def do_POST(self) -> None:
        assert self.path == "/v1/chat/completions"
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            failure = server.failures.pop(0) if server.failures else None
            if len(server.requests) == server.well_for:
                failure = 500
            server.requests.append(body)
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        time.sleep(server.pause)
        try:
            if failure is not None:
                self.answer(failure, {"error": {"message": "out of order", "code": failure}})
                return
            text = body["messages"][-1]["content"]
            if len(text) > 50 or (len(text) > 30 and "max_tokens" in body):
                self.answer(400, {"error": TOO_LONG})
                return
            reasons = {"cut": "length", "filtered": "content_filter"}
            choices = [
                {
                    "index": index,
                    "finish_reason": reasons.get(text, "stop"),
                    "message": {
                        "role": "assistant",
                        "content": None if text == "silent" else f"{text} {body['seed']} {index}",
                        **server.more,
                    },
                }
                for index in reversed(range(1 if server.only_one else body["n"]))
            ]
            head = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"]}
            self.answer(200, {**head, "choices": choices})
        finally:
            with server.lock:
                server.at_once -= 1


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(Server()) as served:
        yield served


def make(server: Server, **settings: Any) -> ServerSampler:
    sampling = Sampling(n=3, temperature=0.8, top_p=0.9, top_k=7, max_new_tokens=20)
    return ServerSampler(ServerConfig(url=server.url, **settings), sampling)


def test_what_is_asked_and_answered(server: Server) -> None:
    sampler = make(server)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "cut"}]
    text, conversation = sampler([request("a"), request(chat)])
    asked = {body["messages"][-1]["content"]: body for body in server.requests}
    assert {name: asked["a"][name] for name in asked["a"] if name != "seed"} == {
        "model": "small-model",
        "messages": [{"role": "user", "content": "a"}],
        "n": 3,
        "temperature": 0.8,
        "top_p": 0.9,
        "top_k": 7,
        "max_tokens": 20,
    }
    assert asked["cut"]["messages"] == chat
    seed = asked["a"]["seed"]
    assert text.samples == tuple(Sample(f"a {seed} {index}", "stop") for index in range(3))
    assert [sample.finish for sample in conversation.samples] == ["length"] * 3
    assert seed != asked["cut"]["seed"]
    assert sampler([request("a")])[0] == text


@pytest.mark.parametrize(
    ("more", "response", "special_tokens"),
    [
        (
            {"content": "4", "reasoning_content": "two and two"},
            {"role": "assistant", "content": "4", "reasoning_content": "two and two"},
            0,
        ),
        ({"content": "<|channel|>final<|message|>4"}, "<|channel|>final<|message|>4", 2),
        ({"content": "analysisTwo and two.assistantfinal4"}, None, 1),
        ({"content": "The analysis of a < b | c."}, None, 0),
    ],
)
def test_reasoning_and_channels(
    server: Server, more: dict[str, Any], response: Any, special_tokens: int
) -> None:
    server.more = more
    (answers,) = make(server)([request("a")])
    for sample in answers.samples:
        assert sample.response == (response or more["content"])
        assert sample.special_tokens == special_tokens


def test_a_call_of_a_tool_is_an_answer(server: Server) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    server.more = {"content": None, "tool_calls": [call]}
    (answers,) = make(server)([request("a")])
    assert not answers.samples[0].empty
    assert answers.samples[0].response == {"role": "assistant", "content": "", "tool_calls": [call]}


def test_answers_are_in_order_and_asked_together(server: Server) -> None:
    counts = []
    server.pause = 0.01
    prompts = [f"prompt {number}" for number in range(40)]
    answers = make(server, concurrency=4)([request(p) for p in prompts], counts.append)
    assert [answer.samples[0].text.rsplit(" ", 2)[0] for answer in answers] == prompts
    assert sum(counts) == 40
    assert 1 < server.most_at_once <= 4


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_may_pass_is_tried_again(server: Server, status: int) -> None:
    server.failures = [status, status]
    assert len(make(server, retries=2)([request("a")])[0].samples) == 3
    assert len(server.requests) == 3


def test_what_does_not_pass_is_told(server: Server) -> None:
    server.failures = [500] * 10
    with pytest.raises(RolloutError) as caught:
        make(server, retries=2)([request("a", "prompts.jsonl:7")])
    message = str(caught.value)
    assert message.startswith(f"{server.url}: prompts.jsonl:7: HTTP status 500")
    assert "out of order" in message
    assert len(server.requests) == 3


def test_what_no_repetition_helps_is_told_at_once(server: Server) -> None:
    server.failures = [401]
    with pytest.raises(RolloutError, match=r"HTTP status 401: .out of order"):
        make(server)([request("a")])
    assert len(server.requests) == 1
    server.failures = [400]
    with pytest.raises(RolloutError, match="HTTP status 400"):
        make(server)([request("a")])


def test_one_failure_ends_the_rest(server: Server) -> None:
    server.failures = [401] * 100
    with pytest.raises(RolloutError):
        make(server, concurrency=2)([request(f"{number}") for number in range(100)])
    assert len(server.requests) <= 4


def test_prompt_beyond_the_context(server: Server) -> None:
    long, short = make(server)([request("a" * 51), request("a")])
    assert long.refused == "with a prompt that leaves no room to answer"
    assert len(short.samples) == 3


def test_limit_beyond_the_context(server: Server) -> None:
    """A prompt that leaves less than the limit gets the rest: it is asked again without one."""
    (answers,) = make(server)([request("forty letters" * 3)])
    assert len(answers.samples) == 3
    assert ["max_tokens" in body for body in server.requests] == [True, False]


def test_server_without_n(server: Server) -> None:
    """It gives one response; each of the others is asked for with a seed of its own."""
    server.only_one = True
    sampler = make(server)
    (answers,) = sampler([request("a")])
    assert [body["n"] for body in server.requests] == [3, 1, 1]
    assert len({body["seed"] for body in server.requests}) == 3
    seeds = [body["seed"] for body in server.requests]
    assert [sample.text for sample in answers.samples] == [f"a {seed} 0" for seed in seeds]
    assert sampler([request("a")]) == [answers]


def test_no_server() -> None:
    config = ServerConfig(url="http://127.0.0.1:9/v1", retries=0)
    with pytest.raises(
        RolloutError, match=r"127\.0\.0\.1:9/v1: the list of its models .*: ClientConn"
    ):
        ServerSampler(config, Sampling())


def test_models(server: Server) -> None:
    assert make(server).model == "small-model"
    # Servers answer for models that they do not list.
    assert make(server, model="other").model == "other"
    server.models = ["one", "two"]
    with pytest.raises(RolloutError, match=r"found one, two; name the one to ask \(server.model\)"):
        make(server)


def test_command(
    server: Server,
    write_jsonl: Callable[..., str],
    tmp_path: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts = ["a", "cut", "filtered", "silent", "b" * 51, "a"]
    prompts = write_jsonl([{"prompt": text, "id": i} for i, text in enumerate(texts)])
    out = str(tmp_path / "out")
    options = ["--prompts", prompts, "--out", out, "--n", "3", "--rows_per_part", "2"]
    command = ["sample", *options, "--server.url", server.url, "--progress", "false"]
    main(command)
    rows = [row for _, row in read_rows(out)]
    assert [(row["id"], row["truncated"]) for row in rows] == [
        (0, [False] * 3),
        (1, [True] * 3),
        (5, [False] * 3),
    ]
    assert rows[0]["sampled"]["model"] == "small-model"
    assert set(rows[0]["responses"]).isdisjoint(rows[2]["responses"])
    shown = capsys.readouterr().out
    assert "complete: 3 parts; 3 of 6 rows written, 3.0 responses each" in shown
    assert "rows dropped: 1 with a prompt that leaves no room to answer" in shown
    assert "rows dropped: 2 with too few responses left" in shown
    assert "noted: 3 responses dropped: ended for content_filter" in shown
    assert "noted: 3 responses dropped: empty" in shown
    assert "noted: 3 responses truncated" in shown
    assert "noted: 1 prompts came before and are answered anew" in shown


def test_command_goes_on_after_a_failure(
    server: Server, write_jsonl: Callable[..., str], tmp_path: Any
) -> None:
    prompts = write_jsonl([{"prompt": f"prompt {number}"} for number in range(6)])
    options = ["--prompts", prompts, "--server.url", server.url, "--rows_per_part", "2"]
    command = ["sample", *options, "--server.retries", "0", "--server.concurrency", "1"]
    main([*command, "--out", str(tmp_path / "whole")])
    # Well for the first part's two, and then not.
    server.requests, server.well_for = [], 2
    with pytest.raises(SystemExit, match="start the same command again to continue"):
        main([*command, "--out", str(tmp_path / "cut")])
    assert sorted(p.name for p in (tmp_path / "cut").glob("*.jsonl")) == ["part-00000.jsonl"]
    server.requests, server.well_for = [], None
    main([*command, "--out", str(tmp_path / "cut")])
    assert len(server.requests) == 4
    for part in (tmp_path / "whole").glob("part-*"):
        assert (tmp_path / "cut" / part.name).read_bytes() == part.read_bytes()
