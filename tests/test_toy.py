"""The toy world: its language, its gold score, its files, and the report of the quick start."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mpo_lightning.toy import language, world
from mpo_lightning.toy.__main__ import main
from mpo_lightning.toy.language import gold_score, gold_scores, is_grammatical

PROMPT = "How is the price of the boat?"


def answers(count: int, *, seed: int = 0) -> list[tuple[str, str]]:
    """Prompts and answers of the grammar."""
    rng = random.Random(seed)
    prompts = [prompt for prompt, _, _ in language.requests()]
    asked = rng.choices(prompts, k=count)
    return [(prompt, language.write_answer(prompt, rng)) for prompt in asked]


# ------------------------------------------------------------------------------------ language


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("", 0.0),
        ("The boat is plain and small. Its price is mild.", 1.0),
        ("The boat is good and great. Its price is lovely!", 4.0),
        ("The boat is bad and poor. Its price is sad!", -2.0),
        ("The lamp is bad and good. Its price is sad!", -1.0),
        # A word said again earns nothing if positive, costs 1 if neutral and 2 if negative.
        ("The boat is good and good. Its price is plain.", 2.0),
        ("The boat is plain and plain. Its price is small.", 0.0),
        ("The boat is bad and bad. Its price is small.", -2.0),
        # Three times is two repetitions; intensifiers and function words may be said again.
        ("good good good", 1.0),
        ("The boat is very good and it is very nice.", 3.0),
        # Whole words in any case: "goods" and "boats" are neither.
        ("GOOD Boat", 2.0),
        ("goods boats", 0.0),
    ],
)
def test_gold_by_hand(response: str, score: float) -> None:
    assert gold_score(PROMPT, response) == score


def test_gold_of_several_responses() -> None:
    responses = ["The boat is plain.", "The boat is good and great."]
    assert gold_scores(PROMPT, responses) == [1.0, 3.0]


def test_gold_needs_one_topic() -> None:
    with pytest.raises(ValueError, match="exactly one topic"):
        gold_score("How are you?", "Good.")
    with pytest.raises(ValueError, match="exactly one topic"):
        gold_score("Is the boat on the river?", "Good.")


def test_grammar_sentences_parse() -> None:
    drawn = answers(2000)
    assert all(is_grammatical(text) for _, text in drawn)
    assert len({text for _, text in drawn}) > 1900
    moods = (language.POSITIVE, language.NEUTRAL, language.NEGATIVE)
    for _, text in drawn:
        assert sum(word in mood for word in language.words(text) for mood in moods) == 3


@pytest.mark.parametrize(
    "text",
    [
        "",
        "The boat is good and nice.",
        "The boat is good and nice. Its price was mild.",
        "The boat is good nice. Its price is mild.",
        "The boat is good and nice. Its price is mild",
        "The boat is good and nice. its price is mild.",
        "The boat is good and nice. Its price is mild. ",
        "The goat is good and nice. Its price is mild.",
    ],
)
def test_other_sentences_do_not_parse(text: str) -> None:
    assert is_grammatical("The boat is good and nice. Its price is mild.")
    assert not is_grammatical(text)


def test_splits_share_no_topic_with_aspect() -> None:
    splits = language.split_prompts(random.Random(0), 256, 32, 64)
    assert [len(split) for split in splits[:3]] == [256, 32, 64]
    pairs = [
        {(language.topic_of(prompt), language.aspect_of(prompt)) for prompt in split}
        for split in splits
    ]
    train, val, test, pool = pairs
    assert len(val) == 32
    assert len(test) == 64
    assert train <= pool
    assert not pool & val
    assert not pool & test
    assert not val & test
    assert all(len(set(split)) == len(split) for split in splits)
    with pytest.raises(ValueError, match="864 training prompts"):
        language.split_prompts(random.Random(0), 865, 32, 64)


# --------------------------------------------------------------------------- tokenizer and model


@pytest.fixture(scope="module")
def toy_tokenizer(toy_world: Path) -> Any:
    return AutoTokenizer.from_pretrained(toy_world / "base")


def test_tokenizer_round_trip(toy_tokenizer: Any) -> None:
    texts = [text for _, text in answers(200)] + ["Na\u00efve \u2713\n  x ,!", " a", ""]
    for text in texts:
        ids = toy_tokenizer(text)["input_ids"]
        assert toy_tokenizer.decode(ids) == text
        assert toy_tokenizer.bos_token_id not in ids
    lengths = [len(toy_tokenizer(text)["input_ids"]) + 1 for _, text in answers(1000)]
    assert min(lengths) >= 8
    assert sum(8 <= length <= 24 for length in lengths) > 970


def test_template(toy_tokenizer: Any) -> None:
    def ids(messages: list[dict[str, str]], **options: Any) -> list[int]:
        text = toy_tokenizer.apply_chat_template(messages, tokenize=False, **options)
        plain = toy_tokenizer(text)["input_ids"]
        # Tokenizing the rendered text, or rendering to tokens: the same, with one begin token.
        tokens = toy_tokenizer.apply_chat_template(messages, return_dict=False, **options)
        assert plain == tokens
        assert plain.count(toy_tokenizer.bos_token_id) == 1
        assert plain[0] == toy_tokenizer.bos_token_id
        return list(plain)

    for prompt, answer in answers(50):
        turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": prompt}]
        for start in (turns[1:], turns):
            front = ids(start, add_generation_prompt=True)
            whole = ids([*start, {"role": "assistant", "content": answer}])
            assert whole[: len(front)] == front
            assert whole[-1] == toy_tokenizer.eos_token_id
            assert toy_tokenizer.decode(whole[len(front) : -1]) == answer
        assert ids(turns[1:], add_generation_prompt=True) == world.prompt_ids(toy_tokenizer, prompt)
    with pytest.raises(Exception, match="unknown role: tool"):
        toy_tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_special_tokens_are_distinct(toy_tokenizer: Any, toy_world: Path) -> None:
    special = toy_tokenizer.bos_token_id, toy_tokenizer.eos_token_id, toy_tokenizer.pad_token_id
    assert len(set(special)) == 3
    config = json.loads((toy_world / "base" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == special
    assert config["vocab_size"] == len(toy_tokenizer)


def test_model_size_and_dtype(toy_world: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(toy_world / "base")
    assert model.config.model_type == "llama"
    assert 1e6 < sum(weight.numel() for weight in model.parameters()) < 3e6
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_model_learnt_the_language(toy_world: Path) -> None:
    measured = json.loads((toy_world / "world.json").read_text())["measured"]
    assert measured["grammatical"] > 0.85
    # The grammar itself is on topic in 75% of its answers.
    assert 0.6 < measured["on_topic"] < 0.85
    assert measured["distinct"] > 0.95


# -------------------------------------------------------------------------------------- the data


def read_split(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("name", "count"), [("train", 256), ("val", 32), ("test", 64)])
def test_groups(toy_world: Path, name: str, count: int) -> None:
    rows = read_split(toy_world, name)
    assert len(rows) == count
    assert len({row["prompt_id"] for row in rows}) == count
    spreads = []
    for row in rows:
        assert len(row["responses"]) == 8
        assert all(response.strip() for response in row["responses"])
        assert row["scores"] == [gold_score(row["prompt"], text) for text in row["responses"]]
        spreads.append(torch.tensor(row["scores"]).std().item())
    # Groups without contrast teach nothing; they should be next to none.
    assert sum(spread == 0 for spread in spreads) <= 1
    assert sum(spreads) / count > 1
    held = {row["prompt"] for row in rows}
    assert all(
        held.isdisjoint(row["prompt"] for row in read_split(toy_world, other))
        for other in world.SPLITS
        if other != name
    )


# --------------------------------------------------------------------------------- building again


def test_second_build_reuses(toy_world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {path: path.stat().st_mtime_ns for path in toy_world.rglob("*")}
    again = world.build(toy_world, seed=0)
    assert again.reused
    assert "Reusing" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in toy_world.rglob("*")} == files
    assert again.fingerprint == world.fingerprint(0)


def test_fingerprint_depends_on_seed_settings_and_version(monkeypatch: pytest.MonkeyPatch) -> None:
    marks = {
        world.fingerprint(0),
        world.fingerprint(1),
        world.fingerprint(0, replace(world.Settings(), teaching_steps=7)),
    }
    monkeypatch.setattr(world, "WORLD_VERSION", world.WORLD_VERSION + 1)
    marks.add(world.fingerprint(0))
    monkeypatch.setattr(language, "OFF_TOPIC", 0.5)
    marks.add(world.fingerprint(0))
    assert len(marks) == 5


def fake_write(path: Path, seed: int, settings: world.Settings, mark: str) -> None:
    """Writes the files of a world, without a model in them."""
    (path / "base").mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        (path / "base" / name).write_text(str(seed))
    for name in world.SPLITS:
        (path / f"{name}.jsonl").write_text("")
    (path / "world.json").write_text(json.dumps({"fingerprint": mark}))


@pytest.fixture
def fake_build(monkeypatch: pytest.MonkeyPatch) -> Callable[..., world.ToyWorld]:
    monkeypatch.setattr(world, "_write_world", fake_write)
    return world.build


def test_other_fingerprint_or_partial_world_is_built_again(
    fake_build: Callable[..., world.ToyWorld], tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "world"
    assert not fake_build(out, seed=0).reused
    assert fake_build(out, seed=0).reused
    assert not fake_build(out, seed=1).reused
    assert (out / "base" / "config.json").read_text() == "1"
    for missing in ("train.jsonl", "base/model.safetensors", "world.json"):
        (out / missing).unlink()
        assert world.find_world(out, world.fingerprint(1)) is None
        assert not fake_build(out, seed=1).reused
    (out / "world.json").write_text('{"fingerp')
    assert not fake_build(out, seed=1).reused
    assert [path.name for path in out.parent.iterdir()] == ["world"]


def test_foreign_files_are_left_alone(
    fake_build: Callable[..., world.ToyWorld], tmp_path: Path
) -> None:
    out = tmp_path / "world"
    fake_build(out, seed=0)
    (out / "adapter").mkdir()
    assert fake_build(out, seed=0).reused
    with pytest.raises(FileExistsError, match="adapter"):
        fake_build(out, seed=1)
    assert (out / "base" / "config.json").read_text() == "0"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file"):
        fake_build(tmp_path / "file")


def test_failed_build_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(path: Path, *_: Any) -> None:
        (path / "world.json").write_text("{}")
        raise RuntimeError("no space left")

    monkeypatch.setattr(world, "_write_world", fail)
    with pytest.raises(RuntimeError, match="no space left"):
        world.build(tmp_path / "world")
    assert list(tmp_path.iterdir()) == []


SMALL = world.Settings(
    train_prompts=6,
    val_prompts=2,
    test_prompts=3,
    responses_per_prompt=3,
    tokenizer_texts=300,
    hidden_size=64,
    intermediate_size=128,
    teaching_steps=80,
    teaching_lr=1e-2,
)


def test_small_build_is_deterministic_and_leaves_the_generator_alone(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    random_state = random.getstate()
    worlds = [world.build(tmp_path / name, seed, SMALL) for name, seed in (("a", 3), ("b", 3))]
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == random_state
    first, second = worlds
    assert not second.reused
    for name in ("base/model.safetensors", "base/tokenizer.json", "train.jsonl", "test.jsonl"):
        assert (first.path / name).read_bytes() == (second.path / name).read_bytes(), name
    other = world.build(tmp_path / "c", 4, SMALL)
    assert other.split("train").read_bytes() != first.split("train").read_bytes()
    with pytest.raises(ValueError, match="no split 'dev'"):
        first.split("dev")


def test_untaught_model_is_an_error(tmp_path: Path) -> None:
    settings = replace(SMALL, teaching_steps=2, max_new_tokens=2)
    with pytest.raises(RuntimeError, match="not taught long enough"):
        world.build(tmp_path / "w", 0, settings)


# ----------------------------------------------------------------------------------- the sampler


def test_samples_follow_the_model(toy_tokenizer: Any) -> None:
    """The first sampled token has the model's own distribution, with left padding in the batch."""
    # Large random weights, unlike taught ones, let everything that is attended to show.
    settings = world.Settings(hidden_size=64, intermediate_size=128, initializer_range=0.1)
    model = world.make_model(toy_tokenizer, 0, settings).eval()
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        embedding[toy_tokenizer.pad_token_id] = embedding[toy_tokenizer.eos_token_id]
    prompts = [
        "How is the price of the boat?",
        "I want to know more about the tea. How is its look?",
    ]
    count = 1500
    drawn = world.sample_responses(
        model, toy_tokenizer, prompts, count, seed=1, max_new_tokens=1, rows=2 * count
    )
    for prompt, group in zip(prompts, drawn, strict=True):
        ids = torch.tensor([world.prompt_ids(toy_tokenizer, prompt)])
        expected = model(ids).logits[0, -1].softmax(-1)
        counts = torch.bincount(torch.tensor([ids[0] for ids in group]), minlength=len(expected))
        error = (expected * (1 - expected) / count).sqrt()
        assert ((counts / count - expected).abs() < 5 * error + 2 / count).all()
        # Rare tokens are not cut off.
        rare = expected.argsort()[:-50]
        tail = expected[rare].sum().item()
        assert tail > 0.3
        error_of_tail = (tail * (1 - tail) / count) ** 0.5
        assert counts[rare].sum().item() / count == pytest.approx(tail, abs=5 * error_of_tail)


# -------------------------------------------------------------------------------------- the report


METRICS = """\
epoch,step,train/loss,train/rewards/margin,train/rewards/accuracy,train/kl,val/loss,\
val/rewards/margin,val/rewards/accuracy,val/kl
0,1,0.7,0.0,0.5,0.0,,,,
0,1,,,,,0.69,0.1,0.55,0.01
0,9,0.5,0.4,0.9,0.2,,,,
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The files that the report reads, made up."""
    comparison = {
        "policy": {"score": 2.154},
        "reference": {"score": 0.556},
        "score_difference": {"value": 1.598, "low": 1.431, "high": 1.748},
        "win_rate": {"value": 0.796, "low": 0.77, "high": 0.829},
    }
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "comparison.json").write_text(json.dumps(comparison))
    rows = [
        {"file": "a/before-scored/part-00000.jsonl", "tokens": 10, "log_ratio": 7.0},
        {"file": "a/before-scored/part-00001.jsonl", "tokens": 15, "log_ratio": 7.0},
        {"file": "a/after-scored/part-00000.jsonl", "tokens": 12, "log_ratio": 1.5},
        {"file": "a/after-scored/part-00000.jsonl", "tokens": 20, "log_ratio": -0.5},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "report" / "predictions.parquet")
    (tmp_path / "metrics.csv").write_text(METRICS)
    return tmp_path


def test_report_command(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["report", "--run", str(run), "--seed", "3"])
    head, rule, row, *rest = capsys.readouterr().out.splitlines()
    assert head.split(" | ")[1:4] == ["gold score before", "after", "gain [95% interval]"]
    assert rule.count("---") == 8
    assert row == (
        "| 3 | 0.56 | 2.15 | 1.60 [1.43, 1.75] | 0.80 [0.77, 0.83] | 0.50 | 12.5 | 16.0 |"
    )
    assert rest[1] == f"picture  {run / 'quickstart.png'}"
    assert rest[2] == f"adapter  {run / 'checkpoints' / 'last-adapter'}"
    assert (run / "quickstart.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "missing", ["report/comparison.json", "report/predictions.parquet", "metrics.csv"]
)
def test_report_names_what_is_missing(
    missing: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / missing).unlink()
    with pytest.raises(SystemExit) as stop:
        main(["report", "--run", str(run)])
    assert stop.value.code == 2
    assert missing in capsys.readouterr().err


def test_build_command_refuses_foreign_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(SystemExit) as stop:
        main(["build", "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert "mine" in capsys.readouterr().err


def test_build_command_reuses(toy_world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["build", "--out", str(toy_world), "--seed", "0"])
    assert "Reusing" in capsys.readouterr().out
