"""Training runs in the studies' world, through the classes that users train with.

The policy is measured exactly before training and every few optimizer steps.
"""

import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor

from mpo_lightning.data.datamodule import PreferenceDataModule
from mpo_lightning.data.rendering import RenderingRules
from mpo_lightning.losses import AboveMean, SetLoss
from mpo_lightning.model.loading import LoRA, PolicyConfig
from mpo_lightning.quiet import quiet
from mpo_lightning.studies.lab.pairs import FreshPairDPO
from mpo_lightning.studies.world.enumeration import enumerate_logps
from mpo_lightning.studies.world.judges import Judge, NoisyJudge
from mpo_lightning.studies.world.measures import Yardstick, group_measures
from mpo_lightning.studies.world.world import GroupSampling, StudyWorld, load_world
from mpo_lightning.training.module import MPOModule

__all__ = [
    "BETAS",
    "LEARNING_RATE",
    "PRIMARY",
    "WITHOUT_OUTPUT",
    "TrainingResult",
    "TrainingRun",
    "train",
]

# Betas at which every study of methods is run. Where policies are compared, beta times the
# log-ratios is small at the first, and all losses are nearly linear; at the second it is not.
BETAS = (0.1, 1.0)
# Learning rate of the studies that do not tune it: the middle one of those that `methods` tries.
LEARNING_RATE = 1e-3
# Settings of a `Trainer` that writes and shows nothing.
WITHOUT_OUTPUT: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
# Number of groups whose responses' log-probabilities are followed.
FOLLOWED = 32
STEPS_PER_EPOCH = 8
# Divergence from the reference of the primary measure, nats.
PRIMARY = 0.5


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """The task of a training run; it names everything that the result depends on.

    Args:
        seed: seed of the world, the groups, the adapter and the order.
        loss: the loss.
        lr: learning rate of AdamW, constant.
        prompts: number of groups.
        responses: number of responses of a group.
        sampling: draws the responses.
        judge: scores the responses.
        epochs: number of epochs, each of 8 optimizer steps, whatever the number of groups.
        until: divergence from the reference, nats, at which training ends early. Defaults to none.
        responses_per_pass: responses that go through the model at a time. Defaults to all of a
            batch.
        measured_every: optimizer steps between measurements.
    """

    seed: int
    loss: SetLoss
    lr: float = LEARNING_RATE
    prompts: int = 128
    responses: int = 10
    sampling: GroupSampling = field(default_factory=GroupSampling)
    judge: Judge = field(default_factory=NoisyJudge)
    epochs: int = 16
    until: float | None = PRIMARY
    responses_per_pass: int | None = None
    measured_every: int = 2

    def __call__(self, worlds: Path) -> dict[str, Any]:
        """Train, and return the fields of the `TrainingResult` by name."""
        return asdict(train(self, worlds))


@dataclass(frozen=True)
class TrainingResult:
    """Result of a training run.

    Attributes:
        trajectory: measures by optimizer step, the first before training.
        groups: number of groups trained on.
        dropped: number of groups left out because they have no contrast.
        seconds: duration of `Trainer.fit`, without the measurements.
    """

    trajectory: list[dict[str, float]]
    groups: int
    dropped: int
    seconds: float


class _Measuring(Callback):
    """Measures the policy before training and every few optimizer steps."""

    def __init__(self, run: TrainingRun, world: StudyWorld, drawn: Tensor, scores: Tensor) -> None:
        prompts = world.trained(run.prompts)[:FOLLOWED]
        held_out = world.held_out
        self.run = run
        self.seconds = 0.0
        self.trajectory: list[dict[str, float]] = []
        self.drawn = drawn[:FOLLOWED]
        valid = torch.ones_like(self.drawn, dtype=torch.bool)
        # The same sets for every loss, also for one without sets or with others, so that losses
        # can be compared.
        self.chosen, _ = AboveMean()(scores[:FOLLOWED], valid)
        self.reference = world.logps[prompts]
        self.ids = world.prompt_ids(torch.cat([held_out, prompts]))
        self.symbol_ids = world.symbol_ids
        gold = world.gold(getattr(run.judge, "utility", "additive"))
        self.yardstick = Yardstick(
            world.reference[held_out], gold[held_out], world.grammar.attributes
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measure(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, MPOModule)
        if isinstance(pl_module.loss, FreshPairDPO):
            pl_module.loss = replace(pl_module.loss, epoch=trainer.current_epoch)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        last = trainer.global_step == trainer.estimated_stepping_batches
        if trainer.global_step % self.run.measured_every == 0 or last:
            self._measure(trainer, pl_module)
            until = self.run.until
            trainer.should_stop = until is not None and self.trajectory[-1]["kl"] >= until

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        started = time.perf_counter()
        assert isinstance(pl_module, MPOModule)
        assert pl_module.policy is not None
        with torch.no_grad():
            found = enumerate_logps(pl_module.policy.causal_lm, self.ids, self.symbol_ids)
        held_out = len(self.yardstick.reference)
        log_ratios = (found[held_out:] - self.reference).gather(1, self.drawn)
        self.trajectory.append(
            {
                "step": float(trainer.global_step),
                **self.yardstick(found[:held_out]),
                **group_measures(log_ratios, self.chosen, self.run.loss.beta),
            }
        )
        self.seconds += time.perf_counter() - started


def train(run: TrainingRun, worlds: Path) -> TrainingResult:
    """Train, and measure on the way.

    Args:
        run: the data, the loss and the settings.
        worlds: folder of worlds; the run's is built there if it is missing.
    """
    world = load_world(worlds, run.seed)
    prompts = world.trained(run.prompts)
    drawn = world.sample(prompts, run.responses, run.sampling)
    scores = run.judge(world, prompts, drawn)
    measuring = _Measuring(run, world, drawn, scores)
    with tempfile.TemporaryDirectory() as folder, quiet():
        groups = Path(folder) / "groups.jsonl"
        world.write_groups(groups, prompts, drawn, scores)
        seed_everything(run.seed, verbose=False)
        module = MPOModule(
            policy=PolicyConfig(base=str(world.base), lora=LoRA(r=16, lora_alpha=32)),
            loss=run.loss,
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=run.lr),
            lr_scheduler=None,
            responses_per_pass=run.responses_per_pass,
        )
        data = PreferenceDataModule(
            tokenizer=str(world.base),
            train=str(groups),
            groups_per_batch=max(1, run.prompts // STEPS_PER_EPOCH),
            loss=run.loss,
            prompt_format="text",
            # A response may stand in both halves of a group that a `SetJudge` labels.
            rendering=RenderingRules(equal_tokens="keep"),
            seed=run.seed,
            # No other run reads these groups.
            cache=f"{folder}/tokens",
        )
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=run.epochs,
            default_root_dir=folder,
            callbacks=[measuring],
            **WITHOUT_OUTPUT,
        )
        started = time.perf_counter()
        trainer.fit(module, datamodule=data)
        seconds = time.perf_counter() - started - measuring.seconds
    kept = len(data.datasets["train"])
    return TrainingResult(measuring.trajectory, kept, run.prompts - kept, seconds)
