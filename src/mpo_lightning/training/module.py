"""MPOModule: the LightningModule that trains a policy on groups.

The life of an optimizer step, in Lightning's order:

1. ``on_train_batch_start``, for each batch of the accumulation window: a resumed run takes over its
   random numbers before the first one.
2. ``training_step``: log-probabilities under reference and policy, the loss of each group, metrics
   of the window; returns the *sum* over the batch's groups. On the first batch everything is
   checked against the model's own logits.
3. Backward pass, by Lightning: gradients of the window's batches add up.
4. ``on_before_optimizer_step``, after the window's last batch: divides the gradient by the number
   of groups on all processes, logs the step; a step that is not finite is refused or left out.
5. ``configure_gradient_clipping``, then ``optimizer_step``: weights change, the schedule steps.
6. ``on_train_batch_end``, for each batch: notes where a checkpoint may resume (only between two
   optimizer steps), and ends the run on all processes after SIGTERM.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import AdamW, Optimizer

from mpo_lightning.batch import GroupBatch, GroupList, PromptBatch, RunData
from mpo_lightning.errors import ResumeError, fields_below, require_same
from mpo_lightning.files import cache_folder
from mpo_lightning.generation.generate import Generation, ModelSampler, PromptAnswer
from mpo_lightning.losses import MPO, SetLoss
from mpo_lightning.losses.base import Measured
from mpo_lightning.model.loading import PolicyConfig, build_policy, refuse_unshardable
from mpo_lightning.model.logps import Layout
from mpo_lightning.model.policy import Policy, PolicyError
from mpo_lightning.model.reference_cache import ReferenceCache
from mpo_lightning.model.reference_fill import fill
from mpo_lightning.optim import RunSchedule, WarmupCosine, optimizer_steps
from mpo_lightning.training.checkpoint import AdapterCheckpointIO
from mpo_lightning.training.failures import FiniteSteps, MemoryAdvice
from mpo_lightning.training.metrics import METRICS, GroupMetrics, group_statistics
from mpo_lightning.training.predictions import prediction_rows
from mpo_lightning.training.record import Record, training_record, write_record
from mpo_lightning.training.resume import RunState
from mpo_lightning.training.sigterm import SigtermHandler
from mpo_lightning.training.throughput import Throughput

__all__ = ["MPOModule"]

ON_PROGRESS_BAR = {name for name, metric in METRICS.items() if metric.label is not None}
ADAPTER_PREFIX = "policy.model."


class MPOModule(LightningModule):
    """Trains a policy on whole groups of scored responses.

    The loss of an optimizer step is the mean over all its groups, on all processes and in all
    accumulated batches, however unevenly they are spread.

    Args:
        policy: which model is trained, and its adapter.
        loss: what is minimised; any `SetLoss`.
        optimizer: makes the optimizer from the trainable parameters.
        lr_scheduler: makes the learning-rate schedule: a `RunSchedule`, which is told the length of
            the run, or any torch scheduler; stepped after each optimizer step. None keeps the rate.
        layout: "shared" computes each prompt once for its group, "separate" once per response;
            "auto" whichever computes fewer tokens for the batch at hand, where the architecture
            can share a prompt.
        responses_per_pass: responses that go through the model at a time; all of a batch if none.
            With it memory does not grow with the number of responses, at the price of one more
            forward pass; gradients are the same.
        reference: "adapters-off" computes the reference in every step, "cached" once: what is not
            in the cache is computed before training starts, with a progress bar.
        reference_cache: folder of the cached values; one of the user's cache folder if none.
        on_nonfinite: what to do with an optimizer step whose loss or gradient is not finite. "stop"
            ends the run and names the groups, "skip" leaves the step out, says so and counts it.
        generation: how predict answers prompts that come without responses.
    """

    def __init__(
        self,
        *,
        policy: PolicyConfig,
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
        if responses_per_pass is not None and responses_per_pass < 1:
            raise ValueError(
                f"model.responses_per_pass must be at least 1, got {responses_per_pass}."
            )
        self.policy_config = policy
        self.loss = loss
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.layout: Layout = layout
        self.responses_per_pass = responses_per_pass
        self.reference: Literal["adapters-off", "cached"] = reference
        self.reference_cache = Path(reference_cache or cache_folder("reference"))
        self.on_nonfinite: Literal["stop", "skip"] = on_nonfinite
        self.generation = generation
        # Opened when it is first needed.
        self._cache: ReferenceCache | None = None
        self.policy: Policy | None = None
        self.train_metrics = GroupMetrics()
        self.val_metrics = GroupMetrics()
        self.test_metrics = GroupMetrics()
        # A checkpoint holds the adapter alone; on_load_checkpoint is strict about that.
        self.strict_loading = False
        self._checked = False
        # Groups of this epoch and process from which the loss learns nothing.
        self._idle_groups: Tensor | int = 0
        self._steps = FiniteSteps(on_nonfinite)
        # Groups of the last validation or test, on all processes.
        self.groups_counted = 0
        self._run = RunState()
        # Metrics in the checkpoint that this run resumed from.
        self._earlier_metrics: dict[str, Any] = {}
        self._sigterm = SigtermHandler()

    @property
    def _policy(self) -> Policy:
        if self.policy is None:
            raise RuntimeError("The model is not loaded yet: call configure_model() first.")
        return self.policy

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
        rank_zero_info(f"Weights: {self.policy.describe()}.")

    def configure_callbacks(self) -> list[Callback]:
        """Speed and memory as metrics, and advice where memory runs out."""
        return [Throughput(), MemoryAdvice()]

    def setup(self, stage: str) -> None:
        """Have every checkpoint of this run leave an adapter folder beside it.

        Raises:
            ValueError: if the data were prepared for another loss.
        """
        data = self._data
        if data is not None and data.loss is not None and data.loss != self.loss:
            raise ValueError(
                f"The data module was given {data.loss} to decide which groups teach something, "
                f"but {self.loss} is trained. Give both the same loss."
            )
        strategy = self.trainer.strategy
        io = strategy.checkpoint_io
        # A trainer that fitted another module before still writes that one's adapters.
        inner = io.inner if isinstance(io, AdapterCheckpointIO) else io
        strategy.checkpoint_io = AdapterCheckpointIO(inner, self._write_adapter)
        if stage == "predict" and self._answers_prompts():
            self._refuse_sharded_answers()

    @property
    def _data(self) -> RunData | None:
        """The data module, where it is one that a run may ask."""
        data = getattr(self.trainer, "datamodule", None)
        return data if isinstance(data, RunData) else None

    def _answers_prompts(self) -> bool:
        """Whether the data to predict for are prompts without responses."""
        return self._data is not None and self._data.answers_prompts()

    def _refuse_sharded_answers(self) -> None:
        if isinstance(self.trainer.strategy, FSDPStrategy | ModelParallelStrategy):
            raise PolicyError(
                "predict answers prompts with the whole model on each process, and this strategy "
                "shards it. Use one device or configs/strategy/ddp.yaml (model.policy.quantization "
                "where memory is short); the checkpoint is the same."
            )

    # --------------------------------------------------------------------------- reference

    def _reference(self, batch: GroupBatch) -> Tensor:
        """Reference log-probability of each response, (B, N), computed or looked up."""
        return self._policy.reference(batch) if self._cache is None else self._cache.look_up(batch)

    def on_train_start(self) -> None:
        """With a cached reference, compute what the cache lacks of the training data."""
        self._sigterm.install()
        self._fill_cache(self.trainer.train_dataloader)
        self._steps.clear()
        self.train_metrics.reset()
        self._run.begin(self.trainer)

    def on_validation_start(self) -> None:
        """The same for the validation data."""
        self._fill_cache(self.trainer.val_dataloaders)
        self._run.validating = True

    def on_test_start(self) -> None:
        """The same for the test data."""
        self._fill_cache(self.trainer.test_dataloaders)

    def on_predict_start(self) -> None:
        """The same for the data to predict for; answers have no reference."""
        if not self._answers_prompts():
            self._fill_cache(self.trainer.predict_dataloaders)

    def _fill_cache(self, loaders: Any) -> None:
        """Compute the reference of all groups of these loaders that the cache lacks.

        Raises:
            PolicyError: if the data set of a loader does not know all its groups.
        """
        if self.reference != "cached":
            return
        trainer = self.trainer
        if self._cache is None:
            # Mixed precision computes in another dtype than that of the weights.
            identity = self._policy.identity()
            dtype = f"{identity['dtype']}/{trainer.precision}"
            self._cache = ReferenceCache(self.reference_cache, {**identity, "dtype": dtype})

        def compute(batch: GroupBatch) -> Tensor:
            # What is computed so far is kept.
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
        """Loss of each group (B,) and policy minus reference (B, N); the metrics are updated."""
        measured = self._measure(batch)
        output = self.loss.evaluate(measured)
        metrics.update(group_statistics(measured, output), batch.counted)
        return output.loss, measured.log_ratios

    def on_train_batch_start(self, batch: GroupBatch, batch_idx: int) -> None:
        """Restore the random numbers of the run that is resumed."""
        self._run.before_batch()

    def on_train_batch_end(self, outputs: Any, batch: GroupBatch, batch_idx: int) -> None:
        """Note where the run stands after each optimizer step, and end it after SIGTERM."""
        self._run.after_batch(self.trainer)
        self._sigterm.stop_together(self.trainer)

    def training_step(self, batch: GroupBatch, batch_idx: int) -> Tensor:
        """Sum of the groups' losses; on_before_optimizer_step makes the gradient a mean."""
        self._run.accumulates()
        # Lightning does so for DDP alone: gradients go between processes once an optimizer step.
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

        Only now is the number of groups known: a last window may hold fewer batches, a last batch
        fewer groups, and processes may hold unequally many.

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
            # What Lightning and the strategy have divided the sum by so far, undone.
            factor = self.trainer.accumulate_grad_batches * self.trainer.world_size / groups
            for parameter in parameters:
                parameter.grad.mul_(factor.to(parameter.grad.dtype))
        # Also of a step that was left out: a logger would repeat the values of the step before.
        self._log("train", values)
        self._steps.clear()
        if self.on_nonfinite == "skip":
            self.log("train/skipped_steps", float(self._steps.skipped), batch_size=1)
        self.log("lr", optimizer.param_groups[0]["lr"], batch_size=1)
        self._run.before_update()

    def on_train_epoch_end(self) -> None:
        """Warn of groups that taught the loss nothing, where the data module kept them."""
        here = torch.as_tensor(self._idle_groups, device=self.device)
        self._idle_groups = 0
        idle = int(self.trainer.strategy.reduce(here, reduce_op="sum"))
        if idle:
            rank_zero_warn(
                f"{idle} groups of this epoch teach {type(self.loss).__name__} nothing, and "
                "count in the mean all the same. Give PreferenceDataModule the loss, and it leaves "
                "them out."
            )

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Update the weights; afterwards no gradient is left over."""
        super().optimizer_step(*args, **kwargs)
        self._run.after_update()

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

    def validation_step(self, batch: GroupBatch, batch_idx: int) -> None:
        """Add a batch to the validation metrics."""
        self._step(batch, self.val_metrics)

    def on_validation_batch_end(self, *_: Any) -> None:
        """End the run after SIGTERM."""
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self._sigterm.stop_together(self.trainer)

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics."""
        self._log_epoch("val", self.val_metrics)
        self._run.validating = False

    def test_step(self, batch: GroupBatch, batch_idx: int) -> None:
        """Add a batch to the test metrics."""
        self._step(batch, self.test_metrics)

    def on_test_epoch_end(self) -> None:
        """Log the test metrics."""
        self._log_epoch("test", self.test_metrics)

    def predict_step(
        self, batch: GroupBatch | PromptBatch, batch_idx: int
    ) -> list[dict[str, object]] | list[PromptAnswer]:
        """Log-probabilities, reward and rank of each response, one row a response; or answers."""
        if isinstance(batch, PromptBatch):
            return self._answer(batch)
        measured = self._measure(batch)
        if not batch.counted.all():
            return []
        return prediction_rows(batch, measured, self.loss.rewards(measured))

    def _answer(self, batch: PromptBatch) -> list[PromptAnswer]:
        """A response of the policy to each prompt."""
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
            # The values are those of all processes already: there is nothing left to average.
            self.log(f"{stage}/{name}", value, prog_bar=name in ON_PROGRESS_BAR, batch_size=1)

    def _check_first_batch(self, batch: GroupBatch, log_ratios: Tensor) -> None:
        """Stop a run that would compute something else than it says.

        Raises:
            PolicyError: if log-probabilities differ from those of the model's own logits, or if a
                fresh adapter's policy differs from the reference.
        """
        self._policy.check(batch)
        self._policy.check_shards()
        if self._cache is not None:
            self._policy.check_reference(batch, self._cache.look_up)
        if self._policy.is_untrained():
            gaps = log_ratios.detach().abs()
            # Computed one after the other they agree to the last digit; cached values were
            # computed in batches of another shape.
            tolerance = self._policy.tolerance(batch.lengths) if self._cache else 1e-3
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
        """The injected optimizer over the adapter, and the injected schedule over the run."""
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
        if self.lr_scheduler is None:
            return optimizer
        if isinstance(self.lr_scheduler, RunSchedule):
            scheduler = self.lr_scheduler(optimizer, optimizer_steps(self.trainer))
        else:
            scheduler = self.lr_scheduler(optimizer)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    # --------------------------------------------------------------------------- checkpoints

    def _adapter_shapes(self) -> dict[str, list[int]]:
        return {n: list(p.shape) for n, p in self.named_parameters() if p.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the adapter, leave the frozen base out, and add what an exact resume needs.

        Raises:
            CheckpointError: in the middle of an optimizer step, when some weights may be updated
                and others not.
        """
        self._run.save(checkpoint)
        shapes = self._adapter_shapes()
        checkpoint["state_dict"] = {
            name: value for name, value in checkpoint["state_dict"].items() if name in shapes
        }
        # By itself, since some strategies have taken the weights out when a checkpoint is checked.
        checkpoint["adapter_shapes"] = shapes
        checkpoint["base"] = self._base()
        checkpoint["optimizer_param_indexing"] = self._optimizer_param_indexing()
        checkpoint["skipped_steps"] = self._steps.skipped
        checkpoint["training"] = self._record()

    def _record(self) -> Record:
        config = self.policy_config
        loaded = {name: getattr(config, name) for name in ("revision", "quantization")}
        return training_record(
            self.trainer,
            data=None if self._data is None else self._data.record(),
            base={"name": config.base, **loaded, **self._policy.identity()},
            loss=self.loss,
            schedule=self.lr_scheduler,
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
        """Parameters that the numbers in an optimizer's state count, under this strategy."""
        strategy = self.trainer.strategy
        sharded = isinstance(strategy, FSDPStrategy | ModelParallelStrategy)
        trained_only = getattr(strategy, "indexes_trained_parameters", not sharded)
        return "trained weights" if trained_only else "all weights"

    def _base(self) -> dict[str, str]:
        identity = self._policy.identity()
        return {name: identity[name] for name in ("model", "config", "weights")}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Accept exactly this adapter on this base, and take over what a resumed run needs.

        Raises:
            PolicyError: if the checkpoint's adapter has other layers or shapes.
            ResumeError: if the base is another one.
        """
        self.check_checkpoint(checkpoint)
        trainer = self._trainer
        if trainer is None or trainer.state.fn != TrainerFn.FITTING:
            return
        self._steps.skipped = checkpoint["skipped_steps"]
        self._earlier_metrics = checkpoint["training"]["metrics"]
        self._run.load(checkpoint, trainer)

    def check_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another adapter or another base, or that cannot be gone on from.

        Raises:
            PolicyError: if the checkpoint's adapter has other layers or shapes.
            ResumeError: if the base is another one, or the strategy that wrote it was.
        """
        if "base" not in checkpoint:
            raise ResumeError(
                "The file is no checkpoint of this package: it does not say which base its adapter "
                "belongs to."
            )
        expected = self._adapter_shapes()
        found = checkpoint["adapter_shapes"]
        weights = checkpoint.get("state_dict")
        if found == expected and weights is not None:
            found = {name: list(value.shape) for name, value in weights.items()}
        if found != expected:
            differing = sorted(
                name
                for name in found.keys() | expected.keys()
                if found.get(name) != expected.get(name)
            )
            name = differing[0]
            raise PolicyError(
                f"The checkpoint's adapter is not this run's: {len(differing)} weights differ. "
                f"First {name}: {found.get(name, 'absent')} in the checkpoint, "
                f"{expected.get(name, 'absent')} here. Use the model.policy settings that wrote it."
            )
        remedy = "Use the model.policy settings that wrote it."
        require_same("base model", checkpoint["base"], self._base(), remedy)
        if self._trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        if checkpoint["optimizer_param_indexing"] != self._optimizer_param_indexing():
            raise ResumeError(
                "The checkpoint numbers the optimizer's state by "
                f"{checkpoint['optimizer_param_indexing']}, this strategy by "
                f"{self._optimizer_param_indexing()}. Lightning's own FSDPStrategy and "
                "ModelParallelStrategy resume from their own checkpoints only; "
                "mpo_lightning.strategy.FSDP2 and unsharded runs from each other's."
            )

    def _write_adapter(self, path: Any, checkpoint: dict[str, Any]) -> None:
        state_dict = checkpoint["state_dict"]
        weights = {name.removeprefix(ADAPTER_PREFIX): value for name, value in state_dict.items()}
        self._policy.save_adapter(path, weights)
        write_record(path, checkpoint["training"], self.trainer)
        if self._data is not None and self._data.tokenizer is not None:
            self._data.tokenizer.save_pretrained(path)
