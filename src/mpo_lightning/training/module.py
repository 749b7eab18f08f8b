"""MPOModule: the LightningModule that trains a policy on groups.

The life of an optimizer step, in Lightning's order. For each batch of its accumulation window:

1. ``on_train_batch_start``: a resumed run restores its random state before its first batch.
2. ``training_step``: log-probabilities under reference and policy, the loss of each group, metrics.
   Returns the *sum* over the batch's groups. The first batch is checked against the model's own
   logits.
3. Lightning divides the sum by ``accumulate_grad_batches``, sets gradients to zero if the batch is
   the window's first, and runs the backward pass: gradients of the window's batches add up.

After the window's last batch, for which 2 to 4 run inside ``optimizer_step``:

4. ``on_before_optimizer_step``: a step that is not finite stops the run or is left out; the
   gradient becomes the mean over the groups of all processes; metrics are logged. Then
   ``configure_gradient_clipping``.
5. The weights change, and ``optimizer_step`` returns. Lightning steps the schedule.

And for each batch again:

6. ``on_train_batch_end``: records where a checkpoint may resume, if no gradients are pending, and
   ends the run on all processes after SIGTERM.
"""

import warnings
from dataclasses import is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from mpo_lightning.batch import GroupBatch, GroupList, ModelLimits, PromptBatch, RunData
from mpo_lightning.checks import check_settings
from mpo_lightning.errors import UserError, fields_below
from mpo_lightning.files import cache_folder
from mpo_lightning.generation.generate import Generation, ModelSampler, PromptAnswer
from mpo_lightning.losses import MPO, SetLoss
from mpo_lightning.losses.base import Measured
from mpo_lightning.model.loading import (
    PolicyConfig,
    base_limits,
    build_policy,
    refuse_unshardable,
    warn_if_slow,
)
from mpo_lightning.model.logps import Layout
from mpo_lightning.model.policy import Policy, PolicyError
from mpo_lightning.model.reference_cache import ReferenceCache
from mpo_lightning.model.reference_fill import fill
from mpo_lightning.optim import RunSchedule, WarmupCosine, optimizer_steps
from mpo_lightning.training.checkpoint import (
    AdapterCheckpointIO,
    read_checkpoint,
    refuse_links,
    require_same_run,
)
from mpo_lightning.training.failures import EndTogether, FiniteSteps, MemoryAdvice
from mpo_lightning.training.idioms import (
    check_loaders,
    check_monitors,
    group_batch,
    refuse_unsupported,
    restored,
)
from mpo_lightning.training.metrics import METRICS, GroupMetrics, group_statistics
from mpo_lightning.training.predictions import prediction_rows
from mpo_lightning.training.processes import watch_early
from mpo_lightning.training.record import Record, describe, training_record, write_record
from mpo_lightning.training.resume import RunState
from mpo_lightning.training.run_folder import OneRun
from mpo_lightning.training.sigterm import SigtermHandler
from mpo_lightning.training.throughput import Throughput

__all__ = ["MPOModule"]

ON_PROGRESS_BAR = {name for name, metric in METRICS.items() if metric.label is not None}
ADAPTER_PREFIX = "policy.model."

if TYPE_CHECKING:
    from os import PathLike

    from transformers import PreTrainedModel

    AnyPolicy: TypeAlias = PolicyConfig | str | PathLike[str] | PreTrainedModel
else:
    # The command line knows settings only.
    AnyPolicy = PolicyConfig


class MPOModule(LightningModule):
    """Trains a policy on whole groups of scored responses.

    The loss of an optimizer step is the mean over all its groups, on all processes and in all
    accumulated batches, however unevenly they are spread.

    Checkpoints hold these settings but for optimizer and lr_scheduler, so that
    ``MPOModule.load_from_checkpoint("last.ckpt")`` needs no other argument.

    Args:
        policy: the model to train, and its adapter. In Python also its folder or hub id, or a
            loaded model, with the default adapter.
        loss: the loss to minimise; any `SetLoss`.
        optimizer: makes the optimizer from the trainable parameters.
        lr_scheduler: makes the learning-rate schedule: a `RunSchedule`, which knows the length of
            the run, or any torch scheduler; stepped after each optimizer step. None keeps the rate.
        layout: "shared" computes each prompt once for its group (prefix sharing); "continued" as
            well, and continues its cache with each response, for models with states; "separate"
            computes it once per response; "auto" is whichever computes fewest tokens for the batch
            among those in which the architecture computes the same.
        responses_per_pass: responses that go through the model at a time (gradient caching,
            GradCache, arXiv 2101.06983): memory does not grow with the number of responses, for one
            more forward pass; gradients are the same. Defaults to all of a batch.
        reference: "adapters-off" computes the reference in every step, "cached" once: values that
            the cache lacks are computed before training starts, with a progress bar.
        reference_cache: folder of the cached values. Defaults to a folder in the user's cache.
        on_nonfinite: "stop" ends the run at an optimizer step whose loss or gradient is not finite,
            and names the groups; "skip" leaves the step out, warns and counts it.
        generation: settings with which predict answers prompts that have no responses.
    """

    def __init__(
        self,
        *,
        policy: AnyPolicy,
        loss: SetLoss = MPO(),  # noqa: B008 (frozen)
        optimizer: OptimizerCallable = lambda params: AdamW(params, lr=1e-5),
        lr_scheduler: RunSchedule | LRSchedulerCallable | None = WarmupCosine(),  # noqa: B008
        layout: Layout = "auto",
        responses_per_pass: int | None = None,
        reference: Literal["adapters-off", "cached"] = "adapters-off",
        reference_cache: str | None = None,
        on_nonfinite: Literal["stop", "skip"] = "stop",
        generation: Generation = Generation(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__()
        watch_early()
        policy, loss, generation = map(restored, (policy, loss, generation))
        if not isinstance(policy, PolicyConfig):
            with fields_below("policy"):
                policy = PolicyConfig(base=policy)
        self.policy_config: PolicyConfig = policy
        self.loss = loss
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.layout: Layout = layout
        self.responses_per_pass = responses_per_pass
        self.reference: Literal["adapters-off", "cached"] = reference
        self.reference_cache = Path(reference_cache or cache_folder("reference"))
        self.on_nonfinite: Literal["stop", "skip"] = on_nonfinite
        self.generation = generation
        check_settings(self)
        if self.responses_per_pass is not None and self.responses_per_pass < 1:
            raise ValueError(
                f"model.responses_per_pass must be at least 1, got {self.responses_per_pass}."
            )
        self.save_hyperparameters(
            {
                name: describe(value)
                for name, value in {
                    "policy": policy,
                    "loss": loss,
                    "layout": layout,
                    "responses_per_pass": responses_per_pass,
                    "reference": reference,
                    "reference_cache": reference_cache,
                    "on_nonfinite": on_nonfinite,
                    "generation": generation,
                }.items()
            }
        )
        # Learning rate in the place of the optimizer's own; Lightning's Tuner sets it.
        self.lr: float | None = None
        self._optimizer_lr: float | None = None
        # Loaded by configure_model; opened when it is first needed.
        self.policy: Policy | None = None
        self._limits: ModelLimits | None = None
        self._cache: ReferenceCache | None = None
        self.train_metrics = GroupMetrics()
        self.val_metrics = GroupMetrics()
        self.test_metrics = GroupMetrics()
        # A checkpoint holds only the adapter; on_load_checkpoint checks that it is complete.
        self.strict_loading = False
        self.register_load_state_dict_post_hook(_leave_out_base)  # type: ignore[no-untyped-call]
        # Whether the first batch was compared with the model's own logits.
        self._checked = False
        # Number of groups of this epoch and process that teach the loss nothing.
        self._idle_groups: Tensor | int = 0
        # Number of groups of the last validation or test, on all processes.
        self.groups_counted = 0
        self._steps = FiniteSteps(self.on_nonfinite)
        self._run = RunState()
        # Optimizer steps of the run, if the schedule was told them.
        self._schedule_steps: int | None = None
        self._sigterm = SigtermHandler()
        # Metrics in the checkpoint that this run resumed from.
        self._earlier_metrics: dict[str, Any] = {}

    @property
    def _policy(self) -> Policy:
        if self.policy is None:
            raise RuntimeError("The model is not loaded yet: call configure_model() first.")
        return self.policy

    def limits(self) -> ModelLimits:
        """Return the limits of the base on rows, from its configuration alone."""
        if self._limits is None:
            with fields_below("model.policy"):
                self._limits = base_limits(self.policy_config)
        return self._limits

    def configure_model(self) -> None:
        """Load the base and add the adapter, once; under ModelParallelStrategy shard it (FSDP2).

        Raises:
            PolicyError: if the strategy would split layers between processes, or does not work
                with compiled layers or with the base's quantisation.
        """
        if self.policy is not None:
            return
        mesh = self.device_mesh
        strategy = None if self._trainer is None else self._trainer.strategy
        flat = isinstance(strategy, FSDPStrategy)
        with fields_below("model.policy"):
            if mesh is not None or flat:
                refuse_unshardable(self.policy_config, mesh, precision=str(self.trainer.precision))
            self.policy = build_policy(
                self.policy_config,
                self.layout,
                self.responses_per_pass,
                device="cpu" if strategy is None else strategy.root_device,
                mesh=None if mesh is None else mesh["data_parallel"],
                flat_storage=flat,
            )
        if flat:
            self.policy.record_fingerprint()
        if strategy is not None:
            kind = str(self.trainer.precision).partition("-")[0]
            computed = {"bf16": torch.bfloat16, "16": torch.float16}.get(kind, torch.float32)
            warn_if_slow(computed, strategy.root_device)
        rank_zero_info(f"Weights: {self.policy.describe()}.")

    def configure_callbacks(self) -> list[Callback]:
        """Return callbacks for speed and memory, and for failures of this and other processes.

        Raises:
            CheckpointError: if a callback of the trainer saves links, or another fit writes its
                checkpoints into the same folder.
            UserError: for an idiom that is not supported, or a monitor that is no metric.
        """
        # The first hook of a run, before data and model are loaded.
        refuse_links(self.trainer)
        refuse_unsupported(self.trainer, self)
        # Batches of data modules go through the module's hook on purpose.
        warnings.filterwarnings("ignore", ".*You have overridden `on_before_batch_transfer`")
        if self.trainer.state.fn == TrainerFn.FITTING:
            check_monitors(self.trainer, self)
        return [Throughput(), MemoryAdvice(), EndTogether(self.trainer), OneRun(self.trainer)]

    def setup(self, stage: str) -> None:
        """Check the data module's loss; write an adapter folder beside every checkpoint.

        Raises:
            ValueError: if the data module was given another loss.
            PolicyError: if predict is to answer prompts with a sharded policy.
        """
        data = self._data
        if data is not None and data.loss is not None and data.loss != self.loss:
            raise ValueError(
                f"The data module was given {data.loss} to decide which groups teach something, "
                f"but {self.loss} is trained. Give both the same loss."
            )
        strategy = self.trainer.strategy
        io = strategy.checkpoint_io
        # A trainer that has fitted another module still writes that module's adapters.
        inner = io.inner if isinstance(io, AdapterCheckpointIO) else io
        strategy.checkpoint_io = AdapterCheckpointIO(inner, self._write_adapter)
        sharded = isinstance(strategy, FSDPStrategy | ModelParallelStrategy)
        if stage == "predict" and sharded and self._answers_prompts():
            raise PolicyError(
                "predict answers prompts with the whole model on each process, and this strategy "
                "shards it. Use one device or configs/strategy/ddp.yaml (model.policy.quantization "
                "where memory is short); the checkpoint is the same."
            )

    @property
    def _data(self) -> RunData | None:
        """The data module, if it follows the `RunData` protocol."""
        data = getattr(self.trainer, "datamodule", None)
        return data if isinstance(data, RunData) else None

    def _answers_prompts(self) -> bool:
        """Whether predict gets prompts without responses."""
        return self._data is not None and self._data.answers_prompts()

    # --------------------------------------------------------------------------- reference

    def _reference(self, batch: GroupBatch) -> Tensor:
        """Compute or look up the reference log-probability of each response, (B, N)."""
        return self._policy.reference(batch) if self._cache is None else self._cache.look_up(batch)

    def on_train_start(self) -> None:
        """Handle SIGTERM, fill the reference cache, and begin with nothing accumulated.

        Warns of a learning rate that no longer follows the schedule of the checkpoint.

        Raises:
            UserError: if a monitor is no metric of this run.
        """
        validates = sum(self.trainer.num_val_batches) > 0
        check_monitors(self.trainer, self, validates=validates)
        if self.lr != self._optimizer_lr and self.trainer.global_step == 0:
            # LearningRateFinder has found it in this run, and the schedule follows it.
            self.trainer.strategy.setup_optimizers(self.trainer)
        self._sigterm.install()
        self._fill_cache(self.trainer.train_dataloader)
        self._steps.clear()
        self.train_metrics.reset()
        self._run.begin(self.trainer)
        schedule = self.lr_scheduler
        if schedule is None or isinstance(schedule, RunSchedule):
            self._schedule_steps = self._run.follow_schedule(
                self.trainer, schedule, self._schedule_steps
            )

    def on_validation_start(self) -> None:
        """Fill the reference cache for the validation data."""
        self._fill_cache(self.trainer.val_dataloaders)
        self._run.validating = True

    def on_test_start(self) -> None:
        """Fill the reference cache for the test data."""
        self._fill_cache(self.trainer.test_dataloaders)

    def on_predict_start(self) -> None:
        """Fill the reference cache for the data to predict, unless they are prompts."""
        if not self._answers_prompts():
            self._fill_cache(self.trainer.predict_dataloaders)

    def _fill_cache(self, loaders: Any) -> None:
        """With a cached reference, compute the values that the cache lacks for these loaders.

        Raises:
            PolicyError: if a loader's data set does not list all its groups.
            UserError: if a loader stacks groups as tensors.
        """
        check_loaders(loaders)
        if self.reference != "cached":
            return
        trainer = self.trainer
        if self._cache is None:
            # Mixed precision computes in another dtype than that of the weights.
            identity = self._policy.identity()
            dtype = f"{self._policy.precision()}/{trainer.precision}"
            self._cache = ReferenceCache(self.reference_cache, {**identity, "dtype": dtype})

        def compute(batch: GroupBatch) -> Tensor:
            # Values computed so far are kept.
            self._sigterm.stop_alone()
            with trainer.precision_plugin.forward_context():
                return self._policy.reference(batch.to(self.device))

        for loader in CombinedLoader(loaders).flattened:
            dataset = getattr(loader, "dataset", None)
            if not isinstance(dataset, GroupList):
                raise PolicyError(
                    "model.reference: cached needs to know all groups before training: use "
                    f"PreferenceDataModule, or adapters-off. Found a loader of {type(dataset)}."
                )
            computed = fill(
                self._cache,
                dataset.groups,
                compute,
                # A training step has to hold the largest group anyway.
                tokens_per_batch=int(dataset.sizes.max()),
                rank=trainer.global_rank,
                world_size=trainer.world_size,
                broadcast=trainer.strategy.broadcast,
                barrier=trainer.strategy.barrier,
                description="Reference",
            )
            if computed:
                rank_zero_info(f"Reference: {computed} responses computed, in {self._cache.folder}")

    # ------------------------------------------------------------------------------- steps

    def _measure(self, batch: GroupBatch) -> Measured:
        reference_logps = self._reference(batch)
        return Measured(
            policy_logps=self._policy(batch),
            reference_logps=reference_logps,
            lengths=batch.lengths,
            scores=batch.scores,
            valid=batch.valid,
        )

    def _step(self, batch: GroupBatch, metrics: GroupMetrics) -> tuple[Tensor, Tensor]:
        """Return the loss of each group (B,) and log-ratios (B, N); update the metrics."""
        measured = self._measure(batch)
        output = self.loss.evaluate(measured)
        metrics.update(group_statistics(measured, output), batch.counted)
        return output.loss, measured.log_ratios

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> GroupBatch | PromptBatch:
        """Return what a loader of the user's own gave as a batch.

        Raises:
            UserError: if it is neither a batch nor groups of token ids.
        """
        return group_batch(batch)

    def on_train_batch_start(self, batch: GroupBatch, batch_idx: int) -> None:
        """Restore the random state of a resumed run, before its first batch."""
        self._run.before_batch()

    def training_step(self, batch: GroupBatch, batch_idx: int) -> Tensor:
        """Return the sum of the groups' losses."""
        self._run.accumulates()
        # Reduce gradients over processes once an optimizer step; Lightning does so for DDP only.
        full = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0
        self._policy.synchronize_gradients(full or self.trainer.is_last_batch)
        loss, log_ratios = self._step(batch, self.train_metrics)
        if self._data is None or self._data.loss is None:
            idle = ~self.loss.has_contrast(batch.scores, batch.valid) & batch.counted
            self._idle_groups = self._idle_groups + idle.sum()
        if not self._checked:
            self._check_first_batch(batch, log_ratios)
        self._steps.add(batch, loss, log_ratios)
        return torch.where(batch.counted, loss, 0.0).sum()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Turn the accumulated gradient into the mean over the step's groups, and log the step.

        The number of groups is known only now: the last window may have fewer batches, the last
        batch fewer groups, and processes may have different numbers of them.

        Raises:
            NonFiniteError: if the loss or the gradient of the step is not finite.
        """
        values = self.train_metrics.compute()
        self.train_metrics.reset()
        parameters = [
            parameter
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        groups = values["groups"]
        if self._steps.accept(self.trainer, values["loss"], parameters):
            # Undo the division by Lightning (batches) and the strategy (processes).
            factor = self.trainer.accumulate_grad_batches * self.trainer.world_size / groups
            for parameter in parameters:
                parameter.grad.mul_(factor.to(parameter.grad.dtype))
        # Log steps that are left out, too: loggers would repeat the values of the step before.
        self._log("train", values)
        self._steps.clear()
        if self.on_nonfinite == "skip":
            self.log("train/skipped_steps", float(self._steps.skipped), batch_size=1)
        self.log("lr", optimizer.param_groups[0]["lr"], batch_size=1)
        self._run.before_update()

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as Lightning does; under FSDP1, which it refuses, by the norm over all shards."""
        by_norm = gradient_clip_algorithm in (None, "norm")
        if isinstance(self.trainer.strategy, FSDPStrategy) and gradient_clip_val and by_norm:
            model: Any = self.trainer.model
            model.clip_grad_norm_(gradient_clip_val)
            return
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Run the last batch of the window and update the weights."""
        super().optimizer_step(*args, **kwargs)
        self._run.after_update()

    def on_train_batch_end(self, outputs: Any, batch: GroupBatch, batch_idx: int) -> None:
        """Record where a checkpoint may resume, and end the run after SIGTERM."""
        self._run.after_batch(self.trainer)
        self._sigterm.stop_together(self.trainer)

    def on_train_epoch_end(self) -> None:
        """Warn of groups that teach the loss nothing, if the data module did not leave them out."""
        here = torch.as_tensor(self._idle_groups, device=self.device)
        self._idle_groups = 0
        idle = int(self.trainer.strategy.reduce(here, reduce_op="sum"))
        if idle:
            rank_zero_warn(
                f"{idle} groups of this epoch teach {type(self.loss).__name__} nothing, and "
                "count in the mean all the same. Give PreferenceDataModule the loss, and it leaves "
                "them out."
            )

    # ---------------------------------------------------------------------------- evaluation

    def validation_step(self, batch: GroupBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to the validation metrics, which are those of all loaders together."""
        self._step(batch, self.val_metrics)

    def on_validation_batch_end(self, *_: Any) -> None:
        """End the run after SIGTERM."""
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self._sigterm.stop_together(self.trainer)

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics."""
        self._log_epoch("val", self.val_metrics)
        self._run.validating = False

    def test_step(self, batch: GroupBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to the test metrics, which are those of all loaders together."""
        self._step(batch, self.test_metrics)

    def on_test_epoch_end(self) -> None:
        """Log the test metrics."""
        self._log_epoch("test", self.test_metrics)

    def predict_step(
        self, batch: GroupBatch | PromptBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> list[dict[str, object]] | list[PromptAnswer]:
        """Return one row per response (log-probabilities, reward, rank), or answers to prompts."""
        if isinstance(batch, PromptBatch):
            return self._answer(batch)
        measured = self._measure(batch)
        if not batch.counted.all():
            return []
        return prediction_rows(batch, measured, self.loss.rewards(measured))

    def _answer(self, batch: PromptBatch) -> list[PromptAnswer]:
        """Generate the policy's response to each prompt."""
        if not batch.counted:
            return []
        sampler = ModelSampler(
            self._policy.causal_lm,
            batch.tokenizer,
            self.generation.sampling(),
            responses_per_batch=len(batch.items),
        )
        answers = sampler([item.request for item in batch.items])
        return [PromptAnswer(*pair) for pair in zip(batch.items, answers, strict=True)]

    def _log_epoch(self, stage: str, metrics: GroupMetrics) -> None:
        values = metrics.compute()
        metrics.reset()
        self.groups_counted = int(values["groups"])
        self._log(stage, values)

    def _log(self, stage: str, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            # The values are those of all processes already, so that there is nothing to average.
            self.log(f"{stage}/{name}", value, prog_bar=name in ON_PROGRESS_BAR, batch_size=1)

    def _check_first_batch(self, batch: GroupBatch, log_ratios: Tensor) -> None:
        """Compare the batch with the model's own logits, and a fresh policy with its reference.

        Raises:
            PolicyError: if they differ by more than rounding.
        """
        self._policy.check(batch)
        self._policy.check_shards()
        if self._cache is not None:
            self._policy.check_reference(batch, self._cache.look_up)
        if self._policy.is_untrained():
            gaps = log_ratios.detach().abs()
            # Live values agree to the last digit; cached ones come from batches of other shapes.
            cached = self._cache is not None
            tolerance = self._policy.tolerance(batch.lengths) if cached else 1e-3
            if not bool((gaps <= tolerance)[batch.valid].all()):
                raise PolicyError(
                    f"{type(self._policy.causal_lm).__name__}: the adapter is fresh, so policy and "
                    f"reference must agree, but a log-ratio of the first batch is "
                    f"{gaps.max().item():.4f} nats. Something random or stateful is active in "
                    "training only."
                )
        self._checked = True

    # -------------------------------------------------------------------------- optimization

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make the optimizer of the adapter's parameters, and the schedule of the run.

        Raises:
            UserError: for a schedule on a plateau of no metric, or on an unknown length.
        """
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
        self._optimizer_lr = self.lr
        if self.lr is not None:
            for group in optimizer.param_groups:
                group["lr"] = self.lr
        if self.lr_scheduler is None:
            return optimizer
        if isinstance(self.lr_scheduler, RunSchedule):
            self._schedule_steps = optimizer_steps(self.trainer)
            scheduler = self.lr_scheduler(optimizer, self._schedule_steps)
        else:
            scheduler = self.lr_scheduler(optimizer)
        if not isinstance(scheduler, ReduceLROnPlateau):
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
            }
        monitor = getattr(scheduler, "monitor", None)
        if monitor is None:
            raise UserError(
                "model.lr_scheduler: torch's ReduceLROnPlateau does not say which metric it "
                "watches. Use lightning.pytorch.cli.ReduceLROnPlateau with monitor: train/loss, "
                "looked at after each optimizer step, or val/loss, at the end of each epoch."
            )
        by_step = monitor.startswith("train/")
        if not by_step and self.trainer.max_epochs == 1:
            rank_zero_warn(
                f"ReduceLROnPlateau looks at {monitor} at the end of each epoch, and the run has "
                "one: it will not change the rate. Watch train/loss, or raise trainer.max_epochs."
            )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": scheduler,
                "interval": "step" if by_step else "epoch",
                "monitor": monitor,
            },
        }

    # --------------------------------------------------------------------------- checkpoints

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Load as Lightning does, from a file that is as it was written.

        Raises:
            DamagedError: if the file is not what was written, or holds NaN.
            ResumeError: if it cannot be read as plain values.
        """
        if isinstance(checkpoint_path, str | Path):
            read_checkpoint(checkpoint_path)
        loaded: Self = super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
        return loaded

    def _adapter_shapes(self) -> dict[str, list[int]]:
        return {n: list(p.shape) for n, p in self.named_parameters() if p.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the adapter, leave the frozen base out, and add the state for an exact resume.

        Raises:
            CheckpointError: in the middle of an optimizer step, when some weights may be updated
                and others not.
        """
        self._run.save(checkpoint, self._schedule_steps)
        shapes = self._adapter_shapes()
        # Lightning's WeightAveraging has put the averaged weights in the place of the current ones.
        for key in {"state_dict", "current_model_state"} & checkpoint.keys():
            weights = checkpoint[key]
            checkpoint[key] = {name: weights[name] for name in weights if name in shapes}
        # Beside the weights, which some strategies take out before a checkpoint is checked.
        checkpoint["adapter_shapes"] = shapes
        checkpoint["base"] = self._base()
        checkpoint["optimizer_param_indexing"] = self._optimizer_param_indexing()
        # A subclass may have saved what is no plain value.
        checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] = {
            name: describe(value)
            for name, value in self.hparams.items()
            if is_dataclass(value) or not callable(value)
        }
        checkpoint["skipped_steps"] = self._steps.skipped
        checkpoint["training"] = self._record()

    def _record(self) -> Record:
        config, own = self.policy_config, type(self).configure_optimizers
        loaded = {name: getattr(config, name) for name in ("revision", "quantization")}
        return training_record(
            self.trainer,
            data=None if self._data is None else self._data.record(),
            base={"name": config.base, **loaded, **self._policy.identity()},
            loss=self.loss,
            # Of a subclass's own optimizer the record says what it made.
            schedule=self.lr_scheduler if own is MPOModule.configure_optimizers else own,
            settings={
                "layout": self.layout,
                "responses_per_pass": self.responses_per_pass,
                "reference": self.reference,
                "gradient_checkpointing": config.gradient_checkpointing,
                "on_nonfinite": self.on_nonfinite,
                "skipped_steps": self._steps.skipped,
            },
            earlier_metrics=self._earlier_metrics,
        )

    def _optimizer_param_indexing(self) -> str:
        """Return which parameters this strategy numbers in an optimizer's state."""
        strategy = self.trainer.strategy
        sharded = isinstance(strategy, FSDPStrategy | ModelParallelStrategy)
        trained_only = getattr(strategy, "indexes_trained_parameters", not sharded)
        return "trained weights" if trained_only else "all weights"

    def _base(self) -> dict[str, str]:
        identity = self._policy.identity()
        return {name: identity[name] for name in ("model", "config", "weights")}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that a checkpoint is of this run, and restore the state of a resumed one."""
        self.check_checkpoint(checkpoint)
        trainer = self._trainer
        if trainer is None or trainer.state.fn != TrainerFn.FITTING:
            return
        self._steps.skipped = checkpoint["skipped_steps"]
        self._earlier_metrics = checkpoint["training"]["metrics"]
        self._run.load(checkpoint, trainer)

    def check_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check with `require_same_run` that this run may load a checkpoint."""
        training = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        require_same_run(
            checkpoint,
            adapter_shapes=self._adapter_shapes(),
            base=self._base(),
            optimizer_param_indexing=self._optimizer_param_indexing() if training else None,
        )

    def _write_adapter(self, path: Path, checkpoint: dict[str, Any], seal: str) -> None:
        state_dict = checkpoint["state_dict"]
        weights = {name.removeprefix(ADAPTER_PREFIX): value for name, value in state_dict.items()}
        self._policy.save_adapter(path, weights)
        write_record(path, checkpoint["training"], self.trainer, seal)
        if self._data is not None and self._data.tokenizer is not None:
            self._data.tokenizer.save_pretrained(path)


def _leave_out_base(module: nn.Module, keys: Any) -> None:
    """Take the frozen base out of what a state dict lacks: checkpoints never hold it."""
    frozen = tuple(name for name, p in module.named_parameters() if not p.requires_grad)
    keys.missing_keys[:] = [name for name in keys.missing_keys if not name.endswith(frozen)]
