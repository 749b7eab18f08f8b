"""Judges: what they change, and what they leave."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mpo_lightning.studies.lab.agreement import Agreement
from mpo_lightning.studies.world.judges import NoisyJudge, SetJudge, SetRule, remedied
from mpo_lightning.studies.world.learnt_judge import LearntJudge
from mpo_lightning.studies.world.world import GroupSampling, StudyWorld, load_world


@pytest.fixture(scope="module")
def world(study_worlds: Path) -> StudyWorld:
    return load_world(study_worlds, 0)


def scores(world: StudyWorld, prompts: int = 200, n: int = 10, **settings: Any) -> Tensor:
    trained = world.trained(prompts)
    return NoisyJudge(**settings)(world, trained, world.sample(trained, n, GroupSampling()))


def test_without_noise_a_judge_gives_gold(world: StudyWorld) -> None:
    trained = world.trained(200)
    drawn = world.sample(trained, 10, GroupSampling())
    torch.testing.assert_close(scores(world, noise=0.0), world.gold()[trained[:, None], drawn])


def test_noise_is_of_the_response(world: StudyWorld) -> None:
    noise = scores(world) - scores(world, noise=0.0)
    assert noise.std() == pytest.approx(1, abs=0.1)
    assert abs(noise.mean()) < 5 / 2000**0.5
    # Of smaller groups and fewer prompts the same.
    torch.testing.assert_close(scores(world, 50, 4), scores(world)[:50, :4])
    trained = world.trained(50)
    twice = world.sample(trained, 2, GroupSampling(copies=2))
    found = NoisyJudge()(world, trained, twice)
    assert torch.equal(found[:, 0], found[:, 1])


def test_another_draw_is_another_judge_of_the_same_kind(world: StudyWorld) -> None:
    noise, other = (scores(world, draw=draw) - scores(world, noise=0.0) for draw in (0, 1))
    assert other.std() == pytest.approx(1, abs=0.1)
    # Five standard errors of a correlation of 2000.
    assert abs(torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1]) < 0.12


def test_judge_of_sets(world: StudyWorld) -> None:
    trained = world.trained(300)
    drawn = world.sample(trained, 6, GroupSampling())
    # The same noise as that of a judge of responses.
    noisy = NoisyJudge()(world, trained, drawn).tolist()
    better = {
        "sum": lambda half: sum(math.exp(score) for score in half),
        "max": max,
        "mean": lambda half: sum(half) / 3,
        "min": min,
    }
    rules: tuple[SetRule, ...] = ("sum", "max", "mean", "min")
    found = {}
    for rule in rules:
        found[rule] = SetJudge(rule=rule)(world, trained, drawn)
        for row, given in zip(noisy, found[rule].tolist(), strict=True):
            one, two = better[rule](row[:3]), better[rule](row[3:])
            # Halves that share their best or worst response are level.
            assert given == [float(one >= two)] * 3 + [float(two >= one)] * 3
    # The best and the worst response often stand in different halves; the sum is near the best.
    agree = {rule: (found[rule] == found["sum"]).double().mean().item() for rule in rules}
    assert agree["max"] > agree["mean"] > agree["min"]
    assert agree["min"] < 0.85


@pytest.mark.parametrize("shape", ["exp", "log", "uniform", "bimodal", "rank"])
def test_shapes_keep_the_order(world: StudyWorld, shape: str) -> None:
    plain, shaped = scores(world), scores(world, shape=shape)
    assert torch.equal(plain.argsort(1), shaped.argsort(1))
    assert not torch.allclose(plain, shaped)


def test_skew_is_where_it_is_said_to_be(world: StudyWorld) -> None:
    def skew(values: Tensor) -> float:
        centred = values - values.mean()
        return (centred.pow(3).mean() / centred.square().mean() ** 1.5).item()

    assert abs(skew(scores(world))) < 0.3
    assert skew(scores(world, shape="exp")) > 1
    assert skew(scores(world, shape="log")) < -1


@pytest.mark.parametrize("levels", [2, 5])
def test_levels_are_equally_likely(world: StudyWorld, levels: int) -> None:
    found = scores(world, shape="levels", levels=levels)
    counts = torch.bincount(found.long().flatten(), minlength=levels)
    assert counts.sum() == 2000
    assert (counts - 2000 / levels).abs().max() <= 1


def test_corruption(world: StudyWorld) -> None:
    plain = scores(world)
    for side, extreme in (("corrupted_tops", plain.amax(1)), ("corrupted_bottoms", plain.amin(1))):
        found = scores(world, **{side: 0.3})
        changed = found != plain
        # Of the half that can be hit: 30 % of 5 of 10, within five standard errors.
        assert abs(changed.double().mean().item() - 0.15) < 5 * (0.3 * 0.7 / 1000) ** 0.5 / 2
        assert torch.equal(found[changed], extreme[:, None].expand_as(found)[changed])
        assert torch.equal(
            scores(world, **{side: 0.05}) != plain,
            changed & (scores(world, **{side: 0.05}) != plain),
        )


def test_taste_and_crowding(world: StudyWorld) -> None:
    trained = world.trained(200)
    drawn = world.sample(trained, 10, GroupSampling())
    liked = scores(world, taste=0.5) - scores(world)
    attribute = world.grammar.attributes[drawn, 0]
    assert (liked[attribute > 0] > 0).all()
    assert torch.corrcoef(torch.stack([liked.flatten(), attribute.flatten()]))[0, 1] > 0.999
    lost = scores(world) - scores(world, crowding=0.5)
    begin = (drawn // 32).tolist()
    for row in range(5):
        expected = [0.5 * (begin[row].count(symbol) - 1) for symbol in begin[row]]
        assert lost[row].tolist() == pytest.approx(expected)


def test_remedies() -> None:
    values = torch.tensor([[3.0, 1.0, 1.0, 7.0], [2.0, 2.0, 2.0, 2.0]], dtype=torch.float64)
    assert torch.equal(remedied(values, "none"), values)
    z = remedied(values, "z-score")
    assert z[0].mean() == pytest.approx(0, abs=1e-12)
    assert z[0].std(correction=0) == pytest.approx(1)
    ranks = remedied(values, "rank")
    # Ranks 2, 0.5, 0.5, 3: ties share.
    spread = torch.tensor([2.0, 0.5, 0.5, 3.0]).std(correction=0)
    assert ranks[0].tolist() == pytest.approx(
        [(r - 1.5) / spread.item() for r in (2.0, 0.5, 0.5, 3.0)]
    )
    assert ranks[1].tolist() == z[1].tolist() == [0.0] * 4


def test_learnt_judge_has_learnt_something(world: StudyWorld, study_worlds: Path) -> None:
    learnt = Agreement(seed=0, judge=LearntJudge(), prompts=64)(study_worlds)
    noisy = Agreement(seed=0, judge=NoisyJudge(), prompts=64)(study_worlds)
    clean = Agreement(seed=0, judge=NoisyJudge(noise=0.0), prompts=64)(study_worlds)
    assert clean["kendall_tau"] > 0.99
    assert clean["same_set"] == 1
    assert 0.2 < learnt["kendall_tau"] < 0.95
    assert 0.3 < noisy["kendall_tau"] < 0.7
    assert (world.folder / "reward-256" / "model.safetensors").is_file()
