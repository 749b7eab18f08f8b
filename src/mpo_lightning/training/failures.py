"""What a run says when it cannot go on: losses that are no numbers, memory that is not there."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from mpo_lightning.batch import GroupBatch
from mpo_lightning.errors import UserError

__all__ = ["MemoryAdvice", "NonFiniteError", "all_finite", "describe_nonfinite", "is_out_of_memory"]

ADVICE = (
    "Out of memory. What takes less of it: smaller data.tokens_per_batch (or "
    "groups_per_batch) and larger trainer.accumulate_grad_batches: together no result changes; "
    "model.responses_per_pass: 8 or fewer; model.policy.dtype: bfloat16; "
    "model.policy.gradient_checkpointing: true; model.policy.quantization: nf4; smaller "
    "data.max_length; several devices with mpo_lightning.strategy.FSDP2."
)


class NonFiniteError(UserError, RuntimeError):
    """A loss or gradient that is not finite; the message names the groups and their values."""


def describe_nonfinite(batch: GroupBatch, loss: Tensor, log_ratios: Tensor) -> list[str]:
    """One line for each group of a batch whose loss is not finite.

    Args:
        batch: the groups.
        loss: (B,).
        log_ratios: (B, N).
    """
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
    """Whether all of these are finite, bool scalar; of sharded tensors this process's part."""
    parts = [getattr(gradient, "to_local", lambda g=gradient: g)() for gradient in gradients]
    return torch.stack([part.isfinite().all() for part in parts]).all()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on whatever device."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


class MemoryAdvice(Callback):
    """Adds to an out-of-memory error what can be done about it."""

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Add a note to the exception."""
        if is_out_of_memory(exception):
            exception.add_note(ADVICE)
