"""The shipped strategies give the numbers of one process, on one node and on two."""

import json
import socket
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig

from tests import processes
from tests.conftest import (
    example_rows,
    make_tokenizer,
    tiny_config,
    tiny_model,
    write_rows,
)
from tests.model.architectures import CONTINUED, multimodal_config, variant_model
from tests.runs import (
    OVERLAYS,
    ROOT,
    STRATEGIES,
    TWO,
    adapter,
    assert_same_adapter,
    assert_same_metrics,
    fit,
    metrics,
    write_recipe,
)


@pytest.fixture(scope="module")
def recipe(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """19 ragged groups, 4 to a step: 5 optimizer steps of which the last holds 3 groups."""
    folder = tmp_path_factory.mktemp("strategies")
    return write_recipe(
        folder,
        base,
        write_rows(folder / "groups.jsonl", example_rows(19)),
        trainer={"max_epochs": 1, "gradient_clip_val": 0.5},
        data={"val": write_rows(folder / "val.jsonl", example_rows(5, seed=1))},
    )


@pytest.fixture(scope="module")
def single(recipe: Path) -> Path:
    """What one process leaves."""
    run(recipe, recipe.parent / "single", "single")
    return recipe.parent / "single"


# Products with rounded weights amplify rounding of the activations; 4-bit values are the same.
TOLERANCE = {"none": 1e-5, "nf4": 1e-4, "int8": 1e-3}


def run(recipe: Path, root: Path, name: str, quantization: str = "none") -> None:
    if name == "fsdp2" and quantization == "nf4":
        name, quantization = "fsdp2-4bit", "none"
    options = [*OVERLAYS[name], f"--data.groups_per_batch={4 if name == 'single' else 2}"]
    if quantization != "none":
        options += [f"--model.policy.quantization={quantization}"]
    fit(recipe, root, *options)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_same_numbers_everywhere(recipe: Path, tmp_path: Path, quantization: str) -> None:
    """Losses, metrics and adapter after 5 optimizer steps: one process, DDP, FSDP2."""
    roots = {name: tmp_path / name for name in ("single", "ddp", "fsdp2")}
    for name, root in roots.items():
        run(recipe, root, name, quantization)
    expected = metrics(roots["single"])
    assert len(expected) == 6
    tolerance = TOLERANCE[quantization]
    for root in (roots["ddp"], roots["fsdp2"]):
        assert_same_metrics(metrics(root), expected, tolerance)
        assert_same_adapter(root, roots["single"], tolerance)


def test_8_bit_base_trains_alike_on_two_processes(recipe: Path, tmp_path: Path) -> None:
    for name in ("single", "ddp"):
        run(recipe, tmp_path / name, name, "int8")
    tolerance = TOLERANCE["int8"]
    expected = metrics(tmp_path / "single")
    assert_same_metrics(metrics(tmp_path / "ddp"), expected, tolerance, order=False)
    assert_same_adapter(tmp_path / "ddp", tmp_path / "single", tolerance)
    refused = fit(
        recipe,
        tmp_path / "fsdp2",
        *OVERLAYS["fsdp2"],
        "--model.policy.quantization=int8",
        check=False,
    )
    assert refused.returncode != 0
    assert "int8 weights cannot be sharded" in refused.stderr


def two_nodes(strategy: str) -> list[str]:
    options = [*OVERLAYS[strategy], "--data.groups_per_batch=2"]
    return [*(o for o in options if o not in TWO), "--trainer.num_nodes=2", "--trainer.devices=1"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_nodes(recipe: Path, single: Path, tmp_path: Path, strategy: str) -> None:
    fit(recipe, tmp_path / "nodes", *two_nodes(strategy), nodes=2)
    assert_same_adapter(tmp_path / "nodes", single, 1e-5)


def test_torchrun_launches_two_nodes(recipe: Path, single: Path, tmp_path: Path) -> None:
    """Two agents that know nothing of each other but a rendezvous, as on two machines."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    torchrun += ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=test"]

    def node(_: int) -> None:
        fit(recipe, tmp_path / "nodes", *two_nodes("fsdp2"), launcher=torchrun)

    with ThreadPoolExecutor() as pool:
        list(pool.map(node, range(2)))
    assert_same_adapter(tmp_path / "nodes", single, 1e-5)


@pytest.mark.parametrize("name", ["single", "ddp", "fsdp2", "fsdp2-4bit"])
def test_overlays_run_over_the_quick_start(toy_world: Path, tmp_path: Path, name: str) -> None:
    """From its own folder, as the README says, only shorter."""
    arguments = ["fit", "--config", str(ROOT / "configs" / "quickstart.yaml")]
    arguments += ["--config", str(STRATEGIES / f"{name}.yaml"), "--trainer.accelerator=cpu"]
    arguments += ["--trainer.devices=2", f"--trainer.default_root_dir={tmp_path}"]
    arguments += ["--trainer.max_steps=3", "--trainer.limit_val_batches=1"]
    arguments += ["--data.groups_per_batch=2"]
    arguments += ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path}"]
    arguments += ["--trainer.logger.name=", "--trainer.logger.version="]
    # With all that saves memory as well.
    arguments += ["--model.responses_per_pass=3", "--model.policy.gradient_checkpointing=true"]
    result = processes.run(processes.command_line, arguments, processes=2, cwd=toy_world.parent)
    assert result.returncode == 0, result.stderr[-3000:]
    assert len([row for row in metrics(tmp_path) if "train/loss" in row]) == 3
    assert any(weight.any() for key, weight in adapter(tmp_path).items() if "lora_B" in key)


@pytest.fixture(scope="module")
def wrapper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe for a multimodal model whose language model is trained."""
    folder = tmp_path_factory.mktemp("wrapper")
    tiny_model(multimodal_config("gemma3")).save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    groups = write_rows(folder / "groups.jsonl", example_rows(8))
    return write_recipe(folder, str(folder / "base"), groups, trainer={"max_epochs": 1})


def test_language_model_of_a_wrapper_is_trained_the_same(wrapper: Path, tmp_path: Path) -> None:
    """In separate rows, and with prompts shared on two processes, where DDP refuses unused weights.

    Its towers are sharded, and quantised, like its layers.
    """
    checkpointed = "--model.policy.gradient_checkpointing=true"
    ways = {
        "single": ["--model.layout=separate"],
        "ddp": ["--model.layout=shared", checkpointed],
        "fsdp2": ["--model.layout=shared", checkpointed],
        "single-4bit": ["--model.layout=separate", "--model.policy.quantization=nf4"],
        "fsdp2-4bit": ["--model.layout=shared"],
    }
    for name, options in ways.items():
        alone = name.startswith("single")
        options += [f"--data.groups_per_batch={4 if alone else 2}"]
        overlay = OVERLAYS["single" if alone else name]
        told = fit(wrapper, tmp_path / name, *overlay, *options).stderr
        assert "none on model.vision_tower, model.multi_modal_projector, which no text" in told
    for name, expected in {"ddp": "single", "fsdp2": "single", "fsdp2-4bit": "single-4bit"}.items():
        assert_same_metrics(metrics(tmp_path / name), metrics(tmp_path / expected), 1e-4)
        assert_same_adapter(tmp_path / name, tmp_path / expected, 1e-4)


# ----------------------------------------------------------------------------------- the parts


def test_only_the_first_process_ever_holds_the_whole_base(
    write_jsonl: Callable[..., str], tmp_path: Path
) -> None:
    """The second one's peak of memory is lower by most of the base's size; its head is tied."""
    settings = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 24}
    config = LlamaConfig(
        **{**tiny_config().to_dict(), **settings, "head_dim": 64, "tie_word_embeddings": True}
    )
    folder = tmp_path / "base"
    model = AutoModelForCausalLM.from_config(config)
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    recipe = write_recipe(
        tmp_path, str(folder), write_jsonl(example_rows(2)), trainer={"max_epochs": 1}
    )
    watch = ["--trainer.callbacks+=tests.interruptions.MemoryAtStart"]
    watch += [f"--trainer.callbacks.folder={tmp_path}"]
    fit(recipe, tmp_path / "run", *OVERLAYS["fsdp2"], *watch)
    peaks = [json.loads((tmp_path / f"memory{rank}.json").read_text()) for rank in (0, 1)]
    assert size > 90 * 2**20
    assert peaks[1] < peaks[0] - 0.4 * size


def test_overlays_say_what_they_change_only() -> None:
    overlays = sorted(STRATEGIES.glob("*.yaml"))
    assert len(overlays) == 5
    for path in overlays:
        content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert set(content) <= {"trainer", "model", "samples"}
        assert content.get("samples", {"count": 0}) == {"count": 0}
        assert set(content.get("model", {"policy": {}})["policy"]) <= {"quantization", "dtype"}


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe for a model with recurrent layers, whose prompts' cache is continued."""
    folder = tmp_path_factory.mktemp("hybrid")
    variant_model("qwen3_5_text", **CONTINUED["qwen3_5_text"]).save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    data = write_rows(folder / "groups.jsonl", example_rows(11))
    return write_recipe(folder, str(folder / "base"), data)


def test_model_with_states_trains_alike_everywhere(hybrid: Path, tmp_path: Path) -> None:
    """In separate rows, continued, two responses at a time, and on two processes."""
    ways = {
        "single": ["--model.layout=separate"],
        "continued": [],
        "slices": ["--model.responses_per_pass=2"],
        "ddp": [],
        "fsdp2": ["--model.responses_per_pass=3"],
    }
    for name, options in ways.items():
        overlay = OVERLAYS[name if name in OVERLAYS else "single"]
        groups = 4 if overlay is OVERLAYS["single"] else 2
        told = fit(hybrid, tmp_path / name, *overlay, f"--data.groups_per_batch={groups}", *options)
        assert ("its cache continued" in told.stderr) == (name != "single")
    expected = metrics(tmp_path / "single")
    for name in ways:
        # Steps amplify what the layouts round differently.
        assert_same_metrics(metrics(tmp_path / name), expected, 2e-3, order=False)
        assert_same_adapter(tmp_path / name, tmp_path / "single", 2e-3)
