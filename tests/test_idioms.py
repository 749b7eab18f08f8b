"""What Lightning's users are in the habit of writing: each line of docs/lightning.md is run."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch import callbacks as cb
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from peft import LoraConfig, PeftModel, get_peft_model
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from mpo_lightning import LoRA, MPOModule, PolicyConfig, PreferenceDataModule
from mpo_lightning.batch import GroupBatch
from mpo_lightning.commands.run_callbacks import name_missing_library
from mpo_lightning.data.groups import DataError
from mpo_lightning.errors import UserError
from mpo_lightning.losses import MPO, AboveMean, TopBottom
from mpo_lightning.losses.base import SetLoss
from mpo_lightning.model.loading import warn_if_slow
from mpo_lightning.model.policy import PolicyError
from mpo_lightning.training.checkpoint import RunCheckpoint
from mpo_lightning.training.idioms import restored
from mpo_lightning.training.record import describe
from tests.conftest import (
    StopAfterFirstEpoch,
    example_rows,
    make_tokenizer,
    random_groups,
    tiny_config,
    tiny_model,
    write_rows,
)
from tests.runs import fit, write_recipe
from tests.training.fits import RAGGED, adapter, loader, make_trainer

PAGE = Path(__file__).parent.parent / "docs" / "lightning.md"
GROUPS = random_groups(RAGGED)
# Lightning warns of much here; this package's own warnings are asked for.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@dataclass
class Scene:
    """What the lines of the page use."""

    base: str
    folder: Path

    def module(self, **settings: Any) -> MPOModule:
        """A module whose adapter is the same each time."""
        torch.manual_seed(0)
        options = {
            "policy": PolicyConfig(base=self.base, lora=LoRA(r=4)),
            "optimizer": lambda parameters: AdamW(parameters, lr=1e-3),
        }
        return MPOModule(**{**options, **settings})

    def data(self, **settings: Any) -> PreferenceDataModule:
        options: dict[str, Any] = {"train": example_rows(8), "val": example_rows(4, seed=1)}
        return PreferenceDataModule(tokenizer=self.base, groups_per_batch=2, **options | settings)

    def trainer(self, **settings: Any) -> Trainer:
        return make_trainer(default_root_dir=self.folder, **{"num_sanity_val_steps": 0, **settings})

    def fit(self, trainer: Trainer, **settings: Any) -> MPOModule:
        """Fit a module on 8 groups of token ids in 4 batches."""
        module = self.module(**settings)
        trainer.fit(module, groups(), groups())
        return module


def groups() -> DataLoader[GroupBatch]:
    return loader(GROUPS, [2, 2, 2, 2])


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


class Rates(Callback):
    """The learning rate of each optimizer step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, opt: Any) -> None:
        self.rates.append(opt.param_groups[0]["lr"])


@pytest.fixture(scope="module")
def scene(base: str, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(base, tmp_path_factory.mktemp("idioms"))


@dataclass
class Fitted:
    """A run with Lightning's callbacks and loggers, that several lines look at."""

    module: MPOModule
    trainer: Trainer
    checkpoint: str
    outputs: list[tuple[float, float]]


@pytest.fixture(scope="module")
def fitted(scene: Scene) -> Fitted:
    outputs = []

    class Reads(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, module: Any, out: Any, batch: Any, batch_idx: int
        ) -> None:
            outputs.append((out["loss"].item(), trainer.callback_metrics["train/loss"].item()))

    trainer = scene.trainer(
        enable_checkpointing=True,
        log_every_n_steps=1,
        gradient_clip_val=0.1,
        gradient_clip_algorithm="value",
        logger=[CSVLogger(scene.folder), TensorBoardLogger(scene.folder)],
        callbacks=[
            RunCheckpoint(dirpath=scene.folder / "kept", monitor="val/loss", save_last=True),
            cb.EarlyStopping(monitor="val/loss"),
            cb.LearningRateMonitor(logging_interval="step"),
            cb.DeviceStatsMonitor(cpu_stats=True),
            cb.ModelSummary(),
            cb.Timer("00:01:00:00"),
            Reads(),
        ],
    )
    module = scene.fit(trainer, loss=MPO(beta=0.3, alpha=1.0, partition=TopBottom(k=1)))
    return Fitted(module, trainer, str(scene.folder / "kept" / "last.ckpt"), outputs)


# ---------------------------------------------------------------------------------- the table

Line = Callable[[Scene, Fitted], None]
WORKS: dict[str, Line] = {}
INSTEAD: dict[str, tuple[type[Exception], str, Line]] = {}


def works(habit: str) -> Callable[[Line], Line]:
    def keep(line: Line) -> Line:
        WORKS[habit] = line
        return line

    return keep


def instead(habit: str, match: str, error: type[Exception] = UserError) -> Callable[[Line], Line]:
    """A habit that ends in one line of this package, or of Lightning."""

    def keep(line: Line) -> Line:
        INSTEAD[habit] = (error, match, line)
        return line

    return keep


def lines_of_page() -> Iterator[tuple[str, str]]:
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        found = re.match(r"\| (.+?) \| (works|instead) \|", line)
        if found:
            yield found[1].replace("`", ""), found[2]


def test_the_page_has_the_lines_that_are_run() -> None:
    run = dict.fromkeys(WORKS, "works") | dict.fromkeys(INSTEAD, "instead")
    assert sorted(lines_of_page()) == sorted(run.items())


# ---------------------------------------------------------------------------------- the module


@works('MPOModule(policy="path/or/hub-id")')
def _path(scene: Scene, fitted: Fitted) -> None:
    module = scene.module(policy=scene.base)
    assert module.policy_config == PolicyConfig(base=scene.base)


@works("MPOModule(policy=AutoModelForCausalLM.from_pretrained(...))")
def _loaded(scene: Scene, fitted: Fitted) -> None:
    named = scene.fit(scene.trainer())
    loaded = AutoModelForCausalLM.from_pretrained(scene.base)
    lora = LoRA(r=4)
    module = scene.fit(scene.trainer(), policy=PolicyConfig(base=loaded, lora=lora))
    assert same(adapter(module), adapter(named))
    assert module.policy_config.base == scene.base
    assert scene.module(policy=tiny_model()).policy_config == PolicyConfig(base="LlamaForCausalLM")


@instead("MPOModule(policy=get_peft_model(...))", r"LoRA\(r=8, lora_alpha=16, target_modules=\['q_")
def _peft(scene: Scene, fitted: Fitted) -> None:
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"])
    scene.module(policy=get_peft_model(tiny_model(), config))


@works("MPOModule(optimizer=torch.optim.AdamW)")
def _class(scene: Scene, fitted: Fitted) -> None:
    trainer = scene.trainer(limit_train_batches=1)
    scene.fit(trainer, optimizer=torch.optim.AdamW, lr_scheduler=None)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 1e-3


@instead("MPOModule(optimizer=AdamW(...))", "optimizer must be a function .*AdamW", ValueError)
def _instance(scene: Scene, fitted: Fitted) -> None:
    scene.module(optimizer=AdamW([torch.nn.Parameter(torch.zeros(1))]))


# A rate that falls whenever the metric does not halve.
def _plateau(scene: Scene, monitor: str) -> list[float]:
    rates = Rates()
    scene.fit(
        scene.trainer(max_epochs=2, accumulate_grad_batches=2, callbacks=[rates]),
        lr_scheduler=lambda optimizer: ReduceLROnPlateau(
            optimizer, monitor=monitor, factor=0.5, patience=0, threshold=0.9
        ),
    )
    return [rate * 1e3 for rate in rates.rates]


@works('lr_scheduler=lambda o: ReduceLROnPlateau(o, monitor="val/loss")')
def _plateaus(scene: Scene, fitted: Fitted) -> None:
    assert _plateau(scene, "train/loss") == pytest.approx([1, 1, 0.5, 0.25])
    with pytest.warns(UserWarning, match="val/loss at the end of each epoch, and the run has one"):
        scene.fit(
            scene.trainer(limit_train_batches=1),
            lr_scheduler=lambda o: ReduceLROnPlateau(o, monitor="val/loss"),
        )


@instead("lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau", r"lightning\.pytorch\.cli")
def _torchs(scene: Scene, fitted: Fitted) -> None:
    scene.fit(scene.trainer(), lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau)


class OwnOptimizer(MPOModule):
    """A subclass in Lightning's manner, that keeps its own arguments."""

    def __init__(self, rate: float = 0.1, **settings: Any) -> None:
        super().__init__(**settings)
        self.save_hyperparameters()
        self.rate = rate

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return SGD([p for p in self.parameters() if p.requires_grad], lr=self.rate)


def _own(scene: Scene) -> OwnOptimizer:
    torch.manual_seed(0)
    return OwnOptimizer(
        rate=0.05, policy=PolicyConfig(base=scene.base, lora=LoRA(r=4)), optimizer=SGD
    )


@works("a subclass with its own configure_optimizers")
def _subclass(scene: Scene, fitted: Fitted) -> None:
    module, trainer = _own(scene), scene.trainer()
    trainer.fit(module, groups())
    plain = scene.fit(scene.trainer(), optimizer=lambda p: SGD(p, lr=0.05), lr_scheduler=None)
    assert same(adapter(module), adapter(plain))


@instead("configure_optimizers with two optimizers", "multiple optimizers", RuntimeError)
def _two(scene: Scene, fitted: Fitted) -> None:
    class Two(MPOModule):
        def configure_optimizers(self) -> OptimizerLRScheduler:
            trained = [p for p in self.parameters() if p.requires_grad]
            return [SGD(trained[:2], lr=0.1), SGD(trained[2:], lr=0.1)], []

    scene.trainer().fit(Two(policy=PolicyConfig(base=scene.base)), groups())


@instead("automatic_optimization = False", "nothing would be trained")
def _manual(scene: Scene, fitted: Fitted) -> None:
    module = scene.module()
    module.automatic_optimization = False
    scene.trainer().fit(module, groups())


@works("module.hparams, and save_hyperparameters() in a subclass")
def _hparams(scene: Scene, fitted: Fitted) -> None:
    assert fitted.module.hparams["policy"]["settings"]["lora"]["settings"]["r"] == 4
    assert "TopBottom" in Path(fitted.trainer.loggers[0].log_dir or "", "hparams.yaml").read_text()
    trainer = scene.trainer()
    trainer.fit(_own(scene), groups())
    trainer.save_checkpoint(scene.folder / "own.ckpt")
    loaded = OwnOptimizer.load_from_checkpoint(scene.folder / "own.ckpt")
    assert loaded.rate == 0.05
    # The record does not say that the schedule was the default.
    assert torch.load(scene.folder / "own.ckpt")["training"]["schedule"] is None


@instead("torch.compile(module)", "compile: true")
def _compiled(scene: Scene, fitted: Fitted) -> None:
    scene.trainer().fit(torch.compile(scene.module()), groups())  # type: ignore[arg-type]


@instead("module(batch)", "forward", NotImplementedError)
def _forward(scene: Scene, fitted: Fitted) -> None:
    batch = GroupBatch.from_groups(GROUPS[:2])
    assert fitted.module.policy is not None
    assert fitted.module.policy(batch).shape == batch.scores.shape
    fitted.module(batch)


@works('module.to("cpu"), freeze(), eval()')
def _moved(scene: Scene, fitted: Fitted) -> None:
    module = scene.module()
    module.configure_model()
    before = adapter(module)
    module.to("cpu").eval()
    module.freeze()
    assert not adapter(module)
    module = scene.module()
    module.to("cpu")
    scene.trainer(limit_train_batches=1).fit(module, groups())
    assert before.keys() == adapter(module).keys()


# ---------------------------------------------------------------------------------------- data


class Batches(Callback):
    """The groups of each training batch, and the metrics of the last step."""

    def __init__(self) -> None:
        self.sources: list[list[str]] = []
        self.tokens: list[torch.Tensor] = []

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.sources.append(batch.sources)
        self.tokens.append(batch.tokens)


@works("PreferenceDataModule(train=rows)")
def _rows(scene: Scene, fitted: Fitted) -> None:
    seen = Batches()
    scene.trainer(callbacks=[seen]).fit(scene.module(), scene.data())
    assert sorted(s for batch in seen.sources for s in batch) == [f"train:{i}" for i in range(1, 9)]


@works('data.setup("fit") and data.train_dataloader() without a trainer')
def _alone(scene: Scene, fitted: Fitted) -> None:
    data = scene.data()
    data.setup("fit")
    (val,) = [data.val_dataloader()]
    assert sum(len(batch) for batch in data.train_dataloader()) == 8
    assert isinstance(val, DataLoader)
    assert sum(len(batch) for batch in val) == 4
    with pytest.raises(DataError, match=r"data\.train is not read: .* call setup"):
        scene.data().train_dataloader()


@works("trainer.fit(module, DataLoader(groups, collate_fn=list))")
def _token_groups(scene: Scene, fitted: Fitted) -> None:
    of_batches = scene.fit(scene.trainer())
    mappings = [
        {
            "prompt": group.prompt.tolist(),
            "responses": [response.tolist() for response in group.responses],
            "scores": torch.tensor(group.scores, dtype=torch.float64),
        }
        for group in GROUPS
    ]
    for items in (GROUPS, mappings):
        module = scene.module()
        several: DataLoader[Any] = DataLoader(items, batch_size=2, collate_fn=list)  # type: ignore[arg-type]
        scene.trainer().fit(module, several)
        assert same(adapter(module), adapter(of_batches))


@instead("trainer.fit(module, DataLoader(rows))", r"PreferenceDataModule\(.*train=rows\)")
def _loader_of_rows(scene: Scene, fitted: Fitted) -> None:
    rows: DataLoader[Any] = DataLoader(example_rows(4), batch_size=2, collate_fn=list)  # type: ignore[arg-type]
    scene.trainer().fit(scene.module(), rows)


@instead("DataLoader(groups, batch_size=2)", "collate_fn=list")
def _stacked(scene: Scene, fitted: Fitted) -> None:
    scene.trainer().fit(scene.module(), DataLoader(GROUPS, batch_size=2))  # type: ignore[arg-type]


@works("trainer.fit(module, train, [val_1, val_2])")
def _two_loaders(scene: Scene, fitted: Fitted) -> None:
    halves = [loader(GROUPS[:4], [2, 2]), loader(GROUPS[4:], [2, 2])]
    module, trainer = scene.module(), scene.trainer()
    (both,) = [trainer.validate(module, halves, verbose=False)]
    (whole,) = trainer.validate(module, groups(), verbose=False)
    assert both[0]["val/groups"] == 8
    assert both[0]["val/logps/chosen"] == pytest.approx(whole["val/logps/chosen"], rel=1e-6)


@instead("trainer.predict(module, rows)", r"PreferenceDataModule\(")
def _predict(scene: Scene, fitted: Fitted) -> None:
    scene.trainer().predict(scene.module(), example_rows(2))


@works("Trainer(overfit_batches=2)")
def _overfit(scene: Scene, fitted: Fitted) -> None:
    seen = Batches()
    trainer = scene.trainer(overfit_batches=2, max_epochs=2, callbacks=[seen])
    trainer.fit(scene.module(), scene.data())
    first = [["train:1", "train:2"], ["train:3", "train:4"]]
    assert seen.sources == [*first, *first]


@works("Trainer(fast_dev_run=True)")
def _fast(scene: Scene, fitted: Fitted) -> None:
    trainer = scene.trainer(fast_dev_run=True)
    scene.fit(trainer)
    assert trainer.global_step == 1


@works("Trainer(limit_train_batches=0.5, val_check_interval=0.5)")
def _limits(scene: Scene, fitted: Fitted) -> None:
    rates = Rates()
    trainer = scene.trainer(limit_train_batches=0.5, val_check_interval=0.5, callbacks=[rates])
    trainer.fit(scene.module(), scene.data())
    assert rates.rates == pytest.approx([1e-3, 5e-4])


@instead("trainer.validate() after a fit without validation data", r"data\.val is not set")
def _validate(scene: Scene, fitted: Fitted) -> None:
    trainer = scene.trainer(limit_train_batches=1, enable_checkpointing=True)
    trainer.fit(scene.module(), scene.data(val=None))
    trainer.validate()


@instead("trainer.test(module, data) without test data", r"data\.test is not set")
def _test(scene: Scene, fitted: Fitted) -> None:
    scene.trainer().test(scene.module(), scene.data())


# --------------------------------------------------------------------------------- the trainer


@works("Trainer(accumulate_grad_batches=3)")
def _accumulated(scene: Scene, fitted: Fitted) -> None:
    trainer = scene.trainer(accumulate_grad_batches=3)
    scene.fit(trainer)
    assert trainer.global_step == 2


@works("GradientAccumulationScheduler({0: 1, 1: 2})")
def _accumulation_scheduled(scene: Scene, fitted: Fitted) -> None:
    for data in ((groups(),), (scene.data(),)):
        rates = Rates()
        scheduled = cb.GradientAccumulationScheduler({0: 1, 1: 2})
        trainer = scene.trainer(max_epochs=2, callbacks=[rates, scheduled])
        trainer.fit(scene.module(), *data)  # type: ignore[misc]
        # 4 steps and 2, of which round(0.6) warm up.
        cosine = [0.5e-3 * (1 + torch.tensor(s / 5 * torch.pi).cos().item()) for s in range(5)]
        assert rates.rates == pytest.approx([0, *cosine])


@works('Trainer(gradient_clip_val=0.1, gradient_clip_algorithm="value")')
def _clipped(scene: Scene, fitted: Fitted) -> None:
    assert fitted.trainer.gradient_clip_val == 0.1


@instead("Trainer(max_epochs=-1) with a schedule over the run", r"trainer\.max_steps")
def _endless(scene: Scene, fitted: Fitted) -> None:
    scene.fit(scene.trainer(max_epochs=-1))


@works('Trainer(precision="bf16-mixed")')
def _mixed(scene: Scene, fitted: Fitted) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
        with pytest.warns(UserWarning, match=r"no instructions for bfloat16.* hundred times"):
            module = scene.fit(scene.trainer(precision="bf16-mixed", limit_train_batches=1))
        with pytest.warns(UserWarning, match="no instructions for bfloat16"):
            scene.module(policy=PolicyConfig(base=scene.base, dtype="bfloat16")).configure_model()
    assert {p.dtype for p in module.parameters()} == {torch.float32}


@works('Trainer(precision="bf16-true")')
def _bf16(scene: Scene, fitted: Fitted) -> None:
    with pytest.warns(UserWarning, match="keeps the adapter in bfloat16, too"):
        scene.fit(scene.trainer(precision="bf16-true", limit_train_batches=1))


@instead('Trainer(precision="16-true")', "16-mixed")
def _float16(scene: Scene, fitted: Fitted) -> None:
    scene.fit(scene.trainer(precision="16-true"))


# DeepSpeed itself is not installed.
@instead('Trainer(strategy="deepspeed")', "FSDP2")
def _deepspeed(scene: Scene, fitted: Fitted) -> None:
    trainer = scene.trainer()
    trainer._accelerator_connector.strategy = DeepSpeedStrategy.__new__(DeepSpeedStrategy)
    module = scene.module()
    module._trainer = trainer
    module.configure_callbacks()


@works("Trainer(logger=[CSVLogger(...), TensorBoardLogger(...)])")
def _loggers(scene: Scene, fitted: Fitted) -> None:
    metrics = Path(fitted.trainer.loggers[0].log_dir or "", "metrics.csv").read_text()
    assert "val/rewards/accuracy" in metrics.splitlines()[0]


# The command line's own run of it: tests/callbacks/test_watched_run.py.
@instead("trainer.logger: WandbLogger without wandb", r"mpo-lightning\[wandb\]")
def _wandb(scene: Scene, fitted: Fitted) -> None:
    name_missing_library(ModuleNotFoundError("Requirement 'wandb>=0.12.10' not met. HINT: Try"))


# ----------------------------------------------------------------------------------- callbacks


def _watch(scene: Scene, callback: Callback) -> None:
    checkpoints = isinstance(callback, cb.ModelCheckpoint)
    scene.fit(scene.trainer(callbacks=[callback], enable_checkpointing=checkpoints))


@instead('ModelCheckpoint(monitor="val_loss")', "watches val_loss, .* called val/loss")
def _monitor(scene: Scene, fitted: Fitted) -> None:
    _watch(scene, cb.ModelCheckpoint(dirpath=scene.folder, monitor="val_loss"))


@instead('EarlyStopping(monitor="val_acc")', r"Metrics: val/loss, .*val/rewards/accuracy")
def _unlike(scene: Scene, fitted: Fitted) -> None:
    _watch(scene, cb.EarlyStopping(monitor="val_acc"))


@works('EarlyStopping(monitor="val/loss")')
def _early(scene: Scene, fitted: Fitted) -> None:
    (stopping,) = fitted.trainer.early_stopping_callbacks
    assert isinstance(stopping, cb.EarlyStopping)
    assert stopping.best_score.isfinite()


@instead('EarlyStopping(monitor="val/loss") without validation data', r"data\.val, or .*train/loss")
def _without(scene: Scene, fitted: Fitted) -> None:
    trainer = scene.trainer(callbacks=[cb.EarlyStopping(monitor="val/loss")])
    trainer.fit(scene.module(), groups())


@instead('ModelCheckpoint(monitor="val/rewards/accuracy")', "higher: set mode to max")
def _worst(scene: Scene, fitted: Fitted) -> None:
    _watch(scene, cb.ModelCheckpoint(dirpath=scene.folder, monitor="val/rewards/accuracy"))


@works("LearningRateMonitor(), DeviceStatsMonitor(), ModelSummary(), Timer()")
def _others(scene: Scene, fitted: Fitted) -> None:
    metrics = Path(fitted.trainer.loggers[0].log_dir or "", "metrics.csv").read_text()
    assert "lr-AdamW" in metrics
    assert "DeviceStatsMonitor" in metrics


@works("Tuner(trainer).lr_find(module, datamodule=data)")
def _lr_find(scene: Scene, fitted: Fitted) -> None:
    module = scene.module()
    tuner = Tuner(scene.trainer(max_epochs=5))
    found = tuner.lr_find(module, datamodule=scene.data(), num_training=20)
    assert found is not None
    assert module.lr == found.suggestion() is not None
    scene.trainer().fit(module, scene.data())
    rate = module.lr
    plain = scene.module(optimizer=lambda parameters: AdamW(parameters, lr=rate))
    scene.trainer().fit(plain, scene.data())
    # The search has left no trace but the rate.
    assert same(adapter(module), adapter(plain))


@works("LearningRateFinder()")
def _finder(scene: Scene, fitted: Fitted) -> None:
    rates, module = Rates(), scene.module()
    finder = cb.LearningRateFinder(num_training_steps=20, min_lr=1e-6)
    scene.trainer(max_epochs=5, callbacks=[finder, rates]).fit(module, scene.data())
    assert module.lr is not None
    assert max(rates.rates) == pytest.approx(module.lr)


@works("Tuner(trainer).scale_batch_size(module, datamodule=data)")
def _batch_size(scene: Scene, fitted: Fitted) -> None:
    data = scene.data()
    tuner = Tuner(scene.trainer())
    size = tuner.scale_batch_size(scene.module(), datamodule=data, max_trials=2, steps_per_trial=1)
    assert data.groups_per_batch == size == 4


@instead("StochasticWeightAveraging(...)", "EMAWeightAveraging")
def _swa(scene: Scene, fitted: Fitted) -> None:
    _watch(scene, cb.StochasticWeightAveraging(swa_lrs=1e-3))


@works("EMAWeightAveraging()")
def _ema(scene: Scene, fitted: Fitted) -> None:
    steps: list[dict[str, torch.Tensor]] = []

    class Keep(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
            steps.append(adapter(module))

    def run(name: str, *more: Callback, resume: str | None = None) -> MPOModule:
        kept = RunCheckpoint(dirpath=scene.folder / name, save_last=True)
        callbacks = [Keep(), cb.EMAWeightAveraging(decay=0.5), kept, *more]
        trainer = scene.trainer(max_epochs=2, enable_checkpointing=True, callbacks=callbacks)
        module = scene.module()
        trainer.fit(module, loader(GROUPS[:4], [2, 2]), ckpt_path=resume)
        return module

    whole = adapter(run("averaged"))
    average = steps[0]
    for step in steps:
        average = {name: 0.5 * value + 0.5 * step[name] for name, value in average.items()}
    for name, value in average.items():
        torch.testing.assert_close(whole[name], value)
    run("stopped", StopAfterFirstEpoch())
    last = scene.folder / "stopped" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    assert checkpoint["current_model_state"].keys() == checkpoint["state_dict"].keys() == {*whole}
    assert same(adapter(run("resumed", resume=str(last))), whole)


@instead("ModelPruning(...)", r"lora\.r")
def _pruned(scene: Scene, fitted: Fitted) -> None:
    _watch(scene, cb.ModelPruning("l1_unstructured"))


@instead("BackboneFinetuning()", "base is frozen")
def _finetuned(scene: Scene, fitted: Fitted) -> None:
    _watch(scene, cb.BackboneFinetuning())


@works("on_train_batch_end(..., outputs, ...)")
def _outputs(scene: Scene, fitted: Fitted) -> None:
    sums, means = zip(*fitted.outputs, strict=True)
    # Two groups in each batch.
    assert sums == pytest.approx([2 * mean for mean in means])


# --------------------------------------------------------------------------------- checkpoints


@works('MPOModule.load_from_checkpoint("last.ckpt")')
def _from_checkpoint(scene: Scene, fitted: Fitted) -> None:
    loaded = MPOModule.load_from_checkpoint(fitted.checkpoint)
    assert same(adapter(fitted.module), adapter(loaded))
    assert loaded.loss == MPO(beta=0.3, alpha=1.0, partition=TopBottom(k=1))
    assert loaded.policy_config == fitted.module.policy_config
    assert loaded.hparams == fitted.module.hparams
    other = MPOModule.load_from_checkpoint(fitted.checkpoint, loss=MPO(beta=2.0))
    assert other.loss == MPO(beta=2.0)


@works('module.load_state_dict(torch.load("last.ckpt")["state_dict"])')
def _state_dict(scene: Scene, fitted: Fitted) -> None:
    module = scene.module()
    module.configure_model()
    weights = torch.load(fitted.checkpoint)["state_dict"]
    module.load_state_dict(weights)
    assert same(adapter(fitted.module), adapter(module))
    del weights[next(iter(weights))]
    with pytest.raises(RuntimeError, match="Missing key"):
        module.load_state_dict(weights)


@works('trainer.fit(module, data, ckpt_path="last")')
def _last(scene: Scene, fitted: Fitted) -> None:
    def run(*more: Callback, resume: str | None = None) -> MPOModule:
        kept = RunCheckpoint(dirpath=scene.folder / "resumed", save_last=True)
        module = scene.module()
        trainer = scene.trainer(max_epochs=2, enable_checkpointing=True, callbacks=[kept, *more])
        trainer.fit(module, loader(GROUPS[:4], [2, 2]), ckpt_path=resume)
        return module

    whole = run()
    run(StopAfterFirstEpoch())
    assert same(adapter(run(resume="last")), adapter(whole))


@works('trainer.validate(module, data, ckpt_path="best")')
def _best(scene: Scene, fitted: Fitted) -> None:
    (values,) = fitted.trainer.validate(fitted.module, groups(), ckpt_path="best", verbose=False)
    stopping = fitted.trainer.early_stopping_callbacks[0]
    assert isinstance(stopping, cb.EarlyStopping)
    assert values["val/loss"] == pytest.approx(stopping.best_score.item())


@works("module.policy.model.generate(...)")
def _generate(scene: Scene, fitted: Fitted) -> None:
    assert fitted.module.policy is not None
    trained = fitted.module.policy.model.eval()
    trained.save_pretrained(scene.folder / "alone")
    plain = AutoModelForCausalLM.from_pretrained(scene.base)
    plain = PeftModel.from_pretrained(plain, scene.folder / "alone").eval()
    tokenizer = make_tokenizer()
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    texts = ["Name a fruit.", "Count to five. Why is the sky blue?"]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
    found, expected = (m.generate(**inputs, max_new_tokens=8) for m in (trained, plain))
    assert torch.equal(found, expected)


# -------------------------------------------------------------------------------------- running


@pytest.mark.parametrize("habit", sorted(WORKS))
def test_works(habit: str, scene: Scene, fitted: Fitted) -> None:
    WORKS[habit](scene, fitted)


@pytest.mark.parametrize("habit", sorted(INSTEAD))
def test_says_what_instead(habit: str, scene: Scene, fitted: Fitted) -> None:
    error, match, line = INSTEAD[habit]
    with pytest.raises(error, match=match) as raised:
        line(scene, fitted)
    if issubclass(error, UserError):
        assert "\n" not in str(raised.value)


# ------------------------------------------------------------------------------------- siblings


def test_a_plateau_in_a_recipe(base: str, tmp_path: Path) -> None:
    scheduler = {
        "class_path": "lightning.pytorch.cli.ReduceLROnPlateau",
        "init_args": {"monitor": "val/loss", "factor": 0.5, "patience": 0, "threshold": 0.9},
    }
    rows = write_rows(tmp_path / "rows.jsonl", example_rows(4))
    recipe = write_recipe(
        tmp_path, base, rows, model={"lr_scheduler": scheduler}, data={"val": rows}
    )
    fit(recipe, tmp_path / "run", "--trainer.max_epochs=3")
    (metrics,) = (tmp_path / "run").rglob("metrics.csv")
    header, *lines = (line.split(",") for line in metrics.read_text().splitlines())
    rates = [float(line[header.index("lr")]) for line in lines if line[header.index("lr")]]
    assert rates == pytest.approx([0.01, 0.01, 0.01, 0.01, 0.005, 0.005])


def test_a_monitor_may_be_a_metric_of_ones_own(scene: Scene) -> None:
    class Own(Callback):
        def on_validation_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
            module.log("mine", 1.0)
            module.log("val_loss", 1.0)

    trainer = scene.trainer(callbacks=[Own(), cb.EarlyStopping(monitor="mine")])
    scene.fit(trainer)
    trainer = scene.trainer(callbacks=[Own(), cb.EarlyStopping(monitor="val_loss")])
    with pytest.warns(UserWarning, match="It is called val/loss. Mind this unless"):
        scene.fit(trainer)


def test_a_scheduler_with_a_wrong_monitor(scene: Scene) -> None:
    for monitor, match in (("eval_loss", "called val/loss"), ("val/chosen_mass", "mode to max")):
        with pytest.raises(UserError, match=match):
            scene.fit(
                scene.trainer(max_epochs=2),
                lr_scheduler=lambda o, m=monitor: ReduceLROnPlateau(o, monitor=m),
            )


# Values that layers copied from the configuration when they were made are switched off, too.
def test_a_loaded_model_loses_its_dropout(scene: Scene) -> None:
    model = tiny_model(tiny_config(attention_dropout=0.5)).train()
    module = scene.module(policy=PolicyConfig(base=model, dtype="bfloat16"))
    scene.trainer(limit_train_batches=1).fit(module, groups())
    assert model.config.attention_dropout == model.model.layers[0].self_attn.attention_dropout == 0
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    with pytest.raises(PolicyError, match="has adapters already"):
        scene.module(policy=model)


def test_what_is_no_model(scene: Scene) -> None:
    with pytest.raises(PolicyError, match=r"policy\.base: Linear is neither"):
        scene.module(policy=torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="a loaded model keeps its weights"):
        PolicyConfig(base=tiny_model(), quantization="nf4")


@pytest.mark.parametrize(
    ("item", "match"),
    [
        (GROUPS[0]._replace(prompt=GROUPS[0].prompt[None]), "no token ids"),
        (GROUPS[0]._replace(responses=("a", "b")), "no token ids"),
        (GROUPS[0]._replace(scores=torch.tensor([1.0, 2.0]).bfloat16()), "rounded"),
        (3, "gave a int"),
        ([3], "gave a int as a group"),
    ],
    ids=["stacked", "text", "rounded", "number", "numbers"],
)
def test_what_is_no_group(scene: Scene, item: Any, match: str) -> None:
    with pytest.raises(UserError, match=match):
        scene.module().on_before_batch_transfer(item, 0)


def test_token_groups_are_batches_by_themselves(scene: Scene) -> None:
    one = GROUPS[0]
    found = scene.module().on_before_batch_transfer(one, 0)
    assert isinstance(found, GroupBatch)
    assert torch.equal(found.tokens, torch.cat([one.prompt, *one.responses]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_a_slow_dtype(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    short = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{short}_supported", lambda: False)
    with pytest.warns(UserWarning, match="up to a hundred times slower"):
        warn_if_slow(dtype, torch.device("cpu"))
    warn_if_slow(dtype, torch.device("meta"))
    warn_if_slow(torch.float32, torch.device("cpu"))
    monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{short}_supported", lambda: True)
    warn_if_slow(dtype, torch.device("cpu"))


def test_settings_of_a_checkpoint_make_no_other_classes() -> None:
    loss = MPO(beta=0.5, partition=AboveMean())
    assert restored(describe(loss)) == loss
    assert isinstance(restored(describe(loss)), SetLoss)
    for path in ("os.system", "subprocess.Popen", "my_losses.Mine", "types.SimpleNamespace", ""):
        with pytest.raises(UserError, match="which is no class of this package"):
            restored({"class": path, "settings": {}})
