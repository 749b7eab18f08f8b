"""Log-probabilities of responses: one function for policy, reference and evaluation.

Both layouts compute the same numbers. *Shared* puts a batch in one row with every prompt once;
*separate* makes one row per response. Only positions that predict response tokens reach the head,
in chunks, with log-softmax in fp32 whatever the model's dtype.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from mpo_lightning.attention import SHARED_PROMPT_ATTENTION, PromptSharing
from mpo_lightning.batch import GroupBatch

__all__ = [
    "SHARED_PROMPT_MODELS",
    "Layout",
    "response_logps",
    "separate_rows",
    "shared_row",
    "token_logps",
]

Layout = Literal["shared", "separate"]

# Model types whose attention is computed by the registered function alone and that take positions
# as given; tests hold each of them to separate rows. Others use separate rows.
SHARED_PROMPT_MODELS = frozenset(
    {
        *{"cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt2", "gpt_neox"},
        *{"gpt_oss", "granite", "llama", "mistral", "mixtral", "olmo", "olmo2", "olmo3", "opt"},
        *{"phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "smollm3", "starcoder2"},
    }
)


class ModelRows(NamedTuple):
    """What a model computes for a batch in one of the layouts.

    Attributes:
        inputs: keyword arguments of the backbone.
        predictors: for each scored token the flat index of the position that predicts it, (S,).
        targets: the scored tokens, (S,), responses one after the other.
    """

    inputs: dict[str, Any]
    predictors: Tensor
    targets: Tensor


def shared_row(batch: GroupBatch) -> ModelRows:
    """The batch as one row, every prompt once: T tokens and no padding."""
    sharing = PromptSharing(batch.prompt_lengths, batch.response_lengths)
    predictors, scored = [], []
    for start, prompt, lengths in sharing.groups():
        at = start + prompt
        for length in lengths:
            # The prompt's last position predicts every response's first token.
            predictors.append(torch.tensor([start + prompt - 1]))
            predictors.append(torch.arange(at, at + length - 1))
            scored.append(torch.arange(at, at + length))
            at += length
    device = batch.tokens.device
    inputs = {
        "input_ids": batch.tokens[None],
        "position_ids": sharing.positions(device)[None],
        # A mask of four dimensions is taken as it is: without one, positions that restart would
        # read as packed documents, and a mask of the whole row would be built.
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
        "shared_prompt": sharing,
    }
    return ModelRows(
        inputs, torch.cat(predictors).to(device), batch.tokens[torch.cat(scored).to(device)]
    )


def separate_rows(batch: GroupBatch) -> ModelRows:
    """The batch as one row per response, prompt and response, padded at the end."""
    sizes = [
        size
        for prompt, lengths in zip(batch.prompt_lengths, batch.response_lengths, strict=True)
        for size in (prompt, *lengths)
    ]
    parts = iter(torch.split(batch.tokens, sizes))
    rows, predictors, targets = [], [], []
    spans: list[tuple[int, int]] = []
    for lengths in batch.response_lengths:
        prompt = next(parts)
        for response in (next(parts) for _ in lengths):
            rows.append(torch.cat([prompt, response]))
            spans.append((len(prompt), len(response)))
            targets.append(response)
    # Padding is masked and never scored: its id is of no account.
    input_ids = pad_sequence(rows, batch_first=True)
    width, device = input_ids.shape[1], input_ids.device
    totals = torch.tensor([sum(span) for span in spans])
    attention_mask = (torch.arange(width)[None] < totals[:, None]).long().to(device)
    for row, (prompt_length, length) in enumerate(spans):
        first = row * width + prompt_length - 1
        predictors.append(torch.arange(first, first + length))
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    return ModelRows(inputs, torch.cat(predictors).to(device), torch.cat(targets))


def token_logps(
    hidden: Tensor,
    targets: Tensor,
    head: Callable[[Tensor], Tensor],
    *,
    chunk_size: int = 1024,
) -> Tensor:
    """Log-probability of each target token: ``log_softmax(head(hidden).float())[target]``, fp32.

    Logits of at most ``chunk_size`` tokens exist at a time; the backward pass computes them again.

    Args:
        hidden: hidden states at the predicting positions, (S, D).
        targets: the tokens, long (S,).
        head: maps (s, D) to logits (s, V).
        chunk_size: tokens at a time.

    Returns:
        (S,) in nats; float64 where the logits are.
    """

    def of_chunk(states: Tensor, tokens: Tensor) -> Tensor:
        logits = head(states)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return -nn.functional.cross_entropy(logits, tokens, reduction="none")

    chunks = zip(torch.split(hidden, chunk_size), torch.split(targets, chunk_size), strict=True)
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(of_chunk, h, t, use_reentrant=False) for h, t in chunks])
    return torch.cat([of_chunk(h, t) for h, t in chunks])


def output_head(model: Any) -> Callable[[Tensor], Tensor]:
    """Hidden states to logits as the model computes them.

    The head is called as a module, so that an adapter on it counts, and what some architectures do
    to the logits afterwards is done: scaling (Granite, Cohere) and soft-capping (Gemma).
    """
    head = model.get_output_embeddings()
    config = model.config.get_text_config()
    factor = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    softcap = getattr(config, "final_logit_softcapping", None)

    def logits(hidden: Tensor) -> Tensor:
        values: Tensor = head(hidden) * (factor / divisor) if factor != divisor else head(hidden)
        return softcap * torch.tanh(values / softcap) if softcap else values

    return logits


def response_logps(
    model: Any,
    batch: GroupBatch,
    *,
    layout: Layout,
    chunk_size: int = 1024,
) -> Tensor:
    """Log-probability of each response given its prompt, summed over its tokens, (B, N) fp32.

    Equals gathering and summing ``model(input_ids).logits.float().log_softmax(-1)`` over each
    response alone behind its prompt, end-of-turn token included. Padding slots are zero.

    Args:
        model: a transformers causal language model (with PEFT layers in it, if any).
        batch: whole groups.
        layout: "shared" computes each prompt once, "separate" once per response.
        chunk_size: tokens at a time that reach the head.

    Raises:
        NotImplementedError: if the model's attention does not follow the shared layout.
    """
    rows = shared_row(batch) if layout == "shared" else separate_rows(batch)
    if layout == "shared":
        # It stays set: a checkpointed layer reads it again in the backward pass.
        model.config._attn_implementation = SHARED_PROMPT_ATTENTION
    hidden = model.base_model(**rows.inputs, use_cache=False).last_hidden_state
    if layout == "shared":
        layers, calls = model.config.num_hidden_layers, rows.inputs["shared_prompt"].calls
        if calls != layers:
            raise NotImplementedError(
                f"{type(model).__name__}: {calls} of {layers} attention layers follow the shared "
                "layout. Set model.layout: separate."
            )
    per_token = token_logps(
        hidden.flatten(0, 1)[rows.predictors],
        rows.targets,
        output_head(model),
        chunk_size=chunk_size,
    )
    sums = torch.segment_reduce(per_token, "sum", lengths=batch.lengths.flatten(), initial=0)
    return sums.view(len(batch), batch.slots)
