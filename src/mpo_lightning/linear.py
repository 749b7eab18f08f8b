"""Linear layers, and LoRA on them, through oneDNN on CPU.

PyTorch multiplies float32 matrices with MKL, which left half of the speed of an AMD processor
unused that oneDNN, which comes with PyTorch as well, reached (docs/compute.md). Both are full
float32: they differ in the order of summation only. LoRA's product is added to the layer's in
place, which saves the memory and the time of three tensors of the output's size.
"""

from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["OneDnnLinear", "OneDnnLoraLinear", "use_onednn"]


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``rows @ weight.T + bias``; the weight may be a transposed view."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return result


def _sum_over_rows(left: Tensor, right: Tensor) -> Tensor:
    """``left.T @ right``, the gradient of a weight."""
    return _product(left.t(), right.t()) if len(left) else left.t() @ right


def _flat(values: Tensor) -> Tensor:
    """(..., D) as (rows, D), the same memory."""
    return values.view(-1, values.shape[-1])


def _in_float32_on_cpu(inputs: Tensor, weight: Tensor) -> bool:
    return (
        inputs.dtype == weight.dtype == torch.float32
        and inputs.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        # The compiler chooses its own kernels.
        and not torch.compiler.is_compiling()
    )


class _Linear(torch.autograd.Function):
    """``inputs @ weight.T + bias``, and with LoRA ``+ scaling * low @ up.T``."""

    @staticmethod
    def forward(  # noqa: PLR0917 (autograd passes them by position)
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        low: Tensor | None,
        up: Tensor | None,
        scaling: float,
    ) -> Tensor:
        # Inputs of a frozen weight are not kept.
        kept = inputs.contiguous() if ctx.needs_input_grad[1] else None
        low = None if low is None else low.contiguous()
        ctx.save_for_backward(kept, weight, low, up)
        ctx.scaling = scaling
        output = _product(inputs, weight, bias)
        if low is not None and up is not None:
            _flat(output).addmm_(_flat(low), up.t(), alpha=scaling)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, low, up = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        rows = _flat(gradient)
        needed = ctx.needs_input_grad
        return (
            _product(gradient, weight.t()) if needed[0] else None,
            _sum_over_rows(rows, _flat(inputs)) if needed[1] else None,
            rows.sum(0) if needed[2] else None,
            _product(gradient, up.t()).mul_(ctx.scaling) if needed[3] else None,
            _sum_over_rows(rows, _flat(low)).mul_(ctx.scaling) if needed[4] else None,
            None,
        )


class OneDnnLinear(nn.Linear):
    """A linear layer that multiplies with oneDNN where all is float32 on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        """As `torch.nn.Linear`."""
        if not _in_float32_on_cpu(input, self.weight):
            return super().forward(input)
        output: Tensor = _Linear.apply(input, self.weight, self.bias, None, None, 1.0)  # type: ignore[no-untyped-call]
        return output


class OneDnnLoraLinear(LoraLinear):  # type: ignore[misc]
    """PEFT's LoRA layer; plain LoRA on such a layer is computed together with it."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's."""
        base, active = self.get_base_layer(), self.active_adapters
        plain = (
            type(base) is OneDnnLinear
            and len(active) == 1
            and active[0] in self.lora_A
            and active[0] not in self.lora_variant
            and self.lora_B[active[0]].bias is None
            and self.lora_B[active[0]].weight.dtype == torch.float32
            and not (self.disable_adapters or self.merged or args or kwargs)
        )
        if not plain or not _in_float32_on_cpu(x, base.weight):
            output: Tensor = super().forward(x, *args, **kwargs)
            return output
        (name,) = active
        low = self.lora_A[name](self.lora_dropout[name](x))
        up, scaling = self.lora_B[name].weight, self.scaling[name]
        merged: Tensor = _Linear.apply(x, base.weight, base.bias, low, up, scaling)  # type: ignore[no-untyped-call]
        return merged


def use_onednn(model: nn.Module) -> None:
    """Let a model's plain linear layers multiply with oneDNN on CPU, where PyTorch has it.

    They stay the same layers with the same parameters and names: only how they multiply changes.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = OneDnnLinear
        elif type(module) is LoraLinear:
            module.__class__ = OneDnnLoraLinear
