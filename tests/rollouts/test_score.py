"""``mpo-lightning score``: canonical rows, ready for training, whatever happens between."""

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForSequenceClassification

from mpo_lightning.cli import main
from mpo_lightning.data.groups import PreferenceGroup
from mpo_lightning.data.reading import GroupReader
from mpo_lightning.rollouts.score import score
from mpo_lightning.rollouts.scorers import RewardModelConfig, Scorable, load_reward_model
from tests import processes
from tests.conftest import CORPUS, example_rows, make_tokenizer, read_rows, tiny_config
from tests.rollouts.killed_run import killed_run

SMALL = ["--rows_per_part", "3", "--progress", "false"]


def groups_of(folder: Path) -> list[PreferenceGroup]:
    """What training reads there, all of it usable."""
    groups = [result.group for result in GroupReader(str(folder)).results()]
    assert None not in groups
    return groups  # type: ignore[return-value]


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    unscored = []
    for row in example_rows(8):
        del row["scores"]
        unscored.append({**row, "truncated": [False] * len(row["responses"])})
    return unscored


@pytest.fixture
def data(rows: list[dict[str, Any]], write_jsonl: Callable[..., str]) -> str:
    return write_jsonl(rows)


@pytest.fixture
def function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A scorer of the user's, in the working directory."""
    folder = tmp_path / "user"
    folder.mkdir()
    (folder / "my_scores.py").write_text(
        "def lengths(prompt, responses):\n    return [len(text) for text in responses]\n"
        "def same(prompt, responses):\n    return [1 for text in responses]\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "my_scores", raising=False)
    return "my_scores:lengths"


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("reward")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(tiny_config(num_labels=1))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    model.float().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def command(data: str, out: Path, *more: str) -> list[str]:
    return ["score", "--data", data, "--out", str(out), *SMALL, *more]


def content(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_by_function(
    data: str,
    rows: list[dict[str, Any]],
    function: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    main(command(data, out, "--function", function))
    groups = groups_of(out)
    for group, row in zip(groups, rows, strict=True):
        assert group.prompt == row["prompt"]
        assert group.responses == row["responses"]
        assert group.scores == [len(text) for text in row["responses"]]
        assert group.truncated == row["truncated"]
        assert group.extra == {"prompt_id": row["prompt_id"], "scored_by": function}
    assert "is complete: 3 parts; 8 of 8 rows written" in capsys.readouterr().out


def test_by_reward_model(
    data: str, rows: list[dict[str, Any]], reward_model: str, tmp_path: Path
) -> None:
    main(command(data, tmp_path / "out", "--reward_model.path", reward_model))
    written = [row for _, row in read_rows(str(tmp_path / "out"))]
    items = [Scorable(row["prompt"], row["responses"], "x") for row in rows]
    expected = load_reward_model(RewardModelConfig(path=reward_model))(items)
    for row, scores in zip(written, expected, strict=True):
        assert row["scores"] == pytest.approx(scores, abs=1e-5)
        assert row["scored_by"] == reward_model


def test_responses_beyond_the_limit(
    write_jsonl: Callable[..., str],
    reward_model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    long = "word " * 60
    data = write_jsonl(
        [
            {
                "prompt": "a",
                "responses": ["b", long, "c"],
                "truncated": [False, True, True],
                "models": ["x", "y", "z"],
            },
            {"prompt": "a", "responses": ["b", long]},
        ]
    )
    limit = ["--reward_model.max_length", "60", "--reward_model.responses_per_batch", "2"]
    main(command(data, tmp_path / "out", "--reward_model.path", reward_model, *limit))
    (row,) = (row for _, row in read_rows(str(tmp_path / "out")))
    assert row["responses"] == ["b", "c"]
    assert row["truncated"] == [False, True]
    assert len(row["scores"]) == 2
    shown = capsys.readouterr().out
    assert "1 of 2 rows written" in shown
    assert "noted: 2 responses dropped: beyond the scorer's max_length" in shown
    assert "noted: 1 columns models left as long as the responses were" in shown
    assert "rows dropped: 1 with fewer than two responses left" in shown


def test_killed_and_gone_on(data: str, function: str, tmp_path: Path) -> None:
    scoring = ["--function", function]
    main(command(data, tmp_path / "whole", *scoring))
    out = tmp_path / "killed"
    killed = processes.run(killed_run, [8, command(data, out, *scoring)])
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert sorted(path.name for path in out.glob("*.jsonl")) == [
        "part-00000.jsonl",
        "part-00001.jsonl",
    ]
    assert len(list(out.glob(".*.partial"))) == 1
    main(command(data, out, *scoring))
    assert content(out) == content(tmp_path / "whole")


def test_two_processes_at_once(data: str, function: str, tmp_path: Path) -> None:
    """As torchrun starts them, on one folder that none of them has made yet."""
    main(command(data, tmp_path / "one", "--function", function))
    arguments = command(data, tmp_path / "two", "--function", function)
    both = processes.Started(processes.command_line, arguments, processes=2)
    shown = both.finish().stdout
    assert [process.exitcode for process in both.processes] == [0, 0]
    assert "is complete: 3 parts" in shown
    assert content(tmp_path / "two") == content(tmp_path / "one")


def test_a_changed_function_is_refused(data: str, function: str, tmp_path: Path) -> None:
    main(command(data, tmp_path / "out", "--function", function))
    with pytest.raises(SystemExit, match=r"function was 'my_scores:lengths', is 'my_scores:same'"):
        main(command(data, tmp_path / "out", "--function", "my_scores:same"))
    with Path("my_scores.py").open("a", encoding="utf-8") as file:
        file.write("# Another thought.\n")
    with pytest.raises(SystemExit, match="function_file was"):
        main(command(data, tmp_path / "out", "--function", function))


def test_scores_that_are_there(
    write_jsonl: Callable[..., str],
    function: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = write_jsonl(example_rows(2))
    with pytest.raises(SystemExit, match=r"groups\.jsonl:1: scores: found scores; expected none"):
        main(command(data, tmp_path / "out", "--function", function))
    main(command(data, tmp_path / "out", "--function", "my_scores:same", "--replace", "true"))
    assert all(set(row["scores"]) == {1.0} for _, row in read_rows(str(tmp_path / "out")))
    shown = capsys.readouterr().out
    assert "noted: 2 rows had scores, now replaced" in shown
    assert "noted: 2 rows have equal scores only" in shown


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"prompt": "a"}, "responses: found no such field"),
        ({"responses": ["a", "b"]}, "prompt: found no such field"),
        ({"prompt": "a", "responses": ["b"]}, r"responses: found 1 response\(s\)"),
        ({"prompt": "a", "responses": ["b", " "]}, r"responses\[1\]: found ' '"),
        (
            {"prompt": "a", "responses": ["b", "c"], "truncated": [True]},
            "truncated: found 1 entries for 2 responses",
        ),
        ("3", "row: found int"),
        ("{", "not valid JSON"),
    ],
)
def test_bad_rows(
    row: Any, found: str, write_jsonl: Callable[..., str], function: str, tmp_path: Path
) -> None:
    data = write_jsonl([{"prompt": "a", "responses": ["b", "c"]}, row])
    with pytest.raises(SystemExit, match=rf"groups\.jsonl:2: {found}"):
        main(command(data, tmp_path / "out", "--function", function))
    assert not (tmp_path / "out").exists()


def test_either_of_the_two(data: str, reward_model: str, function: str, tmp_path: Path) -> None:
    for more in ([], ["--function", function, "--reward_model.path", reward_model]):
        with pytest.raises(SystemExit, match="Name either"):
            main(command(data, tmp_path / "out", *more))


def test_sampled_rows_are_scored(base: str, function: str, tmp_path: Path) -> None:
    """The two commands in a row, with parts of other sizes, give what ``fit`` reads."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": t}) + "\n" for t in CORPUS), encoding="utf-8")
    sampled, scored = tmp_path / "sampled", tmp_path / "scored"
    main(
        [
            *["sample", "--prompts", str(prompts), "--model.base", base, "--out", str(sampled)],
            *["--n", "2", "--max_new_tokens", "6", "--rows_per_part", "1", "--progress", "false"],
            *["--special_tokens", "keep"],
        ]
    )
    score(data=str(sampled), out=str(scored), function=function, progress=False)
    groups = groups_of(scored)
    assert [group.prompt for group in groups] == CORPUS
    assert all(set(group.extra) == {"sampled", "scored_by"} for group in groups)
    assert all(group.truncated is not None for group in groups)


def test_a_token_that_the_reward_model_lacks_is_found_before_anything_is_scored(
    rows: list[dict[str, Any]], write_jsonl: Callable[..., str], tmp_path: Path
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|extra|>"])
    tokenizer.save_pretrained(tmp_path / "model")
    LlamaForSequenceClassification(tiny_config(num_labels=1)).save_pretrained(tmp_path / "model")
    rows[7]["responses"][1] += " <|extra|>"
    command = ["score", "--reward_model.path", str(tmp_path / "model"), *SMALL]
    with pytest.raises(
        SystemExit, match=r"jsonl:8: responses\[1\], after its prompt: found token 384 .*below 384"
    ):
        main([*command, "--data", write_jsonl(rows), "--out", str(tmp_path / "out")])
    assert not list((tmp_path / "out").glob("*.jsonl"))
    others = write_jsonl(rows[:7], "others.jsonl")
    main([*command, "--data", others, "--out", str(tmp_path / "others")])
