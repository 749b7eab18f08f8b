"""Training runs of the studies: through the product, measured exactly, the same each time."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mpo_lightning.losses import MPO
from mpo_lightning.studies.lab.training import TrainingResult, TrainingRun, train
from mpo_lightning.studies.world.judges import NoisyJudge
from mpo_lightning.studies.world.world import GroupSampling
from tests.studies.made_up import assert_same

RUN = TrainingRun(seed=0, loss=MPO(), lr=2e-3, prompts=32, responses=4, epochs=2, measured_every=8)


@pytest.fixture(scope="module")
def result(study_worlds: Path) -> TrainingResult:
    return train(RUN, study_worlds)


def test_trajectory(result: TrainingResult) -> None:
    assert [point["step"] for point in result.trajectory] == [0, 8, 16]
    assert (result.groups, result.dropped) == (32, 0)
    assert result.seconds > 0
    start, _, end = result.trajectory
    # A fresh adapter is the reference.
    assert start["kl"] == pytest.approx(0, abs=1e-6)
    # But for what it writes that is no response.
    assert start["gold"] == pytest.approx(0, abs=2e-3)
    assert start["effective_chosen"] == pytest.approx(1, abs=1e-4)
    assert end["kl"] > 0.3
    assert 0.1 < end["gold"] < end["ideal_gold"]
    assert end["win_rate"] > 0.5
    assert end["chosen_shift"] > end["rejected_shift"]


def test_equal_runs_are_equal(result: TrainingResult, study_worlds: Path) -> None:
    again = train(RUN, study_worlds)
    assert_same(again.trajectory, result.trajectory)
    # As it is kept and read again.
    assert json.loads(json.dumps(asdict(again)))["trajectory"] == again.trajectory


def test_slices_and_copies_train_alike(result: TrainingResult, study_worlds: Path) -> None:
    sliced = train(replace(RUN, responses_per_pass=5), study_worlds).trajectory[-1]
    assert sliced == pytest.approx(result.trajectory[-1], abs=2e-3)
    # MPO sees the same in copies of two responses as in the two.
    two = train(replace(RUN, responses=2), study_worlds)
    copied = train(replace(RUN, sampling=GroupSampling(copies=2)), study_worlds)
    assert copied.trajectory[-1] == pytest.approx(two.trajectory[-1], abs=2e-3)


def test_groups_without_contrast_are_counted(study_worlds: Path) -> None:
    judge = NoisyJudge(shape="levels", levels=2)
    run = replace(RUN, responses=2, judge=judge, epochs=1)
    found = train(run, study_worlds)
    assert 5 < found.dropped < 27
    assert found.groups + found.dropped == 32
