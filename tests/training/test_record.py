"""Settings as plain values; the record of a whole run is tested with the export."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from mpo_lightning.files import public_name
from mpo_lightning.losses import MPO, TopBottom
from mpo_lightning.optim import WarmupCosine
from mpo_lightning.training.record import describe, formula


def test_settings_are_plain() -> None:
    found = describe(
        {
            "loss": MPO(beta=0.2, partition=TopBottom(k=3)),
            "betas": (0.9, 0.99),
            "limit": float("inf"),
            "lr": torch.tensor(0.5),
            "optimizer": torch.optim.AdamW,
            "schedule": WarmupCosine(),
            "none": None,
        }
    )
    assert json.loads(json.dumps(found)) == found
    assert found["loss"]["class"] == "mpo_lightning.losses.sets.MPO"
    assert found["loss"]["settings"]["beta"] == 0.2
    assert found["loss"]["settings"]["partition"]["settings"] == {"k": 3}
    assert found["betas"] == [0.9, 0.99]
    assert (found["limit"], found["lr"], found["none"]) == ("inf", 0.5, None)
    assert found["optimizer"] == "torch.optim.adamw.AdamW"


@dataclass(frozen=True, kw_only=True)
class Own(MPO):
    """Another loss than MPO, which does not say which."""


@dataclass(frozen=True, kw_only=True)
class Stated(MPO):
    """Another loss, with its own equation."""

    latex: ClassVar = "L = 0"


def test_a_loss_has_the_equation_of_its_own_class_only() -> None:
    found = formula(MPO())
    assert found is not None
    assert found["title"] == "Multi-Preference Optimization (MPO)"
    assert found["arxiv"] == ["2412.04628"]
    assert formula(Own()) is None
    stated = formula(Stated())
    assert stated is not None
    assert stated["latex"] == "L = 0"


def test_names_without_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data" / "saved").mkdir(parents=True)
    assert public_name(str(tmp_path / "data" / "saved")) == "saved"
    assert public_name(f"{tmp_path / 'data' / 'saved'}:train") == "saved:train"
    monkeypatch.chdir(tmp_path)
    assert public_name("data/saved") == "saved"
    assert public_name("org/name:train") == "org/name:train"
