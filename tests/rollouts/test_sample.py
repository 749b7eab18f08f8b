"""``mpo-lightning sample``: rows in, rows out, whatever happens between."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import GenerationConfig

from mpo_lightning.cli import main
from mpo_lightning.data import rendering
from mpo_lightning.data.prompts import request
from mpo_lightning.errors import RolloutError
from mpo_lightning.generation.generate import ModelSampler, Sampling
from mpo_lightning.generation.model import ModelConfig, load_sampler
from mpo_lightning.generation.server import ServerConfig
from mpo_lightning.rollouts.sample import sample
from tests import processes
from tests.conftest import CORPUS, make_tokenizer, read_rows, tiny_config, tiny_model
from tests.rollouts.killed_run import killed_run

SMALL = ["--n", "3", "--max_new_tokens", "8", "--rows_per_part", "3", "--progress", "false"]
# Random weights write special tokens now and then.
SMALL += ["--special_tokens", "keep"]


@pytest.fixture
def prompts(write_jsonl: Callable[..., str]) -> str:
    rows: list[dict[str, Any]] = [{"prompt": text, "id": i} for i, text in enumerate(CORPUS * 2)]
    rows[5]["prompt"] = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "One."},
        {"role": "user", "content": "Two?"},
    ]
    return write_jsonl(rows, "prompts.jsonl")


def command(prompts: str, base: str, out: Path, *more: str) -> list[str]:
    return ["sample", "--prompts", prompts, "--model.base", base, "--out", str(out), *SMALL, *more]


def content(out: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_rows(prompts: str, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    main(command(prompts, base, out, "--seed", "5"))
    rows = [row for _, row in read_rows(str(out))]
    source = [row for _, row in read_rows(prompts)]
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in source]
    assert [row["id"] for row in rows] == list(range(8))
    # What the model says when it is asked directly.
    sampler = load_sampler(ModelConfig(base=base), Sampling(n=3, max_new_tokens=8, seed=5))
    occurrences = [0, 0, 0, 0, 1, 0, 1, 1]
    asked = [
        request(row["prompt"], occurrence=occurrence)
        for row, occurrence in zip(source, occurrences, strict=True)
    ]
    for row, answers in zip(rows, sampler(asked), strict=True):
        assert row["responses"] == [drawn.text for drawn in answers.samples]
        assert row["truncated"] == [drawn.finish == "length" for drawn in answers.samples]
        assert row["sampled"] == {
            **{"model": base, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 5}
        }
    shown = capsys.readouterr().out
    assert "is complete: 3 parts; 8 of 8 rows written, 3.0 responses each" in shown
    assert "noted: 3 prompts came before and are answered anew" in shown
    # Done is done.
    before = content(out)
    main(command(prompts, base, out, "--seed", "5"))
    assert content(out) == before


def test_killed_and_gone_on(prompts: str, base: str, tmp_path: Path) -> None:
    """SIGKILL while the rows of the second part are written: its report and digests are there."""
    main(command(prompts, base, tmp_path / "whole"))
    out = tmp_path / "killed"
    killed = processes.run(killed_run, [6, command(prompts, base, out)])
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    left = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    assert left == [
        "part-00000.jsonl",
        "part-00000.report.json",
        "part-00000.sha256",
        "part-00001.report.json",
        "part-00001.sha256",
        "settings.json",
    ]
    assert len(list(out.glob(".*.partial"))) == 1
    first = (out / "part-00000.jsonl").stat().st_mtime_ns
    main(command(prompts, base, out))
    assert content(out) == content(tmp_path / "whole")
    assert (out / "part-00000.jsonl").stat().st_mtime_ns == first


def test_processes_share_the_parts(
    prompts: str,
    base: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    main(command(prompts, base, tmp_path / "one"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, parts in ((1, {"part-00001.jsonl"}), (0, {f"part-0000{i}.jsonl" for i in range(3)})):
        monkeypatch.setenv("RANK", str(rank))
        capsys.readouterr()
        main(command(prompts, base, tmp_path / "two"))
        assert {path.name for path in (tmp_path / "two").glob("*.jsonl")} == parts
        done = "is complete" if rank == 0 else "1 of 3 parts"
        assert done in capsys.readouterr().out
    assert content(tmp_path / "two") == content(tmp_path / "one")


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ("--seed 1", "seed was 0, is 1"),
        ("--temperature 0.5", "temperature was 1.0, is 0.5"),
        ("--system_prompt Sing.", "system_prompt was None, is 'Sing.'"),
        ("--model.dtype bfloat16", "model.dtype was 'auto', is 'bfloat16'"),
        ("--responses_per_batch 8", "responses_per_batch was 64, is 8"),
    ],
)
def test_other_settings_are_refused(
    changed: str, found: str, prompts: str, base: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    main(command(prompts, base, out))
    with pytest.raises(SystemExit, match=found):
        main(command(prompts, base, out, *changed.split()))


def test_other_input_is_refused(prompts: str, base: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    main(command(prompts, base, out))
    with Path(prompts).open("a", encoding="utf-8") as file:
        file.write('{"prompt": "More?"}\n')
    with pytest.raises(SystemExit, match=r"prompts was '\w+', is '\w+'; rows was 8, is 9"):
        main(command(prompts, base, out))


def test_other_weights_are_refused(prompts: str, tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    model = tiny_model()
    model.save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    main(command(prompts, str(base), out))
    model.lm_head.weight.data[3, 3] += 1e-3
    model.save_pretrained(base)
    with pytest.raises(SystemExit, match=r"model\.base_files was"):
        main(command(prompts, str(base), out))


def test_what_is_left_out_is_counted(
    base: str,
    write_jsonl: Callable[..., str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A prompt beyond the context gets no answer; a model that ends at once gives none."""
    folder, out = tmp_path / "small", tmp_path / "out"
    model = tiny_model(tiny_config(max_position_embeddings=60))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    rows = [
        {"prompt": "Why?", "responses": ["a"], "scores": [1], "truncated": [False], "kept": "x"},
        {"prompt": "word " * 60},
    ]
    main(command(write_jsonl(rows), str(folder), out))
    shown = capsys.readouterr().out
    assert "1 of 2 rows written" in shown
    assert "rows dropped: 1 with a prompt that leaves no room to answer" in shown
    for column in ("responses", "scores", "truncated"):
        assert f"noted: 1 rows whose own {column} are left out" in shown
    (row,) = (row for _, row in read_rows(str(out)))
    assert set(row) == {"prompt", "responses", "truncated", "kept", "sampled"}

    GenerationConfig(eos_token_id=list(range(384))).save_pretrained(folder)
    with pytest.raises(SystemExit, match=r"no row was written \(prompts: 1 with too few respon"):
        main(command(write_jsonl(rows[:1], "one.jsonl"), str(folder), tmp_path / "empty"))
    shown = capsys.readouterr().out
    assert "0 of 1 rows written" in shown
    assert "rows dropped: 1 with too few responses left" in shown
    assert "noted: 3 responses dropped: empty" in shown
    assert (tmp_path / "empty" / "part-00000.jsonl").read_bytes() == b""


def test_no_prompt_leaves_room(base: str, write_jsonl: Callable[..., str], tmp_path: Path) -> None:
    """A default limit beyond the context uses what is left of it; where nothing is, it is told."""
    folder = tmp_path / "small"
    tiny_model(tiny_config(max_position_embeddings=40)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    settings = ["--n", "2", "--special_tokens", "keep", "--progress", "false"]
    rows = [{"instruction": f"What is {number}?"} for number in range(3)]
    common = ["sample", "--model.base", str(folder), *settings]
    main([*common, "--prompts", write_jsonl(rows), "--out", str(tmp_path / "out")])
    assert len(list(read_rows(str(tmp_path / "out")))) == 3
    rows = [{"prompt": "word " * (60 + number)} for number in range(3)]
    with pytest.raises(SystemExit) as stopped:
        main([*common, "--prompts", write_jsonl(rows), "--out", str(tmp_path / "none")])
    assert str(stopped.value) == (
        f"error: {tmp_path / 'none'}: no row was written (prompts: 3 with a prompt that leaves no "
        "room to answer). Change the settings or the input, and remove the folder."
    )


@pytest.fixture
def channels(base: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have the model write texts with special tokens, and its tokenizer parse them if wanted."""

    def write(*texts: str, template: dict[str, Any] | None = None) -> None:
        def responses(self: ModelSampler, ids: Any, *args: Any, **_: Any) -> list[list[int]]:
            tokenizer = self.tokenizer.tokenizer
            tokenizer.response_template = template
            slots = args[2]
            encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
            return [[*encoded[slot % len(texts)], 1] for _ in range(len(ids)) for slot in slots]

        monkeypatch.setattr(ModelSampler, "_responses", responses)

    return write


GLUED = "<|system|>thought<|assistant|>word"
THINKING = {
    "start_anchor": "<|assistant|>",
    "fields": {
        "reasoning_content": {"open": "<|system|>", "close": "<|assistant|>"},
        "content": {"close": "<|eos|>"},
    },
}


def test_channels_are_no_text(
    prompts: str,
    base: str,
    tmp_path: Path,
    channels: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What the words between special tokens mean, only the tokenizer can say."""
    channels(GLUED, "plain", "other")
    drop = ["--special_tokens", "drop"]
    main(command(prompts, base, tmp_path / "drop", *drop))
    assert [row["responses"] for _, row in read_rows(str(tmp_path / "drop"))] == [
        ["plain", "other"]
    ] * 8
    shown = capsys.readouterr().out
    assert "noted: 8 responses dropped: special tokens in their midst (first: " in shown
    main(command(prompts, base, tmp_path / "keep"))
    (_, row), *_ = read_rows(str(tmp_path / "keep"))
    assert row["responses"] == ["thoughtword", "plain", "other"]
    with pytest.raises(SystemExit, match=r"prompts.jsonl:1: found a response with special tokens"):
        main(command(prompts, base, tmp_path / "error", "--special_tokens", "error"))
    # A prompt without two answers left goes, too; without any prompt there is nothing.
    channels(GLUED, GLUED, "other")
    with pytest.raises(SystemExit, match="no row was written .*8 with too few responses left"):
        main(command(prompts, base, tmp_path / "none", *drop))


def test_channels_that_the_tokenizer_parses(
    prompts: str, base: str, tmp_path: Path, channels: Callable[..., None]
) -> None:
    channels(GLUED, "<|system|>more<|assistant|>words", "plain", template=THINKING)
    main(command(prompts, base, tmp_path / "out", "--special_tokens", "drop"))
    (_, row), *_ = read_rows(str(tmp_path / "out"))
    assert row["responses"] == [
        {"role": "assistant", "reasoning_content": "thought", "content": "word"},
        {"role": "assistant", "reasoning_content": "more", "content": "words"},
        "plain",
    ]


def test_sources(base: str, tmp_path: Path) -> None:
    """Parquet, and a folder that was sampled before."""
    path = tmp_path / "prompts.parquet"
    pq.write_table(pa.table({"prompt": ["a", "b"], "day": pa.array([1, 2], pa.date32())}), path)
    first = sample(
        prompts=str(path),
        out=str(tmp_path / "first"),
        model=ModelConfig(base=base),
        n=2,
        max_new_tokens=4,
        progress=False,
    )
    rows = [json.loads(line) for line in first.path(0).read_text(encoding="utf-8").splitlines()]
    assert [row["day"] for row in rows] == ["1970-01-02", "1970-01-03"]
    main(command(str(tmp_path / "first"), base, tmp_path / "second"))
    assert [row["prompt"] for _, row in read_rows(str(tmp_path / "second"))] == ["a", "b"]


def test_one_model_or_one_server(prompts: str, base: str, tmp_path: Path) -> None:
    server = ServerConfig(url="http://127.0.0.1:9/v1")
    out = str(tmp_path / "out")
    with pytest.raises(RolloutError, match="Name either a model"):
        sample(prompts=prompts, out=out)
    with pytest.raises(RolloutError, match="Name either a model"):
        sample(prompts=prompts, out=out, model=ModelConfig(base=base), server=server)


def test_settings_from_a_file(prompts: str, base: str, tmp_path: Path) -> None:
    path = tmp_path / "sample.yaml"
    path.write_text(
        f"prompts: {prompts}\nout: {tmp_path / 'by-file'}\nmodel: {{base: {base}}}\n"
        "n: 3\nmax_new_tokens: 8\nrows_per_part: 3\nprogress: false\nspecial_tokens: keep\n",
        encoding="utf-8",
    )
    main(["sample", "--config", str(path)])
    main(command(prompts, base, tmp_path / "by-options"))
    assert content(tmp_path / "by-file") == content(tmp_path / "by-options")


def test_bad_prompts_are_told_before_anything_is_loaded(
    write_jsonl: Callable[..., str], tmp_path: Path
) -> None:
    path = write_jsonl([{"prompt": "a"}, {"question": "b"}])
    with pytest.raises(SystemExit, match="groups.jsonl:2: prompt: found no such field"):
        main(command(path, str(tmp_path / "no model"), tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert os.listdir(tmp_path) == ["groups.jsonl"]


def test_folder_keeps_the_date_that_its_chat_template_wrote(
    prompts: str, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    template = folder / "chat_template.jinja"
    template.write_text("{{ strftime_now('%H:%M ') }}" + template.read_text("utf-8"), "utf-8")
    out = tmp_path / "out"
    monkeypatch.setattr(rendering, "now", lambda: "2026-01-31T23:59:00")
    main(command(prompts, str(folder), out))
    whole = content(out)
    assert json.loads(whole["settings.json"])["settings"]["date"] == "2026-01-31T23:59:00"
    (out / "part-00001.jsonl").unlink()
    monkeypatch.setattr(rendering, "now", lambda: "2026-02-01T00:01:00")
    main(command(prompts, str(folder), out))
    assert content(out) == whole
    # Begun on another day, another date is written.
    main(command(prompts, str(folder), tmp_path / "other"))
    other = content(tmp_path / "other")
    assert json.loads(other["settings.json"])["settings"]["date"] == "2026-02-01T00:01:00"


@pytest.mark.parametrize("place", ["first", "last"])
def test_a_token_that_the_model_lacks_is_found_before_anything_is_sampled(
    write_jsonl: Callable[..., str], tmp_path: Path, place: str
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|extra|>"])
    tokenizer.save_pretrained(tmp_path / "base")
    tiny_model().save_pretrained(tmp_path / "base")
    rows = [{"prompt": text} for text in CORPUS]
    rows.insert(0 if place == "first" else 4, {"prompt": "Say <|extra|>."})
    number = 1 if place == "first" else 5
    data, base, out = write_jsonl(rows), str(tmp_path / "base"), tmp_path / "out"
    with pytest.raises(
        SystemExit, match=rf"jsonl:{number}: prompt: found token 384 .*expected tokens below 384"
    ):
        main(command(data, base, out))
    assert not list(out.glob("*.jsonl"))
    # The tokenizer's other tokens do no harm.
    main(command(write_jsonl(rows[1:4], "others.jsonl"), base, tmp_path / "others"))


def test_prompts_whose_text_the_template_leaves_out_are_counted(
    base: str, tmp_path: Path, write_jsonl: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}<|eos|>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
        encoding="utf-8",
    )
    rows = [{"prompt": "Why?"}, {"prompt": "Why?", "system": "Be brief."}, {"prompt": "a <|eos|>"}]
    asked = write_jsonl(rows, "asked.jsonl")
    main(command(asked, str(folder), tmp_path / "out", "--special_tokens", "keep"))
    told = capsys.readouterr().out
    lost = "a prompt of which the chat template leaves out a text of the system"
    assert f"noted: 1 prompts answered from {lost} (first: {asked}:2)" in told
    special = "a prompt in whose text the special token <|eos|> is written"
    assert f"noted: 1 prompts answered from {special} (first: {asked}:3)" in told
