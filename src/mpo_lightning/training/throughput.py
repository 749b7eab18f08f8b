"""How fast a run computes and how much memory it holds, as metrics."""

from time import monotonic
from typing import Any

import psutil
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from mpo_lightning.batch import GroupBatch

__all__ = ["Throughput", "memory"]


def memory(device: torch.device) -> int:
    """Bytes: the most that was allocated on a CUDA device, elsewhere what the process holds."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


class Throughput(Callback):
    """Logs, for each optimizer step, tokens a second and memory.

    ``system/tokens_per_second`` counts the tokens that all processes computed, each prompt once,
    over the time from one optimizer step to the next, validation left out. ``system/memory_gib`` is
    the `memory` of the process that holds most. An optimizer step looks at its gradient and so
    waits for the device: there is nothing to synchronise here.
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
        """Count a batch; after an optimizer step, log what came of its batches."""
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
        """Let it go on."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._since = monotonic()
