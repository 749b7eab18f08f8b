"""Pairs in TRL's formats against TRL's own trainer: tokens, losses, metrics, trained weights."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
import trl
from datasets import Dataset
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from mpo_lightning import LoRA, MPOModule, PolicyConfig, PreferenceDataModule
from mpo_lightning.cli import main
from mpo_lightning.losses import DPO, IPO, NCA, Hinge, RobustDPO, SetLoss
from tests.conftest import CHAT_TEMPLATE, CORPUS, make_tokenizer
from tests.runs import metrics

BETA = 0.3
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
Pair = dict[str, Any]

# TRL's name of a metric, and ours.
NAMES = {
    "loss": "loss",
    "rewards/chosen": "rewards/chosen",
    "rewards/rejected": "rewards/rejected",
    "rewards/accuracies": "rewards/accuracy",
    "rewards/margins": "rewards/margin",
    "logps/chosen": "logps/chosen",
    "logps/rejected": "logps/rejected",
    "learning_rate": "lr",
}


@pytest.fixture(scope="module")
def world(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose chat template ends with the end of the turn."""
    folder = tmp_path_factory.mktemp("peer") / "base"
    shutil.copytree(base, folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace(
        "{{ eos_token }}\n{% endfor %}", "{{ eos_token }}{% endfor %}"
    )
    assert tokenizer.chat_template != CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def texts() -> list[Pair]:
    """Answers of unequal lengths, one with the end of sequence written out."""
    sentences = [part.strip() for text in CORPUS for part in text.replace("?", ".").split(".")]
    sentences = [text for text in sentences if text]
    rows = [
        {
            "prompt": f"{sentences[i]}?",
            "chosen": f" {sentences[i - 1]}.",
            "rejected": f" {sentences[i - 2]} and {sentences[i - 3]}!",
        }
        for i in range(6)
    ]
    rows[2]["chosen"] += "<|eos|>"
    return rows


def messages(rows: list[Pair]) -> list[Pair]:
    """The same as conversations, one with a system's message and a turn before."""

    def said(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content.removesuffix("<|eos|>")}

    found = [
        {
            "prompt": [said("user", row["prompt"])],
            "chosen": [said("assistant", row["chosen"])],
            "rejected": [said("assistant", row["rejected"])],
        }
        for row in rows
    ]
    before = [said("system", "Be brief."), said("user", "One?"), said("assistant", "One.")]
    found[1]["prompt"] = before + found[1]["prompt"]
    return found


def implicit(rows: list[Pair]) -> list[Pair]:
    """The same without a column for the prompt."""
    return [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in rows]


FORMATS: dict[str, Callable[[], list[Pair]]] = {
    "text": texts,
    "text, implicit prompt": lambda: implicit(texts()),
    "chat": lambda: messages(texts()),
    "chat, implicit prompt": lambda: implicit(messages(texts())),
}


def shake(model: torch.nn.Module) -> None:
    """The same adapter, other than fresh, in models that name their layers alike."""
    generator = torch.Generator().manual_seed(1)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    # A and B of seven linear layers in each of two decoder layers.
    assert len([name for name in trained if "lora_" in name]) == len(trained) == 28
    with torch.no_grad():
        for _, parameter in sorted(trained.items()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def adapter(model: torch.nn.Module) -> dict[str, Tensor]:
    """Its weights, under PEFT's names."""
    return {
        name.partition("base_model.")[2]: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


class Shaken(Callback):
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        shake(pl_module)


class Found(NamedTuple):
    """What a run leaves.

    Attributes:
        logps: of each pair's chosen and rejected response: policy and reference before training.
        steps: metrics of two optimizer steps, under our names.
        trained: the adapter after them.
    """

    logps: list[dict[str, tuple[float, float]]]
    steps: list[dict[str, float]]
    trained: dict[str, Tensor]


def trl_trainer(
    world: Path, rows: list[Pair], out: Path, lora: dict[str, Any] | None = None, **settings: Any
) -> Any:
    defaults = {"beta": BETA, "lr_scheduler_type": "constant"}
    arguments = trl.DPOConfig(
        output_dir=str(out),
        max_steps=2,
        per_device_train_batch_size=len(rows),
        learning_rate=1e-2,
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **{**defaults, **settings},
    )
    return trl.DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(world),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(world),
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", **(lora or LORA)),
    )


def trained_by_trl(world: Path, rows: list[Pair], out: Path, **settings: Any) -> Found:
    trainer = trl_trainer(world, rows, out, **settings)
    shake(trainer.model)
    batch = trainer.data_collator(list(trainer.train_dataset))
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        policy = trainer.model(**inputs, labels=labels, fused_lm_head=True).log_probs.sum(1)
    references = trainer.compute_ref_log_probs(trainer.model, batch)
    logps = [
        dict(zip(("chosen", "rejected"), zip(pair, reference, strict=True), strict=True))
        for pair, reference in zip(
            zip(*(half.tolist() for half in policy.chunk(2)), strict=True),
            zip(*(half.tolist() for half in references), strict=True),
            strict=True,
        )
    ]
    trainer.train()
    steps = [row for row in trainer.state.log_history if "rewards/chosen" in row]
    named = [{ours: step[theirs] for theirs, ours in NAMES.items()} for step in steps]
    return Found(logps, named, adapter(trainer.model))


def trained_by_us(
    world: Path, rows: list[Pair], out: Path, loss: SetLoss, **settings: Any
) -> Found:
    file = out.with_suffix(".jsonl")
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    module = MPOModule(
        policy=PolicyConfig(base=str(world), lora=LoRA(**LORA)),
        loss=loss,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0),
        lr_scheduler=None,
    )
    data = PreferenceDataModule(
        tokenizer=str(world),
        train=str(file),
        predict=str(file),
        groups_per_batch=len(rows),
        **settings,
    )
    trainer = Trainer(
        accelerator="cpu",
        max_steps=2,
        # TRL's default.
        gradient_clip_val=1.0,
        logger=CSVLogger(out, name="", version=""),
        log_every_n_steps=1,
        callbacks=[Shaken()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module.configure_model()
    shake(module)
    predicted = [row for rows in trainer.predict(module, data) or [] for row in rows]
    logps: list[dict[str, tuple[float, float]]] = []
    for row in predicted:
        if row["response"] == 0:
            logps.append({})
        values = (row["policy_logp"], row["reference_logp"])
        logps[-1]["chosen" if row["score"] == 1 else "rejected"] = values
    trainer.fit(module, data)
    steps = [
        {name.removeprefix("train/"): value for name, value in row.items()}
        for row in metrics(out)
        if "train/loss" in row
    ]
    return Found(logps, steps, adapter(module))


def assert_same(ours: Found, theirs: Found, but: set[str] = frozenset()) -> None:
    """To 1e-4; the adapter has moved by more."""
    assert len(ours.logps) == len(theirs.logps)
    for one, other in zip(ours.logps, theirs.logps, strict=True):
        for side in ("chosen", "rejected"):
            assert one[side] == pytest.approx(other[side], rel=1e-5, abs=1e-4)
    assert len(ours.steps) == len(theirs.steps) == 2
    for one, other in zip(ours.steps, theirs.steps, strict=True):
        for name in other.keys() - but:
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-4), name
    assert ours.trained.keys() == theirs.trained.keys()
    for name, weight in theirs.trained.items():
        torch.testing.assert_close(ours.trained[name], weight, rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("kind", FORMATS)
def test_dpo_is_trls_on_every_format(world: Path, tmp_path: Path, kind: str) -> None:
    rows = FORMATS[kind]()
    theirs = trained_by_trl(world, rows, tmp_path / "trl")
    ours = trained_by_us(
        *(world, rows, tmp_path / "ours", DPO(beta=BETA)),
        prompt_format="text" if kind.startswith("text") else "auto",
    )
    assert_same(ours, theirs)
    # Policy and reference differ, and the steps are no small ones.
    assert max(abs(p - r) for pair in theirs.logps for p, r in pair.values()) > 0.1
    assert abs(theirs.steps[0]["loss"] - theirs.steps[1]["loss"]) > 0.01


PER_TOKEN = {"rewards/chosen", "rewards/rejected", "rewards/margin", "rewards/accuracy"}


@pytest.mark.parametrize(
    ("kind", "loss", "but"),
    [
        ("hinge", Hinge(beta=BETA), set()),
        ("robust", RobustDPO(beta=BETA, flipped=0.2), set()),
        ("nca_pair", NCA(beta=BETA, temperature=1e-4), set()),
        # Their rewards are those that the loss compares: per token.
        ("ipo", IPO(beta=BETA, length_normalized=True), PER_TOKEN),
        ("sigmoid_norm", DPO(beta=BETA, length_normalized=True), PER_TOKEN),
    ],
)
def test_losses_train_as_trls(
    world: Path, tmp_path: Path, kind: str, loss: SetLoss, but: set[str]
) -> None:
    rows = texts()
    smoothing = {"label_smoothing": 0.2} if kind == "robust" else {}
    theirs = trained_by_trl(world, rows, tmp_path / "trl", loss_type=kind, **smoothing)
    ours = trained_by_us(world, rows, tmp_path / "ours", loss, prompt_format="text")
    assert_same(ours, theirs, but)


def test_long_responses_are_cut_and_long_prompts_dropped_as_by_trl(
    world: Path, tmp_path: Path
) -> None:
    rows = messages(texts())
    # One prompt is as long as this, without room for an answer; most answers go beyond.
    limit = 41
    theirs = trained_by_trl(world, rows, tmp_path / "trl", max_length=limit)
    ours = trained_by_us(
        *(world, rows, tmp_path / "ours", DPO(beta=BETA)), max_length=limit, over_long="cut"
    )
    assert len(ours.logps) == len(rows) - 1
    assert_same(ours, theirs)


def test_what_a_template_writes_after_the_end_of_a_turn_is_learned_by_trl_only(
    base: str, tmp_path: Path
) -> None:
    """A line break, as in ChatML."""
    rows = messages(texts())
    theirs = trl_trainer(Path(base), rows, tmp_path / "trl").train_dataset
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    data = PreferenceDataModule(tokenizer=base, train=str(file))
    data.setup("fit")
    tokenizer = AutoTokenizer.from_pretrained(base)
    (line_break,) = tokenizer("\n", add_special_tokens=False)["input_ids"]
    groups = data.datasets["train"].groups
    assert len(theirs) == len(groups) == len(rows)
    for row, group in zip(theirs, groups, strict=True):
        assert group.prompt.tolist() == row["prompt_ids"]
        for response, name in zip(group.responses, ("chosen_ids", "rejected_ids"), strict=True):
            assert [*response.tolist(), line_break] == row[name]
            assert response[-1] == tokenizer.eos_token_id


def test_documented_recipe_trains_as_trls_defaults(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parent.parent / "docs" / "trl.md").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    assert recipe.count("1000") == 2
    recipe = recipe.replace("1000", "2").replace("path/or/hub-id", str(world))
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    rows = messages(texts())
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mpo-lightning"])
    command = ["fit", "--config=recipe.yaml", "--trainer.callbacks=tests.test_trl_trainer.Shaken"]
    # Of so small a model bf16 and a small step would show nothing.
    command += ["--trainer.precision=32-true", "--model.optimizer.lr=0.01"]
    command += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    command += ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path}"]
    command += [
        "--trainer.logger.name=",
        "--trainer.logger.version=",
        "--trainer.log_every_n_steps=1",
    ]
    main(command)
    found = [row for row in metrics(tmp_path) if "train/loss" in row]
    theirs = trained_by_trl(
        *(world, rows, tmp_path / "trl"),
        lora={"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
        beta=0.1,
        lr_scheduler_type="linear",
    )
    assert len(found) == 2
    for one, other in zip(found, theirs.steps, strict=True):
        for name, value in other.items():
            assert one.get(f"train/{name}", one["lr"]) == pytest.approx(value, rel=1e-4, abs=1e-4)
