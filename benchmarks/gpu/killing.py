"""A callback that ends the process, for `strategies`."""

import os
import signal
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["KillAtBatch"]


class KillAtBatch(Callback):
    """The process is gone (SIGKILL) right before a batch, counted from 0.

    Args:
        batch: the batch.
    """

    def __init__(self, batch: int) -> None:
        self._batch = batch

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """End."""
        if trainer.fit_loop.total_batch_idx == self._batch:
            os.kill(os.getpid(), signal.SIGKILL)
