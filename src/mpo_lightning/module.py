"""MPOModule: groups in, loss and metrics out. It wires the floors below and adds no arithmetic."""

import math
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import AdamW, Optimizer

from mpo_lightning.batch import GroupBatch
from mpo_lightning.checkpoint import AdapterCheckpointIO
from mpo_lightning.data.datamodule import GroupDataset
from mpo_lightning.logps import Layout
from mpo_lightning.losses import MPO, SetLoss
from mpo_lightning.metrics import GroupMetrics, group_statistics
from mpo_lightning.optim import RunSchedule, WarmupCosine
from mpo_lightning.policy import Policy, PolicyConfig, PolicyError, build_policy
from mpo_lightning.predictions import prediction_rows
from mpo_lightning.reference import ReferenceCache, default_root, fill

__all__ = ["MPOModule"]

ON_PROGRESS_BAR = {"loss", "rewards/margin", "rewards/accuracy"}
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
        self.reference_cache = default_root() if reference_cache is None else Path(reference_cache)
        # Of the base, taken before it is sharded; and the cache, opened when it is first needed.
        self._identity: dict[str, str] = {}
        self._cache: ReferenceCache | None = None
        self.policy: Policy | None = None
        self.train_metrics = GroupMetrics()
        self.val_metrics = GroupMetrics()
        self.test_metrics = GroupMetrics()
        # A checkpoint holds the adapter alone; on_load_checkpoint is strict about that.
        self.strict_loading = False
        self._checked = False

    @property
    def _policy(self) -> Policy:
        if self.policy is None:
            raise RuntimeError("The model is not loaded yet: call configure_model() first.")
        return self.policy

    def configure_model(self) -> None:
        """Load the base and add the adapter, once; under ModelParallelStrategy shard it (FSDP2).

        Raises:
            PolicyError: if the strategy would split layers between processes, or does not work
                with compiled layers.
        """
        if self.policy is not None:
            return
        if self.device_mesh is not None and self.device_mesh["tensor_parallel"].size() > 1:
            raise PolicyError(
                "ModelParallelStrategy splits layers between processes, each of which would see "
                "the same data. Set data_parallel_size to the number of processes and "
                "tensor_parallel_size to 1."
            )
        if self.device_mesh is not None and self.policy_config.compile:
            raise PolicyError(
                "model.policy.compile does not work together with ModelParallelStrategy. Set it to "
                "false."
            )
        self.policy = build_policy(self.policy_config, self.layout, self.responses_per_pass)
        if self.reference == "cached":
            self._identity = self.policy.identity()
        if self.device_mesh is not None:
            self.policy.shard(self.device_mesh["data_parallel"])

    def setup(self, stage: str) -> None:
        """Have every checkpoint of this run leave an adapter folder beside it."""
        strategy = self.trainer.strategy
        io = strategy.checkpoint_io
        # A trainer that fitted another module before still writes that one's adapters.
        inner = io.inner if isinstance(io, AdapterCheckpointIO) else io
        strategy.checkpoint_io = AdapterCheckpointIO(inner, self._write_adapter)

    # --------------------------------------------------------------------------- reference

    def _reference(self, batch: GroupBatch) -> Tensor:
        """Reference log-probability of each response, (B, N), computed or looked up."""
        return self._policy.reference(batch) if self._cache is None else self._cache.look_up(batch)

    def on_train_start(self) -> None:
        """With a cached reference, compute what the cache lacks of the training data."""
        self._fill_cache(self.trainer.train_dataloader)

    def on_validation_start(self) -> None:
        """The same for the validation data."""
        self._fill_cache(self.trainer.val_dataloaders)

    def on_test_start(self) -> None:
        """The same for the test data."""
        self._fill_cache(self.trainer.test_dataloaders)

    def on_predict_start(self) -> None:
        """The same for the data to predict for."""
        self._fill_cache(self.trainer.predict_dataloaders)

    def _fill_cache(self, loaders: Any) -> None:
        """Compute the reference of all groups that these loaders give and the cache lacks.

        Raises:
            PolicyError: if a loader isn't one of `PreferenceDataModule`.
        """
        if self.reference != "cached":
            return
        trainer = self.trainer
        if self._cache is None:
            # Mixed precision computes in another dtype than that of the weights.
            dtype = f"{self._identity['dtype']}/{trainer.precision}"
            self._cache = ReferenceCache(self.reference_cache, {**self._identity, "dtype": dtype})

        def compute(batch: GroupBatch) -> Tensor:
            with trainer.precision_plugin.forward_context():
                return self._policy.reference(batch.to(self.device))

        for loader in CombinedLoader(loaders).flattened:
            dataset = getattr(loader, "dataset", None)
            if not isinstance(dataset, GroupDataset):
                raise PolicyError(
                    "model.reference: cached needs to know all groups before training: use "
                    f"PreferenceDataModule, or adapters-off. Found a loader of {type(dataset)}."
                )
            computed = fill(
                self._cache,
                dataset.groups,
                compute,
                # A training step has to hold the largest group anyway.
                tokens_per_batch=max(dataset.sizes),
                rank=trainer.global_rank,
                world_size=trainer.world_size,
                broadcast=trainer.strategy.broadcast,
                barrier=trainer.strategy.barrier,
                description="Reference",
            )
            if computed:
                rank_zero_info(f"Reference: {computed} responses computed, in {self._cache.folder}")

    # ------------------------------------------------------------------------------- steps

    def _step(self, batch: GroupBatch, metrics: GroupMetrics) -> tuple[Tensor, Tensor]:
        """Loss of each group (B,) and the log-ratios (B, N); the metrics are updated."""
        reference_logps = self._reference(batch)
        policy_logps = self._policy(batch)
        log_ratios = policy_logps - reference_logps
        loss = self.loss(log_ratios, batch.scores, batch.valid)
        statistics = group_statistics(
            loss=loss,
            policy_logps=policy_logps,
            reference_logps=reference_logps,
            scores=batch.scores,
            valid=batch.valid,
            lengths=batch.lengths,
            beta=self.loss.beta,
        )
        metrics.update(statistics, batch.counted)
        return loss, log_ratios

    def training_step(self, batch: GroupBatch, batch_idx: int) -> Tensor:
        """Sum of the groups' losses; on_before_optimizer_step makes the gradient a mean."""
        # Lightning does so for DDP alone: gradients go between processes once an optimizer step.
        full = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0
        self._policy.synchronize_gradients(full or self.trainer.is_last_batch)
        loss, log_ratios = self._step(batch, self.train_metrics)
        if not self._checked:
            self._check_first_batch(batch, log_ratios)
        return torch.where(batch.counted, loss, 0.0).sum()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Turn the accumulated gradient into the mean over the step's groups, and log the step.

        Only now is the number of groups known: a last window may hold fewer batches, a last batch
        fewer groups, and processes may hold unequally many.
        """
        values = self.train_metrics.compute()
        self.train_metrics.reset()
        # What Lightning and the strategy have divided the sum by so far, undone.
        divided = self.trainer.accumulate_grad_batches * self.trainer.world_size
        factor = divided / values.pop("groups")
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor.to(parameter.grad.dtype))
        self._log("train", values)
        self.log("lr", optimizer.param_groups[0]["lr"], batch_size=1)

    def validation_step(self, batch: GroupBatch, batch_idx: int) -> None:
        """Add a batch to the validation metrics."""
        self._step(batch, self.val_metrics)

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics."""
        self._log_epoch("val", self.val_metrics)

    def test_step(self, batch: GroupBatch, batch_idx: int) -> None:
        """Add a batch to the test metrics."""
        self._step(batch, self.test_metrics)

    def on_test_epoch_end(self) -> None:
        """Log the test metrics."""
        self._log_epoch("test", self.test_metrics)

    def predict_step(self, batch: GroupBatch, batch_idx: int) -> list[dict[str, object]]:
        """Log-probabilities, reward and rank of each response, one row a response."""
        reference_logps = self._reference(batch)
        policy_logps = self._policy(batch)
        if not batch.counted.all():
            return []
        return prediction_rows(batch, policy_logps, reference_logps, beta=self.loss.beta)

    def _log_epoch(self, stage: str, metrics: GroupMetrics) -> None:
        values = metrics.compute()
        metrics.reset()
        del values["groups"]
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
        if self._cache is not None:
            self._policy.check_reference(batch, self._cache.look_up)
        if self._policy.is_fresh():
            gaps = log_ratios.detach().abs()
            # Computed one after the other they agree to the last digit; cached values were
            # computed in batches of another shape.
            tolerance = self._policy.rounding(batch.lengths) if self._cache else 1e-3
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
            scheduler = self.lr_scheduler(optimizer, self._optimizer_steps())
        else:
            scheduler = self.lr_scheduler(optimizer)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def _optimizer_steps(self) -> int:
        """Optimizer steps of the whole run.

        With a data module `trainer.estimated_stepping_batches` is avoided: it makes the training
        loader before a checkpoint is restored, and a resumed run would start from that loader
        (pytorch-lightning#20550).
        """
        trainer = self.trainer
        datamodule = getattr(trainer, "datamodule", None)
        if datamodule is None or trainer.max_epochs in (None, -1):
            return int(trainer.estimated_stepping_batches)
        batches = len(datamodule.train_dataloader())
        limit = trainer.limit_train_batches
        if isinstance(limit, int):
            batches = min(batches, limit)
        elif limit is not None:
            batches = int(batches * limit)
        steps = math.ceil(batches / trainer.accumulate_grad_batches) * int(trainer.max_epochs or 1)
        return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)

    # --------------------------------------------------------------------------- checkpoints

    def _adapter_shapes(self) -> dict[str, list[int]]:
        return {n: list(p.shape) for n, p in self.named_parameters() if p.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the adapter, leave the frozen base out."""
        shapes = self._adapter_shapes()
        checkpoint["state_dict"] = {
            name: value for name, value in checkpoint["state_dict"].items() if name in shapes
        }
        # By itself, since some strategies have taken the weights out when a checkpoint is checked.
        checkpoint["adapter_shapes"] = shapes

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Accept exactly this adapter.

        Raises:
            PolicyError: if the checkpoint's adapter has other layers or shapes.
        """
        expected = self._adapter_shapes()
        found = checkpoint.get("adapter_shapes", {})
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

    def _write_adapter(self, path: Any, state_dict: dict[str, Tensor]) -> None:
        weights = {name.removeprefix(ADAPTER_PREFIX): value for name, value in state_dict.items()}
        self._policy.save_adapter(path, weights)
        tokenizer = getattr(getattr(self.trainer, "datamodule", None), "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(path)
