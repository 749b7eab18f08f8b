"""What the README says runs as it stands."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from mpo_lightning.cli import main
from mpo_lightning.losses import SetLoss
from tests.conftest import example_rows

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def workplace(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the README names, its model being a small real one."""
    for name, seed in (("train", 0), ("val", 1), ("test", 2)):
        lines = "\n".join(json.dumps(row) for row in example_rows(6, seed=seed))
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    (recipe,) = blocks("yaml")
    (tmp_path / "recipe.yaml").write_text(recipe.replace("path/or/hub-id", base), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mpo-lightning"])
    return tmp_path


def commands() -> list[list[str]]:
    text = next(block for block in blocks("sh") if "mpo-lightning validate" in block)
    return [shlex.split(line, comments=True) for line in text.replace("\\\n", "").splitlines()]


def test_commands_run_in_their_order(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = commands()
    assert [command[1] for command in found] == ["fit", "fit", "validate", "predict", "fit"]
    for command in found:
        assert command[0] == "mpo-lightning"
        arguments = [*command[1:], "--trainer.accelerator=cpu"]
        if "--print_config" in arguments:
            with pytest.raises(SystemExit) as stopped:
                main(arguments)
            assert stopped.value.code == 0
        else:
            main(arguments)
    assert (workplace / "predictions.parquet").is_file()
    assert (workplace / "runs/first/checkpoints/last-adapter/adapter_config.json").is_file()
    assert "beta: 0.1" in capsys.readouterr().out


def test_python_example_trains(workplace: Path, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code = next(block for block in blocks("python") if "Trainer(" in block)
    quiet: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False}

    def cpu_trainer(**settings: Any) -> Trainer:
        return Trainer(**settings, **quiet)

    monkeypatch.setattr("lightning.pytorch.Trainer", cpu_trainer)
    names: dict[str, Any] = {}
    exec(code.replace("path/or/hub-id", base), names)
    assert names["module"].trainer.global_step == 1
    assert not names["module"].policy.is_untrained()


def test_own_loss_example_is_a_loss() -> None:
    code = next(block for block in blocks("python") if "MeanMargin" in block)
    assert len(code.splitlines()) < 20
    names: dict[str, Any] = {}
    exec(code, names)
    loss: SetLoss = names["MeanMargin"](beta=2.0)
    ratios = torch.tensor([[0.5, 0.1, -0.3, torch.nan]])
    scores = torch.tensor([[3.0, 1.0, 1.0, torch.nan]])
    valid = torch.tensor([[True, True, True, False]])
    # 2 * (0.5 - (0.1 - 0.3) / 2) = 1.2
    assert loss(ratios, scores, valid).item() == pytest.approx(
        torch.nn.functional.softplus(torch.tensor(-1.2)).item()
    )


def test_own_loss_example_trains_from_a_file(workplace: Path) -> None:
    code = next(block for block in blocks("python") if "MeanMargin" in block)
    (workplace / "my_loss.py").write_text(code, encoding="utf-8")
    command = [str(Path(sys.executable).with_name("mpo-lightning")), "fit", "--config=recipe.yaml"]
    options = ["--model.loss=my_loss.MeanMargin", "--trainer.accelerator=cpu"]
    result = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    config = next(workplace.glob("runs/first/lightning_logs/*/config.yaml"))
    assert "class_path: my_loss.MeanMargin" in config.read_text(encoding="utf-8")


def test_numbers_of_the_real_model_are_those_that_are_kept() -> None:
    kept = json.loads((ROOT / "docs/results/showcase/report.json").read_text("utf-8"))["compared"]

    def short(value: float) -> str:
        return f"{value:.2f}".removeprefix("0")

    share = kept["test"]["share of constraints met"]
    both = kept["test"]["both met"]
    others = kept["other-kinds"]["share of constraints met"]["difference"]
    gain = share["difference"]
    said = " ".join(README.split())
    for part in (
        f"from {short(share['before']['value'])} to {short(share['after']['value'])}, "
        f"+{short(gain['value'])} [{short(gain['low'])}, {short(gain['high'])}]",
        f"from {short(both['before']['value'])} to {short(both['after']['value'])}",
        f"{short(others['value'])} [{short(others['low'])}, {short(others['high'])}]",
    ):
        assert part in said, part
