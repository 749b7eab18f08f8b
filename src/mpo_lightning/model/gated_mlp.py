"""Gated MLPs that keep two tensors for the backward pass in the place of four.

``down(act(gate(x)) * up(x))`` keeps gate, act(gate), up and, for an adapter on ``down``, their
product, each of the MLP's inner width: the largest part of what a layer keeps. Gate and up suffice:
the other two are elementwise and computed again when the backward pass comes to them.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mpo_lightning.model.fast_linear import FastLoraLinear, product

__all__ = ["keep_less_of_gated_mlps"]

Activation = Callable[[Tensor], Tensor]


def _times(inner: Tensor, up: Tensor, gate: Tensor) -> Tensor:
    """``inner * up``, in place where ``inner`` is a tensor of its own; without gradients."""
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
        return inner, None if down is None else product(inner, down)

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
            through = product(of_low.contiguous(), down.t())
            of_inner = through if of_inner is None else through.add_(of_inner)
        assert of_inner is not None
        (of_gate,) = torch.autograd.grad(act, gate, of_inner * up)
        return of_gate, of_inner * act.detach(), of_down, None


def _forward(self: Any, x: Tensor) -> Tensor:
    """As the MLP's own, see above."""
    gate, up, down = self.gate_proj(x), self.up_proj(x), self.down_proj
    # The compiler decides by itself what it computes again.
    if torch.compiler.is_compiling():
        output: Tensor = down(self.act_fn(gate) * up)
    elif not torch.is_grad_enabled():
        output = down(_times(self.act_fn(gate), up, gate))
    elif isinstance(down, FastLoraLinear) and down.is_plain(gate) and not down.drops:
        inner, low = _Gated.apply(gate, up, down.down_weight, self.act_fn)  # type: ignore[no-untyped-call]
        output = down.join(inner, low)
    else:
        inner, _ = _Gated.apply(gate, up, None, self.act_fn)  # type: ignore[no-untyped-call]
        output = down(inner)
    return output


def keep_less_of_gated_mlps(model: nn.Module) -> None:
    """Let the gated MLPs of a model keep less for the backward pass; what they compute stays.

    They are those whose own forward method is, instruction for instruction, that of Llama's, as in
    most architectures of today.
    """
    from transformers.models.llama.modeling_llama import LlamaMLP

    def code(forward: Any) -> tuple[Any, ...]:
        of = getattr(forward, "__code__", None)
        return () if of is None else (of.co_code, of.co_names, of.co_consts)

    llama = code(LlamaMLP.forward)
    for module in model.modules():
        if code(type(module).forward) == llama:
            module.forward = MethodType(_forward, module)
