"""Failures of a run: losses or gradients not finite, lack of memory, processes that are gone."""

from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from mpo_lightning.batch import GroupBatch
from mpo_lightning.errors import UserError
from mpo_lightning.training.processes import RunProcesses, join_run
from mpo_lightning.training.resume import of_all_processes

__all__ = [
    "EndTogether",
    "FiniteSteps",
    "MemoryAdvice",
    "NonFiniteError",
    "all_finite",
    "describe_nonfinite",
    "is_out_of_memory",
]

ADVICE = (
    "Out of memory. To need less: smaller data.tokens_per_batch (or groups_per_batch) with larger "
    "trainer.accumulate_grad_batches, which gives the same results; "
    "model.responses_per_pass: 8 or fewer; model.policy.dtype: bfloat16; "
    "model.policy.gradient_checkpointing: true; model.policy.quantization: nf4; smaller "
    "data.max_length; several devices with mpo_lightning.strategy.FSDP2."
)


class NonFiniteError(UserError, RuntimeError):
    """Loss or gradient that is not finite; the message names the groups and their values."""


class FiniteSteps:
    """Guard against optimizer steps whose loss or gradient is not finite.

    Args:
        on_nonfinite: "stop" raises an error at such a step, "skip" leaves it out.

    Attributes:
        skipped: number of steps left out so far.
    """

    def __init__(self, on_nonfinite: Literal["stop", "skip"]) -> None:
        self.on_nonfinite = on_nonfinite
        self.skipped = 0
        # Batches of the accumulation window, with the loss and log-ratios of their groups.
        self._window: list[tuple[GroupBatch, Tensor, Tensor]] = []

    def add(self, batch: GroupBatch, loss: Tensor, log_ratios: Tensor) -> None:
        """Add a batch to the accumulation window, with its loss (B,) and log-ratios (B, N)."""
        self._window.append((batch, loss.detach(), log_ratios.detach()))

    def clear(self) -> None:
        """Begin a new accumulation window."""
        self._window.clear()

    def accept(self, trainer: Trainer, loss: Tensor, parameters: list[Any]) -> bool:
        """Return whether to make the optimizer step, the same on all processes.

        A step that is left out has its gradients set to None, so that optimizers ignore them.

        Args:
            trainer: the run's trainer.
            loss: mean over the groups of the step, a scalar.
            parameters: parameters that have a gradient.

        Raises:
            NonFiniteError: naming the groups, with on_nonfinite "stop".
        """
        finite = loss.isfinite()
        precision = trainer.precision_plugin
        # The gradient scaler of 16-mixed leaves out steps whose gradient overflows by itself.
        scaled = isinstance(precision, MixedPrecision) and precision.scaler is not None
        if parameters and not scaled:
            finite = finite & all_finite([parameter.grad for parameter in parameters])
        if not bool(trainer.strategy.reduce((~finite).float(), reduce_op="sum")):
            return True
        here = [line for of_batch in self._window for line in describe_nonfinite(*of_batch)]
        lines = [line for of_process in of_all_processes(here) for line in of_process]
        step = trainer.global_step + 1
        if lines:
            what = f"the loss of {len(lines)} group(s) is not finite:\n  " + "\n  ".join(lines[:8])
        else:
            what = "all losses are finite, but the gradient is not."
        if self.on_nonfinite == "stop":
            raise NonFiniteError(
                f"Optimizer step {step}: {what}\nThe weights are those of step {step - 1}. Look at "
                "these rows, lower the learning rate, or set trainer.gradient_clip_val; "
                "model.on_nonfinite: skip leaves such steps out."
            )
        for parameter in parameters:
            parameter.grad = None
        self.skipped += 1
        rank_zero_warn(f"Optimizer step {step} is left out ({self.skipped} so far): {what}")
        return False


def describe_nonfinite(batch: GroupBatch, loss: Tensor, log_ratios: Tensor) -> list[str]:
    """Return a line for each group whose loss is not finite; loss (B,), log-ratios (B, N)."""
    bad = ~loss.isfinite() & batch.counted
    lines = []
    for group in bad.nonzero().flatten().tolist():
        n = len(batch.response_lengths[group])
        ratios = ", ".join(f"{value:.4g}" for value in log_ratios[group, :n].tolist())
        scores = ", ".join(f"{value:.6g}" for value in batch.scores[group, :n].tolist())
        lines.append(
            f"{batch.sources[group]}: loss {loss[group].item():.4g}, log-ratios [{ratios}], "
            f"scores [{scores}]"
        )
    return lines


def all_finite(gradients: list[Tensor]) -> Tensor:
    """Return whether all gradients are finite, a bool scalar; for shards, this process's part."""
    parts = [getattr(gradient, "to_local", lambda g=gradient: g)() for gradient in gradients]
    return torch.stack([part.isfinite().all() for part in parts]).all()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out, on any device."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


class MemoryAdvice(Callback):
    """Callback that adds advice to an out-of-memory error."""

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Add a note to the exception."""
        if is_out_of_memory(exception):
            exception.add_note(ADVICE)


class EndTogether(Callback):
    """Callback with which all processes of a run end when one of them does, see `processes`.

    Args:
        trainer: the run's trainer, before its processes know of one another.
    """

    def __init__(self, trainer: Trainer) -> None:
        environment = getattr(trainer.strategy, "cluster_environment", None)
        # None for a run that has only this process on its machine.
        self._processes: RunProcesses | None = None
        if environment is not None and trainer.num_devices > 1:
            self._processes = join_run(
                port=environment.main_port,
                node=environment.node_rank(),
                local_rank=environment.local_rank(),
                rank=trainer.global_rank,
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave a run that has ended well."""
        if self._processes is not None:
            self._processes.leave()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Tell the other processes of a failure; SIGTERM ends all of them, after saving."""
        if self._processes is None:
            return
        if isinstance(exception, SIGTERMException):
            self._processes.leave_at_exit()
        else:
            self._processes.fail(exception)
