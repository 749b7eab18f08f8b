"""Time and memory of a run in a process of its own."""

from pathlib import Path

import pytest

from mpo_lightning.losses import MPO
from mpo_lightning.studies.lab.training import train
from mpo_lightning.studies.scaling import Cost
from tests.studies.made_up import assert_same


def test_cost(study_worlds: Path) -> None:
    run = Cost(
        seed=0,
        loss=MPO(),
        prompts=16,
        responses=512,
        epochs=1,
        until=None,
        measured_every=8,
    )
    found = run(study_worlds)
    assert_same(found["trajectory"], train(run, study_worlds).trajectory)
    assert found["step_ms"] == pytest.approx(1000 * found["seconds"] / 8)
    # A step holds 2 x 512 responses; it was 79 MiB, and below 25 with two responses.
    assert 40 < found["memory_mib"] < 400
