"""Runs that were killed go on as if they had not been; what they must not go on from is refused."""

import os
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler
from transformers import AutoModelForCausalLM, AutoTokenizer

from mpo_lightning import PreferenceDataModule
from mpo_lightning.optim import RunSchedule, WarmupCosine, at_step
from mpo_lightning.training.resume import of_all_processes, random_state, restore_random_state
from tests.conftest import StopAfterFirstEpoch, example_rows, make_tokenizer, write_rows
from tests.runs import (
    GO_ON,
    OVERLAYS,
    SAVE_EACH_STEP,
    assert_same_adapter,
    assert_same_metrics,
    fit,
    metrics,
    of_two,
)
from tests.training.fits import make_module, make_trainer

PLAIN_FSDP2 = {
    "data_parallel_size": 2,
    "tensor_parallel_size": 1,
    "save_distributed_checkpoint": "false",
}


def kill_at(batch: int) -> list[str]:
    return [
        "--trainer.callbacks+=tests.interruptions.KillAtBatch",
        f"--trainer.callbacks.batch={batch}",
    ]


# Before anything was saved, between two steps, between two epochs, and inside an epoch with the
# gradient of a batch.
MOMENTS = [2, 4, 6, 11]
OTHERS = {
    "slices": "--data.num_workers=2 --data.tokens_per_batch=150 --model.responses_per_pass=2",
    "nf4": "--model.policy.quantization=nf4",
}


@pytest.mark.parametrize("name", ["plain", *OTHERS])
def test_killed_run_goes_on_bit_for_bit(
    recipe: Path, whole: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    """Same losses, same order of groups, same adapter; with dropout, in mid-accumulation."""
    options = OTHERS.get(name, "").split()
    if options:
        uninterrupted = tmp_path / "whole"
        fit(recipe, uninterrupted, *options)
    else:
        uninterrupted = whole("single")
    options += SAVE_EACH_STEP
    expected = metrics(uninterrupted)
    for batch in MOMENTS if name == "plain" else MOMENTS[-1:]:
        root = tmp_path / f"killed{batch}"
        killed = fit(recipe, root, *options, *kill_at(batch), check=False)
        assert killed.returncode == -9
        fit(recipe, root, *options, *GO_ON)
        found = metrics(root)
        assert_same_metrics(found, expected[-len(found) :])
        # Before the first save it starts anew.
        assert (len(found) < len(expected)) == (batch >= 4)
        assert_same_adapter(root, uninterrupted)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_killed_processes_go_on_bit_for_bit(
    recipe: Path, whole: Callable[[str], Path], tmp_path: Path, strategy: str
) -> None:
    """All processes die in mid-epoch and mid-accumulation."""
    options = [*of_two(strategy), *SAVE_EACH_STEP]
    killed = fit(recipe, tmp_path / "killed", *options, *kill_at(4), check=False)
    assert killed.returncode != 0
    fit(recipe, tmp_path / "killed", *options, *GO_ON)
    expected, found = metrics(whole(strategy)), metrics(tmp_path / "killed")
    assert 0 < len(found) < len(expected)
    assert_same_metrics(found, expected[-len(found) :])
    assert_same_adapter(tmp_path / "killed", whole(strategy))


@pytest.mark.parametrize(("first", "then"), [("fsdp2", "single"), ("single", "fsdp2")])
def test_run_goes_on_with_another_strategy(
    recipe: Path, tmp_path: Path, first: str, then: str
) -> None:
    """Optimizer states are numbered alike whether they were sharded or not."""
    options = ["--trainer.accumulate_grad_batches=1", "--model.policy.lora.lora_dropout=0"]
    batch = {"single": ["--data.groups_per_batch=2"], "fsdp2": ["--data.groups_per_batch=1"]}
    fit(recipe, tmp_path / "whole", *OVERLAYS["single"], *options, *batch["single"])
    killed = [*OVERLAYS[first], *options, *batch[first], *SAVE_EACH_STEP, *kill_at(8)]
    assert fit(recipe, tmp_path / "parts", *killed, check=False).returncode != 0
    fit(recipe, tmp_path / "parts", *OVERLAYS[then], *options, *batch[then], *GO_ON)
    names = {path.name for path in (tmp_path / "parts" / "checkpoints").glob("last*")}
    assert names == {"last.ckpt", "last-adapter"}
    assert_same_adapter(tmp_path / "parts", tmp_path / "whole", 1e-5)


def test_optimizer_states_that_are_numbered_otherwise_are_refused(
    recipe: Path, tmp_path: Path
) -> None:
    """They would be taken for those of other weights."""
    lightnings = ["--trainer.strategy=lightning.pytorch.strategies.ModelParallelStrategy"]
    lightnings += [f"--trainer.strategy.{name}={value}" for name, value in PLAIN_FSDP2.items()]
    fit(recipe, tmp_path / "run", *lightnings, "--trainer.devices=2", "--trainer.max_epochs=1")
    for strategy in ("single", "fsdp2"):
        result = fit(recipe, tmp_path / "run", *OVERLAYS[strategy], *GO_ON, check=False)
        assert result.returncode == 1
        assert "optimizer's state by all weights, this strategy by trained" in result.stderr


# ------------------------------------------------------------------------- runs of another length


def schedule_name(schedule: object) -> str:
    return type(schedule).__name__


class Linear(RunSchedule):
    """Falls to zero over the run."""

    def __call__(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        return LambdaLR(optimizer, lambda step: max(0.0, 1 - step / total_steps))


class OfTorch(RunSchedule):
    """Keeps its length in its state, which a checkpoint restores."""

    def __call__(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        return CosineAnnealingLR(optimizer, T_max=total_steps)


class Constant(RunSchedule):
    """Warms up over a number of steps that is not a share of the run."""

    def __call__(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 2))


class Rates(Callback):
    """The learning rate of each optimizer step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, *_: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def rates(base: str, data: str, schedule: Any, checkpoint: Path, **settings: Any) -> list[float]:
    """The rates of a run, which goes on from a checkpoint if there is one and leaves another."""
    module = make_module(base, lr_scheduler=schedule)
    seen = Rates()
    trainer = make_trainer(callbacks=[seen], **settings)
    files = PreferenceDataModule(tokenizer=base, train=data, groups_per_batch=2)
    known = str(checkpoint) if checkpoint.exists() else None
    trainer.fit(module, files, ckpt_path=known, weights_only=True)
    trainer.save_checkpoint(checkpoint)
    return seen.rates


@pytest.mark.parametrize(
    "schedule", [WarmupCosine(warmup=0.2), Linear(), OfTorch()], ids=schedule_name
)
@pytest.mark.parametrize(
    ("runs", "lengths"),
    [
        ([{"max_epochs": 1}, {"max_epochs": 3}], (4, 12)),
        ([{"max_steps": 3, "max_epochs": 2}, {"max_steps": 6, "max_epochs": 2}], (3, 6)),
        # Four steps are done, six to come.
        ([{"max_epochs": 1}, {"max_epochs": 4, "accumulate_grad_batches": 2}], (4, 10)),
    ],
    ids=str,
)
def test_another_length_is_told_and_followed_from_the_first_step(
    base: str, tmp_path: Path, schedule: RunSchedule, runs: Any, lengths: tuple[int, int]
) -> None:
    """The rates are those of a run of the new length; no step has the last one of the old."""
    data = write_rows(tmp_path / "groups.jsonl", example_rows(8))
    (first, then), (before, now) = runs, lengths
    assert len(rates(base, data, schedule, tmp_path / "x.ckpt", **first)) == before
    told = rf"of a run of {before} optimizer steps,.* this one has {now}: after"
    with pytest.warns(UserWarning, match=told):
        found = rates(base, data, schedule, tmp_path / "x.ckpt", **then)
    optimizer = SGD([torch.zeros(1)], lr=0.05)
    expected = [each for (each,) in at_step(schedule, now, optimizer, now)[1]]
    assert found == pytest.approx(expected[before:now])
    # What it leaves knows its length: with the same settings there is nothing to tell.
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*learning rate.*")
        assert rates(base, data, schedule, tmp_path / "x.ckpt", **then) == []


@pytest.mark.parametrize("schedule", [Constant(), None, WarmupCosine()], ids=schedule_name)
def test_what_does_not_change_is_not_told(
    base: str, write_jsonl: Callable[..., str], tmp_path: Path, schedule: Any
) -> None:
    data = write_jsonl(example_rows(8))
    settings: dict[str, Any] = {"max_epochs": 2}
    interrupted = {**settings, "callbacks": [StopAfterFirstEpoch()]}
    module = make_module(base, lr_scheduler=schedule)
    files = PreferenceDataModule(tokenizer=base, train=data, groups_per_batch=2)
    trainer = make_trainer(**interrupted)
    trainer.fit(module, files)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    longer = settings if isinstance(schedule, WarmupCosine) else {"max_epochs": 4}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*learning rate.*")
        found = rates(base, data, schedule, tmp_path / "x.ckpt", **longer)
    assert found == rates(base, data, schedule, tmp_path / "y.ckpt", **longer)[4:]


def test_a_schedule_that_is_switched_off_is_told(
    base: str, write_jsonl: Callable[..., str], tmp_path: Path
) -> None:
    """Its last rate would stay for good, and that is often zero."""
    data = write_jsonl(example_rows(8))
    rates(base, data, WarmupCosine(), tmp_path / "x.ckpt")
    with pytest.warns(
        UserWarning, match="run of 4 optimizer steps.* no schedule: the rate is 0.05"
    ):
        found = rates(base, data, None, tmp_path / "x.ckpt", max_epochs=2)
    assert found == [0.05] * 4


# ------------------------------------------------------------------------------------- refusals


@pytest.fixture(scope="module")
def checkpoint(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run that was killed inside an epoch."""
    root = tmp_path_factory.mktemp("killed")
    fit(recipe, root, *SAVE_EACH_STEP, *kill_at(11), check=False)
    return root / "checkpoints" / "last.ckpt"


def test_what_a_run_must_not_go_on_from_is_refused_by_name(
    base: str, recipe: Path, checkpoint: Path, tmp_path: Path
) -> None:
    other = str(tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    model.save_pretrained(other)
    AutoTokenizer.from_pretrained(base).save_pretrained(other)
    make_tokenizer(vocab_size=320).save_pretrained(tmp_path / "tokens")
    rows = example_rows(11)
    rows[7]["scores"][0] += 0.5
    cases = {
        "another base model: its weights": [f"--model.policy.base={other}"],
        "another tokenizer": [f"--data.tokenizer={tmp_path / 'tokens'}"],
        "adapter is not this run's": ["--model.policy.lora.r=8"],
        "another data set (data.train)": [
            f"--data.train={write_rows(tmp_path / 'changed.jsonl', rows)}"
        ],
        "another order of groups: its groups": ["--data.groups_per_batch=3"],
        "another order of groups: its seed": ["--data.seed=5"],
    }
    for message, options in cases.items():
        result = fit(recipe, tmp_path / "again", f"--ckpt_path={checkpoint}", *options, check=False)
        assert result.returncode == 1, message
        assert message in result.stderr
        assert "Traceback" not in result.stderr
    sharded = [*OVERLAYS["fsdp2"], f"--model.policy.base={other}", f"--ckpt_path={checkpoint}"]
    result = fit(recipe, tmp_path / "again", *sharded, check=False)
    assert result.returncode != 0
    assert "another base model: its weights" in result.stderr


def test_the_same_elsewhere_is_accepted(
    base: str, recipe: Path, whole: Callable[[str], Path], checkpoint: Path, tmp_path: Path
) -> None:
    """Neither where base and data lie nor how a batch is computed is part of what was trained."""
    shutil.copytree(base, tmp_path / "moved")
    shutil.copy(recipe.parent / "groups.jsonl", tmp_path / "moved.jsonl")
    options = [f"--model.policy.base={tmp_path / 'moved'}", "--model.layout=separate"]
    options += [f"--data.train={tmp_path / 'moved.jsonl'}", f"--ckpt_path={checkpoint}"]
    fit(recipe, tmp_path / "again", *options)
    found, expected = (
        [row["step"] for row in metrics(root)] for root in (tmp_path / "again", whole("single"))
    )
    # It goes on where the checkpoint was made.
    assert 0 < len(found) < len(expected)
    assert found == expected[-len(found) :]


# ------------------------------------------------------------------------------------ the parts


def test_random_numbers_go_on_from_a_state(tmp_path: Path) -> None:
    """Of all three generators, through a checkpoint that holds nothing but plain values."""

    def draw() -> list[Any]:
        return [random.random(), random.gauss(0, 1), np.random.normal(), torch.rand(2).tolist()]

    draw()
    torch.save(random_state(), tmp_path / "state.pt")
    expected = draw()
    draw()
    restore_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draw() == expected


def test_one_process_is_all_processes() -> None:
    assert of_all_processes({"a": os.getpid()}) == [{"a": os.getpid()}]
