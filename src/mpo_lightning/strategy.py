"""Lightning's sharded strategies with the settings that this package needs.

Lightning's own work as well; what they need to be told is spelled out here, so that a configuration
does not depend on the number of processes or on the architecture.
"""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.optim import Optimizer

from mpo_lightning.model.policy import Policy, PolicyError
from mpo_lightning.training.module import MPOModule

__all__ = ["FSDP1", "FSDP2"]


class FSDP2(ModelParallelStrategy):
    """FSDP2: the policy is sharded over all processes, each decoder layer by itself.

    Every process sees other groups (Lightning's default would split layers between the processes of
    a node). A checkpoint is one file, and only trained weights are gathered for it.

    Args:
        process_group_backend: of `torch.distributed`; nccl on GPUs and gloo on CPU if none.
    """

    # In the optimizer's state, as without sharding; Lightning's numbers count frozen ones as well.
    indexes_trained_parameters = True

    def __init__(self, process_group_backend: str | None = None) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
        )

    def setup_environment(self) -> None:
        """Share data between all processes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state, whole, on the first process; numbered as without sharding."""
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            get_optimizer_state_dict,
        )

        assert self.model is not None
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        plain = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        named: dict[str, Any] = get_optimizer_state_dict(self.model, plain, options=options)
        if not named:
            return named
        groups = named["param_groups"]
        number = {name: i for i, name in enumerate(n for g in groups for n in g["params"])}
        return {
            "state": {number[name]: value for name, value in named["state"].items()},
            "param_groups": [{**g, "params": [number[n] for n in g["params"]]} for g in groups],
        }

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read a checkpoint, and take weights and optimizer from it; always as plain values.

        Raises:
            PolicyError: if it is of another adapter.
            ResumeError: if it is of another base, or numbers the optimizer's state otherwise.
        """
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            set_model_state_dict,
            set_optimizer_state_dict,
        )

        module, model = self.lightning_module, self.model
        assert isinstance(module, MPOModule)
        assert model is not None
        path = Path(self.broadcast(checkpoint_path))
        checkpoint: dict[str, Any] = torch.load(
            path, mmap=True, map_location="cpu", weights_only=True
        )
        # Before anything of it is taken.
        module.check_checkpoint(checkpoint)
        whole = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
        set_model_state_dict(model, checkpoint.pop("state_dict"), options=whole)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        # Nothing but weights is taken for an evaluation, and of a file that holds no more.
        states = checkpoint.get("optimizer_states", [])
        for optimizer, state in zip(self.optimizers, states, strict=False):
            order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
            named: Any = {
                "state": {order[number]: value for number, value in state["state"].items()},
                "param_groups": [
                    {**group, "params": [order[number] for number in group["params"]]}
                    for group in state["param_groups"]
                ],
            }
            set_optimizer_state_dict(model, optimizer, named, options=whole)
        return checkpoint

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The trained weights, whole, on the first process; nothing on the others."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        assert self.model is not None
        options = StateDictOptions(
            full_state_dict=True, cpu_offload=True, ignore_frozen_params=True
        )
        return get_model_state_dict(self.model, options=options)


class FSDP1(FSDPStrategy):
    """FSDP1, on GPUs: decoder layers and adapters are units of their own.

    Frozen and trained weights in one unit would take gradient memory for both.
    """

    def __init__(self) -> None:
        super().__init__(state_dict_type="full", use_orig_params=True)

    def setup(self, trainer: Trainer) -> None:
        """Choose the units from the model that there is now.

        Raises:
            PolicyError: if the devices are no GPUs.
        """
        if self.root_device.type != "cuda":
            raise PolicyError("FSDP1 needs GPUs. On CPU use mpo_lightning.strategy.FSDP2.")
        self.kwargs["auto_wrap_policy"] = wrap_policy(self.lightning_module)
        super().setup(trainer)


def wrap_policy(module: nn.Module | None) -> Any:
    """Which modules are units: decoder layers, and what is trained."""
    from peft.utils.other import fsdp_auto_wrap_policy

    (policy,) = [m for m in module.modules() if isinstance(m, Policy)] if module else [None]
    return fsdp_auto_wrap_policy(policy.causal_lm) if policy else None
