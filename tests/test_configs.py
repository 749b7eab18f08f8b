"""Every shipped configuration is parsed and instantiated."""

import sys
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

from mpo_lightning import MPOModule, PreferenceDataModule
from mpo_lightning.cli import MPOCLI

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_config_is_parsed_and_instantiated(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["mpo-lightning"])
    monkeypatch.chdir(tmp_path)
    # Everything up to running: model, data and trainer are made, nothing is loaded.
    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda self, name: None)
    cli = MPOCLI(
        MPOModule,
        PreferenceDataModule,
        auto_configure_optimizers=False,
        args=["fit", "--config", str(path)],
    )
    named = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert cli.model.policy_config.base == named["model"]["policy"]["base"]
    assert cli.datamodule.tokenizer_path == named["model"]["policy"]["base"]
    assert cli.datamodule.sources["train"] == [named["data"]["train"]]


def test_there_are_configs() -> None:
    assert CONFIGS
