"""The run that is prepared for a GPU, with tiny models on the CPU: so that it cannot rot."""

import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

# The benchmarks lie beside the package, not in it.
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.gpu import correctness
from benchmarks.gpu.correctness import ARCHITECTURES, PRECISIONS, Errors
from benchmarks.gpu.jobs import Notes, Runner
from benchmarks.gpu.report import failures, markdown
from benchmarks.gpu.speed import LlamaShape
from benchmarks.gpu.strategies import _compare

from mpo_lightning.model import logps


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """Results and page of the whole run."""
    out = tmp_path_factory.mktemp("gpu")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    # As it forks, in a process that is not this one.
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--device", "cpu", "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert (out / "gpu.png").stat().st_size > 10_000
    page = (out / "gpu.md").read_text(encoding="utf-8")
    return json.loads((out / "gpu.json").read_text(encoding="utf-8")), page


def test_every_architecture_is_compared_in_every_precision(
    ran: tuple[dict[str, Any], str],
) -> None:
    rows = [row for row in ran[0]["rows"] if row["part"] == "correctness"]
    found = {(row["architecture"], row["precision"], row["layout"]) for row in rows}
    expected = set()
    for name in ARCHITECTURES:
        once = "continued" if name == "qwen3_5_text" else "shared"
        for layout in ("own", "separate", once, f"{once}, 2 a pass"):
            expected |= {(name, precision, layout) for precision in PRECISIONS}
    assert found == expected
    for row in rows:
        assert row["ok"], row
        assert 0 < row["gradient"] < (1e-4 if row["precision"] == "float32" else 0.2), row
        assert row["kernels"], row


def test_killed_run_resumes_bit_for_bit_on_the_cpu(ran: tuple[dict[str, Any], str]) -> None:
    (row,) = [row for row in ran[0]["rows"] if row["part"] == "strategies"]
    assert row["bit_for_bit"]
    assert row["ok"]
    assert len(set(row["losses"])) > 3


def test_steps_are_timed(ran: tuple[dict[str, Any], str]) -> None:
    rows = [row for row in ran[0]["rows"] if row["part"] == "speed"]
    assert {row["method"] for row in rows} == {
        "ours, shared, nf4",
        "ours, separate, bf16",
        "ours, shared by masks, bf16",
        "TRL, bf16",
    }
    timed = [row for row in rows if "seconds" in row]
    left_out = {row["method"] for row in rows if "left_out" in row}
    assert left_out == set() if find_spec("trl") else {"TRL, bf16"}
    for row in timed:
        assert 0 < row["least"] <= row["seconds"] <= row["most"]
        assert row["peak_mib"] > 50
        if row["method"].startswith("ours"):
            assert 0 < row["share_of_rate"] < 1
        if row["n"] == 8:
            inside = row["time_in"]
            assert sum(inside.values()) == pytest.approx(1, abs=1e-3)
            assert min(inside["attention"], inside["products"]) > 0.02
    assert {row.get("responses_per_pass") for row in timed if row["n"] == 32} == {None, 8}


def test_page_holds_it_all(ran: tuple[dict[str, Any], str]) -> None:
    results, page = ran
    assert page == markdown(results) + "\n"
    assert "No failures." in page
    for part in ("## Exactness", "## Killed and resumed", "## Seconds and memory of a step"):
        assert part in page


# ------------------------------------------------------------------------------- what goes wrong


FAILS = """
import time

def fails(settings, notes):
    with notes.attempt(case="first"):
        raise ValueError("this case is wrong")
    notes.add(case="second")
    time.sleep(settings["sleep"])
    raise RuntimeError("and then the whole")
"""


@pytest.mark.parametrize(("sleep", "complaint"), [(0, "exit status 1"), (60, "its time was up")])
def test_what_a_process_had_is_kept_with_what_became_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sleep: float, complaint: str
) -> None:
    (tmp_path / "wrong.py").write_text(FAILS, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    # Python is started anew, as with CUDA.
    runner = Runner(tmp_path / "jobs", fork=False, deadline=time.monotonic() + 60)
    outcome = runner.run("wrong:fails", {"sleep": sleep}, 3)
    first, second = outcome.rows
    assert "ValueError: this case is wrong" in first["error"]
    assert second == {"case": "second"}
    assert complaint in (outcome.complaint() or "")
    assert ("and then the whole" in outcome.log) == (sleep == 0)
    assert failures([first, second, {"ok": False}, {"ok": True}]) == [first, {"ok": False}]


def test_wrong_layout_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = logps.shared_row

    def shifted(batch: Any, **settings: bool) -> Any:
        rows = right(batch, **settings)
        # Responses begin one position late.
        positions = rows.inputs["position_ids"]
        inputs = {**rows.inputs, "position_ids": positions + (positions >= 11)}
        return rows._replace(inputs=inputs)

    monkeypatch.setattr(logps, "shared_row", shifted)
    monkeypatch.setattr(correctness, "PRECISIONS", ("bf16",))
    notes = tmp_path / "rows.jsonl"
    correctness.check({"architectures": ["llama"], "tiny": True, "device": "cpu"}, Notes(notes))
    lines = notes.read_text(encoding="utf-8").splitlines()
    verdicts = {row["layout"]: row["ok"] for row in map(json.loads, lines)}
    assert verdicts == {"own": True, "separate": True, "shared": False, "shared, 2 a pass": False}


def test_errors_are_judged_by_those_of_the_models_own_logits() -> None:
    own = Errors(value=0.01, worst_value=0.02, gradient=0.05, worst_gradient=0.1)
    rounding = (1e-3, 1e-2)
    assert own._replace(value=0.029, gradient=0.09).within(own, rounding)
    assert not own._replace(value=0.031).within(own, rounding)
    assert not own._replace(gradient=0.11).within(own, rounding)
    assert not own._replace(gradient=float("nan")).within(own, rounding)
    assert Errors(9e-4, 1, 9e-3, 1).within(Errors(0, 0, 0, 0), rounding)


def test_runs_that_differ_are_told_apart(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    def left(name: str, weight: float, losses: list[float]) -> Path:
        folder = tmp_path / name / "checkpoints" / "last-adapter"
        folder.mkdir(parents=True)
        weights = {"lora_B": torch.tensor([3.0, weight]), "lora_A": torch.ones(2)}
        save_file(weights, folder / "adapter_model.safetensors")
        text = "\n".join(["train/loss", *map(str, losses)])
        (tmp_path / name / "metrics.csv").write_text(text, encoding="utf-8")
        return tmp_path / name

    whole = left("whole", 4.0, [6, 5, 4, 3, 2, 1])
    same = _compare(whole, left("same", 4.0, [2, 1]), 0.0)
    assert same["ok"]
    assert same["bit_for_bit"]
    other = _compare(whole, left("other", 4.5, [2, 1.5]), 0.02)
    assert other["difference"] == pytest.approx(0.1)
    assert other["loss_difference"] == 0.5
    assert not other["ok"]
    # It began anew.
    assert not _compare(whole, left("anew", 4.0, [6, 5, 4, 3, 2, 1]), 0.02)["ok"]


def test_sizes_are_those_of_llama_3_8b() -> None:
    shape = LlamaShape()
    weights = shape.layers * sum(a * b for a, b in shape.linears())
    assert weights + 2 * shape.vocabulary * shape.hidden == pytest.approx(8.03e9, rel=1e-3)
