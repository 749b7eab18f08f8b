"""A server that is not ours: ``transformers serve``, where its extra is installed."""

import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from transformers import GenerationConfig
from transformers.utils.import_utils import is_serve_available

from mpo_lightning.cli import main
from tests.conftest import read_rows, write_rows
from tests.processes import Started, command_line

pytestmark = pytest.mark.skipif(
    not is_serve_available(), reason="transformers[serving] is not installed"
)
PROMPTS = [
    {"prompt": "Name a fruit."},
    {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]},
    {"prompt": "Grüße \U0001f600", "id": 7},
    {"prompt": "Count."},
]


def serve(base: str, port: int) -> None:
    """``transformers serve BASE --port PORT --device cpu``."""
    from transformers.cli.serve import Serve

    Serve(base, device="cpu", port=port, host="127.0.0.1")  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def served(base: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Settings of a server of the tiny model, which samples where it is asked to."""
    folder = tmp_path_factory.mktemp("served") / "base"
    shutil.copytree(base, folder)
    GenerationConfig(do_sample=True, top_k=0, bos_token_id=0, eos_token_id=1).save_pretrained(
        folder
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    started = Started(serve, [str(folder), port])
    (process,) = started.processes
    while True:
        try:
            urlopen(f"http://127.0.0.1:{port}/health").close()
            break
        except URLError:
            assert process.exitcode is None, started.finish().stderr
            time.sleep(0.1)
    yield [f"--server.url=http://127.0.0.1:{port}/v1", f"--server.model={folder}"]
    process.kill()
    started.finish()


def command(prompts: Path, out: Path, *more: str) -> list[str]:
    options = [f"--prompts={prompts}", f"--out={out}", "--max_new_tokens=12", *more]
    return ["sample", *options, "--rows_per_part=1", "--progress=false"]


def rows_of(folder: Path) -> list[Any]:
    return [row for _, row in read_rows(str(folder))]


def test_likeliest_answers_are_those_of_the_model_here(
    served: list[str], base: str, tmp_path: Path
) -> None:
    prompts = write_rows(tmp_path / "prompts.jsonl", PROMPTS)
    for name, model in (("there", served), ("here", [f"--model.base={base}"])):
        main(command(prompts, tmp_path / name, "--n=1", "--temperature=0", *model))
    there, here = (rows_of(tmp_path / name) for name in ("there", "here"))
    assert len(there) == len(PROMPTS)
    for of_server, of_model in zip(there, here, strict=True):
        assert {**of_server, "sampled": None} == {**of_model, "sampled": None}


def test_a_killed_run_goes_on(served: list[str], tmp_path: Path) -> None:
    """The server's seed is one for all that it computes: it is asked for one at a time."""
    prompts = write_rows(tmp_path / "prompts.jsonl", PROMPTS)
    options = ["--n=4", *served, "--server.concurrency=1"]
    killed = Started(command_line, command(prompts, tmp_path / "killed", *options))
    while not list((tmp_path / "killed").glob("part-*.jsonl")):
        assert killed.processes[0].exitcode is None, killed.finish().stderr
        time.sleep(0.01)
    killed.processes[0].kill()
    killed.finish()
    left = sorted(path.name for path in (tmp_path / "killed").glob("part-*.jsonl"))
    assert 0 < len(left) < len(PROMPTS)
    for name in ("killed", "whole"):
        main(command(prompts, tmp_path / name, *options))
    rows = rows_of(tmp_path / "killed")
    assert rows == rows_of(tmp_path / "whole")
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in PROMPTS]
    assert all(len(set(row["responses"])) == 4 for row in rows)


def test_another_model_is_refused_by_row(served: list[str], tmp_path: Path) -> None:
    prompts = write_rows(tmp_path / "prompts.jsonl", PROMPTS)
    with pytest.raises(SystemExit) as stopped:
        main(command(prompts, tmp_path / "out", served[0], "--server.model=another"))
    told = str(stopped.value)
    assert f"{prompts}:1: HTTP status 400: " in told
    assert "requested 'another'" in told
    assert "\n" not in told
