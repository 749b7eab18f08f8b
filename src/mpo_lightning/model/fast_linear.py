"""Faster float32 linear layers, and LoRA on them, for CPU.

PyTorch multiplies float32 matrices with MKL. oneDNN, which comes with PyTorch too, was twice as
fast on an AMD processor and slower on an Intel one (docs/compute.md). Both are full float32 and
differ only in the order of summation. LoRA's product is added to the layer's output in place, which
saves the memory and time of three tensors of the output's size.
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
    "matmul",
    "onednn_is_faster",
    "use_fast_linear",
]


@cache
def onednn_is_faster() -> bool:
    """Whether oneDNN multiplies float32 matrices faster than MKL: on all but Intel processors.

    The processor's name decides, not a measurement: a resumed run must multiply as before.
    """
    # Older releases of torch do not have it.
    capabilities: Any = getattr(torch.cpu, "get_capabilities", dict)()
    name = capabilities.get("cpu_name", "")
    return torch.backends.mkldnn.is_available() and "Intel" not in name  # type: ignore[no-untyped-call]


def matmul(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``rows @ weight.T + bias`` in float32 on CPU; the weight may be a transposed view."""
    if not onednn_is_faster():
        return nn.functional.linear(rows, weight, bias)
    result: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return result


def _weight_gradient(left: Tensor, right: Tensor) -> Tensor:
    """``left.T @ right``."""
    return matmul(left.t(), right.t()) if len(left) else left.t() @ right


def _as_rows(values: Tensor) -> Tensor:
    """View (..., D) as (rows, D)."""
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
        # A frozen weight does not need its inputs in the backward pass.
        kept = inputs.contiguous() if ctx.needs_input_grad[1] else None
        low = None if low is None else low.contiguous()
        ctx.save_for_backward(kept, weight, low, up)
        ctx.scaling = scaling
        output = matmul(inputs, weight, bias)
        if low is not None and up is not None:
            _as_rows(output).addmm_(_as_rows(low), up.t(), alpha=scaling)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, low, up = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        rows = _as_rows(gradient)
        needed = ctx.needs_input_grad
        return (
            matmul(gradient, weight.t()) if needed[0] else None,
            _weight_gradient(rows, _as_rows(inputs)) if needed[1] else None,
            rows.sum(0) if needed[2] else None,
            matmul(gradient, up.t()).mul_(ctx.scaling) if needed[3] else None,
            _weight_gradient(rows, _as_rows(low)).mul_(ctx.scaling) if needed[4] else None,
            None,
        )


class FastLinear(nn.Linear):
    """A linear layer that multiplies with the faster library in float32 on CPU."""

    def forward(self, input: Tensor) -> Tensor:
        """Compute what `torch.nn.Linear` computes."""
        if not _in_float32_on_cpu(input, self.weight):
            return super().forward(input)
        output: Tensor = _Linear.apply(input, self.weight, self.bias, None, None, 1.0)  # type: ignore[no-untyped-call]
        return output


class FastLoraLinear(LoraLinear):  # type: ignore[misc]
    """PEFT's LoRA layer on a `FastLinear`; plain LoRA is computed together with the base layer."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute what PEFT's layer computes."""
        if args or kwargs or not self.is_plain(x):
            output: Tensor = super().forward(x, *args, **kwargs)
            return output
        (name,) = self.active_adapters
        return self.join(x, self.lora_A[name](self.lora_dropout[name](x)))

    def is_plain(self, x: Tensor) -> bool:
        """Whether there is one active adapter, plain LoRA, and all is float32 on CPU."""
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
    def has_dropout(self) -> bool:
        """Whether the active adapter's inputs go through dropout."""
        return not isinstance(self.lora_dropout[self.active_adapters[0]], nn.Identity)

    @property
    def down_weight(self) -> Tensor:
        """The active adapter's A, (r, in)."""
        weight: Tensor = self.lora_A[self.active_adapters[0]].weight
        return weight

    def join(self, x: Tensor, low: Tensor) -> Tensor:
        """Return the layer's output, given its inputs and their product with the adapter's A."""
        (name,) = self.active_adapters
        base, up, scaling = self.get_base_layer(), self.lora_B[name].weight, self.scaling[name]
        merged: Tensor = _Linear.apply(x, base.weight, base.bias, low, up, scaling)  # type: ignore[no-untyped-call]
        return merged


def use_fast_linear(model: nn.Module) -> None:
    """Turn a model's float32 linear layers, and plain LoRA layers on them, into the fast ones.

    They keep their parameters and names; only how they multiply changes. Layers of other dtypes or
    classes, and LoRA layers on those, are left alone.
    """
    layers: list[Any] = list(model.modules())
    for layer in layers:
        if type(layer) is nn.Linear and layer.weight.dtype == torch.float32:
            layer.__class__ = FastLinear
    for layer in layers:
        if type(layer) is LoraLinear and type(layer.get_base_layer()) is FastLinear:
            layer.__class__ = FastLoraLinear
