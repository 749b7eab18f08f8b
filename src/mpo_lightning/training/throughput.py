"""Speed and memory of a run, as metrics."""

from time import monotonic
from typing import Any

import psutil
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from mpo_lightning.batch import GroupBatch

__all__ = ["Throughput", "memory"]


def memory(device: torch.device) -> int:
    """Return the peak of allocated bytes on CUDA, elsewhere the resident bytes of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


class Throughput(Callback):
    """Logs tokens per second and memory of each optimizer step.

    ``system/tokens_per_second`` counts the tokens of all processes, each prompt once, over the time
    from one optimizer step to the next without validation. ``system/memory_gib`` is the largest
    `memory` of a process. The device is synchronised already: each optimizer step reads its
    gradient.
    """

    def __init__(self) -> None:
        self._tokens = 0
        self._seconds = 0.0
        self._since = 0.0
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._begin(trainer)

    def _begin(self, trainer: Trainer) -> None:
        self._tokens, self._seconds = 0, 0.0
        self._since, self._step = monotonic(), trainer.global_step

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: GroupBatch,
        batch_idx: int,
    ) -> None:
        """Count a batch; after an optimizer step, log speed and memory."""
        self._tokens += len(batch.tokens)
        if trainer.global_step == self._step:
            return
        seconds = self._seconds + monotonic() - self._since
        here = torch.tensor(
            [self._tokens, memory(trainer.strategy.root_device)],
            dtype=torch.float32,
            device=trainer.strategy.root_device,
        )
        tokens, held = trainer.strategy.all_gather(here).reshape(-1, 2).unbind(1)
        for name, value in (
            ("tokens_per_second", tokens.sum() / seconds),
            ("memory_gib", held.max() / 2**30),
        ):
            pl_module.log(f"system/{name}", value, batch_size=1)
        self._begin(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._seconds += monotonic() - self._since

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock again."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._since = monotonic()
