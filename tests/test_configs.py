"""Every shipped configuration is parsed and instantiated."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import DDPStrategy

from mpo_lightning import MPOModule, PreferenceDataModule
from mpo_lightning.commands.run import MPOCLI
from mpo_lightning.strategy import FSDP1, FSDP2

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
OVERLAYS = sorted((ROOT / "configs" / "strategy").glob("*.yaml"))


@pytest.fixture
def instantiate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., MPOCLI]:
    """Everything up to running: model, data and trainer are made, nothing is loaded."""
    monkeypatch.setattr(sys, "argv", ["mpo-lightning"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda self, name: None)

    def make(*args: str) -> MPOCLI:
        return MPOCLI(
            MPOModule, PreferenceDataModule, auto_configure_optimizers=False, args=["fit", *args]
        )

    return make


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_config_is_parsed_and_instantiated(path: Path, instantiate: Callable[..., MPOCLI]) -> None:
    cli = instantiate("--config", str(path))
    named = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert cli.model.policy_config.base == named["model"]["policy"]["base"]
    assert cli.datamodule.tokenizer_path == named["model"]["policy"]["base"]
    assert cli.datamodule.sources["train"] == [named["data"]["train"]]


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda p: str(p.relative_to(ROOT)))
def test_overlay_goes_over_a_recipe(path: Path, instantiate: Callable[..., MPOCLI]) -> None:
    """It changes what it names; on GPUs it would take those that there are."""
    quickstart = str(ROOT / "configs" / "quickstart.yaml")
    cli = instantiate(
        *("--config", quickstart, "--config", str(path)),
        *("--trainer.accelerator=cpu", "--trainer.devices=2"),
    )
    strategies: dict[str, Any] = {
        "single": DDPStrategy,  # what "auto" makes of two devices
        "ddp": DDPStrategy,
        "fsdp2": FSDP2,
        "fsdp2-4bit": FSDP2,
        "fsdp": FSDP1,
    }
    assert type(cli.trainer.strategy) is strategies[path.stem]
    assert cli.model.policy_config.base == "quickstart/base"
    assert cli.model.policy_config.quantization == ("nf4" if "4bit" in path.stem else "none")


def test_there_are_configs() -> None:
    assert CONFIGS
    assert len(OVERLAYS) == 5
