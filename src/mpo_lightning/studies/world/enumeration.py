"""Exact log-probabilities of all responses under a model: one forward pass for all prompts."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["enumerate_ends", "enumerate_logps"]


def _two_steps(model: Any, prompt_ids: Tensor, symbol_ids: Tensor) -> tuple[Tensor, Any]:
    prompts, symbols = len(prompt_ids), len(symbol_ids)
    output = model(input_ids=prompt_ids, use_cache=True, logits_to_keep=1)
    first = output.logits[:, -1].double().log_softmax(-1)[:, symbol_ids]
    # The prompt's keys and values serve all first symbols.
    cache = output.past_key_values
    cache.batch_repeat_interleave(symbols)
    output = model(input_ids=symbol_ids.repeat(prompts)[:, None], past_key_values=cache)
    second = output.logits[:, -1].double().log_softmax(-1)[:, symbol_ids]
    second = second.view(prompts, symbols, symbols)
    return (first[:, :, None] + second).flatten(1), output.past_key_values


def enumerate_logps(model: Any, prompt_ids: Tensor, symbol_ids: Tensor) -> Tensor:
    """Compute the log-probability of every pair of symbols after every prompt, float64 (P, R).

    The end-of-sequence token after the pair is not part of it (see `enumerate_ends`). The
    exponentials sum to less than one: the rest is the probability of other tokens in the symbols'
    places.

    Args:
        model: a causal language model.
        prompt_ids: prompts of one length, long (P, T).
        symbol_ids: ids of the symbols, long (32,).
    """
    return _two_steps(model, prompt_ids, symbol_ids)[0]


@torch.no_grad()
def enumerate_ends(model: Any, prompt_ids: Tensor, symbol_ids: Tensor, end_id: int) -> Tensor:
    """Compute the log-probability of the end token after every pair of symbols, float64 (P, R)."""
    ends = []
    # Prompt by prompt, each with a thousand rows of keys and values, one for each pair.
    for prompt in torch.split(prompt_ids, 1):
        cache = _two_steps(model, prompt, symbol_ids)[1]
        cache.batch_repeat_interleave(len(symbol_ids))
        pairs = symbol_ids.repeat(len(symbol_ids))[:, None]
        logits = model(input_ids=pairs, past_key_values=cache).logits[:, -1]
        ends.append(logits.double().log_softmax(-1)[:, end_id])
    return torch.stack(ends)
