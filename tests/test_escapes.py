"""Control characters of data, file names and models: no command hands them to a terminal."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from mpo_lightning.cli import main
from tests.conftest import example_rows, write_rows
from tests.runs import write_recipe

ESCAPE = "\x1b]0;title\x07\x1b[31m\u202e"
SCORES = "--function=tests.damage:scores"
QUIET = "--progress=false"


@pytest.fixture(scope="module")
def folder(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, their file and the base's folder, all with control characters in texts and names."""
    folder = tmp_path_factory.mktemp("escapes")
    rows: list[dict[str, Any]] = [
        {"prompt": f"Why {ESCAPE}?", "responses": [f"So {ESCAPE}.", f"No {ESCAPE}."]}
        | {"scores": [2.0, 1.0], f"id{ESCAPE}": ESCAPE, "models": [f"m{ESCAPE}", "n"]},
        *({**row, f"id{ESCAPE}": ESCAPE} for row in example_rows(3)),
    ]
    write_rows(folder / f"rows{ESCAPE}.jsonl", rows)
    bad = [*rows, {"prompt": "Why?", "responses": [ESCAPE], f"x{ESCAPE}": 1}]
    write_rows(folder / f"bad{ESCAPE}.jsonl", bad)
    prompts = [{"prompt": row["prompt"]} for row in [*rows, *rows]]
    write_rows(folder / f"prompts{ESCAPE}.jsonl", prompts)
    shutil.copytree(base, folder / f"base{ESCAPE}")
    write_recipe(
        folder,
        f"base{ESCAPE}",
        f"rows{ESCAPE}.jsonl",
        trainer={"logger": False, "default_root_dir": "run", "max_steps": 1},
        model={"reference": "cached", "reference_cache": "references"},
        data={"cache": "tokens", "num_proc": 1},
    )
    return folder


def test_no_command_prints_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    rows, bad, prompts = (f"{name}{ESCAPE}.jsonl" for name in ("rows", "bad", "prompts"))
    model = [f"--model.base=base{ESCAPE}", "--max_new_tokens=2", "--n=2", QUIET]
    out = f"out{ESCAPE}"
    commands = [
        ["fit", "--config=recipe.yaml"],
        [
            "predict",
            "--config=recipe.yaml",
            f"--data.predict={rows}",
            f"--predictions.path={out}.jsonl",
        ],
        ["data", "check", rows, bad],
        ["data", "check", rows, f"--tokenizer=base{ESCAPE}", "--show=2"],
        ["data", "convert", rows, f"--out={out}.parquet"],
        ["data", "convert", bad, "--out=new.jsonl"],
        ["data", "convert", bad, "--out=new.jsonl", "--bad_rows=drop"],
        ["data", "split", rows, f"--out={out}-split", "--val=1"],
        ["sample", f"--prompts={prompts}", f"--out={out}", *model],
        ["sample", f"--prompts={prompts}", f"--out={out}", *model, "--seed=1"],
        ["sample", f"--prompts={bad}.nope", f"--out={out}", *model],
        ["score", f"--data={rows}", f"--out={out}-scored", SCORES, QUIET],
        ["score", f"--data={bad}", f"--out={out}-bad", SCORES, QUIET],
        ["compare", f"--policy={rows}", f"--reference={rows}", SCORES, QUIET, f"--out={out}.json"],
        ["export", "last", "--run=run", f"--out={out}-export"],
        ["cache", "show", "references"],
        ["cache", "show", "--tokens", "tokens"],
        ["cache", "clear", "--tokens", "tokens"],
        ["cache", "clear", f"{out}-nothing"],
        ["fit", f"--config=no{ESCAPE}.yaml"],
        ["fit", f"--no{ESCAPE}=1"],
        [f"no{ESCAPE}"],
    ]
    printed = {}
    for command in commands:
        monkeypatch.setattr("sys.argv", ["mpo-lightning", *command])
        try:
            main(command)
            said: object = ""
        except SystemExit as stopped:
            said = stopped.code
        # What the interpreter prints at the end.
        printed[" ".join(command)] = f"{said}{''.join(capfd.readouterr())}"
    leaks = {
        json.dumps(command): [line[:200] for line in text.splitlines() if leaks_in(line)]
        for command, text in printed.items()
        if leaks_in(text)
    }
    assert not leaks, json.dumps(leaks, indent=2)
    shown = "".join(printed.values())
    assert shown.count("\\x1b]0;title") > len(commands) // 2
    assert os.path.exists(f"{out}-export")


def leaks_in(text: str) -> bool:
    return any(each in text for each in ("\x1b]", "\x07", "\x1b[31m\u202e", "\u202e"))
