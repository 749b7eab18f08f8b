"""Training runs of the studies: through the product, measured exactly, the same each time."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from torch import Tensor

from mpo_lightning.losses import MPO
from mpo_lightning.studies.lab.pairs import FreshPairDPO
from mpo_lightning.studies.lab.training import TrainingResult, TrainingRun, train
from mpo_lightning.studies.world.judges import NoisyJudge
from mpo_lightning.studies.world.world import GroupSampling
from tests.studies.made_up import assert_same

RUN = TrainingRun(
    seed=0, loss=MPO(), lr=2e-3, prompts=32, responses=4, epochs=2, until=None, measured_every=8
)


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
    assert start["gold"] == pytest.approx(0, abs=1e-5)
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


def test_a_run_ends_where_it_is_read(result: TrainingResult, study_worlds: Path) -> None:
    far = (result.trajectory[1]["kl"] + result.trajectory[0]["kl"]) / 2
    found = train(replace(RUN, until=far, measured_every=2), study_worlds).trajectory
    # At the first measurement beyond, and as the longer run was there.
    assert found[-2]["kl"] < far <= found[-1]["kl"]
    assert found[-1]["step"] == 2 * (len(found) - 1) < 8
    # Of a divergence that is not reached, at the last step.
    short = train(replace(RUN, until=50.0), study_worlds).trajectory
    assert_same(short, result.trajectory)


def test_draws_are_other_data_of_the_same_world(result: TrainingResult, study_worlds: Path) -> None:
    other = replace(RUN, sampling=GroupSampling(draw=1), judge=NoisyJudge(draw=1))
    found = train(other, study_worlds).trajectory
    start = result.trajectory[0]
    assert [found[0][m] for m in ("kl", "gold")] == pytest.approx([0, start["gold"]], abs=1e-6)
    assert found[-1]["gold"] != pytest.approx(result.trajectory[-1]["gold"], abs=1e-3)


def test_a_fresh_pair_is_drawn_each_epoch(
    study_worlds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs = []
    drawn = FreshPairDPO.drawn

    def noting(loss: FreshPairDPO, scores: Tensor, valid: Tensor) -> Tensor:
        epochs.append(loss.epoch)
        return drawn(loss, scores, valid)

    monkeypatch.setattr(FreshPairDPO, "drawn", noting)
    train(replace(RUN, loss=FreshPairDPO(), prompts=16), study_worlds)
    assert sorted(set(epochs)) == [0, 1]
    assert epochs.count(1) >= 8


def test_groups_without_contrast_are_counted(study_worlds: Path) -> None:
    judge = NoisyJudge(shape="levels", levels=2)
    run = replace(RUN, responses=2, judge=judge, epochs=1)
    found = train(run, study_worlds)
    assert 5 < found.dropped < 27
    assert found.groups + found.dropped == 32
