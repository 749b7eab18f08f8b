"""Logits of causal language models, from hidden states to what the model itself returns."""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor, nn, tanh

from mpo_lightning.model.decoder import text_decoder

__all__ = ["output_head", "output_modules"]

# Entries of a configuration by which models multiply their logits, and by which they divide them.
FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
# Model types that multiply by the entry by which others divide.
MULTIPLIED = frozenset({"hyperclovax"})
# Entries that bound the logits, which approach the bound by tanh.
BOUNDS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# The number of words where the output embedding has more rows.
WORDS = "unpadded_vocab_size"
# Modules of a model, one after the other, where its head is more than the output embedding.
MODULES = {"modernbert-decoder": ("lm_head", "decoder")}


def output_modules(model: Any) -> list[nn.Module]:
    """Return the modules from hidden states to logits, in their order."""
    names = MODULES.get(text_decoder(model).config.model_type)
    return [model.get_output_embeddings()] if names is None else [getattr(model, n) for n in names]


def output_head(model: Any) -> Callable[[Tensor], Tensor]:
    """Return the function from hidden states to logits, as the model computes them.

    The head is called as modules, so that an adapter on it counts. Factors and bounds of the logits
    are those of the configuration that the model's code uses: a wrapper leaves out what its
    language model would have by itself (LLaVA of Granite, Aya Vision of Cohere).
    """
    config = text_decoder(model).config
    modules = output_modules(model)
    kind: type = type(model)
    code = _code(kind)

    def entry(name: str) -> Any:
        return getattr(config, name, None) if name in code else None

    factor = scaling = 1.0
    for name in FACTORS:
        factor *= entry(name) or 1.0
    for name in DIVISORS:
        scaling *= entry(name) or 1.0
    factor = factor * scaling if config.model_type in MULTIPLIED else factor / scaling
    bound = next(filter(None, map(entry, BOUNDS)), None)
    words = entry(WORDS)

    def logits(hidden: Tensor) -> Tensor:
        for module in modules:
            hidden = module(hidden)
        values = hidden[..., :words] if words else hidden
        if factor != 1.0:
            values = values * factor
        return bound * tanh(values / bound) if bound else values

    return logits


@cache
def _code(kind: type) -> str:
    return inspect.getsource(kind)
