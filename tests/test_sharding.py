"""Two processes, also with the policy sharded by FSDP2, give the numbers of one."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mpo_lightning import PreferenceDataModule
from mpo_lightning.data.sampler import StepGroups
from tests import processes, sharded_run
from tests.conftest import example_rows, plain_logps
from tests.runs import Rows, metrics


def run(base: str, data: str, out: Path, strategy: str = "auto", **settings: Any) -> Rows:
    target = functools.partial(sharded_run.run, **settings)
    count = 1 if strategy == "auto" else 2
    result = processes.run(target, [base, data, out, strategy], processes=count)
    assert result.returncode == 0, result.stderr[-3000:]
    return metrics(out)


def assert_equal_runs(
    first: Rows, second: Rows, folders: tuple[Path, Path], tolerance: float, *, order: bool = True
) -> None:
    """The same metrics at every step and the same adapter at the end.

    The order of rewards that are nearly equal is a matter of rounding: compared where asked for.
    """
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        if not order:
            for name in [k for k in one if k.endswith(("accuracy", "kendall_tau", "top1"))]:
                del one[name], other[name]
        assert other == pytest.approx(one, rel=tolerance, abs=tolerance)
    name = "last-adapter/adapter_model.safetensors"
    expected, found = (load_file(folder / name) for folder in folders)
    for key, weight in expected.items():
        torch.testing.assert_close(found[key], weight, rtol=tolerance, atol=tolerance, msg=key)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 2e-2)])
def test_sharded_policy_trains_like_a_whole_one_and_keeps_its_reference(
    base: str, write_jsonl: Callable[..., str], tmp_path: Path, dtype: str, tolerance: float
) -> None:
    """11 groups leave an uneven end; the checkpoint's adapter is gathered from both processes.

    With a bf16 base the adapter is float32: a layer's parameters are of two dtypes.
    """
    data = write_jsonl(example_rows(11))
    folders = (tmp_path / "one", tmp_path / "two")
    settings = {"dtype": dtype, "layout": "shared"}
    whole = run(base, data, folders[0], **settings)
    sharded = run(base, data, folders[1], "fsdp2", **settings)
    assert len(whole) == 8
    assert_equal_runs(whole, sharded, folders, tolerance, order=dtype == "float32")

    datamodule = PreferenceDataModule(tokenizer=base, train=data)
    datamodule.setup("fit")
    batch = datamodule.datasets["train"][StepGroups([0, 1, 2], counted=True)]
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        of_base = plain_logps(model, batch).float()
    reference = torch.load(tmp_path / "two" / "reference.pt")
    torch.testing.assert_close(reference, of_base, rtol=tolerance, atol=1e-4)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_slices_train_alike_on_processes_that_need_unequally_many(
    base: str, write_jsonl: Callable[..., str], tmp_path: Path, strategy: str
) -> None:
    """Gradients go between the processes once a step, not once a slice or accumulated batch.

    The reference comes from a cache that both processes fill.
    """
    rows = example_rows(11)
    for number, row in enumerate(rows):
        # On every step one process has more responses than the other.
        times = 1 + 3 * (number % 2)
        row["responses"] = [f"{r} {i}" for i in range(times) for r in row["responses"]]
        row["scores"] = row["scores"] * times
    data = write_jsonl(rows)
    folders = (tmp_path / "one", tmp_path / "two")
    whole = run(base, data, folders[0], epochs=1, groups_per_step=8)
    # Two processes with two batches of two groups each.
    settings = {"responses_per_pass": 3, "accumulate": 2, "epochs": 1, "groups_per_step": 8}
    cache = {"reference": "cached", "reference_cache": str(tmp_path / "cache")}
    sliced = run(base, data, folders[1], strategy, **settings, **cache)
    # With cached values the rewards of a fresh adapter differ in the last digit.
    assert_equal_runs(whole, sliced, folders, 1e-4, order=False)
    reductions = json.loads((folders[1] / "reductions.json").read_text(encoding="utf-8"))
    # Adapters lie in the two decoder layers, each sharded by itself; DDP has one bucket.
    assert len(reductions) == 2 * (2 if strategy == "fsdp2" else 1)


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
    result = processes.run(processes.command_line, ["fit", f"--config={recipe}"], processes=2)
    assert result.returncode != 0
    assert "tensor_parallel_size to 1" in result.stderr


def test_sharded_run_resumes_as_if_it_had_not_stopped(
    base: str, write_jsonl: Callable[..., str], tmp_path: Path
) -> None:
    """With Lightning's own strategy, from a checkpoint of its own."""
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
        options = [f"--trainer.default_root_dir={root}", f"--trainer.max_epochs={epochs}", *more]
        options += ["--model.optimizer.lr=0.01", f"--config={recipe}"]
        result = processes.run(processes.command_line, ["fit", *options], processes=2)
        assert result.returncode == 0, result.stderr[-3000:]
        return load_file(root / "checkpoints" / "last-adapter" / "adapter_model.safetensors")

    expected = fit("whole", 2)
    half = fit("parts", 1)
    found = fit("parts", 2, "--ckpt_path=last")
    assert any(not torch.equal(half[key], weight) for key, weight in expected.items())
    for key, weight in expected.items():
        assert torch.equal(found[key], weight), key
