"""Exports load without this package and are the policy; what would not be is refused or said."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mpo_lightning import files as package_files
from mpo_lightning.cli import main
from mpo_lightning.data.groups import DataError
from mpo_lightning.digests import write_sums
from mpo_lightning.errors import DamagedError
from mpo_lightning.export.export import export
from mpo_lightning.export.merging import Change
from mpo_lightning.export.trained_adapter import ExportError
from mpo_lightning.model.loading import LoRA, PolicyConfig, auto_class, build_policy
from mpo_lightning.model.policy import Policy, PolicyError, digest_of_weights
from tests.conftest import example_rows, make_tokenizer, tiny_model
from tests.model.architectures import multimodal_config
from tests.runs import write_recipe

IDS = torch.arange(2, 40)[None]


@pytest.fixture(scope="module")
def run(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``fit`` leaves: W-MPO on six groups, of a seventh all scores are equal."""
    folder = tmp_path_factory.mktemp("run")
    rows = example_rows(6)
    equal = {**rows[0], "prompt": "Equal?", "scores": [1.0] * len(rows[0]["scores"])}
    sources = {"train": [*rows, equal], "val": example_rows(3, seed=1)}
    for name, content in sources.items():
        lines = "".join(json.dumps(row) + "\n" for row in content)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    csv_logger = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(folder), "name": "logs", "version": ""},
    }
    recipe = write_recipe(
        folder,
        base,
        str(folder / "train.jsonl"),
        trainer={"default_root_dir": str(folder), "logger": csv_logger},
        data={"val": str(folder / "val.jsonl")},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["mpo-lightning"])
        main(["fit", "--config", str(recipe)])
    return folder


@pytest.fixture
def adapter(run: Path, tmp_path: Path) -> Path:
    """A copy of the run's adapter, to be tampered with."""
    return Path(shutil.copytree(run / "checkpoints" / "last-adapter", tmp_path / "adapter"))


def make_adapter(folder: Path, base: str, **lora: Any) -> str:
    """An adapter that does something, in a folder that does not say how it was trained."""
    policy = build_policy(PolicyConfig(base=base, lora=LoRA(r=4, **lora)), "auto")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
    policy.save_adapter(folder)
    return str(folder)


def policy_of(run: Path, base: str, **changes: Any) -> Policy:
    """The policy as training has it, with the weights of the checkpoint itself."""
    policy = build_policy(PolicyConfig(base=base, lora=LoRA(r=4), **changes), "auto")
    state = torch.load(run / "checkpoints" / "last.ckpt")["state_dict"]
    missing = policy.load_state_dict(
        {name.removeprefix("policy."): value for name, value in state.items()}, strict=False
    )
    assert not missing.unexpected_keys
    return policy


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(ids).logits.float()
    return result


def readable(folder: Path) -> Iterator[tuple[str, str]]:
    for path in folder.iterdir():
        if path.suffix in {".json", ".md", ".jinja"}:
            yield path.name, path.read_text(encoding="utf-8")


# ------------------------------------------------------------------------------ what is written


LOADED = """
import sys
sys.modules["mpo_lightning"] = None
import torch
ids = torch.arange(2, 40)[None]
found = {}
for code in sys.argv[2:]:
    names = {}
    exec(code, names)
    ids_of_chat = names["tokenizer"].apply_chat_template(
        [{"role": "user", "content": "Name a fruit."}], add_generation_prompt=True
    )["input_ids"]
    with torch.no_grad():
        found[names["name"]] = names["model"].eval()(ids).logits
    found["chat of " + names["name"]] = torch.tensor(ids_of_chat)
torch.save(found, sys.argv[1])
"""


def test_cards_load_what_was_trained(
    run: Path, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code of both cards, run where this package is not: the logits are the policy's."""
    (tmp_path / "my-org").mkdir()
    (tmp_path / "my-org" / "base").symlink_to(base)
    monkeypatch.chdir(tmp_path)
    named = ["--run", str(run), "--base_name", "my-org/base"]
    main(["export", "last", *named, "--out", "alone"])
    main(["export", *named, "--merged", "--max_shard_size", "50KB", "--out", "whole"])
    cards = {name: ModelCard.load(tmp_path / name / "README.md") for name in ("alone", "whole")}
    codes = [re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)[0] for card in cards.values()]
    result = subprocess.run(
        [sys.executable, "-c", LOADED, "found.pt", *codes],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    found = torch.load("found.pt")
    expected = logits(policy_of(run, base).causal_lm)
    assert (expected - logits(tiny_model())).abs().max() > 0.1
    torch.testing.assert_close(found["alone"], expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found["whole"], expected, atol=1e-4, rtol=1e-4)
    rendered = make_tokenizer().apply_chat_template(
        [{"role": "user", "content": "Name a fruit."}], add_generation_prompt=True
    )["input_ids"]
    for name in cards:
        assert found[f"chat of {name}"].tolist() == rendered
        assert "generation_config.json" in os.listdir(name)
        # Nothing in it names a place of this machine.
        for file, text in readable(tmp_path / name):
            assert not re.search(rf"{re.escape(str(run))}|{re.escape(base)}", text), file
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) > 2
    assert cards["alone"].data.base_model == cards["whole"].data.base_model == "my-org/base"
    assert (cards["alone"].data.library_name, cards["whole"].data.library_name) == (
        "peft",
        "transformers",
    )
    # The merged model is a base like any other.
    assert build_policy(PolicyConfig(base="whole"), "auto").is_untrained()


def test_card_tells_what_the_run_did(run: Path, tmp_path: Path) -> None:
    main(["export", str(run / "checkpoints" / "last.ckpt"), "--out", str(tmp_path / "out")])
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license is None
    assert card.data.base_model is None
    assert {"mpo", "mpo-lightning", "lora"} <= set(card.data.tags)
    text = card.text
    for line in (
        "(W-MPO), 6 optimizer steps.",
        "| loss.beta | 0.5 |",
        "| loss.partition | `mpo_lightning.losses.partition.AboveMean` |",
        "- `train.jsonl`: 1 groups dropped with all scores equal",
        "| optimizer.lr | 0.01 |",
        "| lora.r | 4 |",
        "| base.quantization | none |",
        "@article{gupta2024mpo",
        "![Loss, reward margin and reward accuracy over the steps](training.png)",
    ):
        assert line in text
    assert re.search(r"\| train \| `train.jsonl` \| `\w{16}` \| 7 \| 6 \|", text)
    # The metrics are those that the logger has, too.
    with (run / "logs" / "metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    last = [
        f"{float([row[f'{stage}/loss'] for row in rows if row[f'{stage}/loss']][-1]):.4g}"
        for stage in ("train", "val")
    ]
    assert f"| `loss` | {' | '.join(last)} |" in text
    assert (tmp_path / "out" / "training.png").stat().st_size > 5000
    # What the checkpoint itself says is the same.
    recorded = torch.load(run / "checkpoints" / "last.ckpt")["training"]
    written = json.loads((tmp_path / "out" / "training.json").read_text(encoding="utf-8"))
    assert written == {**recorded, "metrics_csv": None, "checkpoint": None}


@pytest.mark.filterwarnings("ignore:The learning rate does not go on as it began")
def test_metrics_outlive_a_stop(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on and is saved before its next validation has the last one's values."""
    again = Path(shutil.copytree(run, tmp_path / "again"))
    before = torch.load(again / "checkpoints" / "last.ckpt")["training"]
    monkeypatch.setattr(sys, "argv", ["mpo-lightning"])
    options = {
        "config": again / "recipe.yaml",
        "trainer.default_root_dir": again,
        "trainer.logger.init_args.save_dir": again,
        "trainer.max_epochs": 3,
        "trainer.limit_val_batches": 0,
        "ckpt_path": "last",
    }
    main(["fit", *(f"--{name}={value}" for name, value in options.items())])
    after = torch.load(again / "checkpoints" / "last.ckpt")["training"]
    assert (before["steps"], after["steps"]) == (6, 9)
    assert after["metrics"]["val/loss"] == before["metrics"]["val/loss"]
    assert after["metrics"]["train/loss"] != before["metrics"]["train/loss"]


def test_without_a_record(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, use_dora=True)
    out = export(adapter, out=str(tmp_path / "out"))
    config = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == base
    text = (out / "README.md").read_text(encoding="utf-8")
    assert "does not say how it was trained" in text
    assert "no DoRA adapters" in text
    said = capsys.readouterr().out
    assert "metrics.csv is not to be found" in said
    assert "give its hub id as --base_name" in said
    make_tokenizer().save_pretrained(adapter)
    # A hub id that is out of reach is named all the same; a folder that is gone is not published.
    for gone, header in (("my-org/far-away", "my-org/far-away"), ("/gone/base", None)):
        out = export(adapter, base=gone, out=str(tmp_path / "far"), force=True)
        assert ModelCard.load(out / "README.md").data.base_model == header
        assert "No generation_config.json" in capsys.readouterr().out


def test_generation_stops_where_responses_ended(
    run: Path, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(base, tmp_path / "other"))
    config = json.loads((other / "generation_config.json").read_text(encoding="utf-8"))
    (other / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": 7}))
    out = export("last", run=str(run), base=str(other), out=str(tmp_path / "out"))
    written = json.loads((out / "generation_config.json").read_text(encoding="utf-8"))
    assert written["eos_token_id"] == [7, 1]
    assert "token 1 ends a response as well" in capsys.readouterr().out


# -------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("lora", [{"use_rslora": True}, {"use_dora": True}])
def test_merged_model_is_the_policy(base: str, tmp_path: Path, lora: dict[str, bool]) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, **lora)
    out = export(adapter, merged=True, out=str(tmp_path / "merged"))
    found = logits(AutoModelForCausalLM.from_pretrained(out))
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert (logits(plain) - found).abs().max() > 0.1
    torch.testing.assert_close(
        found, logits(PeftModel.from_pretrained(plain, adapter)), atol=1e-4, rtol=1e-4
    )
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == make_tokenizer().chat_template


@pytest.mark.parametrize(
    ("name", "loads"),
    [
        *(("gemma3", "AutoModelForCausalLM"), ("gemma4", "AutoModelForCausalLM")),
        *(("llama4", "AutoModelForImageTextToText"), ("qwen2_5_vl", "AutoModelForImageTextToText")),
        ("qwen3_5", "AutoModelForImageTextToText"),
    ],
)
def test_the_language_model_of_a_wrapper_is_exported(tmp_path: Path, name: str, loads: str) -> None:
    """Alone for plain PEFT, or merged: both are the policy, and the card loads them."""
    config = multimodal_config(name)
    tiny_model(config).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    run = short_run(tmp_path, optimizer={"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}})
    kind = auto_class(config)
    plain = kind.from_pretrained(tmp_path / "base")
    before = logits(plain)
    folder = export("last", run=run, out=str(tmp_path / "alone"))
    alone = logits(PeftModel.from_pretrained(plain, folder))
    merged = export("last", run=run, out=str(tmp_path / "merged"), merged=True)
    whole = kind.from_pretrained(merged)
    assert type(whole) is type(kind.from_pretrained(tmp_path / "base"))
    towers = {n: p for n, p in whole.named_parameters() if "vision" in n or "visual" in n}
    of_base = dict(kind.from_pretrained(tmp_path / "base").named_parameters())
    assert towers
    assert all(torch.equal(parameter, of_base[name]) for name, parameter in towers.items())
    torch.testing.assert_close(logits(whole), alone, rtol=0, atol=1e-4)
    assert (alone - before).abs().max() > 1e-3
    for each in (folder, merged):
        card = (each / "README.md").read_text(encoding="utf-8")
        assert f"import {loads}, AutoTokenizer" in card
        assert f" = {loads}.from_pretrained(" in card


def short_run(folder: Path, **model: Any) -> str:
    """Train the model in ``base`` for two steps."""
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in example_rows(4)), encoding="utf-8"
    )
    recipe = write_recipe(
        folder,
        str(folder / "base"),
        str(folder / "rows.jsonl"),
        trainer={"default_root_dir": str(folder), "logger": False, "max_steps": 2},
        model={"policy": {"base": str(folder / "base"), "lora": {"r": 16}}, **model},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["mpo-lightning"])
        main(["fit", "--config", str(recipe)])
    return str(folder)


def test_card_tells_the_rank_of_fused_experts(tmp_path: Path) -> None:
    """PEFT gives two weights that are fused into one the rank of both."""
    config = AutoConfig.for_model(
        "qwen3_moe",
        **{"vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "head_dim": 8},
        **{"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
        **{"bos_token_id": 0, "eos_token_id": 1},
    )
    tiny_model(config).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    out = export("last", run=short_run(tmp_path), out=str(tmp_path / "out"))
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "--max-lora-rank 32 " in card
    assert re.search(r"rank_pattern.*gate_up_proj.* 32 ", card)
    assert "down_proj, gate_up_proj, k_proj, o_proj, q_proj, v_proj (6 entries)" in card


def test_sixteen_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Merged in float32 and rounded once; what that loses is said."""
    half = tmp_path / "half"
    model = tiny_model().to(torch.bfloat16)
    model.config.attention_dropout = 0.25
    model.save_pretrained(half)
    make_tokenizer().save_pretrained(half)
    adapter = make_adapter(tmp_path / "adapter", str(half))
    merged = AutoModelForCausalLM.from_pretrained(
        export(adapter, merged=True, out=str(tmp_path / "a"))
    )
    shown = capsys.readouterr().out
    assert merged.dtype == torch.bfloat16
    assert merged.config.attention_dropout == 0.25
    exact = AutoModelForCausalLM.from_pretrained(
        export(adapter, merged=True, out=str(tmp_path / "b"), dtype="float32")
    )
    assert "rounded away" not in capsys.readouterr().out
    assert exact.dtype == torch.float32
    update = lost = torch.zeros((), dtype=torch.float64)
    original = dict(AutoModelForCausalLM.from_pretrained(half).named_parameters())
    whole = dict(exact.named_parameters())
    for name, weight in merged.named_parameters():
        assert torch.equal(weight, whole[name].to(torch.bfloat16))
        update = update + (whole[name] - original[name]).detach().double().square().sum()
        lost = lost + (whole[name] - weight).detach().double().square().sum()
    share = float((lost / update).sqrt())
    assert 0 < share < 1
    said = f"{share:.1%} of the adapter's update is rounded away in bfloat16"
    assert said in shown
    assert said in (tmp_path / "a" / "README.md").read_text(encoding="utf-8")


def test_base_that_was_quantised_in_training(
    run: Path, base: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Merged into full precision it is another model, by as much as is said; dequantised it is it.

    The adapter of the run stands for one that was trained in 4 bits.
    """
    policy = policy_of(run, base, quantization="nf4")
    path = adapter / "training.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["base"] |= {"quantization": "nf4", "weights": digest_of_weights(policy.causal_lm)}
    path.write_text(json.dumps(record), encoding="utf-8")
    write_sums(adapter)

    full = export(str(adapter), merged=True, out=str(tmp_path / "full"))
    shown = capsys.readouterr().out
    ids = torch.arange(1, 129)[None] * 7919 % 384
    expected = logits(policy.causal_lm, ids)[0]
    change = Change.between(logits(AutoModelForCausalLM.from_pretrained(full), ids)[0], expected)
    assert change.logits > 1e-2
    assert "not quite the model that was trained" in shown
    assert f"Against the model that was trained, {change}" in shown
    assert str(change) in (full / "README.md").read_text(encoding="utf-8")
    assert "bit for bit" not in shown
    # The right base in full precision: merged as without quantisation.
    plain = logits(policy_of(run, base).causal_lm)
    found = logits(AutoModelForCausalLM.from_pretrained(full))
    torch.testing.assert_close(found, plain, atol=1e-4, rtol=1e-4)

    same = export(str(adapter), merged=True, onto="dequantized", out=str(tmp_path / "same"))
    found = logits(AutoModelForCausalLM.from_pretrained(same), ids)[0]
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert "Made of dequantised weights" in (same / "README.md").read_text(encoding="utf-8")
    # The adapter's card loads the base in the bits of training.
    alone = export(str(adapter), out=str(tmp_path / "alone"))
    assert "load_in_4bit=True" in (alone / "README.md").read_text(encoding="utf-8")


def test_change_counts_what_it_says() -> None:
    """Two tokens, two words: p = (1/2, 1/2) against (3/4, 1/4), and no change."""
    expected = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    found = torch.tensor([[torch.tensor(3.0).log(), 0.0], [2.0, 0.0]])
    change = Change.between(found, expected)
    assert change.kl == pytest.approx(0.5 * torch.tensor(4 / 3).log().item() / 2)
    assert change.logits == pytest.approx(torch.tensor(3.0).log().item() / 2)
    assert change.top == 1.0


# ------------------------------------------------------------------------------- what is refused


def changed(folder: Path) -> Path:
    """An adapter's folder with other weights."""
    path = folder / "adapter_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(path).items()}, path)
    write_sums(folder)
    return folder


def test_what_is_no_checkpoint(run: Path, base: str, adapter: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(SystemExit, match="last.ckpt does not exist"):
        main(["export", "--run", str(tmp_path), "--out", out])
    with pytest.raises(ExportError, match=r"none.ckpt does not exist\. There: .*last\.ckpt"):
        export(str(run / "checkpoints" / "none.ckpt"), out=out)
    with pytest.raises(PolicyError, match=r"holds no adapter_config\.json"):
        export(base, out=out)
    copied = shutil.copy(run / "checkpoints" / "last.ckpt", tmp_path / "adapter.ckpt")
    with pytest.raises(ExportError, match="there is no adapter-adapter"):
        export(str(copied), out=out)
    record = json.loads((adapter / "training.json").read_text(encoding="utf-8"))
    (adapter / "training.json").write_text(json.dumps({**record, "checkpoint": "0" * 64}))
    write_sums(adapter)
    adapter.rename(tmp_path / "adapter-adapter")
    with pytest.raises(ExportError, match="not of the same moment"):
        export(str(copied), out=out)
    assert not Path(out).exists()


def no_weights(folder: Path, base: str) -> str:
    """A model's folder with its configuration alone."""
    alone = folder / "no-weights"
    alone.mkdir()
    return shutil.copy(Path(base) / "config.json", alone) and str(alone)


def test_what_cannot_be_merged(run: Path, base: str, adapter: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "merged")
    quantised = tmp_path / "quantised"
    shutil.copytree(base, quantised)
    config = json.loads((quantised / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantised / "config.json").write_text(json.dumps(config), encoding="utf-8")
    other = tmp_path / "other"
    model = tiny_model()
    model.lm_head.weight.data[3, 4] += 1e-3
    model.save_pretrained(other)
    for given, message in (
        (str(quantised), "base: the weights of .*quantised are quantised"),
        (str(other), "base: the weights of .*other are not those that the adapter was trained on"),
        (str(tmp_path / "nowhere"), "base: .*nowhere cannot be loaded"),
    ):
        with pytest.raises(ExportError, match=message):
            export(str(adapter), merged=True, base=given, out=out)
    with pytest.raises(ExportError, match="onto: the base was not quantised"):
        export(str(adapter), merged=True, onto="dequantized", out=out)
    for setting in ({"dtype": "float32"}, {"max_shard_size": "1GB"}, {"onto": "dequantized"}):
        with pytest.raises(ExportError, match=f"{next(iter(setting))}: an adapter is written"):
            export(str(adapter), out=out, **setting)  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="base_name: /of/mine is no hub id"):
        export(str(adapter), base_name="/of/mine", out=out)
    path = adapter / "adapter_model.safetensors"
    weights, before = load_file(path), path.read_bytes()
    next(iter(weights.values()))[0, 0] = torch.nan
    save_file(weights, path)
    write_sums(adapter)
    with pytest.raises(DamagedError, match="holds 1 NaN or infinite values in base_model"):
        export(str(adapter), merged=True, out=out)
    path.write_bytes(before)
    write_sums(adapter)
    # Settings are named as this command names them.
    other_rank = make_adapter(tmp_path / "other-rank", base)
    config = json.loads((Path(other_rank) / "adapter_config.json").read_text(encoding="utf-8"))
    (Path(other_rank) / "adapter_config.json").write_text(json.dumps({**config, "r": 2}))
    with pytest.raises(PolicyError, match="^adapter: .* does not fit LlamaForCausalLM"):
        export(other_rank, merged=True, out=out)
    with pytest.raises(PolicyError, match="^base: .* cannot be loaded as a causal language model"):
        export(str(adapter), merged=True, base=no_weights(tmp_path, base), out=out)
    pickled = Path(make_adapter(tmp_path / "pickled", base))
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(PolicyError, match=r"adapter_model\.safetensors\. Pickled weights"):
        export(str(pickled), out=out)
    with pytest.raises(DataError, match="^tokenizer: no tokenizer can be loaded from"):
        export(make_adapter(tmp_path / "fresh", base), base=str(tmp_path / "gone"), out=out)
    assert not Path(out).exists()


# ---------------------------------------------------------------------------- whole, or not there


def files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_nothing_is_overwritten_unasked(
    run: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    export("last", run=str(run), out=str(out))
    before = files(out)
    # What holds the same already is left as it is.
    export(str(adapter), out=str(out))
    assert "holds this export already" in capsys.readouterr().out
    assert files(out) == before
    with pytest.raises(ExportError, match="holds another export: adapter differ.*--force"):
        export(str(changed(adapter)), out=str(out))
    assert files(out) == before
    export(str(adapter), out=str(out), force=True)
    weights = load_file(out / "adapter_model.safetensors")
    for name, value in load_file(adapter / "adapter_model.safetensors").items():
        assert torch.equal(weights[name], value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out"]
    # What is no export is never overwritten.
    (out / "export.json").unlink()
    with pytest.raises(ExportError, match="exists and is no export"):
        export(str(adapter), out=str(out), force=True)


def killed(work: Callable[[], object], at: int) -> None:
    """Do the work in a process that is gone (SIGKILL) before its at-th file is on disk."""
    child = os.fork()
    if child == 0:
        left = [at]

        def die(_: int) -> None:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            package_files.os.fsync = die  # type: ignore[assignment]
            work()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL


def test_a_killed_export_leaves_nothing_that_looks_whole(
    run: Path, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def work() -> Path:
        return export("last", run=str(run), out=str(out))

    killed(work, at=3)
    assert not out.exists()
    assert (tmp_path / ".out.partial").is_dir()
    work()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out"]
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    killed(lambda: export(str(changed(adapter)), out=str(out), force=True), at=2)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_damaged_export_is_told_and_written_again_with_force(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = export("last", run=str(run), out=str(tmp_path / "out"))
    (out / "README.md").write_text("The owner's own words.", encoding="utf-8")
    export("last", run=str(run), out=str(out))
    assert "holds this export already" in capsys.readouterr().out
    for name in ("adapter_model.safetensors", "export.json"):
        path = out / name
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(DamagedError, match=f"{name} is damaged.*again with --force"):
            export("last", run=str(run), out=str(out))
        export("last", run=str(run), out=str(out), force=True)
        export("last", run=str(run), out=str(out))
    # An adapter's folder has digests, too, and is no export.
    other = shutil.copytree(run / "checkpoints" / "last-adapter", tmp_path / "other")
    (other / "training.json").unlink()
    with pytest.raises(ExportError, match="exists and is no export"):
        export("last", run=str(run), out=str(other), force=True)


def test_metrics_that_cannot_be_read_cost_the_picture_only(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = Path(shutil.copytree(run, tmp_path / "again"))
    for content in (b"step,train/loss\n1,half a numb", b"\xff\xfe", b"step\n1,2,3\n", b"loss\n1\n"):
        (again / "logs" / "metrics.csv").write_bytes(content)
        out = export("last", run=str(again), out=str(tmp_path / "out"), force=True)
        shutil.rmtree(out)
        assert "No picture of the training: " in capsys.readouterr().out


def test_no_room(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(package_files.os, "fsync", full)
    with pytest.raises(ExportError, match="out cannot be written: No space"):
        export("last", run=str(run), out=str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())
