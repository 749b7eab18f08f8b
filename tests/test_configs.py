"""Every shipped configuration is parsed and instantiated, as its own first lines tell to use it."""

import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from mpo_lightning import MPOModule, PreferenceDataModule
from mpo_lightning.cli import main
from mpo_lightning.commands import run
from mpo_lightning.strategy import FSDP1, FSDP2

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml"))
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


# Width, layers, width of the MLP, of keys, vocabulary, and whether embeddings and head are one.
SHAPES = {
    "mistral-7b": (4096, 32, 14336, 1024, 32000, False),
    "llama-3-8b": (4096, 32, 14336, 1024, 128256, False),
    "0.5B": (896, 24, 4864, 128, 151936, True),
    "1.5B": (1536, 28, 8960, 256, 151936, True),
    "3B": (2048, 36, 11008, 256, 151936, True),
    "7B": (3584, 28, 18944, 512, 152064, False),
}


def gib(name: str, *, groups: int) -> dict[str, float]:
    """Memory as docs/recipes.md computes it, in GiB, with groups of 8192 tokens."""
    width, layers, mlp, keys, vocabulary, tied = SHAPES[name]
    tokens = groups * 8192
    linear = layers * (2 * width**2 + 2 * width * keys + 3 * width * mlp)
    others = (1 if tied else 2) * vocabulary * width
    inputs_and_outputs = 2 * 2 * width + 2 * (width + keys) + 3 * (width + mlp)
    parts = {
        "bf16": 2 * (linear + others),
        "nf4": linear * 4.127 / 8 + 2 * others + 2 * width * mlp,
        "adapter": 16 * 16 * layers * inputs_and_outputs,
        "kept": tokens * width * layers * 2,
        "layer": tokens * (4 * mlp + 8 * width) * 2,
        "logits": 3 * 256 * vocabulary * 4,
    }
    return {part: size / 2**30 for part, size in parts.items()}


@pytest.mark.parametrize("name", ["mistral-7b", "llama-3-8b"])
def test_memory_is_as_computed(name: str) -> None:
    parts = gib(name, groups=4)
    del parts["nf4"]
    told = [float(n) for n in re.findall(r" (\d+\.\d)$", introduction_of(name), re.M)]
    assert told == pytest.approx([*parts.values(), sum(parts.values())], abs=0.051)


def introduction_of(model: str) -> str:
    return introduction(Path("configs", "model", f"{model}-instruct.yaml"))


@pytest.mark.parametrize("size", ["0.5B", "1.5B", "3B", "7B"])
def test_memory_of_qwen_is_as_computed(size: str) -> None:
    parts = gib(size, groups=1)
    rest = [parts[part] for part in ("adapter", "kept", "layer", "logits")]
    dequantised = 2 * SHAPES[size][0] * SHAPES[size][2] / 2**30
    expected = [
        *(parts["bf16"], parts["nf4"] - dequantised, *rest),
        *(parts["bf16"] + sum(rest), parts["nf4"] + sum(rest)),
    ]
    (row,) = re.findall(rf"^ +{size} +(.*)$", introduction_of("qwen2.5"), re.M)
    assert [float(n) for n in row.split()] == pytest.approx(expected, abs=0.051)


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
