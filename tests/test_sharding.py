"""The policy sharded by FSDP2 over two processes gives the numbers of one."""

import csv
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conftest import example_rows, plain_logps
from mpo_lightning import PreferenceDataModule
from mpo_lightning.data.sampler import StepGroups

SCRIPT = Path(__file__).with_name("sharded_run.py")


def run(base: str, data: str, out: Path, processes: int) -> list[dict[str, float]]:
    command = [sys.executable, str(SCRIPT), base, data, str(out), str(processes)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    with (out / "metrics.csv").open(encoding="utf-8") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def test_sharded_policy_trains_like_a_whole_one_and_keeps_its_reference(
    base: str, write_jsonl: Callable[..., str], tmp_path: Path
) -> None:
    """11 groups leave an uneven end; the checkpoint's adapter is gathered from both processes."""
    data = write_jsonl(example_rows(11))
    whole = run(base, data, tmp_path / "one", 1)
    sharded = run(base, data, tmp_path / "two", 2)
    assert len(whole) == len(sharded) == 8
    for first, second in zip(whole, sharded, strict=True):
        assert second == pytest.approx(first, rel=1e-4, abs=1e-5)
    name = "last-adapter/adapter_model.safetensors"
    expected, found = load_file(tmp_path / "one" / name), load_file(tmp_path / "two" / name)
    for key, weight in expected.items():
        torch.testing.assert_close(found[key], weight, rtol=1e-4, atol=1e-5, msg=key)

    datamodule = PreferenceDataModule(tokenizer=base, train=data)
    datamodule.setup("fit")
    batch = datamodule.datasets["train"][StepGroups([0, 1, 2], counted=True)]
    with torch.no_grad():
        of_base = plain_logps(AutoModelForCausalLM.from_pretrained(base), batch).float()
    reference = torch.load(tmp_path / "two" / "reference.pt")
    torch.testing.assert_close(reference, of_base, rtol=0, atol=1e-4)
