"""Callbacks and losses with which command-line runs in tests come to harm."""

import json
import os
import resource
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

import mpo_lightning.training.checkpoint
from mpo_lightning.losses import MPO


class KillAtBatch(Callback):
    """The process is gone (SIGKILL) right before a batch, counted from 0 over the whole run."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch:
            os.kill(os.getpid(), signal.SIGKILL)


class TermAtBatch(Callback):
    """The first process gets SIGTERM while it is at a batch.

    Args:
        batch: counted from 0 over the whole run.
        wait: seconds before, in which another process comes to wait for this one.
    """

    def __init__(self, batch: int, wait: float = 0) -> None:
        self.batch = batch
        self.wait = wait

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch and trainer.is_global_zero:
            time.sleep(self.wait)
            os.kill(os.getpid(), signal.SIGTERM)


class TermInValidation(Callback):
    """The first process gets SIGTERM while it is at a batch of the n-th validation."""

    def __init__(self, validation: int) -> None:
        self.left = validation

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.left -= 1

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self.left == 0 and trainer.is_global_zero:
            self.left -= 1
            os.kill(os.getpid(), signal.SIGTERM)


class KillWhileSaving(Callback):
    """The process is gone in the middle of its n-th save, when files are written but not placed."""

    def __init__(self, save: int) -> None:
        saves = []
        to_disk = mpo_lightning.training.checkpoint.to_disk

        def dying(path: Any) -> None:
            to_disk(path)
            saves.extend([path] * (path.suffix == ".partial"))
            if len(saves) == save:
                # Half of it.
                os.truncate(path, path.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        mpo_lightning.training.checkpoint.to_disk = dying


class LittleMemory(Callback):
    """From the first step on the system grants the process no more than 200 MiB; Linux only."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * resource.getpagesize() + 200 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


class MemoryAtStart(Callback):
    """Notes the most memory that each process held up to the first batch, bytes; Linux only."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        file = self.folder / f"memory{trainer.global_rank}.json"
        file.write_text(json.dumps(peak), encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class Explosive(MPO):
    """MPO whose loss is NaN for groups that contain a response with this score.

    Args:
        score: the score.
    """

    score: float = 13.0

    def __call__(self, log_ratios: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
        loss = super().__call__(log_ratios, scores, valid)
        bad = ((scores == self.score) & valid).any(1)
        return loss * torch.where(bad, torch.nan, 1.0)


@dataclass(frozen=True, kw_only=True)
class ExplosiveGradient(MPO):
    """MPO with a finite loss and an infinite gradient for groups with such a score."""

    score: float = 13.0

    def __call__(self, log_ratios: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
        loss = super().__call__(log_ratios, scores, valid)
        bad = ((scores == self.score) & valid).any(1)
        # The root's slope at zero is infinite.
        zero = log_ratios[bad, 0] - log_ratios[bad, 0].detach()
        return loss.index_add(0, bad.nonzero().flatten(), zero.sqrt())
