"""Responses that continue the cache of their prompts: the layout of models with states.

Recurrent and convolutional layers keep a state in the place of keys and values. A cache holds
both: the prompts of a batch go through the model once, with their cache in the graph, each response
gets its prompt's part of it, and all responses go through the model from there.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from mpo_lightning.batch import GroupBatch

__all__ = ["CONTINUED_MODELS", "ContinuedRows", "continued_rows", "continued_states"]

# Model types that compute a response from its prompt's cache exactly as behind its prompt, with
# gradients. Tests compare each with full logits. Others that could share their prompts instead.
CONTINUED_MODELS = frozenset(
    {
        *{"bamba", "falcon_h1", "granitemoehybrid", "lfm2", "lfm2_moe", "nemotron_h"},
        *{"olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"},
        # Recurrent or convolutional layers, most of them beside attention.
        *{"bailing_hybrid", "inkling2_text", "inkling_text", "kimi_linear", "lfm3", "mamba2"},
        *{"qwen4_exp_text", "zamba2", "zaya"},
        # Attention that chooses its keys among those of the row.
        *{"axk2", "deepseek_v32", "dots3_note_text", "glm_moe_dsa", "hy_v4"},
        # Attention that does not follow transformers' interface.
        *{"bloom", "codegen", "diffllama", "falcon", "gpt_neo", "gpt_neox_japanese", "gptj"},
        *{"mpt", "xglm"},
        # Chunks of attention begin at places in the row, and layers attend to images alone.
        *{"llama4_text", "mllama_text_model"},
    }
)


class ContinuedRows(NamedTuple):
    """Model input for a batch: B prompts, and R responses that continue them.

    Attributes:
        prompts: keyword arguments of the backbone for the prompts, padded at their beginning.
        owners: number of each response's prompt, long (R,).
        responses: keyword arguments of the backbone for the responses, padded at their end.
        predictors: index of the position that predicts each scored token, among the B last
            positions of the prompts and then all positions of the responses, (S,).
        targets: the scored tokens, (S,), responses one after the other.
    """

    prompts: dict[str, Tensor]
    owners: Tensor
    responses: dict[str, Tensor]
    predictors: Tensor
    targets: Tensor


def continued_rows(batch: GroupBatch) -> ContinuedRows:
    """Lay the batch out as one row per prompt and one row per response."""
    spans, device = batch.spans(), batch.tokens.device
    longest = max(span.prompt for span in spans)
    prompts = [batch.tokens[span.start : span.first_response].flip(0) for span in spans]
    # Padding at the beginning: a state is what the last token leaves.
    prompt_ids = pad_sequence([*prompts], batch_first=True).flip(1)
    lengths = torch.tensor([span.prompt for span in spans])
    known = torch.arange(longest)[None] >= longest - lengths[:, None]
    owners = torch.tensor([n for n, span in enumerate(spans) for _ in span.lengths])
    responses = [batch.tokens[part] for span in spans for part in span.responses()]
    response_ids = pad_sequence(responses, batch_first=True)
    if response_ids.shape[1] == 1:
        # A single token is a step of generation, which overwrites states that gradients need.
        response_ids = pad(response_ids, (0, 1))
    width = response_ids.shape[1]
    sizes = torch.tensor([len(response) for response in responses])
    own = torch.arange(width)[None] < sizes[:, None]
    predictors = []
    for row, (owner, size) in enumerate(zip(owners.tolist(), sizes.tolist(), strict=True)):
        first = len(spans) + row * width
        predictors += [torch.tensor([owner]), torch.arange(first, first + size - 1)]
    return ContinuedRows(
        prompts={
            "input_ids": prompt_ids,
            "attention_mask": known.long().to(device),
            "position_ids": (known.long().cumsum(1) - 1).clamp(min=0).to(device),
        },
        owners=owners.to(device),
        responses={
            "input_ids": response_ids,
            "attention_mask": torch.cat([known[owners], own], dim=1).long().to(device),
            "position_ids": (lengths[owners, None] + torch.arange(width)[None]).to(device),
        },
        predictors=torch.cat(predictors).to(device),
        targets=torch.cat(responses),
    )


def continued_states(decoder: Any, rows: ContinuedRows) -> Tensor:
    """Return the hidden states at the predicting positions, (S, D)."""
    backbone = partial(decoder, use_cache=True)
    of_prompts = backbone(**rows.prompts)
    # What models without attention call their cache.
    name = "cache_params" if "cache_params" in of_prompts else "past_key_values"
    cache = of_prompts[name]
    cache.reorder_cache(rows.owners)
    for layer in cache.layers:
        if hasattr(layer, "update_recurrent_state"):
            _keep_earlier_states(layer)
    of_responses = backbone(**rows.responses, **{name: cache}).last_hidden_state
    last = of_prompts.last_hidden_state[:, -1]
    return torch.cat([last, of_responses.flatten(0, 1)])[rows.predictors]


def _keep_earlier_states(layer: Any) -> None:
    """Make a layer of a cache write into new tensors: the backward pass needs the earlier ones."""
    of_convolution, of_recurrence = layer.update_conv_state, layer.update_recurrent_state

    def update_conv_state(states: Tensor, state_idx: int = 0, **settings: Any) -> Any:
        _copy(layer.conv_states, state_idx)
        return of_convolution(states, state_idx, **settings)

    def update_recurrent_state(states: Tensor, state_idx: int = 0, **settings: Any) -> Any:
        _copy(layer.recurrent_states, state_idx)
        return of_recurrence(states, state_idx, **settings)

    layer.update_conv_state = update_conv_state
    layer.update_recurrent_state = update_recurrent_state


def _copy(states: dict[int, Tensor | None], index: int) -> None:
    state = states[index]
    if state is not None:
        states[index] = state.clone()
