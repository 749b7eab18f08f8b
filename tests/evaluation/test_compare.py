"""``mpo-lightning compare``: two files of answers, matched, scored, counted."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForSequenceClassification

from mpo_lightning.cli import main
from mpo_lightning.data.groups import DataError
from mpo_lightning.data.sources import open_source
from mpo_lightning.errors import RolloutError
from mpo_lightning.evaluation.compare import compare
from mpo_lightning.evaluation.formats import read_answers
from mpo_lightning.rollouts.scorers import RewardModelConfig, Scorable, load_reward_model
from tests.conftest import CHAT_TEMPLATE, make_tokenizer, tiny_config

QUICK = {"resamples": 100, "progress": False}


@pytest.fixture(autouse=True)
def _judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The score of a response is the number that it begins with."""
    (tmp_path / "judge_by_number.py").write_text(
        "def score(prompt, responses):\n    return [float(r.split()[0]) for r in responses]\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(tmp_path))


def alpaca(texts: dict[str, str]) -> list[dict[str, Any]]:
    return [{"instruction": p, "output": text, "generator": "a"} for p, text in texts.items()]


def test_by_hand(
    write_jsonl: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """AlpacaEval's file against Arena-Hard's: 2 wins, 1 tie, 1 loss of 4 common prompts."""
    ours = tmp_path / "ours.json"
    ours.write_text(
        json.dumps(alpaca({"a": "3 xx", "b": "2 x", "c": "1 xxx", "d": "1", "only": "9"})),
        encoding="utf-8",
    )
    theirs = write_jsonl(
        [
            {
                "uid": prompt,
                "messages": [
                    {"role": "user", "content": prompt},
                    {"role": "assistant", "content": {"answer": text}},
                ],
                "truncated": prompt == "c",
            }
            for prompt, text in {"d": "4", "c": "1 x", "b": "1 xx", "a": "1", "other": "0"}.items()
        ],
        "theirs.jsonl",
    )
    out = tmp_path / "found" / "comparison.json"
    main(
        [
            *["compare", "--policy", str(ours), "--reference", theirs, "--resamples", "100"],
            *["--function", "judge_by_number:score", "--out", str(out), "--progress", "false"],
        ]
    )
    shown = capsys.readouterr().out
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["prompts"] == 4
    assert found["games"] == {"wins": 2, "ties": 1, "losses": 1}
    assert found["win_rate"]["value"] == 0.625
    assert found["win_rate"]["low"] < 0.625 < found["win_rate"]["high"]
    # (2 + 1 + 0 - 3) / 4
    assert found["score_difference"]["value"] == 0
    assert (found["policy"]["score"], found["reference"]["score"]) == (1.75, 1.75)
    assert (found["policy"]["length"], found["reference"]["length"]) == (3.25, 2.25)
    assert (found["policy"]["truncated"], found["reference"]["truncated"]) == (0, 1)
    assert 0.5 < found["length_controlled_win_rate"]["value"] < 0.7
    assert found["dropped"] == {
        "only in the policy's file": {"prompts": 1, "first": [f"{ours}:5"]},
        "only in the reference's file": {"prompts": 1, "first": [f"{theirs}:5"]},
    }
    assert found["settings"]["scored_by"]["function"] == "judge_by_number:score"
    assert re.search(r"win rate, a tie counts 1/2 +0\.625 \[0\.\d+, 0\.\d+\]", shown)
    assert "2 wins, 1 ties, 1 losses" in shown
    assert "not compared: 1 prompts only in the policy's file" in shown
    with pytest.raises(SystemExit, match="exists already"):
        main(
            [
                *["compare", "--policy", str(ours), "--reference", theirs, "--out", str(out)],
                *["--function", "judge_by_number:score"],
            ]
        )


def test_several_responses_and_prompts_that_come_twice(write_jsonl: Callable[..., str]) -> None:
    """A text is the same prompt as one message of the user's; the n-th time meets the n-th."""
    chat = [{"role": "user", "content": "a"}]
    ours = write_jsonl(
        [
            {"prompt": chat, "responses": ["3", "1"], "truncated": [True, False]},
            {"prompt": "a", "responses": ["0"]},
        ],
        "ours.jsonl",
    )
    theirs = write_jsonl(
        [
            {"prompt": "a", "completion": "2", "hard": 0.5},
            {"prompt": chat, "completion": [{"role": "assistant", "content": "5"}], "hard": 1},
        ],
        "theirs.jsonl",
    )
    found = compare(
        policy=ours, reference=theirs, function="judge_by_number:score", difficulty="hard", **QUICK
    )
    # Of the first prompt half, of the second none.
    assert found["win_rate"]["value"] == 0.25
    assert found["games"] == {"wins": 1, "ties": 0, "losses": 2}
    assert found["policy"]["truncated"] == 1
    assert found["dropped"] == {}
    with pytest.raises(DataError, match=r"theirs\.jsonl:1: soft: found None"):
        compare(
            policy=ours,
            reference=theirs,
            function="judge_by_number:score",
            difficulty="soft",
            **QUICK,
        )


def test_a_reward_model_scores_and_what_it_cannot_take_is_counted(
    write_jsonl: Callable[..., str], tmp_path: Path
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForSequenceClassification(tiny_config(num_labels=1)).save_pretrained(tmp_path / "rm")
    make_tokenizer().save_pretrained(tmp_path / "rm")
    config = RewardModelConfig(path=str(tmp_path / "rm"), max_length=40)
    ours = write_jsonl(alpaca({"a": "An apple.", "b": "A pear.", "c": "rain " * 50}), "ours.jsonl")
    theirs = write_jsonl(alpaca({"a": "A dog.", "b": "The sky.", "c": "Blue."}), "theirs.jsonl")
    found = compare(policy=ours, reference=theirs, reward_model=config, **QUICK)
    scorer = load_reward_model(config)
    scores = scorer(
        [Scorable("a", ["An apple.", "A dog."], "x"), Scorable("b", ["A pear.", "The sky."], "y")]
    )
    assert found["prompts"] == 2
    assert found["win_rate"]["value"] == sum(one > other for one, other in scores) / 2
    assert found["policy"]["score"] == pytest.approx((scores[0][0] + scores[1][0]) / 2, abs=1e-5)
    assert found["dropped"] == {
        "beyond the scorer's max_length": {"prompts": 1, "first": [f"{ours}:3"]}
    }
    assert found["settings"]["scored_by"]["max_length"] == 40


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a"}, "row: found the columns"),
        ({"instruction": "a", "output": None}, "output: found .None."),
        ({"output": "a"}, "prompt: found null"),
        ({"prompt": "a", "responses": []}, "responses: found"),
        ({"messages": ["a"]}, "messages: found"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "x"}]}, r"messages\[1\].content"),
    ],
    ids=str,
)
def test_rows_that_are_no_answers(
    row: dict[str, Any], message: str, write_jsonl: Callable[..., str]
) -> None:
    path = write_jsonl([row])
    with pytest.raises(DataError, match=f"groups.jsonl:1: {message}"):
        list(read_answers(open_source(path)))


def test_wrong_use(write_jsonl: Callable[..., str]) -> None:
    one = write_jsonl(alpaca({"a": "1"}), "one.jsonl")
    other = write_jsonl(alpaca({"b": "1"}), "other.jsonl")
    with pytest.raises(DataError, match="no prompt in common; the first are 'a' and 'b'"):
        compare(policy=one, reference=other, function="judge_by_number:score", **QUICK)
    with pytest.raises(RolloutError, match="Name either"):
        compare(policy=one, reference=one, **QUICK)
    with pytest.raises(RolloutError, match="resamples must be at least 100"):
        compare(policy=one, reference=one, function="judge_by_number:score", resamples=10)


def test_answers_are_compared_with_what_belongs_to_their_conversation(
    write_jsonl: Callable[..., str],
) -> None:
    tools = [{"type": "function", "function": {"name": "calc"}}]
    row = {"prompt": "2+2?", "system": "Be brief.", "tools": tools}
    call = {"function": {"name": "calc", "arguments": {"sum": "2+2"}}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    path = write_jsonl([row | {"responses": [answer]}, row | {"completion": [answer]}])
    for found in read_answers(open_source(path)):
        assert found.prompt == [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "2+2?"},
        ]
        assert found.responses == [answer]
        assert found.template_arguments == {"tools": tools}
        assert found.texts == [""]


def test_text_that_the_reward_model_s_template_leaves_out_is_noted(
    write_jsonl: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    LlamaForSequenceClassification(tiny_config(num_labels=1)).save_pretrained(tmp_path / "rm")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("content }}", "content.split('!')[-1] }}")
    tokenizer.save_pretrained(tmp_path / "rm")
    ours = write_jsonl(alpaca({"a": "So! An apple.", "b": "A pear."}), "ours.jsonl")
    theirs = write_jsonl(alpaca({"a": "A dog.", "b": "The sky."}), "theirs.jsonl")
    config = RewardModelConfig(path=str(tmp_path / "rm"), response_text="keep")
    found = compare(policy=ours, reference=theirs, reward_model=config, **QUICK)
    reason = "responses whose text the chat template leaves out or changes, for the reward model"
    reason += " (reward_model.response_text)"
    assert found["noted"] == {reason: {"responses": 1, "first": [f"{ours}:1"]}}
    assert f"noted: 1 {reason} (first: {ours}:1)" in capsys.readouterr().out
    with pytest.raises(DataError, match="reward_model.response_text: keep"):
        compare(
            policy=ours,
            reference=theirs,
            reward_model=RewardModelConfig(path=str(tmp_path / "rm")),
            **QUICK,
        )
