"""Exact measures against sums written out, on a small space of responses."""

import pytest
import torch
from torch import Tensor

from mpo_lightning.losses import AboveMean
from mpo_lightning.losses.base import LossOutput, Measured
from mpo_lightning.studies.world.measures import Yardstick, at_divergence, group_measures
from mpo_lightning.training.metrics import group_statistics


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def yardstick() -> Yardstick:
    gold = normal(3, 6, seed=1)
    # Ties count half.
    gold[0, 2] = gold[0, 4]
    return Yardstick(normal(3, 6, seed=0).log_softmax(1), gold, normal(6, 2, seed=2).sign())


def test_measures_written_out(yardstick: Yardstick) -> None:
    logps = normal(3, 6, seed=3).log_softmax(1)
    found = yardstick(logps)
    p, q, gold = logps.exp().tolist(), yardstick.reference.exp().tolist(), yardstick.gold.tolist()
    kl = gain = wins = 0.0
    for x in range(3):
        for i in range(6):
            kl += p[x][i] * (logps[x, i] - yardstick.reference[x, i]).item() / 3
            gain += p[x][i] * gold[x][i] / 3
            for j in range(6):
                better = float(gold[x][i] > gold[x][j]) + 0.5 * (gold[x][i] == gold[x][j])
                wins += p[x][i] * q[x][j] * better / 3
    assert found["kl"] == pytest.approx(kl)
    assert found["gold"] == found["gold_of_all"] == pytest.approx(gain)
    assert found["win_rate"] == pytest.approx(wins)
    acceptable = torch.zeros(2, dtype=torch.float64)
    of_policy = torch.zeros(2, dtype=torch.float64)
    for x in range(3):
        mean = sum(a * b for a, b in zip(q[x], gold[x], strict=True))
        members = [i for i in range(6) if gold[x][i] > mean]
        mass = sum(q[x][i] for i in members)
        acceptable += sum(q[x][i] * yardstick.attributes[i] for i in members) / mass / 3
        of_policy += sum(p[x][i] * yardstick.attributes[i] for i in range(6)) / 3
    off = (of_policy - acceptable).abs().mean().item()
    assert found["acceptable_bias"] == pytest.approx(off)


def test_measures_are_of_the_responses(yardstick: Yardstick) -> None:
    logps = normal(3, 6, seed=3).log_softmax(1)
    # Each prompt leaves the responses by another share.
    kept = torch.tensor([[0.9], [0.5], [1.0]], dtype=torch.float64)
    inside, found = yardstick(logps), yardstick(logps + kept.log())
    assert found["outside"] == pytest.approx(0.2)
    assert inside["outside"] == pytest.approx(0)
    for name in set(found) - {"outside", "gold_of_all"}:
        assert found[name] == pytest.approx(inside[name], abs=1e-9), name
    gold = (logps.exp() * yardstick.gold).sum(1, keepdim=True)
    worst = yardstick.gold.amin(1, keepdim=True)
    of_all = (kept * gold + (1 - kept) * worst).mean().item()
    assert found["gold_of_all"] == pytest.approx(of_all)
    assert of_all < found["gold"]


def test_gaps_are_the_bias_with_its_signs(yardstick: Yardstick) -> None:
    logps = normal(3, 6, seed=5).log_softmax(1)
    found = yardstick(logps)
    ideal = yardstick.ideal(found["kl"]).exp()
    for number in range(2):
        gap = sum(
            (logps[x, i].exp() - ideal[x, i]).item() * yardstick.attributes[i, number].item() / 3
            for x in range(3)
            for i in range(6)
        )
        assert found[f"gap {number}"] == pytest.approx(gap / (2 * found["kl"]) ** 0.5)
    gaps = [abs(found[f"gap {number}"]) for number in range(2)]
    assert found["bias"] == pytest.approx(sum(gaps) / 2)


def test_ideal_is_the_best_of_its_divergence(yardstick: Yardstick) -> None:
    logps = normal(3, 6, seed=4).log_softmax(1)
    found = yardstick(logps)
    ideal = yardstick.ideal(found["kl"])
    assert yardstick.divergence(ideal) == pytest.approx(found["kl"], abs=1e-6)
    assert found["ideal_gold"] > found["gold"]
    of_itself = yardstick(ideal)
    assert of_itself["gold"] == pytest.approx(of_itself["ideal_gold"], abs=1e-6)
    assert of_itself["bias"] == pytest.approx(0, abs=1e-6)
    assert of_itself["distance"] == pytest.approx(0, abs=1e-6)
    assert of_itself["rarity"] == pytest.approx(0, abs=1e-6)
    for seed in range(20):
        # A policy as far from the reference, in another direction.
        direction = yardstick.gold + 0.3 * normal(3, 6, seed=seed + 10)
        other = Yardstick(yardstick.reference, direction, yardstick.attributes)
        near = other.ideal(found["kl"])
        gold = (near.exp() * yardstick.gold).sum(1).mean().item()
        assert gold < found["ideal_gold"]


def test_reference_measures_nothing(yardstick: Yardstick) -> None:
    found = yardstick(yardstick.reference)
    assert found["win_rate"] == pytest.approx(0.5)
    assert found["kl"] == pytest.approx(0)
    assert found["bias"] == pytest.approx(0, abs=1e-3)
    assert found["distance"] == pytest.approx(0, abs=1e-5)


def test_group_measures_are_those_of_the_metrics() -> None:
    log_ratios, scores = normal(8, 5, seed=0), normal(8, 5, seed=1)
    scores[3] = 1.0
    valid = torch.ones(8, 5, dtype=torch.bool)
    chosen, rejected = AboveMean()(scores, valid)
    measured = Measured(
        policy_logps=log_ratios,
        reference_logps=torch.zeros(8, 5),
        lengths=valid.long(),
        scores=scores,
        valid=valid,
    )
    output = LossOutput(torch.zeros(8), 0.5 * log_ratios, chosen, rejected)
    statistics = group_statistics(measured, output)
    found = group_measures(log_ratios, chosen, 0.5)
    for name, metric in (
        ("effective_chosen", "effective_chosen"),
        ("chosen_shift", "logps/chosen"),
        ("rejected_shift", "logps/rejected"),
    ):
        values, weights = statistics[metric]
        expected = ((values * weights).sum() / weights.sum()).item()
        assert found[name] == pytest.approx(expected, rel=1e-5)


def test_at_divergence() -> None:
    points = [{"kl": kl, "gold": gold} for kl, gold in ((0, 0), (0.25, 1), (0.16, 5), (4, 3))]
    assert at_divergence(points, 0.25) == {"kl": 0.25, "gold": 1}
    # Half way between 0.4 and 2 in root kl; the step back in between is not a crossing.
    found = at_divergence(points, 1.44)
    assert found is not None
    assert found["gold"] == pytest.approx(4)
    assert at_divergence(points, 0.04) == pytest.approx({"kl": 0.1, "gold": 0.4})
    assert at_divergence(points, 4.1) is None
