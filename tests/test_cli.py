"""The command line as users run it, in one process and in two."""

import csv
import shutil
import subprocess
import sys
from collections.abc import Callable
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.cli import LightningArgumentParser
from safetensors.torch import load_file

import mpo_lightning.training.module
from mpo_lightning import LoRA, MPOModule, PolicyConfig, PreferenceDataModule, losses
from mpo_lightning.batch import GroupBatch
from mpo_lightning.cli import main
from mpo_lightning.commands.names import COMMANDS
from mpo_lightning.data import datamodule, rendering
from mpo_lightning.generation.model import ModelConfig, load_group_tokenizer
from mpo_lightning.losses import IPO, MDPO, MPO, AboveQuantile, BestRest, EachMPO, TopBottom
from mpo_lightning.model.reference_cache import ReferenceCache
from tests import processes
from tests.conftest import example_rows, random_groups

LOSS_NAMES = [
    name
    for name in losses.__all__
    if isinstance(getattr(losses, name), type)
    and issubclass(getattr(losses, name), losses.SetLoss)
    and name not in {"SetLoss", "PairLoss"}
]


@pytest.fixture
def config(base: str, write_jsonl: Callable[..., str], tmp_path: Path) -> Path:
    """A recipe as a user writes one; 11 groups leave an uneven end."""
    path = tmp_path / "recipe.yaml"
    recipe = {
        "trainer": {
            "accelerator": "cpu",
            "default_root_dir": str(tmp_path / "run"),
            "max_epochs": 2,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": str(tmp_path / "run"), "name": "", "version": ""},
            },
        },
        "model": {
            "policy": {"base": base, "lora": {"r": 4}},
            "loss": {"class_path": "MPO", "init_args": {"beta": 0.5, "alpha": 0.2}},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        },
        "data": {
            "train": write_jsonl(example_rows(11), "train.jsonl"),
            "val": write_jsonl(example_rows(5, seed=1), "val.jsonl"),
            "test": write_jsonl(example_rows(3, seed=2), "test.jsonl"),
            "predict": write_jsonl(example_rows(5, seed=3), "predict.jsonl"),
            "groups_per_batch": 4,
        },
    }
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _plain_argv(monkeypatch: pytest.MonkeyPatch) -> None:
    # LightningCLI warns where arguments are passed although the process has some of its own.
    monkeypatch.setattr(sys, "argv", ["mpo-lightning"])


def launch(*args: Any) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, which starts the second one itself."""
    command = [sys.executable, "-m", "mpo_lightning", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def metrics(folder: Path) -> list[dict[str, float]]:
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    # Without the clock and the memory.
    return [
        {k: float(v) for k, v in row.items() if v and not k.startswith("system/")} for row in rows
    ]


def fit(config: Path, root: Path, *more: Any) -> list[dict[str, float]]:
    main(["fit", "--config", str(config), *map(str, more), *in_folder(root)])
    return metrics(root)


def in_folder(root: Path) -> list[str]:
    return [
        f"--trainer.default_root_dir={root}",
        f"--trainer.logger.init_args.save_dir={root}",
    ]


# ------------------------------------------------------------------------------ the main job


def test_fit_validate_test_and_predict(
    config: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = tmp_path / "run"
    rows = fit(config, run)
    assert [row["train/loss"] for row in rows if "train/loss" in row][-1] < 0.8
    assert len([row for row in rows if "val/loss" in row]) == 2
    assert (run / "config.yaml").is_file()
    last = run / "checkpoints" / "last.ckpt"
    assert (run / "checkpoints" / "last-adapter" / "adapter_model.safetensors").is_file()
    assert "11 of 11 groups" in caplog.text

    for stage in ("validate", "test"):
        main([stage, "--config", str(config), f"--ckpt_path={last}", *in_folder(run)])
    assert "test/rewards/kendall_tau" in capfd.readouterr().out

    path = tmp_path / "predictions.parquet"
    predict = ["predict", "--config", str(config), f"--ckpt_path={last}", *in_folder(run)]
    main([*predict, f"--predictions.path={path}"])
    table = pq.read_table(path).to_pylist()
    expected = example_rows(5, seed=3)
    assert [(r["row"], r["response"]) for r in table] == [
        (line, index) for line, row in enumerate(expected, 1) for index in range(len(row["scores"]))
    ]
    assert any(abs(r["reward"]) > 1e-3 for r in table), "the checkpoint was not used"
    with pytest.raises(SystemExit, match="exists already"):
        main([*predict, f"--predictions.path={path}"])


def test_two_processes_give_the_numbers_of_one(config: Path, tmp_path: Path) -> None:
    """11 and 5 groups over two processes: the end is uneven in training and in validation."""
    samples = ["--samples.count=1", "--samples.max_new_tokens=4"]
    one = fit(config, tmp_path / "one", *samples)
    two_processes = [
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
        "--data.groups_per_batch=2",
        *in_folder(tmp_path / "two"),
    ]
    result = launch("fit", "--config", config, *two_processes, *samples)
    assert result.returncode == 0, result.stderr[-3000:]
    two = metrics(tmp_path / "two")
    # The first process alone writes the samples; a row for each validation.
    found = (tmp_path / "two" / "samples.jsonl").read_text(encoding="utf-8")
    assert found == (tmp_path / "one" / "samples.jsonl").read_text(encoding="utf-8")
    assert len(found.splitlines()) == 2
    assert len(one) == len(two)
    for first, second in zip(one, two, strict=True):
        assert second == pytest.approx(first, rel=1e-4, abs=1e-5)
    name = "checkpoints/last-adapter/adapter_model.safetensors"
    expected, found = load_file(tmp_path / "one" / name), load_file(tmp_path / "two" / name)
    for key, weight in expected.items():
        torch.testing.assert_close(found[key], weight, rtol=1e-4, atol=1e-5, msg=key)

    # The same checkpoint, predicted for by one process and by two: every response once.
    last = tmp_path / "one" / "checkpoints" / "last.ckpt"
    common = ["predict", "--config", str(config), f"--ckpt_path={last}"]
    main([*common, *in_folder(tmp_path / "one"), f"--predictions.path={tmp_path / 'one.parquet'}"])
    predict = [*common, *two_processes, f"--predictions.path={tmp_path / 'two.parquet'}"]
    result = processes.run(processes.command_line, predict, processes=2)
    assert result.returncode == 0, result.stderr[-3000:]
    expected_rows = pq.read_table(tmp_path / "one.parquet").to_pylist()
    found_rows = pq.read_table(tmp_path / "two.parquet").to_pylist()
    assert len(found_rows) == len(expected_rows)
    for first, second in zip(expected_rows, found_rows, strict=True):
        for name, value in first.items():
            near = isinstance(value, float)
            assert second[name] == (pytest.approx(value, rel=1e-4, abs=1e-4) if near else value)
    assert sorted(p.name for p in tmp_path.glob(".*parquet*")) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_from_last_continues_the_same_losses(
    config: Path, tmp_path: Path, workers: int
) -> None:
    more = [f"--data.num_workers={workers}"]
    whole = fit(config, tmp_path / "whole", *more)
    # The first epoch of the same two-epoch run, and then the rest of it.
    root = tmp_path / "parts"
    first = tmp_path / "first.yaml"
    first.write_text(
        yaml.safe_dump(
            {"trainer": {"callbacks": [{"class_path": "tests.conftest.StopAfterFirstEpoch"}]}}
        ),
        encoding="utf-8",
    )
    fit(config, root, *more, "--config", first)
    rest = fit(config, root, *more, "--ckpt_path", "last")
    steps = [row for row in whole if "train/loss" in row and row["epoch"] == 1]
    resumed = [row for row in rest if "train/loss" in row]
    assert len(steps) == 3
    assert resumed == steps
    name = "checkpoints/last-adapter/adapter_model.safetensors"
    expected = load_file(tmp_path / "whole" / name)
    last = sorted((root / "checkpoints").glob("last*-adapter"))[-1]
    found = load_file(last / "adapter_model.safetensors")
    for key, weight in expected.items():
        assert torch.equal(found[key], weight), key


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        (["--trainer.val_check_interval=2"], 6),
        (["--trainer.check_val_every_n_epoch=2", "--trainer.max_epochs=3"], 9),
        (["--trainer.max_steps=3"], 3),
        (["--trainer.max_steps=4"], 4),
    ],
)
def test_last_checkpoint_holds_the_last_step_whatever_ended_the_run(
    config: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    options: list[str],
    steps: int,
) -> None:
    """3 batches an epoch; a longer run goes on from there as if it had not ended."""
    run, more = tmp_path / "run", ["--model.lr_scheduler=null", *options]
    with caplog.at_level("INFO"):
        fit(config, run, *more)
    last = run / "checkpoints" / "last"
    assert f"Saved {last}.ckpt, and the adapter alone: {last}-adapter" in caplog.text
    assert torch.load(run / "checkpoints" / "last.ckpt")["global_step"] == steps
    more += ["--trainer.max_epochs=-1", "--trainer.max_steps=11"]
    rest = fit(config, run, *more, "--ckpt_path=last")
    whole = fit(config, tmp_path / "whole", *more)
    found, expected = ([r for r in rows if "train/loss" in r] for rows in (rest, whole))
    assert found == expected[steps:]
    name = "checkpoints/last-adapter/adapter_model.safetensors"
    expected = load_file(tmp_path / "whole" / name)
    for key, weight in load_file(run / name).items():
        assert torch.equal(weight, expected[key]), key


def test_a_second_run_in_a_folder_is_not_mixed_with_the_first(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = fit(config, run, "--trainer.max_steps=2")
    main(["validate", "--config", str(config), *in_folder(run), "--ckpt_path=last"])
    assert metrics(run) == first
    with pytest.warns(UserWarning, match=r"last\.ckpt is of an earlier run"):
        second = fit(config, run, "--trainer.max_steps=3")
    assert len([row for row in second if "train/loss" in row]) == 3
    checkpoints = run / "checkpoints"
    assert not list(checkpoints.glob("last-v*"))
    assert torch.load(checkpoints / "last.ckpt")["global_step"] == 3
    (run / "metrics-1.csv").replace(run / "metrics.csv")
    assert metrics(run) == first


def test_user_code_and_command_line_train_the_same_adapter(config: Path, tmp_path: Path) -> None:
    fit(config, tmp_path / "cli")
    recipe = yaml.safe_load(config.read_text(encoding="utf-8"))
    seed_everything(0, workers=True)
    module = MPOModule(
        policy=PolicyConfig(base=recipe["model"]["policy"]["base"], lora=LoRA(r=4)),
        loss=MPO(beta=0.5, alpha=0.2),
        optimizer=lambda params: torch.optim.AdamW(params, lr=0.01),
    )
    data = PreferenceDataModule(
        tokenizer=recipe["model"]["policy"]["base"],
        train=recipe["data"]["train"],
        val=recipe["data"]["val"],
        groups_per_batch=4,
    )
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    assert module.policy is not None
    module.policy.save_adapter(tmp_path / "own")
    name = "adapter_model.safetensors"
    expected = load_file(tmp_path / "cli" / "checkpoints" / "last-adapter" / name)
    for key, weight in load_file(tmp_path / "own" / name).items():
        assert torch.equal(weight, expected[key]), key


# ------------------------------------------------------------------------------- configuration


def test_printed_configuration_is_complete_and_stacks(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("model: {policy: {lora: {r: 2}}, layout: separate}\n", encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(config), "--config", str(overlay), "--print_config"])
    assert stopped.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["policy"]["lora"]["r"] == 2
    assert printed["model"]["layout"] == "separate"
    assert printed["model"]["loss"]["init_args"]["alpha"] == 0.2
    assert printed["model"]["lr_scheduler"]["class_path"] == "mpo_lightning.optim.WarmupCosine"
    assert printed["model"]["loss"]["init_args"]["partition"] == {
        "class_path": "mpo_lightning.losses.AboveMean",
        "init_args": {},
    }
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(printed), encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(again), "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out) == printed


def test_every_saving_at_once_trains_as_none(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Slices, a cached reference, checkpointing and a token budget that holds all groups."""
    # One batch an epoch, so that a budget and a number of groups make the same one.
    plain = ["fit", "--config", str(config), "--data.groups_per_batch=11"]
    main([*plain, f"--trainer.default_root_dir={tmp_path / 'plain'}"])
    cache = tmp_path / "cache"
    saving = [
        "--model.responses_per_pass=3",
        "--model.reference=cached",
        f"--model.reference_cache={cache}",
        "--model.policy.gradient_checkpointing=true",
        "--data.groups_per_batch=null",
        "--data.tokens_per_batch=100000",
    ]
    main([*plain, *saving, f"--trainer.default_root_dir={tmp_path / 'saving'}"])
    expected, found = (
        load_file(tmp_path / run / "checkpoints" / "last-adapter" / "adapter_model.safetensors")
        for run in ("plain", "saving")
    )
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-4, msg=name)
    capsys.readouterr()
    main(["cache", "show", str(cache)])
    _, row = capsys.readouterr().out.splitlines()
    responses = sum(len(r["responses"]) for r in [*example_rows(11), *example_rows(5, seed=1)])
    assert row.split()[1] == str(responses)
    assert row.endswith("LlamaForCausalLM  ok")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--model.loss=EachMPO", "--model.loss.beta=0.2"], EachMPO(beta=0.2)),
        (["--model.loss=MDPO", "--model.loss.likelihood=1"], MDPO(likelihood=1.0)),
        (
            ["--model.loss=IPO", "--model.loss.pairs=sets", "--model.loss.partition=BestRest"],
            IPO(pairs="sets", partition=BestRest()),
        ),
        (
            [
                "--model.loss=MPO",
                "--model.loss.partition=mpo_lightning.losses.TopBottom",
                "--model.loss.partition.k=1",
            ],
            MPO(partition=TopBottom(k=1)),
        ),
        (
            [
                "--model.loss",
                '{"class_path": "MPO", "init_args": {"beta": 0.3, "partition": '
                '{"class_path": "AboveQuantile", "init_args": {"quantile": 0.6}}}}',
            ],
            MPO(beta=0.3, partition=AboveQuantile(quantile=0.6)),
        ),
        *(([f"--model.loss={name}"], getattr(losses, name)()) for name in LOSS_NAMES),
    ],
    ids=str,
)
def test_losses_go_by_their_short_names(args: list[str], expected: losses.SetLoss) -> None:
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(MPOModule, "model")
    config = parser.parse_args(["--model.policy.base=nowhere", *args])
    assert parser.instantiate(config).model.loss == expected


PARTITIONS = "AboveMean, AboveQuantile, AboveThreshold, AboveTrimmedMean, BestRest or TopBottom"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--data.trian=x.jsonl"],
            "--data.trian is not a setting of mpo-lightning fit. Did you mean --data.train?",
        ),
        (
            ["--modle.policy.base", "x"],
            "--modle.policy.base is not a setting of mpo-lightning fit. "
            "Did you mean --model.policy.base?",
        ),
        (
            ["--model.policy.lora.rank=4"],
            "--model.policy.lora.rank is not a setting of mpo-lightning fit. In model.policy.lora "
            "there are: r, lora_alpha, lora_dropout, target_modules, exclude_modules, use_rslora "
            "and use_dora.",
        ),
        (
            ["--model.loss.init_args.bta=4"],
            "model.loss.bta is not a setting of MPO. Did you mean model.loss.beta?",
        ),
        (["--model.loss.init_args.beta=0"], "MPO: beta must be a number > 0, got 0.0."),
        (["--model.loss.init_args.beta=-1"], "MPO: beta must be a number > 0, got -1.0."),
        (["--model.loss.init_args.alpha=many"], "model.loss.alpha must be a number, got many."),
        (["--model.loss=NoSuchLoss"], "model.loss must be DPO, *, got NoSuchLoss."),
        (
            ["--model.loss=MDPO", "--model.loss.alpha=1"],
            "model.loss.alpha is not a setting of MDPO. In model.loss there are: beta, "
            "reference_free, length_normalized, likelihood and partition.",
        ),
        (
            ["--model.loss.partition=Best"],
            f"model.loss.partition must be {PARTITIONS}, got Best. Did you mean BestRest?",
        ),
        (["--model.loss.partition=TopBottom", "--model.loss.partition.k=0"], "TopBottom: k must*"),
        (
            ["--model.optimizer.lrr=1"],
            "model.optimizer.lrr is not a setting of AdamW. Did you mean model.optimizer.lr?",
        ),
        (
            ["--data.schema=HelpSteer2", "--data.schema.weights=3"],
            "data.schema.weights must be a mapping, got 3.",
        ),
        (
            ["--data.schema=UltraFeedbck", "--data.schema.weights=3"],
            "data.schema must be AlpacaEval, *, got UltraFeedbck. Did you mean UltraFeedback?",
        ),
        (
            ["--model.lr_scheduler.init_args.warmupp=2"],
            "model.lr_scheduler.warmupp is not a setting of WarmupCosine. "
            "Did you mean model.lr_scheduler.warmup?",
        ),
        (["--data.groups_per_batch=0"], "data.groups_per_batch must be at least 1, got 0."),
        (
            ["--data.over_long=keep"],
            "data.over_long must be drop_group, drop_response, cut or error, got keep.",
        ),
        (["--data.max_length=many"], "data.max_length must be a whole number, got many."),
        (
            ["--model.layout=both"],
            "model.layout must be auto, shared, continued or separate, got both.",
        ),
        (
            ["--trainer.precision=bf16-mixd"],
            "trainer.precision must be 64, * or null, got bf16-mixd. Did you mean bf16-mixed?",
        ),
        (["--trainer.max_epochs=two"], "trainer.max_epochs must be a whole number or null, got*"),
        (["--model.policy.lora.r=0"], "LoRA: r must be at least 1, got 0."),
        (
            ["--model.lr_scheduler.init_args.warmup=2"],
            "WarmupCosine: warmup must be in [[]0, 1), got 2.0.",
        ),
        (["stray"], "stray belongs to no option. Options begin with --."),
        (["--config", "nope.yaml"], "config: File does not exist: '*nope.yaml'"),
    ],
    ids=str,
)
def test_bad_settings_fail_in_one_line_before_anything_is_loaded(
    config: Path,
    args: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(mpo_lightning.training.module, "build_policy", never)
    monkeypatch.setattr(PreferenceDataModule, "setup", never)
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(config), *args])
    assert stopped.value.code == 2
    # Lightning may have said what it seeds.
    assert fnmatchcase(capsys.readouterr().err.splitlines()[-1], f"error: {message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {trian: x}", "data.trian is not * fit (in {file}). Did you mean data.train?"),
        ("data: {max_length: long}", "data.max_length must be a whole *, got long (in {file})."),
        (
            "model: {loss: {class_path: MPO, init_args: {bta: 1}}}",
            "model.loss.bta is not a setting of MPO (in {file}). Did you mean model.loss.beta?",
        ),
        ("model: {loss: {", "{file}, line 1, column 16: not YAML: *"),
    ],
)
def test_an_error_in_a_file_names_the_file(
    config: Path,
    text: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(config.parent)
    Path("more").mkdir()
    Path("more/bad.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(config), "--config=more/bad.yaml"])
    expected = message.format(file="more/bad.yaml")
    assert fnmatchcase(capsys.readouterr().err.strip(), f"error: {expected}")


def test_the_environment_comes_first_then_files_then_options(
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("data: {seed: 2, max_responses: 3}\n", encoding="utf-8")
    for name, value in {
        "CONFIG": str(config),
        "DATA__SEED": "1",
        "DATA__MAX_LENGTH": "77",
        "DATA__MAX_RESPONSES": "4",
        "MODEL__LR_SCHEDULER": '{"class_path": "WarmupCosine", "init_args": {"warmup": 0.3}}',
    }.items():
        monkeypatch.setenv(f"MPO_LIGHTNING_FIT__{name}", value)
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(overlay), "--data.seed=3", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["policy"]["lora"]["r"] == 4  # of the file that a variable names
    assert printed["model"]["lr_scheduler"]["init_args"] == {"warmup": 0.3}
    data = printed["data"]
    assert (data["seed"], data["max_responses"], data["max_length"]) == (3, 3, 77)


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        (
            "FIT__DATA__TRIAN=x.jsonl",
            "MPO_LIGHTNING_FIT__DATA__TRIAN is set in the environment, but stands for no setting. "
            "Did you mean MPO_LIGHTNING_FIT__DATA__TRAIN?",
        ),
        (
            "FIT__DATA__MAX_LENGTH=long",
            "data.max_length must be a whole number, got long "
            "(in MPO_LIGHTNING_FIT__DATA__MAX_LENGTH).",
        ),
    ],
)
def test_a_variable_that_cannot_be_used_is_refused(
    config: Path,
    variable: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name, _, value = variable.partition("=")
    monkeypatch.setenv(f"MPO_LIGHTNING_{name}", value)
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(config)])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data.train=nope.jsonl"], "nope.jsonl: no such file"),
        (["--model.policy.base=.", "--data.tokenizer={base}"], "holds neither config.json"),
        (["--model.policy.lora.target_modules=[nothing]"], "nothing"),
        (["--data.train=null"], "data.train is not set"),
        (["--data.max_length=2"], "No group of .* can be used"),
        (["--data.tokenizer=."], "data.tokenizer: no tokenizer can be loaded from \\.:"),
    ],
    ids=str,
)
def test_bad_input_ends_with_one_clear_message(
    config: Path, base: str, args: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match=rf"(?s)^error: .*{message}"):
        main(["fit", "--config", str(config), *(arg.format(base=base) for arg in args)])


def test_checkpointing_can_be_switched_off(config: Path, tmp_path: Path) -> None:
    fit(config, tmp_path / "none", "--trainer.enable_checkpointing=false", "--trainer.max_steps=1")
    assert not (tmp_path / "none" / "checkpoints").exists()


def make_cache(root: Path, dtype: str) -> Path:
    """A cache of one group."""
    batch = GroupBatch.from_groups(random_groups([(3, [2, 4])]))
    cache = ReferenceCache(root, {"model": "tiny-llama", "dtype": dtype, "weights": "ab"})
    cache.add(batch, torch.tensor([[-1.0, -2.0]]))
    cache.flush()
    return cache.folder


def test_reference_caches_are_shown_and_cleared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MPO_LIGHTNING_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    root = tmp_path / "mpo-lightning" / "reference"
    main(["cache", "show"])
    assert capsys.readouterr().out == f"No reference cache in {root}\n"
    first, second = make_cache(root, "float32"), make_cache(root, "bfloat16")
    main(["cache", "show"])
    title, *rows = capsys.readouterr().out.splitlines()
    assert title.split() == ["name", "responses", "shards", "size", "dtype", "model", "state"]
    assert sorted(row.split() for row in rows) == sorted(
        [name, "2", "1", "0.0", "MiB", dtype, "tiny-llama", "ok"]
        for name, dtype in ((first.name, "float32"), (second.name, "bfloat16"))
    )
    assert {row.index("tiny-llama") for row in rows} == {title.index("model")}

    shard = next(first.glob("*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(SystemExit) as stopped:
        main(["cache", "show", str(root)])
    assert stopped.value.code == 1
    assert f"{shard}: truncated, damaged" in capsys.readouterr().out

    # As the message says, in a process of its own.
    result = launch("cache", "clear", root, "--name", first.name)
    assert (result.returncode, result.stdout) == (0, f"Removed {first}\n")
    (root / "photos").mkdir()
    (root / "photos" / "cat.png").write_bytes(b"")
    with pytest.raises(SystemExit, match=rf"^error: {root}/photos: not a reference cache"):
        main(["cache", "clear"])
    shutil.rmtree(root / "photos")
    monkeypatch.setattr(sys, "argv", ["mpo-lightning", "cache", "clear"])
    main()
    assert capsys.readouterr().out == f"Removed {second}\n"
    main()
    assert capsys.readouterr().out == f"No reference cache in {root}\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [([], "show,clear"), (["prune"], "prune"), (["show", "--name=x"], "--name")],
    ids=str,
)
def test_wrong_use_of_the_cache_command(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["cache", *args])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_overview_names_every_command_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; from mpo_lightning.cli import main; main(['--help']); "
        "sys.exit('torch' in sys.modules or 'jsonargparse' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert all(f"  {name} " in result.stdout for name in COMMANDS)


def test_every_command_has_its_module() -> None:
    for command in COMMANDS.values():
        assert callable(import_module(command.module).main)


def test_an_unknown_command_is_refused_with_those_there_are() -> None:
    with pytest.raises(SystemExit, match="'trian' is not a command(.|\n)*fit"):
        main(["trian"])


def test_run_whose_template_writes_the_date_goes_on_on_another_day(
    config: Path, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    template = folder / "chat_template.jinja"
    template.write_text("{{ strftime_now('%H:%M ') }}" + template.read_text("utf-8"), "utf-8")

    def day(date: str, *more: str) -> list[dict[str, float]]:
        monkeypatch.setattr(datamodule, "now", lambda: date)
        root = ["--data.cache", str(tmp_path / f"tokens-{date}"), *more]
        return fit(config, tmp_path / "run", f"--model.policy.base={folder}", *root)

    first = ["--trainer.max_epochs=-1", "--model.lr_scheduler=null"]
    day("2026-01-31T23:59:00", *first, "--trainer.max_steps=2")
    resumed = day("2026-02-01T00:01:00", *first, "--trainer.max_steps=4", "--ckpt_path=last")
    shutil.rmtree(tmp_path / "run")
    whole = day("2026-01-31T23:59:00", *first, "--trainer.max_steps=4")
    losses = [[r["train/loss"] for r in rows if "train/loss" in r] for rows in (whole, resumed)]
    assert losses[0][2:] == losses[1]
    # What samples from the adapter asks with its date.
    adapter = str(tmp_path / "run" / "checkpoints" / "last-adapter")
    chosen = ModelConfig(base=str(folder), adapter=adapter)
    monkeypatch.setattr(rendering, "now", lambda: "2026-02-01T00:01:00")
    tokenizer = load_group_tokenizer(chosen)
    assert tokenizer.date == "2026-01-31T23:59:00"
    assert "23:59" in tokenizer.tokenizer.decode(tokenizer.prompt_ids("Why?", "x:1"))
    assert load_group_tokenizer(ModelConfig(base=str(folder))).date == "2026-02-01T00:01:00"
