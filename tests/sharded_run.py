"""A run in user code, by one process or by several that know each other."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed.fsdp._fully_shard._fsdp_collectives as fsdp_collectives
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future

from mpo_lightning import LoRA, MPOModule, PolicyConfig, PreferenceDataModule
from mpo_lightning.data.sampler import StepGroups
from mpo_lightning.losses import MPO

# How often gradients went between the processes.
reductions: list[str] = []


def counting_allreduce(state: Any, bucket: GradBucket) -> Future[torch.Tensor]:
    reductions.append("all-reduce")
    return allreduce_hook(state, bucket)


class CountingDDP(DDPStrategy):
    """DDP that counts its reductions; Lightning registers hooks of a user's on GPUs only."""

    def configure_ddp(self) -> None:
        super().configure_ddp()
        self.model.register_comm_hook(None, counting_allreduce)


def count_reduce_scatter() -> None:
    original = fsdp_collectives.foreach_reduce

    def counting(*args: Any, **kwargs: Any) -> Any:
        reductions.append("reduce-scatter")
        return original(*args, **kwargs)

    # Where the name is looked up.
    import torch.distributed.fsdp._fully_shard._fsdp_param_group as param_group

    param_group.foreach_reduce = counting  # type: ignore[attr-defined]


def strategy_of(name: str, processes: int) -> Any:
    if name == "ddp":
        return CountingDDP(process_group_backend="gloo")
    if name == "fsdp2":
        count_reduce_scatter()
        return ModelParallelStrategy(
            data_parallel_size=processes,
            tensor_parallel_size=1,
            process_group_backend="gloo",
            save_distributed_checkpoint=False,
        )
    return "auto"


def run(
    base: str,
    data: str,
    out: Path,
    strategy: str = "auto",
    *,
    dtype: Any = "float32",
    groups_per_step: int = 4,
    accumulate: int = 1,
    epochs: int = 2,
    policy: dict[str, Any] | None = None,
    **settings: Any,
) -> None:
    """Train, save, and leave the reference of three groups and what went between the processes."""
    processes = 1 if strategy == "auto" else 2
    torch.manual_seed(0)
    module = MPOModule(
        policy=PolicyConfig(base=base, dtype=dtype, lora=LoRA(r=4), **(policy or {})),
        loss=MPO(beta=0.5, alpha=1.0),
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2),
        **settings,
    )
    datamodule = PreferenceDataModule(
        tokenizer=base,
        train=data,
        val=data,
        groups_per_batch=groups_per_step // processes // accumulate,
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=strategy_of(strategy, processes),
        max_epochs=epochs,
        accumulate_grad_batches=accumulate,
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
        (out / "reductions.json").write_text(json.dumps(reductions), encoding="utf-8")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
