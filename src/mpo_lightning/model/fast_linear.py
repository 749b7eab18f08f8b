"""Linear layers, and LoRA on them, multiplied by the faster of PyTorch's two libraries on CPU.

PyTorch multiplies float32 matrices with MKL, which left half of the speed of an AMD processor
unused that oneDNN, which comes with PyTorch as well, reached; on an Intel processor MKL was the
faster (docs/compute.md). Both are full float32: they differ in the order of summation only. LoRA's
product is added to the layer's in place, which saves the memory and the time of three tensors of
the output's size.
"""

from functools import cache
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = [
    "FastLinear",
    "FastLoraLinear",
    "onednn_is_faster",
    "product",
    "use_fast_products",
]


@cache
def onednn_is_faster() -> bool:
    """Whether oneDNN multiplies float32 matrices faster here than MKL: on all but Intel processors.

    By the processor's name and not by a measurement: a run and its resumption must agree.
    """
    # Older releases of torch do not tell.
    capabilities: Any = getattr(torch.cpu, "get_capabilities", dict)()
    name = capabilities.get("cpu_name", "")
    return torch.backends.mkldnn.is_available() and "Intel" not in name  # type: ignore[no-untyped-call]


def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``rows @ weight.T + bias``; the weight may be a transposed view."""
    if not onednn_is_faster():
        return nn.functional.linear(rows, weight, bias)
    result: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return result


def _sum_over_rows(left: Tensor, right: Tensor) -> Tensor:
    """``left.T @ right``, the gradient of a weight."""
    return product(left.t(), right.t()) if len(left) else left.t() @ right


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
        output = product(inputs, weight, bias)
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
            product(gradient, weight.t()) if needed[0] else None,
            _sum_over_rows(rows, _flat(inputs)) if needed[1] else None,
            rows.sum(0) if needed[2] else None,
            product(gradient, up.t()).mul_(ctx.scaling) if needed[3] else None,
            _sum_over_rows(rows, _flat(low)).mul_(ctx.scaling) if needed[4] else None,
            None,
        )


class FastLinear(nn.Linear):
    """A linear layer that multiplies with the faster library where all is float32 on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        """As `torch.nn.Linear`."""
        if not _in_float32_on_cpu(input, self.weight):
            return super().forward(input)
        output: Tensor = _Linear.apply(input, self.weight, self.bias, None, None, 1.0)  # type: ignore[no-untyped-call]
        return output


class FastLoraLinear(LoraLinear):  # type: ignore[misc]
    """PEFT's LoRA layer; plain LoRA on such a layer is computed together with it."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's."""
        if args or kwargs or not self.is_plain(x):
            output: Tensor = super().forward(x, *args, **kwargs)
            return output
        (name,) = self.active_adapters
        return self.join(x, self.lora_A[name](self.lora_dropout[name](x)))

    def is_plain(self, x: Tensor) -> bool:
        """Whether inputs like these are computed here: one plain adapter, all in float32 on CPU."""
        base, active = self.get_base_layer(), self.active_adapters
        return (
            type(base) is FastLinear
            and len(active) == 1
            and active[0] in self.lora_A
            and active[0] not in self.lora_variant
            and self.lora_B[active[0]].bias is None
            and self.lora_B[active[0]].weight.dtype == torch.float32
            and not (self.disable_adapters or self.merged)
            and _in_float32_on_cpu(x, base.weight)
        )

    @property
    def drops(self) -> bool:
        """Whether the active adapter's inputs go through dropout."""
        return not isinstance(self.lora_dropout[self.active_adapters[0]], nn.Identity)

    @property
    def down_weight(self) -> Tensor:
        """The active adapter's A, (r, in)."""
        weight: Tensor = self.lora_A[self.active_adapters[0]].weight
        return weight

    def join(self, x: Tensor, low: Tensor) -> Tensor:
        """The layer's output from its inputs and their product with the adapter's A."""
        (name,) = self.active_adapters
        base, up, scaling = self.get_base_layer(), self.lora_B[name].weight, self.scaling[name]
        merged: Tensor = _Linear.apply(x, base.weight, base.bias, low, up, scaling)  # type: ignore[no-untyped-call]
        return merged


def use_fast_products(model: nn.Module) -> None:
    """Let a model's plain linear layers multiply with the faster library on CPU.

    They stay the same layers with the same parameters and names: only how they multiply changes.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FastLinear
        elif type(module) is LoraLinear:
            module.__class__ = FastLoraLinear
