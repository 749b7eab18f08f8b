"""The policy sharded by FSDP2 over two processes gives the numbers of one."""

import csv
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conftest import example_rows, plain_logps
from mpo_lightning import PreferenceDataModule
from mpo_lightning.data.sampler import StepGroups

SCRIPT = Path(__file__).with_name("sharded_run.py")


def run(base: str, data: str, out: Path, processes: int, dtype: str) -> list[dict[str, float]]:
    command = [sys.executable, str(SCRIPT), base, data, str(out), str(processes), dtype]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    with (out / "metrics.csv").open(encoding="utf-8") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 2e-2)])
def test_sharded_policy_trains_like_a_whole_one_and_keeps_its_reference(
    base: str, write_jsonl: Callable[..., str], tmp_path: Path, dtype: str, tolerance: float
) -> None:
    """11 groups leave an uneven end; the checkpoint's adapter is gathered from both processes.

    With a bf16 base the adapter is float32: a layer's parameters are of two dtypes.
    """
    data = write_jsonl(example_rows(11))
    whole = run(base, data, tmp_path / "one", 1, dtype)
    sharded = run(base, data, tmp_path / "two", 2, dtype)
    assert len(whole) == len(sharded) == 8
    for first, second in zip(whole, sharded, strict=True):
        assert second == pytest.approx(first, rel=tolerance, abs=tolerance)
    name = "last-adapter/adapter_model.safetensors"
    expected, found = load_file(tmp_path / "one" / name), load_file(tmp_path / "two" / name)
    for key, weight in expected.items():
        torch.testing.assert_close(found[key], weight, rtol=tolerance, atol=tolerance, msg=key)

    datamodule = PreferenceDataModule(tokenizer=base, train=data)
    datamodule.setup("fit")
    batch = datamodule.datasets["train"][StepGroups([0, 1, 2], counted=True)]
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        of_base = plain_logps(model, batch).float()
    reference = torch.load(tmp_path / "two" / "reference.pt")
    torch.testing.assert_close(reference, of_base, rtol=tolerance, atol=1e-4)


def test_a_strategy_that_would_split_layers_is_refused(
    base: str, write_jsonl: Callable[..., str], tmp_path: Path
) -> None:
    """Its defaults do, on one node: every process would see the same data."""
    recipe = tmp_path / "recipe.yaml"
    strategy = "lightning.pytorch.strategies.ModelParallelStrategy"
    settings = {
        "trainer": {
            **{"accelerator": "cpu", "devices": 2, "logger": False},
            "strategy": {
                "class_path": strategy,
                "init_args": {"process_group_backend": "gloo"},
            },
            "default_root_dir": str(tmp_path),
        },
        "model": {"policy": {"base": base}},
        "data": {"train": write_jsonl(example_rows(3))},
    }
    recipe.write_text(yaml.safe_dump(settings), encoding="utf-8")
    command = [sys.executable, "-m", "mpo_lightning", "fit", "--config", str(recipe)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode != 0
    assert "tensor_parallel_size to 1" in result.stderr


def test_sharded_run_resumes_as_if_it_had_not_stopped(
    base: str, write_jsonl: Callable[..., str], tmp_path: Path
) -> None:
    """The strategy's settings are those that the README names."""
    strategy = {"data_parallel_size": 2, "tensor_parallel_size": 1}
    recipe = tmp_path / "recipe.yaml"
    settings = {
        "trainer": {
            **{"accelerator": "cpu", "devices": 2, "enable_progress_bar": False},
            "strategy": {
                "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
                "init_args": {**strategy, "save_distributed_checkpoint": False},
            },
        },
        "model": {"policy": {"base": base}, "lr_scheduler": None},
        "data": {"train": write_jsonl(example_rows(5)), "groups_per_batch": 2},
    }
    recipe.write_text(yaml.safe_dump(settings), encoding="utf-8")

    def fit(folder: str, epochs: int, *more: str) -> dict[str, torch.Tensor]:
        root = tmp_path / folder
        command = [sys.executable, "-m", "mpo_lightning", "fit", "--config", str(recipe)]
        options = [f"--trainer.default_root_dir={root}", f"--trainer.max_epochs={epochs}", *more]
        options += ["--model.optimizer.lr=0.01"]
        result = subprocess.run(
            [*command, *options], capture_output=True, text=True, timeout=300, check=False
        )
        assert result.returncode == 0, result.stderr[-3000:]
        return load_file(root / "checkpoints" / "last-adapter" / "adapter_model.safetensors")

    expected = fit("whole", 2)
    half = fit("parts", 1)
    found = fit("parts", 2, "--ckpt_path=last")
    assert any(not torch.equal(half[key], weight) for key, weight in expected.items())
    for key, weight in expected.items():
        assert torch.equal(found[key], weight), key
