"""Lightning's sharded strategies with the settings that this package needs.

Lightning's own classes work as well, with settings that depend on the number of processes and the
architecture; these classes choose them.
"""

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.optim import Optimizer

from mpo_lightning.model.policy import Policy, PolicyError
from mpo_lightning.training.checkpoint import read_checkpoint
from mpo_lightning.training.module import MPOModule

__all__ = ["FSDP1", "FSDP2"]


class FSDP2(ModelParallelStrategy):
    """FSDP2: shards the policy over all processes, each decoder layer by itself.

    Every process sees different groups (Lightning's default would split layers between the
    processes of a node). A checkpoint is one file, for which only trained weights are gathered.

    Args:
        process_group_backend: backend of `torch.distributed`. Defaults to nccl on GPUs and gloo on
            CPU.
    """

    # The optimizer's state numbers trained parameters, as without sharding; Lightning's own numbers
    # frozen ones as well.
    indexes_trained_parameters = True

    def __init__(self, process_group_backend: str | None = None) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
        )

    def setup_environment(self) -> None:
        """Divide the data between all processes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the optimizer's whole state on the first process, numbered as if not sharded."""
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
        """Read a checkpoint, as plain values only, and restore weights and optimizer from it.

        Raises:
            DamagedError: if it is not what was written, or holds NaN.
            PolicyError: if its adapter has other layers or shapes.
            ResumeError: if its base or the numbering of its optimizer's state differs.
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
        checkpoint = read_checkpoint(path)
        # Checked before anything is restored.
        module.check_checkpoint(checkpoint)
        whole = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
        set_model_state_dict(model, checkpoint.pop("state_dict"), options=whole)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        # Evaluation has no optimizers, and a file of weights only has no states.
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
        """Return the whole trained weights on the first process, nothing on the others."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        assert self.model is not None
        options = StateDictOptions(
            full_state_dict=True, cpu_offload=True, ignore_frozen_params=True
        )
        return get_model_state_dict(self.model, options=options)


class FSDP1(FSDPStrategy):
    """FSDP1, on GPUs: wraps decoder layers and adapters as separate units.

    Frozen and trained weights in one unit would need gradient memory for both.
    """

    def __init__(self) -> None:
        super().__init__(state_dict_type="full", use_orig_params=True)

    def setup(self, trainer: Trainer) -> None:
        """Choose the units for the loaded model.

        Raises:
            PolicyError: if the devices are not GPUs.
        """
        if self.root_device.type != "cuda":
            raise PolicyError("FSDP1 needs GPUs. On CPU use mpo_lightning.strategy.FSDP2.")
        self.kwargs["auto_wrap_policy"] = wrap_policy(self.lightning_module)
        super().setup(trainer)


def wrap_policy(module: nn.Module | None) -> Any:
    """Return the wrap policy whose units are decoder layers and adapters."""
    from peft.utils.other import fsdp_auto_wrap_policy

    (policy,) = [m for m in module.modules() if isinstance(m, Policy)] if module else [None]
    return fsdp_auto_wrap_policy(policy.causal_lm) if policy else None
