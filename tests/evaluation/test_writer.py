"""``predict`` with prompts: answers in each format, from the policy that was trained."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import Trainer
from safetensors.torch import load_file

from mpo_lightning import MPOModule, PolicyConfig, PreferenceDataModule
from mpo_lightning.cli import main
from mpo_lightning.data.groups import DataError
from mpo_lightning.data.prompts import request
from mpo_lightning.data.sources import open_source
from mpo_lightning.errors import UserError
from mpo_lightning.evaluation.formats import read_answers
from mpo_lightning.evaluation.writer import PredictionWriter
from mpo_lightning.generation.generate import Generation, ModelSampler, Sample
from mpo_lightning.generation.model import ModelConfig, load_sampler
from mpo_lightning.strategy import FSDP2
from tests.conftest import CORPUS, example_rows

ALPACA = [
    {"dataset": "koala", "instruction": text, "output": "a reference", "generator": "gpt"}
    for text in CORPUS
]
ARENA = [
    {"uid": f"u{number}", "category": "hard_prompt", "subcategory": "x", "prompt": text}
    for number, text in enumerate(CORPUS)
]
SETTINGS = {"max_new_tokens": 6, "temperature": 0.8, "top_p": 0.9, "seed": 3}
GENERATION = [f"--model.generation.{name}={value}" for name, value in SETTINGS.items()]
# Random weights write special tokens now and then.
GENERATION.append("--model.generation.special_tokens=keep")


@pytest.fixture(autouse=True)
def _plain_argv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["mpo-lightning"])


@pytest.fixture(scope="module")
def run(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run, whose adapter speaks differently from the base."""
    root = tmp_path_factory.mktemp("run")
    train = root / "train.jsonl"
    train.write_text("\n".join(map(json.dumps, example_rows(4))), encoding="utf-8")
    recipe = {
        "trainer": {
            "accelerator": "cpu",
            "default_root_dir": str(root),
            "max_epochs": 2,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "model": {
            "policy": {"base": base, "lora": {"r": 4}},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.3}},
            "lr_scheduler": None,
        },
        "data": {"train": str(train), "groups_per_batch": 3},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["mpo-lightning"])
        main(["fit", "--config", str(root / "recipe.yaml")])
    weights = load_file(root / "checkpoints" / "last-adapter" / "adapter_model.safetensors")
    assert max(float(w.abs().max()) for n, w in weights.items() if "lora_B" in n) > 0.1
    return root


def command(run: Path, prompts: str, out: Path, *more: str, checkpoint: bool = True) -> list[str]:
    chosen = [f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}"] if checkpoint else []
    where = [f"--data.predict={prompts}", f"--predictions.path={out}"]
    return ["predict", f"--config={run / 'recipe.yaml'}", *chosen, *where, *GENERATION, *more]


def asked(base: str, adapter: str | None, prompts: list[Any], **changes: Any) -> list[str]:
    """What the model says when it is loaded by itself, prompt by prompt."""
    sampling = Generation(**{**SETTINGS, **changes}).sampling()
    sampler = load_sampler(ModelConfig(base=base, adapter=adapter), sampling, responses_per_batch=1)
    return [sampler([request(prompt)])[0].samples[0].text for prompt in prompts]


def test_answers_are_those_of_the_exported_adapter(
    run: Path,
    base: str,
    tmp_path: Path,
    write_jsonl: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Go."}]
    rows: list[Any] = [{"prompt": text, "id": n} for n, text in enumerate(CORPUS)]
    rows += [{"prompt": conversation}, {"prompt": CORPUS[0]}]
    prompts, out = write_jsonl(rows, "prompts.jsonl"), tmp_path / "answers.jsonl"
    main(command(run, prompts, out))
    shown = capsys.readouterr().out
    found = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    adapter = str(run / "checkpoints" / "last-adapter")
    expected = asked(base, adapter, [row["prompt"] for row in rows[:5]])
    assert [row["responses"] for row in found[:5]] == [[text] for text in expected]
    assert expected != asked(base, None, [row["prompt"] for row in rows[:5]])
    # The same prompt again is answered anew.
    assert found[5]["responses"] != found[0]["responses"]
    assert [row["prompt"] for row in found] == [row["prompt"] for row in rows]
    assert [row.get("id") for row in found] == [0, 1, 2, 3, None, None]
    assert found[0]["sampled"] == {
        **{"model": f"{Path(base).name}+last", "max_new_tokens": 6, "temperature": 0.8},
        **{"top_p": 0.9, "top_k": 0, "seed": 3},
    }
    cut = sum(row["truncated"][0] for row in found)
    assert cut > 0
    assert "6 of 6 rows written" in shown
    assert f"{cut} responses truncated" in shown
    assert "1 prompts came before" in shown
    with pytest.raises(SystemExit, match="exists already"):
        main(command(run, prompts, out))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["answers.jsonl", "prompts.jsonl"]


def test_two_processes_write_the_file_of_one(
    run: Path, tmp_path: Path, write_jsonl: Callable[..., str]
) -> None:
    """Five prompts in batches of two: three batches over two processes."""
    prompts = write_jsonl([*ALPACA, {**ALPACA[0], "instruction": "Why?"}], "alpaca.jsonl")
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    batches = "--data.groups_per_batch=2"
    main(command(run, prompts, one, batches))
    processes = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    result = subprocess.run(
        [sys.executable, "-m", "mpo_lightning", *command(run, prompts, two, batches, *processes)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert two.read_bytes() == one.read_bytes()
    rows = json.loads(one.read_text(encoding="utf-8"))
    assert [row["instruction"] for row in rows] == [*CORPUS, "Why?"]
    assert all(row["dataset"] == "koala" for row in rows)
    assert all(row["generator"].endswith("+last") for row in rows)
    assert all(
        set(row) == {"dataset", "instruction", "output", "generator", "truncated"} for row in rows
    )


def test_arena_hard_and_prompts_of_groups(
    run: Path,
    base: str,
    tmp_path: Path,
    write_jsonl: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    arena = tmp_path / "mine.jsonl"
    questions = write_jsonl(ARENA, "question.jsonl")
    greedy = ["--model.generation.temperature=0", "--predictions.model=mine"]
    main(command(run, questions, arena, *greedy, checkpoint=False))
    rows = [json.loads(line) for line in arena.read_text(encoding="utf-8").splitlines()]
    # Without a checkpoint the adapter is fresh: the base answers.
    expected = asked(base, None, CORPUS, temperature=0.0)
    assert [(r["uid"], r["model"], r["messages"]) for r in rows] == [
        (
            f"u{number}",
            "mine",
            [
                {"role": "user", "content": text},
                {"role": "assistant", "content": {"answer": answer}},
            ],
        )
        for number, (text, answer) in enumerate(zip(CORPUS, expected, strict=True))
    ]
    assert len({row["ans_id"] for row in rows}) == 4

    # Scored groups have prompts, too; both kinds of file are read back, and scored.
    groups = write_jsonl(example_rows(4), "groups.jsonl")
    own = tmp_path / "own.jsonl"
    capsys.readouterr()
    main(command(run, groups, own, "--data.predict_as=prompts"))
    assert "4 columns scores not read" in capsys.readouterr().out
    read = list(read_answers(open_source(str(own))))
    assert [answers.prompt for answers in read] == [row["prompt"] for row in example_rows(4)]
    texts = [answers.responses[0] for answers in read_answers(open_source(str(arena)))]
    assert texts == expected


REFUSED: dict[str, tuple[list[Any], str, dict[str, Any], str]] = {
    "suffix": (ALPACA, "a.parquet", {}, "alpaca-eval is written to a .json file"),
    "no uid": (ALPACA, "a.jsonl", {"format": "arena-hard"}, r"\.jsonl:1: uid: found None"),
    "not measured": (ALPACA, "a.parquet", {"format": "parquet"}, "the data are prompts alone"),
    "conversation": (
        example_rows(2)[1:],
        "a.json",
        {"format": "alpaca-eval", "predict_as": "prompts"},
        "prompt: found a conversation of 2 messages",
    ),
    "groups": (example_rows(2), "a.json", {"format": "alpaca-eval"}, "data are scored groups"),
    "no scores": ([{"prompt": "a", "responses": ["b", "c"]}], "a.jsonl", {}, "fit no schema"),
    "input": (
        [{"instruction": "a", "input": "b"}],
        "a.json",
        {},
        "input: found 'b'; expected no column",
    ),
    "sharded": (ALPACA, "a.json", {"strategy": FSDP2()}, "the whole model on each process"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused_before_anything_is_answered(
    case: str,
    base: str,
    tmp_path: Path,
    write_jsonl: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("answered")

    monkeypatch.setattr("mpo_lightning.generation.generate.ModelSampler.__call__", never)
    rows, name, settings, message = REFUSED[case]
    writer = PredictionWriter(str(tmp_path / name), settings.get("format", "auto"))
    data = PreferenceDataModule(
        tokenizer=base, predict=write_jsonl(rows), predict_as=settings.get("predict_as", "auto")
    )
    trainer = Trainer(
        accelerator="cpu",
        strategy=settings.get("strategy", "auto"),
        callbacks=[writer],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    with pytest.raises(UserError, match=message):
        trainer.predict(MPOModule(policy=PolicyConfig(base=base)), data)
    assert [p.name for p in tmp_path.iterdir()] == ["groups.jsonl"]


def test_sources_of_both_kinds_are_not_mixed(base: str, write_jsonl: Callable[..., str]) -> None:
    prompts = write_jsonl(ARENA, "question.jsonl")
    groups = write_jsonl(example_rows(2), "groups.jsonl")
    data = PreferenceDataModule(tokenizer=base, predict=[prompts, groups])
    with pytest.raises(DataError, match=r"question\.jsonl'\] hold prompts alone, .*groups"):
        data.setup("predict")


def test_in_python_and_in_four_bits(base: str, write_jsonl: Callable[..., str]) -> None:
    """Also that columns may have other names."""
    pytest.importorskip("bitsandbytes")
    path = write_jsonl([{"question": text} for text in CORPUS])
    module = MPOModule(
        policy=PolicyConfig(base=base, quantization="nf4"), generation=Generation(**SETTINGS)
    )
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    data = PreferenceDataModule(tokenizer=base, predict=path, columns={"question": "prompt"})
    (answered,) = trainer.predict(module, data)
    found = {each.item.number: each.answers.samples[0].text for each in answered}
    sampler = load_sampler(
        ModelConfig(base=base, quantization="nf4"), Generation(**SETTINGS).sampling()
    )
    expected = [answers.samples[0].text for answers in sampler([request(p) for p in CORPUS])]
    assert [found[number] for number in range(4)] == expected
    assert expected != asked(base, None, CORPUS)


def test_a_prompt_without_room_is_left_out_and_counted(
    run: Path, tmp_path: Path, write_jsonl: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write_jsonl([{"prompt": "word " * 600}, {"prompt": "Why?"}], "prompts.jsonl")
    out = tmp_path / "answers.jsonl"
    main(command(run, prompts, out, checkpoint=False))
    with out.open(encoding="utf-8") as file:
        assert [json.loads(line)["prompt"] for line in file] == ["Why?"]
    assert "1 with a prompt that leaves no room to answer (first: " in capsys.readouterr().out


def test_no_answer_is_an_error(
    run: Path, tmp_path: Path, write_jsonl: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No prompt leaves room, or every answer is left out: no file, and the reason."""
    out = tmp_path / "model_outputs.json"
    long = write_jsonl([{"instruction": "word " * 600}] * 2, "long.jsonl")
    with pytest.raises(SystemExit, match="no answer, so no file is written.*\n.*2 with a prompt"):
        main(command(run, long, out, checkpoint=False))
    special = Sample("ab", "stop", special_tokens=1)
    monkeypatch.setattr(ModelSampler, "_sample", lambda *_: special)
    short = write_jsonl([{"instruction": "Why?"}] * 2, "short.jsonl")
    dropped = command(run, short, out, "--model.generation.special_tokens=drop", checkpoint=False)
    with pytest.raises(SystemExit, match="2 whose answer has special tokens in its midst"):
        main(dropped)
    assert not list(tmp_path.glob("*model_outputs*"))
    main(command(run, short, out, "--model.generation.max_new_tokens=4000", checkpoint=False))
    assert [row["output"] for row in json.loads(out.read_text(encoding="utf-8"))] == ["ab", "ab"]
