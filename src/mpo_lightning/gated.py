"""Gated MLPs that keep two tensors for the backward pass in the place of four.

``down(act(gate(x)) * up(x))`` keeps gate, act(gate), up and, for an adapter on ``down``, their
product, each of the MLP's inner width: the largest part of what a layer keeps. Gate and up suffice:
the other two are elementwise and computed again when the backward pass comes to them.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

__all__ = ["keep_less_of_gated_mlps"]


def _gated_product(mlp: Any, gate: Tensor, up: Tensor) -> Tensor:
    product: Tensor = mlp.act_fn(gate) * up
    return product


def _forward(self: Any, x: Tensor) -> Tensor:
    """As the MLP's own, see above."""
    gate, up = self.gate_proj(x), self.up_proj(x)
    # The compiler decides by itself what it computes again.
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        lean: Tensor = self.down_proj(_gated_product(self, gate, up))
        return lean
    product = checkpoint(
        _gated_product, self, gate, up, use_reentrant=False, preserve_rng_state=False
    )
    # Not the tensor itself: what a hook names stays in memory.
    place, size, dtype = product.data_ptr(), product.numel(), product.dtype

    def pack(kept: Tensor) -> Tensor | torch.Size:
        is_product = kept.data_ptr() == place and kept.numel() == size and kept.is_contiguous()
        return kept.shape if is_product and kept.dtype == dtype else kept

    def unpack(kept: Tensor | torch.Size) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            return _gated_product(self, gate, up).view(kept)

    with saved_tensors_hooks(pack, unpack):
        output: Tensor = self.down_proj(product)
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
