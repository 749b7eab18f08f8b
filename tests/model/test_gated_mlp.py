"""Gated MLPs that keep less compute what they computed, and keep less."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from transformers import CohereConfig, Gemma2Config, GPT2Config, Phi3Config, Qwen3Config

from mpo_lightning.model.fast_linear import use_fast_linear
from mpo_lightning.model.gated_mlp import recompute_gated_mlps
from tests.conftest import tiny_config, tiny_model

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": None,
}
GATED = {
    "llama": tiny_config(num_hidden_layers=1),
    "gemma2": Gemma2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL),
    "cohere": CohereConfig(**{k: v for k, v in SMALL.items() if k != "head_dim"}),
    # Whose result is its input, and whose gradient is that of its result.
    "identity": tiny_config(num_hidden_layers=1, hidden_act="linear"),
    # What keeps its result for the backward pass.
    "sigmoid": tiny_config(num_hidden_layers=1, hidden_act="sigmoid"),
}


def lora(config: Any, *, dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    settings = LoraConfig(
        r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=dropout
    )
    return get_peft_model(tiny_model(config), settings).train()


def mlp_of(model: Any) -> Any:
    return model.get_base_model().model.layers[0].mlp


def outcome(mlp: Any, run: Callable[[Any, Tensor], Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(2, 7, 32, generator=generator, requires_grad=True)
    torch.manual_seed(2)
    output = run(mlp, inputs)
    output.square().sum().backward()
    assert inputs.grad is not None
    with torch.no_grad():
        torch.manual_seed(2)
        torch.testing.assert_close(run(mlp, inputs), output)
    return [output, inputs.grad, *(p.grad for p in mlp.parameters() if p.grad is not None)]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("within", ["plain", "checkpoint"])
@pytest.mark.parametrize("name", GATED)
def test_values_and_gradients_are_the_same(name: str, within: str, dropout: float) -> None:
    """Also inside a checkpoint and with dropout."""

    def run(mlp: Any, inputs: Tensor) -> Tensor:
        if within == "plain":
            return mlp(inputs)  # type: ignore[no-any-return]
        return checkpoint(mlp, inputs, use_reentrant=False)  # type: ignore[no-any-return]

    results = []
    for lean in (False, True):
        model = lora(GATED[name], dropout=dropout)
        use_fast_linear(model)
        if lean:
            recompute_gated_mlps(model)
            assert "forward" in vars(mlp_of(model))
        results.append(outcome(mlp_of(model), run))
    assert len(results[0]) == 2 + 6
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def kept(mlp: Callable[[Tensor], Tensor], inputs: Tensor) -> int:
    """Bytes that a forward pass leaves allocated."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        output = mlp(inputs)
    assert output.requires_grad
    return sum(event.self_cpu_memory_usage for event in profiler.events())


@pytest.mark.parametrize(("fast", "spared"), [(True, 2), (False, 1)])
def test_less_is_kept_of_the_inner_width(fast: bool, spared: int) -> None:
    """Of four tensors two remain with plain LoRA in float32 on CPU, three with PEFT's own way."""
    tokens, inner = 50, 64
    inputs = torch.randn(1, tokens, 32, requires_grad=True)
    sizes = []
    for lean in (False, True):
        model = lora(GATED["llama"])
        if fast:
            use_fast_linear(model)
        if lean:
            recompute_gated_mlps(model)
        sizes.append(kept(mlp_of(model), inputs))
    assert sizes[0] - sizes[1] == spared * tokens * inner * 4


def test_checkpoints_around_it_keep_nothing_of_it() -> None:
    """What a hook of its own would keep, a checkpoint around it could not let go."""
    inputs = torch.randn(1, 50, 32, requires_grad=True)
    model = lora(GATED["llama"])
    use_fast_linear(model)
    recompute_gated_mlps(model)
    mlp = mlp_of(model)

    def checkpointed(x: Tensor) -> Tensor:
        return checkpoint(mlp, x, use_reentrant=False)  # type: ignore[no-any-return]

    output, state_of_random_numbers = 50 * 32 * 4, torch.get_rng_state().nbytes
    assert kept(checkpointed, inputs) < output + state_of_random_numbers + 1000


def test_other_mlps_are_left_alone() -> None:
    phi = {k: v for k, v in SMALL.items() if k != "head_dim"}
    for config in (Phi3Config(**phi), GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64)):
        model = tiny_model(config)
        recompute_gated_mlps(model)
        assert not [m for m in model.modules() if "forward" in vars(m)]
