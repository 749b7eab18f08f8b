"""FSDP1's units and refusals, which need no GPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

from mpo_lightning import LoRA, MPOModule, PolicyConfig
from mpo_lightning.model.policy import PolicyError
from mpo_lightning.strategy import FSDP1, wrap_policy
from tests.conftest import example_rows
from tests.runs import STRATEGIES, fit, write_recipe


def test_units_of_fsdp1_are_decoder_layers_and_adapters(base: str) -> None:
    module = MPOModule(policy=PolicyConfig(base=base, lora=LoRA(r=4)))
    module.configure_model()
    assert module.policy is not None
    chosen = wrap_policy(module)
    units = {
        name
        for name, part in module.policy.causal_lm.named_modules()
        if chosen(part, recurse=False, nonwrapped_numel=0)
    }
    layers = {name for name in units if name.count(".") == 2}
    assert layers == {"model.layers.0", "model.layers.1"}
    adapters = units - layers
    assert len(adapters) == 2 * 7 * 2
    assert all("lora_" in name for name in adapters)


@pytest.mark.parametrize(
    ("quantization", "dtype", "precision", "message"),
    [
        ("nf4", "bfloat16", "bf16-mixed", "FSDP1 stores 4-bit weights together"),
        ("nf4", "auto", "bf16-true", "FSDP1 stores 4-bit weights together"),
        ("int8", "bfloat16", "bf16-true", "int8 weights cannot be sharded"),
    ],
)
def test_bits_that_fsdp1_cannot_flatten_are_refused(
    base: str, quantization: Any, dtype: Any, precision: Any, message: str
) -> None:
    policy = PolicyConfig(base=base, quantization=quantization, dtype=dtype)
    module = MPOModule(policy=policy)
    module.trainer = Trainer(
        accelerator="cpu", devices=1, strategy=FSDP1(), precision=precision, logger=False
    )
    with pytest.raises(PolicyError, match=message):
        module.configure_model()


def test_configuration_of_fsdp1_is_refused_on_cpu(
    base: str, write_jsonl: Callable[..., str], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, base, write_jsonl(example_rows(3)))
    options = [f"--config={STRATEGIES / 'fsdp.yaml'}", "--trainer.accelerator=cpu"]
    result = fit(recipe, tmp_path / "run", *options, "--trainer.devices=1", check=False)
    assert result.returncode != 0
    assert "FSDP1 needs GPUs" in result.stderr
