"""Log-probabilities of responses: one function for policy, reference and evaluation.

All layouts compute the same numbers. *Shared* (prefix sharing) packs a batch into one row with
every prompt once; *continued* computes every prompt once and continues its cache with each
response; *separate* makes one row per response, and packs them where the model follows the
attention of shared prompts. Only positions that predict response tokens reach
the head, in chunks, with log-softmax in fp32 whatever the model's dtype.
"""

import ctypes
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from mpo_lightning.batch import GroupBatch
from mpo_lightning.model.attention import (
    SHARED_PROMPT_ATTENTION,
    KeysAndValues,
    PromptSharing,
)
from mpo_lightning.model.continuation import CONTINUED_MODELS, continued_rows, continued_states
from mpo_lightning.model.decoder import text_decoder
from mpo_lightning.model.head import output_head, output_modules

__all__ = [
    "SHARED_PROMPT_MODELS",
    "SPARSE_MODELS",
    "ExactLayout",
    "Layout",
    "cheapest_layout",
    "exact_layouts",
    "packed_rows",
    "response_logps",
    "separate_rows",
    "shared_row",
    "token_logps",
]

ExactLayout = Literal["shared", "continued", "separate"]
Layout = Literal["auto", "shared", "continued", "separate"]

# Model types that call the registered attention function in every layer and use the positions they
# are given. Tests compare each with separate rows. Other models use separate rows.
SHARED_PROMPT_MODELS = frozenset(
    {
        *{"afmoe", "apertus", "arcee", "aria_text", "axk1", "beam", "biogpt", "bitnet", "cohere"},
        *{"cohere2", "cohere2_moe", "cohere_compass_text", "cosmos3_edge_text", "ctrl", "cwm"},
        *{"dbrx", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5", "ernie4_5_moe"},
        *{"ernie4_5_vl_moe_text", "exaone4", "exaone_moe", "flex_olmo", "flint", "gemma", "gemma2"},
        *{"gemma3_text", "gemma3n_text", "gemma4_text", "gemma4_unified_text", "glm", "glm4"},
        *{"glm4_moe", "glm4_moe_lite", "glm4v_moe_text", "glm4v_text", "gpt2", "gpt_bigcode"},
        *{"gpt_neox", "gpt_oss", "granite", "granite_docling_text", "granite_swa", "granitemoe"},
        *{"granitemoe_swa", "granitemoeshared", "helium", "hrm_text", "hunyuan_v1_dense"},
        *{"hunyuan_v1_moe", "hunyuan_vl_text", "hy_v3", "hyperclovax", "internlm3", "iquestcoder"},
        *{"jais2", "jetmoe", "kolibri1", "laguna", "llama", "longcat_flash", "mellum"},
        *{"mimo_v2_flash", "minicpm3", "minimax_m2", "ministral", "ministral3", "mistral"},
        *{"mistral4", "mixtral", "modernbert-decoder", "muse_glimmer_text", "nanochat", "nemotron"},
        *{"olmo", "olmo2", "olmo3", "olmoe", "opt", "paddleocr_vl_text", "persimmon", "phi"},
        *{"phi3", "phimoe", "qwen2", "qwen2_5_vl_text", "qwen2_moe", "qwen2_vl_text", "qwen3"},
        *{"qwen3_moe", "qwen3_vl_moe_text", "qwen3_vl_text", "seed_oss", "smollm3", "solar_open"},
        *{"stablelm", "starcoder2", "step3p5", "vaultgemma", "youtu"},
    }
)
# Model types whose attention chooses keys among those of the whole row: they see too few of a
# response's own once the row is longer than that choice.
SPARSE_MODELS = frozenset(
    {
        *{"axk2", "deepseek_v32", "deepseek_v4", "dots3_note_text", "glm5_next_text"},
        *{"glm_moe_dsa", "hy_v4", "minimax_m3_vl_text", "mistral_large4_text", "qwen4_exp_text"},
    }
)


def exact_layouts(model: Any) -> list[ExactLayout]:
    """Return the layouts in which a model computes what it computes in rows of its own."""
    decoder = text_decoder(model)
    layouts: list[ExactLayout] = ["separate"]
    if decoder.config.model_type in SHARED_PROMPT_MODELS:
        layouts.append("shared")
    # Layers that are checkpointed drop the cache.
    checkpointed = any(
        getattr(module, "gradient_checkpointing", False) for module in decoder.modules()
    )
    if decoder.config.model_type in CONTINUED_MODELS and not checkpointed:
        layouts.append("continued")
    return layouts


def cheapest_layout(batch: GroupBatch, layouts: Sequence[ExactLayout]) -> ExactLayout:
    """Return the layout that computes fewest tokens, padding included; the first of equals."""
    spans = batch.spans()
    lengths = [length for span in spans for length in span.lengths]
    tokens = {
        "shared": len(batch.tokens),
        "continued": len(spans) * max(span.prompt for span in spans) + len(lengths) * max(lengths),
        "separate": len(lengths) * max(span.prompt + max(span.lengths) for span in spans),
    }
    return min(layouts, key=tokens.__getitem__)


class ModelRows(NamedTuple):
    """Model input for a batch in one of the layouts.

    Attributes:
        inputs: keyword arguments of the backbone, without the mask of shared prompts.
        predictors: flat index of the position that predicts each scored token, (S,).
        targets: the scored tokens, (S,), responses one after the other.
        sharing: the groups of a row in which they share their prompts.
    """

    inputs: dict[str, Any]
    predictors: Tensor
    targets: Tensor
    sharing: PromptSharing | None = None


def shared_row(batch: GroupBatch, *, begun: bool = False) -> ModelRows:
    """Lay the batch out as one row, every prompt once: T tokens and no padding.

    All prompts come first, then all responses, so that each kind is a slice of the row.

    Args:
        batch: whole groups, or a slice of their responses.
        begun: whether the first prompt is in an earlier row. Predictors then count from its last
            position, which comes before this row.
    """
    spans, device = batch.spans(), batch.tokens.device
    prompts = [batch.tokens[span.start : span.first_response] for span in spans[begun:]]
    scored = [torch.arange(part.start, part.stop) for span in spans for part in span.responses()]
    sharing = PromptSharing(batch.prompt_lengths, batch.response_lengths, device, begun=begun)
    predictors = []
    lasts = torch.tensor([1] * begun + sharing.in_row).cumsum(0) - 1
    at = int(lasts[-1]) + 1
    for group, length in sharing.of_responses:
        # The prompt's last position predicts every response's first token.
        predictors += [lasts[group, None], torch.arange(at, at + length - 1)]
        at += length
    targets = batch.tokens[torch.cat(scored).to(device)]
    inputs = {
        "input_ids": torch.cat([*prompts, targets])[None],
        "position_ids": sharing.positions()[None],
    }
    return ModelRows(inputs, torch.cat(predictors).to(device), targets, sharing)


def separate_rows(batch: GroupBatch) -> ModelRows:
    """Lay the batch out as one row per response, prompt and response, padded at the end."""
    rows, targets, sizes = [], [], []
    for span in batch.spans():
        prompt = batch.tokens[span.start : span.first_response]
        for response in span.responses():
            targets.append(batch.tokens[response])
            rows.append(torch.cat([prompt, targets[-1]]))
            sizes.append((len(prompt), len(targets[-1])))
    # Padding is masked and never scored, so any id will do.
    input_ids = pad_sequence(rows, batch_first=True)
    width, device = input_ids.shape[1], input_ids.device
    totals = torch.tensor([sum(size) for size in sizes])
    attention_mask = (torch.arange(width)[None] < totals[:, None]).long().to(device)
    predictors = [
        torch.arange(length) + row * width + prompt - 1
        for row, (prompt, length) in enumerate(sizes)
    ]
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    return ModelRows(inputs, torch.cat(predictors).to(device), torch.cat(targets))


def packed_rows(batch: GroupBatch) -> ModelRows:
    """Lay the batch out as one row of all prompts and responses, a prompt before each response.

    No token is padding. For models that follow the attention of shared prompts.
    """
    device, sizes = batch.tokens.device, []
    ids, scored, positions, predictors = [], [], [], []
    at = 0
    for span in batch.spans():
        prompt = torch.arange(span.start, span.first_response)
        for part in span.responses():
            scored.append(torch.arange(part.start, part.stop))
            ids += [prompt, scored[-1]]
            sizes.append(span.prompt + len(scored[-1]))
            positions.append(torch.arange(sizes[-1]))
            predictors.append(torch.arange(at + span.prompt - 1, at + sizes[-1] - 1))
            at += sizes[-1]
    inputs = {
        "input_ids": batch.tokens[torch.cat(ids).to(device)][None],
        "position_ids": torch.cat(positions).to(device)[None],
    }
    targets = batch.tokens[torch.cat(scored).to(device)]
    sharing = PromptSharing(sizes, [[] for _ in sizes], device)
    return ModelRows(inputs, torch.cat(predictors).to(device), targets, sharing)


def token_logps(
    hidden: Tensor,
    targets: Tensor,
    head: Callable[[Tensor], Tensor],
    *,
    frozen: bool,
    chunk_size: int = 256,
    again: bool = False,
) -> Tensor:
    """Return the log-probability of each target token, nats, fp32 (S,).

    Equivalent to::

        logits = head(hidden).float()
        return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]

    but logits of at most ``chunk_size`` tokens exist at a time. Logits in float64 stay float64.

    Args:
        hidden: hidden states at the predicting positions, (S, D).
        targets: the tokens, long (S,).
        head: maps (s, D) to logits (s, V), row by row.
        frozen: whether nothing in the head is trained. The gradient with respect to the hidden
            states is then taken in the forward pass, chunk by chunk; otherwise the backward pass
            computes the logits a second time.
        chunk_size: tokens at a time.
        again: whether a checkpoint computes this again before the backward pass, so that the
            gradient need not be taken now.
    """
    if frozen and torch.is_grad_enabled() and hidden.requires_grad:
        logps: Tensor = _FrozenHead.apply(hidden, targets, head, chunk_size, again)  # type: ignore[no-untyped-call]
        return logps
    chunks = zip(torch.split(hidden, chunk_size), torch.split(targets, chunk_size), strict=True)
    if torch.is_grad_enabled():
        return torch.cat(
            [checkpoint(_chunk_logps, h, t, head, use_reentrant=False) for h, t in chunks]
        )
    return torch.cat([_chunk_logps(h, t, head) for h, t in chunks])


def _chunk_logps(hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    logits = head(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return -nn.functional.cross_entropy(logits, targets, reduction="none")


def _unchanged(saved: Tensor) -> Tensor:
    return saved


class _FrozenHead(torch.autograd.Function):
    """Log-probabilities of tokens through a head without trained parameters.

    A token's log-probability depends on its own hidden state alone. Its gradient is therefore known
    in the forward pass up to a scalar factor, and is computed while the chunk's logits exist.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 (autograd passes them by position)
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        head: Callable[[Tensor], Tensor],
        chunk_size: int,
        again: bool,
    ) -> Tensor:
        logps: list[Tensor] = []
        directions: list[Tensor] = []
        chunks = zip(torch.split(hidden, chunk_size), torch.split(targets, chunk_size), strict=True)
        if again:
            # The checkpoint forgets it, and wants the size of what is kept the next time.
            ctx.save_for_backward(hidden)
            return torch.cat([_chunk_logps(states, tokens, head) for states, tokens in chunks])
        for states, tokens in chunks:
            # The saved-tensor hooks of a checkpoint around this call would compute the whole model
            # again for this backward pass.
            with torch.enable_grad(), saved_tensors_hooks(_unchanged, _unchanged):
                leaf = states.detach().requires_grad_()
                logits = head(leaf)
            wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
            probabilities = wide.log_softmax(-1)
            logps.append(probabilities.gather(1, tokens[:, None])[:, 0])
            # d log p(target) / d logits is the target's one-hot less the probabilities.
            slope = probabilities.exp_().neg_()
            slope.scatter_add_(1, tokens[:, None], slope.new_ones(len(tokens), 1))
            directions += torch.autograd.grad(logits, leaf, slope.to(logits.dtype))
        ctx.save_for_backward(torch.cat(directions))
        return torch.cat(logps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (directions,) = ctx.saved_tensors
        return (gradients[0][:, None] * directions).to(directions.dtype), None, None, None, None


def response_logps(
    model: Any,
    batch: GroupBatch,
    *,
    layout: Layout,
    chunk_size: int = 256,
    responses_per_pass: int | None = None,
    passes: int = 0,
    before_last_backward: Callable[[], None] | None = None,
) -> Tensor:
    """Return the log-probability of each response given its prompt, nats, fp32 (B, N).

    Equivalent to summing ``model(input_ids).logits.float().log_softmax(-1)`` at the tokens of each
    response, end-of-turn token included, with the response alone after its prompt. Padding slots
    are zero.

    With ``responses_per_pass`` memory does not grow with the number of responses (gradient caching,
    GradCache, arXiv 2101.06983): the backward pass computes one slice of the responses again at a
    time, all but the last, with the same random numbers, so that values and gradients stay those of
    one pass.

    Args:
        model: a transformers causal language model, with or without PEFT layers.
        batch: whole groups.
        layout: "shared" computes each prompt once (prefix sharing), "continued" as well, with the
            cache of keys, values and states, "separate" once per response; "auto" is whichever of
            the model's exact layouts computes fewest tokens.
        chunk_size: tokens at a time that reach the head.
        responses_per_pass: responses that go through the model at a time. Defaults to all.
        passes: minimum number of calls of the model. Processes that share a sharded model must
            call it equally often; surplus calls do not affect the result.
        before_last_backward: called before the backward pass of the slice that comes last in it.

    Raises:
        NotImplementedError: if the model's attention does not follow the shared layout.
    """
    parts = [batch]
    if responses_per_pass:
        parts = list(batch.once(responses_per_pass, partial(batch.slices, responses_per_pass)))
    parts += [parts[0]] * (passes - len(parts))
    layouts = exact_layouts(model) if layout == "auto" else [layout]

    limit = math.inf
    if len(parts) > 1 and batch.tokens.device.type == "cpu" and sys.platform == "linux":
        _return_freed_memory()
        limit = 1.3 * _resident_pages()

    # The backward pass walks the slices from the last to the first. So what it needs of the last is
    # kept, and the others are computed again.
    to_compute_again = set(range(len(parts) - 1)) if torch.is_grad_enabled() else set()

    def compute(number: int, earlier: _PromptStates | None) -> tuple[Tensor, _PromptStates | None]:
        if limit < math.inf and _resident_pages() > limit:
            _return_freed_memory()
        again = number in to_compute_again
        to_compute_again.discard(number)
        keep = "shared" in layouts and number + 1 < len(parts) and parts[number + 1].begun
        # Where a prompt is shared with another slice no layout computes fewer tokens.
        shares = keep or earlier is not None
        chosen = "shared" if shares else cheapest_layout(parts[number], layouts)
        return _scored_token_logps(
            *(model, parts[number], chosen, chunk_size), again=again, earlier=earlier, keep=keep
        )

    def contexts(number: int) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        if number > 0 or before_last_backward is None:
            return nullcontext(), nullcontext()
        return nullcontext(), _calling(before_last_backward)

    per_part = []
    states: _PromptStates | None = None
    for number in range(len(parts)):
        if number in to_compute_again:
            context_fn = partial(contexts, number)
            logps, states = checkpoint(
                compute, number, states, use_reentrant=False, context_fn=context_fn
            )
        else:
            if limit < math.inf and torch.is_grad_enabled():
                _return_freed_memory()
            logps, states = compute(number, states)
        per_part.append(logps)
    per_token = torch.cat(per_part)
    count = sum(sum(lengths) for lengths in batch.response_lengths)
    if len(per_token) > count:
        # The surplus stays in the graph, so that its backward pass is run as well.
        surplus = per_token[count:].sum() * 0
        per_token = per_token[:count] + surplus
    sums = torch.segment_reduce(per_token, "sum", lengths=batch.lengths.flatten(), initial=0)
    return sums.view(len(batch), batch.slots)


def _resident_pages() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])


def _return_freed_memory() -> None:
    """Return freed memory to the operating system.

    Seen with glibc 2.36: it keeps freed memory into which the next slice does not fit, so that the
    process grows with every slice.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def _calling(function: Callable[[], None]) -> Iterator[None]:
    function()
    yield


class _PromptStates(NamedTuple):
    """What a row leaves of its last prompt, whose group continues in the next row.

    Attributes:
        last: hidden state of its last position, (1, D).
        keys: its keys and values.
    """

    last: Tensor
    keys: KeysAndValues


def _scored_token_logps(
    model: Any,
    batch: GroupBatch,
    layout: ExactLayout,
    chunk_size: int,
    *,
    again: bool,
    earlier: _PromptStates | None,
    keep: bool,
) -> tuple[Tensor, _PromptStates | None]:
    """Compute the log-probabilities of all responses' tokens, response after response.

    Args:
        model: the model.
        batch: whole groups, or a slice of their responses.
        layout: how they are computed.
        chunk_size: tokens at a time that reach the head.
        again: whether this is computed again before the backward pass.
        earlier: states of the first prompt, if an earlier row had it. Of the shared layout alone.
        keep: whether the next row needs those of the last prompt. Of the shared layout alone.

    Returns:
        The log-probabilities, (S,), and the states of the last prompt where they are to be kept.
        A model may not allow that: then there are none, and the next row has the prompt, too.
    """
    decoder = text_decoder(model)
    states = None
    if layout == "continued":
        continued = batch.once(layout, partial(continued_rows, batch))
        predicting, targets = continued_states(decoder, continued), continued.targets
    elif layout == "shared":
        begun = earlier is not None
        row = batch.once((shared_row, begun), partial(shared_row, batch, begun=begun))
        predicting, states = _shared_states(decoder, row, earlier, keep=keep)
        targets = row.targets
    else:
        packed = decoder.config._attn_implementation == SHARED_PROMPT_ATTENTION
        make = packed_rows if packed else separate_rows
        rows = batch.once(make, partial(make, batch))
        if packed:
            predicting, _ = _shared_states(decoder, rows, None, keep=False)
        else:
            hidden = decoder(**rows.inputs, use_cache=False).last_hidden_state
            predicting = hidden.flatten(0, 1)[rows.predictors]
        targets = rows.targets
    trained = [p.requires_grad for module in output_modules(model) for p in module.parameters()]
    logps = token_logps(
        predicting,
        targets,
        output_head(model),
        frozen=not any(trained),
        chunk_size=chunk_size,
        again=again,
    )
    return logps, states


def _shared_states(
    decoder: Any, row: ModelRows, earlier: _PromptStates | None, *, keep: bool
) -> tuple[Tensor, _PromptStates | None]:
    """Compute a row in which groups share their prompts.

    Returns:
        The hidden states at the predicting positions, (S, D), and the last prompt's states, see
        `_scored_token_logps`.

    Raises:
        NotImplementedError: if the model's attention does not follow the layout.
    """
    # Stays set: a checkpointed layer reads it again in the backward pass.
    decoder.config._attn_implementation = SHARED_PROMPT_ATTENTION
    assert row.sharing is not None
    own_prompts = row.sharing.in_row
    sharing = row.sharing.for_pass(earlier and earlier.keys, keep=keep and bool(own_prompts))
    hidden: Tensor = decoder(
        **row.inputs,
        attention_mask=sharing.as_attention_mask(),
        # Some layers slice the mask, which then is a tensor like any other.
        shared_prompt=sharing,
        use_cache=False,
    ).last_hidden_state[0]
    layers = decoder.config.num_hidden_layers
    if sharing.calls != layers:
        raise NotImplementedError(
            f"{type(decoder).__name__}: {sharing.calls} of {layers} attention layers follow the "
            "shared layout. Set model.layout: separate."
        )
    keys, sharing.kept = sharing.kept, None
    states = earlier if keep else None
    if keys is not None:
        end = sum(own_prompts)
        states = _PromptStates(hidden[end - 1 : end].clone(), keys)
        with_gradients = any(key.requires_grad for key, _ in keys.values())
        # Layers that are called several times, or compute their gradients in a pass of their own.
        if len(keys) < layers or (hidden.requires_grad and not with_gradients):
            states = None
    if earlier is not None:
        hidden = torch.cat([earlier.last, hidden])
    return hidden[row.predictors], states
