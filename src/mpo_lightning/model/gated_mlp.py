"""Gated MLPs that recompute activations instead of keeping them for the backward pass.

``down(act(gate(x)) * up(x))`` keeps four tensors of the MLP's inner width: gate, act(gate), up and,
for an adapter on ``down``, their product. They are the largest part of what a layer keeps. Gate and
up suffice: the other two are elementwise, and are computed again in the backward pass.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mpo_lightning.model.fast_linear import FastLoraLinear, matmul

__all__ = ["recompute_gated_mlps"]

Activation = Callable[[Tensor], Tensor]


def _times(inner: Tensor, up: Tensor, gate: Tensor) -> Tensor:
    """``inner * up``, in place unless ``inner`` shares the gate's memory; without gradients."""
    return inner * up if inner.data_ptr() == gate.data_ptr() else inner.mul_(up)


class _Gated(torch.autograd.Function):
    """``act(gate) * up`` and, where ``down`` is given, that times ``down.T`` (an adapter's A)."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, down: Tensor | None, act: Activation
    ) -> tuple[Tensor, Tensor | None]:
        ctx.act = act
        ctx.save_for_backward(gate, up, down)
        inner = _times(act(gate), up, gate)
        return inner, None if down is None else matmul(inner, down)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        gate, up, down = ctx.saved_tensors
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            act = ctx.act(gate)
        of_inner, of_low = gradients
        of_down = None
        if of_low is not None and down is not None:
            rows = of_low.reshape(-1, of_low.shape[-1])
            of_down = rows.t() @ (act.detach() * up).reshape(-1, up.shape[-1])
            through = matmul(of_low.contiguous(), down.t())
            of_inner = through if of_inner is None else through.add_(of_inner)
        assert of_inner is not None
        (of_gate,) = torch.autograd.grad(act, gate, of_inner * up)
        return of_gate, of_inner * act.detach(), of_down, None


def _forward(self: Any, x: Tensor) -> Tensor:
    """Compute ``down(act(gate(x)) * up(x))`` with few tensors kept for the backward pass."""
    gate, up, down = self.gate_proj(x), self.up_proj(x), self.down_proj
    # Compiled layers choose for themselves what they compute again.
    if torch.compiler.is_compiling():
        output: Tensor = down(self.act_fn(gate) * up)
    elif not torch.is_grad_enabled():
        output = down(_times(self.act_fn(gate), up, gate))
    elif isinstance(down, FastLoraLinear) and down.is_plain(gate) and not down.has_dropout:
        inner, low = _Gated.apply(gate, up, down.down_weight, self.act_fn)  # type: ignore[no-untyped-call]
        output = down.join(inner, low)
    else:
        inner, _ = _Gated.apply(gate, up, None, self.act_fn)  # type: ignore[no-untyped-call]
        output = down(inner)
    return output


def recompute_gated_mlps(model: nn.Module) -> None:
    """Let a model's gated MLPs keep fewer activations for the backward pass; values stay the same.

    Recognised are the modules whose forward method has the byte code of Llama's MLP, as in most
    current architectures. Two tensors are kept in the place of four for plain LoRA on a
    `FastLinear`, otherwise three.
    """
    from transformers.models.llama.modeling_llama import LlamaMLP

    def code(forward: Any) -> tuple[Any, ...]:
        of = getattr(forward, "__code__", None)
        return () if of is None else (of.co_code, of.co_names, of.co_consts)

    llama = code(LlamaMLP.forward)
    for module in model.modules():
        if code(type(module).forward) == llama:
            module.forward = MethodType(_forward, module)
