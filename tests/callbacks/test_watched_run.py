"""Runs that are watched: real ones, small, through the command line."""

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mpo_lightning import (
    LoRA,
    MPOModule,
    PolicyConfig,
    PreferenceDataModule,
    RunProgressBar,
    Samples,
    TrainingHealth,
)
from mpo_lightning.callbacks.health import HealthWarning
from mpo_lightning.callbacks.health_checks import Thresholds
from mpo_lightning.callbacks.samples import SamplesError
from mpo_lightning.cli import main
from mpo_lightning.data.groups import DataError
from mpo_lightning.losses import MPO
from mpo_lightning.strategy import FSDP1, FSDP2
from mpo_lightning.training.metrics import METRICS
from mpo_lightning.training.resume import random_state
from tests.conftest import example_rows, make_tokenizer
from tests.runs import adapter

SMALL = Thresholds(window=3, slow_after=3)


@pytest.fixture
def data(write_jsonl: Callable[..., str]) -> dict[str, str]:
    return {
        "train": write_jsonl(example_rows(12), "train.jsonl"),
        "val": write_jsonl(example_rows(5, seed=1), "val.jsonl"),
    }


@pytest.fixture
def recipe(
    base: str, data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """A recipe in which nothing is said of what watches it."""
    monkeypatch.setattr(sys, "argv", ["mpo-lightning"])
    monkeypatch.chdir(tmp_path)
    return {
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 2,
            "log_every_n_steps": 1,
            "enable_model_summary": False,
            "num_sanity_val_steps": 1,
            "default_root_dir": str(tmp_path / "run"),
        },
        "model": {
            "policy": {"base": base, "lora": {"r": 4, "lora_dropout": 0.1}},
            "loss": {"class_path": "MPO", "init_args": {"beta": 0.5, "alpha": 0.2}},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        },
        "data": {**data, "groups_per_batch": 4},
    }


def fit(recipe: dict[str, Any], *options: str) -> None:
    path = Path("recipe.yaml")
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    main(["fit", "--config", str(path), *options])


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def json_lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def without_system(path: Path) -> list[dict[str, str]]:
    return [
        {k: v for k, v in row.items() if not k.startswith(("system/", "samples/"))}
        for row in read(path)
    ]


def documented() -> set[str]:
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    return {line.split("`")[1] for line in page.splitlines() if line.startswith("| `")}


def test_run_is_watched_from_the_start_to_the_end(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One run, all that it leaves; and one without samples gives the same numbers and weights."""
    fit(recipe, "--samples.count=2", "--samples.max_new_tokens=8", "--health.thresholds.window=3")
    shown = capsys.readouterr().out
    logs = tmp_path / "run" / "lightning_logs" / "version_0"

    # CSV and TensorBoard in one folder, the configuration once in each.
    names = {path.name for path in logs.iterdir()}
    assert {"metrics.csv", "config.yaml", "samples.jsonl"} <= names
    (events,) = [name for name in names if name.startswith("events")]
    board = EventAccumulator(str(logs / events))
    board.Reload()
    tags = board.Tags()
    rows = read(logs / "metrics.csv")
    for name in {"epoch", *rows[0]} - {"step"}:
        assert name in tags["scalars"], name
    assert [event.step for event in board.Tensors("config/text_summary")] == [0]
    assert b"beta: 0.5" in board.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    assert [event.step for event in board.Tensors("samples/text_summary")] == [3, 6]

    # Everything that is logged is documented.
    bare = {name.removeprefix("train/").removeprefix("val/") for name in rows[0]}
    assert bare - {"epoch", "step"} <= documented()
    speeds = [float(row["system/tokens_per_second"]) for row in rows if row["train/loss"]]
    assert len(speeds) == 6
    assert all(speed > 0 for speed in speeds)
    assert all(0.1 < float(row["system/memory_gib"]) < 16 for row in rows if row["train/loss"])

    # Two prompts at two validations; before is the same in both, and what is not trained.
    samples = [json.loads(line) for line in (logs / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == [3, 3, 6, 6]
    for early, late in zip(samples[:2], samples[2:], strict=True):
        assert early["prompt"] == late["prompt"]
        assert early["before"] == late["before"]
        assert early["source"].endswith(("val.jsonl:1", "val.jsonl:2"))
    # Prompts as their rows have them, not as the template writes them.
    text, (system, user) = (row["prompt"] for row in example_rows(5, seed=1)[:2])
    assert samples[0]["prompt"] == text
    assert samples[1]["prompt"] == f"system: {system['content']}\nuser: {user['content']}"
    lengths = [float(row["samples/length"]) for row in rows if row["samples/length"]]
    after = [row["after_tokens"] for row in samples]
    assert lengths == [sum(after[:2]) / 2, sum(after[2:]) / 2]
    assert "Samples" in shown
    assert "before" in shown

    # Output that is no terminal gets lines, without what moves a cursor.
    assert "\r" not in shown
    assert "\x1b" not in shown
    (line,) = [line for line in shown.splitlines() if line.startswith("Validation at step 6")]
    last = [row for row in rows if row["val/loss"]][-1]
    assert f"loss {float(last['val/loss']):.3f}" in line
    assert "Epoch 1 3/3, step 6: left 00:00, loss" in shown

    # Neither samples nor what else looks on changes anything.
    recipe["trainer"]["default_root_dir"] = str(tmp_path / "alone")
    fit(recipe, "--trainer.enable_progress_bar=false", "--health.ignore=[collapse]")
    assert "Validation" not in capsys.readouterr().out
    alone = tmp_path / "alone" / "lightning_logs" / "version_0" / "metrics.csv"
    assert without_system(alone) == without_system(logs / "metrics.csv")
    one, other = adapter(tmp_path / "run"), adapter(tmp_path / "alone")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_run_that_goes_on_tells_nothing_twice(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate of nothing is told after three steps, and not again by the second part."""
    recipe["model"]["optimizer"]["init_args"]["lr"] = 1e-9
    recipe["model"]["lr_scheduler"] = None
    options = ["--health.thresholds={window: 3, slow_after: 3}", "--samples.count=1"]
    options += ["--samples.max_new_tokens=4", "--trainer.logger=false"]
    with pytest.warns(HealthWarning, match="Step 3, slow: training hardly moves: after 3 steps"):
        fit(recipe, *options, "--trainer.max_epochs=1")
    with pytest.warns(HealthWarning) as warned:
        fit(recipe, *options, "--ckpt_path=last")
    said = [str(each.message) for each in warned if each.category is HealthWarning]
    # Twice as bad at step 6; nothing at steps 4 and 5.
    assert [text.split(":")[0] for text in said] == ["Step 6, slow, worse than before"]
    # Without a logger, samples lie in the run's root.
    samples = json_lines(tmp_path / "run/samples.jsonl")
    assert [row["step"] for row in samples] == [3, 6]
    assert len({row["before"] for row in samples}) == 1


# ----------------------------------------------------------------------------------- in Python


def make(base: str, data: dict[str, str], **settings: Any) -> tuple[MPOModule, Any]:
    module = MPOModule(
        policy=PolicyConfig(base=base, lora=LoRA(r=4), **settings.pop("policy", {})),
        loss=settings.pop("loss", MPO(beta=0.5)),
        optimizer=lambda p: torch.optim.AdamW(p, lr=settings.get("lr", 0.01)),
        lr_scheduler=None,
    )
    return module, PreferenceDataModule(tokenizer=base, groups_per_batch=4, **data)


def trainer(folder: Path, *callbacks: Any, **settings: Any) -> Trainer:
    quiet: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    quiet |= {"enable_model_summary": False, "max_epochs": 1, "default_root_dir": str(folder)}
    quiet |= {"enable_progress_bar": any(isinstance(c, RunProgressBar) for c in callbacks)}
    return Trainer(**quiet | settings, callbacks=list(callbacks))


def told(health: TrainingHealth) -> list[str]:
    return [finding.check for _, finding in health.findings]


@pytest.mark.filterwarnings("ignore::mpo_lightning.callbacks.health.HealthWarning")
def test_real_runs_that_are_made_sick(
    base: str, data: dict[str, str], write_jsonl: Callable[..., str], tmp_path: Path
) -> None:
    """Four groups again and again are learned by heart; two scales of scores make losses vary."""
    health = TrainingHealth(thresholds=Thresholds(window=3))
    few = {"train": write_jsonl(example_rows(4), "few.jsonl")}
    module, groups = make(base, few, lr=0.03, loss=MPO(beta=1.0))
    trainer(tmp_path, health, max_epochs=30).fit(module, groups)
    assert "collapse" in told(health)

    rows = example_rows(12)
    for row in rows[::2]:
        row["scores"] = [40 * score for score in row["scores"]]
    health = TrainingHealth(thresholds=Thresholds(window=3))
    mixed = {"train": write_jsonl(rows, "mixed.jsonl")}
    module, groups = make(base, mixed, loss=MPO(beta=0.5, alpha=0.5), lr=1e-4)
    trainer(tmp_path, health).fit(module, groups)
    assert told(health) == ["loss_variation"]
    assert "model.loss.alpha 0.5" in health.findings[0][1].message

    # The same data on one scale, and as long.
    healthy = TrainingHealth(thresholds=Thresholds(window=3))
    module, groups = make(base, data, loss=MPO(beta=0.5, alpha=0.1), lr=1e-3)
    trainer(tmp_path, healthy).fit(module, groups)
    assert told(healthy) == []


@pytest.mark.parametrize("policy", [{}, {"quantization": "nf4"}], ids=["float32", "nf4"])
def test_samples_are_the_models_own_and_touch_no_random_numbers(
    base: str, data: dict[str, str], tmp_path: Path, policy: dict[str, Any]
) -> None:
    """By transformers' greedy generation; before is the base, also after training."""
    samples = Samples(prompts=["Name a fruit.", "Count."], max_new_tokens=6)
    module, groups = make(base, data, policy=policy, lr=0.05)
    before: list[Any] = []
    answers = samples._answers

    def guarded(*args: Any, **options: Any) -> Any:
        state = random_state()["torch"]
        found = answers(*args, **options)
        assert torch.equal(state, random_state()["torch"])
        before.append(options["reference"])
        return found

    samples._answers = guarded  # type: ignore[method-assign]
    trainer(tmp_path, samples, limit_val_batches=0).fit(module, groups)
    assert before == [True, False]
    policy_model = module.policy
    assert policy_model is not None
    model = policy_model.model.eval()
    assert not policy_model.is_untrained()
    for number, (text, old, new) in enumerate(samples.shown):
        ids = torch.tensor([samples._prompts[number].ids])
        assert ("Name a fruit." in text) == (number == 0)

        def greedy(ids: torch.Tensor = ids) -> tuple[int, ...]:
            made = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
            return tuple(made[0, ids.shape[1] :].tolist())

        assert new.ids == greedy()  # type: ignore[union-attr]
        with model.disable_adapter():
            assert old.ids == greedy()  # type: ignore[union-attr]


def test_prompts_that_leave_no_room_are_told(
    base: str, data: dict[str, str], tmp_path: Path
) -> None:
    samples = Samples(prompts=["one two three " * 400], max_new_tokens=6)
    module, groups = make(base, data)
    trainer(tmp_path, samples, max_steps=1, limit_val_batches=0).fit(module, groups)
    (row,) = json_lines(tmp_path / "samples.jsonl")
    assert row["before"] is None
    assert "leaves no room" in row["before_refused"]


def test_prompts_with_a_token_that_the_model_lacks_are_named(
    base: str, data: dict[str, str], tmp_path: Path
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|extra|>"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    module, groups = make(base, data)
    groups.tokenizer_path = str(tmp_path / "tokenizer")
    samples = Samples(prompts=["Hi", "<|extra|>"], max_new_tokens=6)
    with pytest.raises(DataError, match=r"samples.prompts\[1\]: prompt: found token 384"):
        trainer(tmp_path, samples, max_steps=1, limit_val_batches=0).fit(module, groups)


@pytest.mark.parametrize("strategy", [FSDP1, FSDP2])
def test_sharded_policy_is_refused_by_name(strategy: type) -> None:
    """And only where samples are asked for."""
    sharded: Any = SimpleNamespace(strategy=strategy())
    with pytest.raises(SamplesError, match=f"samples: {strategy.__name__} shards the model"):
        Samples(count=1).setup(sharded, None, "fit")  # type: ignore[arg-type]
    Samples(count=0).setup(sharded, None, "fit")  # type: ignore[arg-type]


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="samples.count must be at least 0"):
        Samples(count=-1)
    with pytest.raises(ValueError, match=r"health.ignore: there are no checks \['slowness'\]"):
        TrainingHealth(ignore=["slowness"])  # type: ignore[list-item]


# ------------------------------------------------------------------------- bars and loggers


class Terminal:
    """A standard output that says it is a terminal."""

    def __init__(self) -> None:
        self.written = ""

    def write(self, text: str) -> int:
        self.written += text
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True


def test_bar_in_a_terminal(
    base: str, data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bar that is written over, with what matters, and each validation on a line of its own."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "160")
    module, groups = make(base, data)
    bar = RunProgressBar()
    trainer(tmp_path, bar).fit(module, groups)
    drawn = terminal.written.split("\r")
    (end,) = [text for text in drawn if "| 3/3" in text and "loss=" in text][-1:]
    for name in ("Epoch 0", "left=00:00", "loss=", "margin=", "accuracy=", "tokens/s=", "GiB="):
        assert name in end
    assert "Validation at step 3: loss" in terminal.written


def test_own_bar_and_loggers_take_the_place_of_ours(recipe: dict[str, Any]) -> None:
    from mpo_lightning.commands.run_callbacks import run_callbacks

    bar, given = RunProgressBar(), TrainingHealth()
    settings: dict[str, Any] = {"callbacks": RichProgressBar(), "logger": False}
    assert run_callbacks(settings, [bar, given], fitting=True)[:-1] == [given]
    assert settings["logger"] is False
    settings = {"callbacks": None, "logger": None, "default_root_dir": "here"}
    assert run_callbacks(settings, [bar, given], fitting=True)[:-1] == [bar, given]
    assert [type(logger) for logger in settings["logger"]] == [TensorBoardLogger, CSVLogger]
    assert len({logger.log_dir for logger in settings["logger"]}) == 1


def test_logger_without_its_library_says_what_to_install(recipe: dict[str, Any]) -> None:
    with pytest.raises(
        SystemExit,
        match=r"needs wandb, which is not installed: pip install 'mpo-lightning\[wandb\]'",
    ):
        fit(recipe, "--trainer.logger=WandbLogger")


def test_what_lightning_refuses_takes_one_line(recipe: dict[str, Any]) -> None:
    with pytest.raises(SystemExit, match=r"^error: To use .*must have DeepSpeed installed\. .*$"):
        fit(recipe, "--trainer.strategy=deepspeed")


def test_documented_metrics_are_those_of_the_code() -> None:
    """In order, and with the direction that is better."""
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    table = page.partition("| name | better |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.split(" |")[:2]] for line in table.splitlines()[2:]]
    words = {True: "higher", False: "lower", None: ""}
    assert rows == [[f"| `{n}`", words[m.higher_is_better]] for n, m in METRICS.items()]
