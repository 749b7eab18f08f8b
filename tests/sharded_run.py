"""A run with the policy sharded over two processes, as a script that Lightning starts again.

Usage: python sharded_run.py BASE DATA OUT PROCESSES DTYPE
"""

import os
import sys
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy

from mpo_lightning import LoRA, MPOModule, PolicyConfig, PreferenceDataModule
from mpo_lightning.data.sampler import StepGroups
from mpo_lightning.losses import MPO


def run(base: str, data: str, out: Path, processes: int, dtype: Any) -> None:
    torch.manual_seed(0)
    module = MPOModule(
        policy=PolicyConfig(base=base, dtype=dtype, lora=LoRA(r=4)),
        loss=MPO(beta=0.5, alpha=1.0),
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2),
    )
    datamodule = PreferenceDataModule(
        tokenizer=base, train=data, val=data, groups_per_batch=4 // processes
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="auto"
        if processes == 1
        else ModelParallelStrategy(
            data_parallel_size=processes,
            tensor_parallel_size=1,
            process_group_backend="gloo",
            save_distributed_checkpoint=False,
        ),
        max_epochs=2,
        logger=CSVLogger(out, name="", version=""),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule)
    trainer.save_checkpoint(out / "last.ckpt")
    assert module.policy is not None
    batch = datamodule.datasets["train"][StepGroups([0, 1, 2], counted=True)]
    reference = module.policy.reference(batch)
    if trainer.is_global_zero:
        torch.save(reference, out / "reference.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
