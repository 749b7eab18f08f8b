"""Speed and memory of optimizer steps, by a clock that the test sets."""

from typing import Any

import psutil
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn

from mpo_lightning.batch import GroupBatch
from mpo_lightning.training import throughput
from mpo_lightning.training.throughput import Throughput, memory
from tests.conftest import random_groups


class Run:
    """Trainer, module and strategy in one; of two processes the other computes twice as much."""

    def __init__(self) -> None:
        self.global_step = 0
        self.fn = TrainerFn.FITTING
        self.state = self.strategy = self
        self.root_device = torch.device("cpu")
        self.logged: dict[str, float] = {}

    def all_gather(self, here: torch.Tensor) -> torch.Tensor:
        return torch.stack([here, 2 * here])

    def log(self, name: str, value: torch.Tensor, batch_size: int) -> None:
        self.logged[name] = float(value)


def test_tokens_of_all_processes_by_the_time_without_validation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(throughput, "monotonic", lambda: now)
    monkeypatch.setattr(throughput, "memory", lambda device: 3 * 2**30)
    run: Any = Run()
    batch = GroupBatch.from_groups(random_groups([(10, [5, 3]), (1, [1])]))
    watch = Throughput()
    watch.on_train_start(run, run)
    now = 2.0
    watch.on_train_batch_end(run, run, None, batch, 0)
    assert run.logged == {}, "no optimizer step yet"
    watch.on_validation_start(run, run)
    now = 50.0
    watch.on_validation_end(run, run)
    now, run.global_step = 53.0, 1
    watch.on_train_batch_end(run, run, None, batch, 1)
    # Two batches of 20 tokens here, twice that elsewhere, in 2 and 3 seconds.
    assert run.logged == {"system/tokens_per_second": 3 * 40 / 5, "system/memory_gib": 6}
    now, run.global_step = 54.0, 2
    watch.on_train_batch_end(run, run, None, batch, 2)
    assert run.logged["system/tokens_per_second"] == 3 * 20 / 1


def test_memory_without_a_gpu_is_what_the_process_holds() -> None:
    held = psutil.Process().memory_info().rss
    assert memory(torch.device("cpu")) == pytest.approx(held, rel=0.1)
