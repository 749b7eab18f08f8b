"""The loops of docs/rollouts.md, run as they stand there: the gold score rises round by round."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mpo_lightning.cli import main
from tests.conftest import read_rows, tiny_config, tiny_model
from tests.runs import write_recipe

DOCS = Path(__file__).parents[2] / "docs" / "rollouts.md"
WORDS = ["good", "bad", "dog", "cat", "sun", "rain", "tree", "bird", "fish", "stone", "river"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
GOLD = """
def score(prompt, responses):
    return [text.split().count("good") - text.split().count("bad") for text in responses]
"""


def loops() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    return [block for block in blocks if "for round in" in block]


def commands(loop: str) -> list[list[str]]:
    """What the shell would call, in order."""
    shell = f'mpo-lightning() {{ printf "%q " "$@"; echo; }}\n{loop}'
    listed = subprocess.run(
        ["bash", "-c", shell], capture_output=True, text=True, check=True, timeout=20
    ).stdout
    return [shlex.split(line) for line in listed.splitlines()]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the loops name, in the working directory: a model that says eleven words at random."""
    special = ["<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>", "<|unknown|>"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        additional_special_tokens=special[2:4],
        chat_template=TEMPLATE,
    )
    base = tmp_path / "my-org" / "base-model"
    tiny_model(tiny_config(vocab_size=len(vocabulary))).save_pretrained(base)
    tokenizer.save_pretrained(base)
    prompts = [{"prompt": f"{one} {other}"} for one in WORDS[2:6] for other in WORDS[6:]]
    lines = "".join(json.dumps(row) + "\n" for row in prompts)
    (tmp_path / "prompts.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "my_scores.py").write_text(GOLD, encoding="utf-8")
    write_recipe(
        tmp_path,
        "given by the loop",
        "given by the loop",
        trainer={"logger": False},
        model={
            "loss": {"class_path": "mpo_lightning.losses.MPO", "init_args": {"beta": 0.3}},
        },
        data={"groups_per_batch": 4},
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_scores", raising=False)
    monkeypatch.setattr(sys, "argv", ["mpo-lightning"])
    return tmp_path


def run(command: list[str]) -> None:
    small = ["--max_new_tokens", "16", "--progress", "false"]
    main([*command, *{"sample": small, "score": small[2:]}.get(command[0], [])])


def gold(folder: Path) -> float:
    scores = [value for _, row in read_rows(str(folder)) for value in row["scores"]]  # type: ignore[index]
    return sum(scores) / len(scores)


def checkpoints(folder: Path) -> dict[str, Any]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


def test_reference_of_the_round_before(world: Path) -> None:
    loop, _ = loops()
    asked = commands(loop)
    assert [command[0] for command in asked] == ["sample", "score", "fit", "export"] * 3
    # The last round's policy is measured by no round after it.
    for command in asked[:10]:
        run(command)
    rounds = world / "runs" / "rounds"
    scores = [gold(rounds / str(number) / "scored") for number in (1, 2, 3)]
    # One word in eleven says good, one bad; a response has at most 16.
    assert abs(scores[0]) < 0.5
    assert scores[1] > scores[0] + 1
    assert scores[2] > scores[1] + 0.5
    # Each round's policy was put on the model merged in the round before.
    named = json.loads(
        (rounds / "2" / "run" / "checkpoints" / "last-adapter" / "adapter_config.json").read_text()
    )["base_model_name_or_path"]
    assert Path(named) == rounds / "1" / "model"
    # Started again, the loop finds everything done.
    before = checkpoints(rounds)
    for command in asked[:10]:
        run(command)
    after = checkpoints(rounds)
    changed = [path for path in before if after[path] != before[path]]
    assert not [path for path in changed if "/model/" in path]


def test_reference_of_the_first_model(world: Path) -> None:
    _, loop = loops()
    asked = commands(loop)
    assert [command[0] for command in asked] == ["sample", "score", "fit"] * 3
    assert "--model.adapter" not in asked[0]
    for command in asked[:5]:
        run(command)
    rounds = world / "runs" / "rounds-from-base"
    assert gold(rounds / "2" / "scored") > gold(rounds / "1" / "scored") + 1
    # The second round samples from the first one's adapter, and trains the first model.
    adapter = "runs/rounds-from-base/1/run/checkpoints/last-adapter"
    assert asked[3][asked[3].index("--model.adapter") + 1] == adapter
    assert asked[5][asked[5].index("--model.policy.base") + 1] == "my-org/base-model"
