"""Every shipped configuration is parsed and instantiated, as its own first lines tell to use it."""

import inspect
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config

import collect_help
from mpo_lightning import MPOModule, PreferenceDataModule
from mpo_lightning.cli import main
from mpo_lightning.commands import run
from mpo_lightning.model.loading import LoRA, PolicyConfig, build_policy
from mpo_lightning.model.logps import token_logps
from mpo_lightning.strategy import FSDP1, FSDP2

ROOT = Path(__file__).parent.parent
FILES = sorted(path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml"))
CONFIGS = [path for path in FILES if path.stem != "sample"]
STRATEGIES = {
    "single": SingleDeviceStrategy,
    "ddp": DDPStrategy,
    "fsdp2": FSDP2,
    "fsdp2-4bit": FSDP2,
    "fsdp": FSDP1,
}


def introduction(path: Path) -> str:
    """The comment at the head of a configuration."""
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    number = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:number])


def commands(path: Path) -> list[list[str]]:
    """The fit commands in it, without the program's name."""
    text = introduction(path).replace("\\\n", " ")
    return [
        shlex.split(line)[1:]
        for line in text.splitlines()
        if line.strip().startswith("mpo-lightning fit")
    ]


@pytest.fixture
def instantiate(
    tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., run.MPOCLI]:
    """Everything up to running, by the command as it stands: model, data and trainer are made.

    In place of the base there is a tiny one, and CPUs in place of GPUs.
    """
    made: list[run.MPOCLI] = []
    monkeypatch.setattr(sys, "argv", ["mpo-lightning"])
    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda self, name: made.append(self))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "recipe.yaml").symlink_to(ROOT / "configs" / "paper.yaml")

    def make(command: list[str], *more: str) -> run.MPOCLI:
        main([*command, f"--model.policy.base={base}", "--trainer.accelerator=cpu", *more])
        return made.pop()

    return make


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_a_configuration_works_as_its_first_lines_say(
    path: Path, base: str, instantiate: Callable[..., run.MPOCLI]
) -> None:
    told = commands(path)
    assert told, "no command"
    own = yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))
    for command in told:
        assert str(path) in command
        # A number that every strategy and machine takes; one process has a strategy of its own.
        devices = own.get("trainer", {}).get("devices", 1)
        cli = instantiate(command, f"--trainer.devices={2 if devices == 'auto' else 1}")
        assert isinstance(cli.model, MPOModule)
        assert isinstance(cli.datamodule, PreferenceDataModule)
        assert cli.model.policy_config.base == cli.datamodule.tokenizer_path == base
        if path.parent.name == "strategy":
            assert type(cli.trainer.strategy) is STRATEGIES[path.stem]
            quantization = "nf4" if "4bit" in path.stem else "none"
            assert cli.model.policy_config.quantization == quantization


def test_settings_of_sampling_are_those_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = set(FILES) - set(CONFIGS)
    monkeypatch.chdir(ROOT)
    (line,) = re.findall(r"^ *mpo-lightning (sample .*\n.*)$", introduction(path), re.M)
    words = shlex.split(line.replace("\\\n", " "))
    assert str(path) in words
    found = collect_help.command_parser("sample").parse_args(words[1:])
    assert (found.n, found.temperature, found.model.base) == (8, 0.8, "showcase/base")


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_a_configuration_says_what_it_takes(path: Path) -> None:
    text = introduction(path)
    if path.name == "quickstart.yaml":
        assert "two CPU cores" in text
        return
    assert re.search(r"^(Memory|Hardware and memory)\b", text, re.M)
    assert re.search(r"^(Data|Memory and data|Hardware and memory)\b", text, re.M)
    if "GiB" in text:
        assert "computed and not measured" in text


# The bases' own settings, as far as they decide sizes.
BASES: dict[str, PretrainedConfig] = {
    "mistral-7b": MistralConfig(
        hidden_size=4096, num_hidden_layers=32, intermediate_size=14336, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=32000,
    ),
    "llama-3-8b": LlamaConfig(
        hidden_size=4096, num_hidden_layers=32, intermediate_size=14336, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256,
    ),
    "0.5B": Qwen2Config(
        hidden_size=896, num_hidden_layers=24, intermediate_size=4864, num_attention_heads=14,
        num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True,
    ),
    "1.5B": Qwen2Config(
        hidden_size=1536, num_hidden_layers=28, intermediate_size=8960, num_attention_heads=12,
        num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True,
    ),
    "3B": Qwen2Config(
        hidden_size=2048, num_hidden_layers=36, intermediate_size=11008, num_attention_heads=16,
        num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True,
    ),
    "7B": Qwen2Config(
        hidden_size=3584, num_hidden_layers=28, intermediate_size=18944, num_attention_heads=28,
        num_key_value_heads=4, vocab_size=152064,
    ),
}  # fmt: skip
ROUNDED = 0.0501


class Weights(NamedTuple):
    """Numbers of weights of a policy: of the base, of its linear layers but the head, trained."""

    base: int
    linear: int
    adapter: int


@pytest.fixture
def weights(tmp_path: Path) -> Callable[[str], Weights]:
    """The weights of a policy of configs/paper.yaml, built without memory for them."""
    paper = yaml.safe_load((ROOT / "configs" / "paper.yaml").read_text(encoding="utf-8"))

    def count(name: str) -> Weights:
        BASES[name].save_pretrained(tmp_path)
        lora = LoRA(**paper["model"]["policy"]["lora"])
        config = PolicyConfig(base=str(tmp_path), random_init=True, dtype="bfloat16", lora=lora)
        with torch.device("meta"):
            policy = build_policy(config, "auto")
        head = policy.causal_lm.get_output_embeddings()
        linear = [
            module.weight.numel()
            for name, module in policy.named_modules()
            if isinstance(module, torch.nn.Linear) and "lora_" not in name and module is not head
        ]
        trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
        total = sum(p.numel() for p in policy.parameters())
        return Weights(base=total - trained, linear=sum(linear), adapter=trained)

    return count


def logits_gib(name: str) -> float:
    """Three float32 tensors of the tokens that the head takes at a time."""
    chunk = inspect.signature(token_logps).parameters["chunk_size"].default
    return float(3 * 4 * chunk * BASES[name].vocab_size / 2**30)


@pytest.mark.parametrize("name", ["mistral-7b", "llama-3-8b"])
def test_memory_is_that_of_the_models_weights(name: str, weights: Callable[[str], Weights]) -> None:
    text = introduction(Path("configs", "model", f"{name}-instruct.yaml"))
    found = weights(name)
    assert f"{found.base / 1e9:.3f}e9 weights x 2 bytes" in text
    assert f"{found.adapter / 1e6:.1f}e6 weights x 16 bytes" in text
    *parts, together = (float(n) for n in re.findall(r" (\d+\.\d)$", text, re.M))
    base, adapter, _, _, logits = parts
    assert base == pytest.approx(2 * found.base / 2**30, abs=ROUNDED)
    assert adapter == pytest.approx(16 * found.adapter / 2**30, abs=ROUNDED)
    assert logits == pytest.approx(logits_gib(name), abs=ROUNDED)
    assert together == pytest.approx(sum(parts), abs=6 * ROUNDED)


@pytest.mark.parametrize("size", ["0.5B", "1.5B", "3B", "7B"])
def test_memory_of_qwen_is_that_of_its_weights(
    size: str, weights: Callable[[str], Weights]
) -> None:
    found = weights(size)
    text = introduction(Path("configs", "model", "qwen2.5-instruct.yaml"))
    (row,) = re.findall(rf"^ +{size} +(.*)$", text, re.M)
    bf16, nf4, adapter, kept, layer, logits, *together = (float(n) for n in row.split())
    assert bf16 == pytest.approx(2 * found.base / 2**30, abs=ROUNDED)
    # 4 bits, an 8-bit scale for every 64 weights and a 32-bit one for every 256 of these.
    in_four_bits = found.linear * (4 + 8 / 64 + 32 / 64 / 256) / 8
    others = 2 * (found.base - found.linear)
    assert nf4 == pytest.approx((in_four_bits + others) / 2**30, abs=ROUNDED)
    assert adapter == pytest.approx(16 * found.adapter / 2**30, abs=ROUNDED)
    assert logits == pytest.approx(logits_gib(size), abs=ROUNDED)
    rest = adapter + kept + layer + logits
    width = BASES[size].hidden_size * BASES[size].intermediate_size
    # With one dequantised matrix, the largest.
    expected = [bf16 + rest, nf4 + 2 * width / 2**30 + rest]
    assert together == pytest.approx(expected, abs=6 * ROUNDED)


def test_the_smallest_recipe_trains(
    toy_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its first lines say, in 4 bits and bfloat16; on toy data, without a GPU."""
    monkeypatch.setattr(sys, "argv", ["mpo-lightning"])
    monkeypatch.chdir(ROOT)
    (command,) = commands(Path("configs/model/qwen2.5-instruct.yaml"))
    run_folder = tmp_path / "run"
    changes: dict[str, Any] = {
        "model.policy.base": toy_world / "base",
        "data.train": toy_world / "train.jsonl",
        "data.schema": "null",
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 2,
        "trainer.accumulate_grad_batches": 2,
        "trainer.default_root_dir": run_folder,
        "trainer.logger": "false",
    }
    main([*command, *(f"--{name}={value}" for name, value in changes.items())])
    adapter = run_folder / "checkpoints" / "last-adapter" / "adapter_model.safetensors"
    assert adapter.is_file()
