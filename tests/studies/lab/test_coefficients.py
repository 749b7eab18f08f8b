"""Coefficient maps against finite differences, and their measures written out."""

from pathlib import Path

import pytest
import torch

from mpo_lightning.losses import DPO, IPO, MPO, InfoNCA, SetLoss
from mpo_lightning.studies.lab.coefficients import CoefficientMap, coefficients
from mpo_lightning.studies.lab.training import PRIMARY
from mpo_lightning.studies.world.judges import NoisyJudge
from mpo_lightning.studies.world.measures import Yardstick
from mpo_lightning.studies.world.world import GroupSampling, load_world


@pytest.mark.parametrize(
    "loss",
    [MPO(alpha=0.7, alpha_unit="std"), DPO(pairs="all"), InfoNCA(temperature=0.5)],
    ids=["MPO", "DPO", "InfoNCA"],
)
def test_coefficients_are_slopes(loss: SetLoss) -> None:
    generator = torch.Generator().manual_seed(0)
    log_ratios, scores = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    found = coefficients(loss, log_ratios, scores)
    valid = torch.ones(3, 4, dtype=torch.bool)
    for group in range(3):
        for response in range(4):
            step = torch.zeros(3, 4, dtype=torch.float64)
            step[group, response] = 1e-5
            above, below = (loss(log_ratios + sign * step, scores, valid).sum() for sign in (1, -1))
            slope = (above - below).item() / 2e-5
            assert found[group, response].item() == pytest.approx(-slope, abs=1e-7)


def test_measures_written_out(study_worlds: Path) -> None:
    task = CoefficientMap(seed=0, loss=MPO(beta=1.0), prompts=8, responses=5)
    found = task(study_worlds)
    world = load_world(study_worlds, 0)
    prompts = world.trained(8)
    drawn = world.sample(prompts, 5, GroupSampling())
    scores = NoisyJudge()(world, prompts, drawn)
    gold = world.gold()
    ideal = Yardstick(world.reference[prompts], gold[prompts], world.grammar.attributes)
    moved = (ideal.ideal(PRIMARY) - world.reference[prompts]).gather(1, drawn)
    signal = power = 0.0
    at_zero, at_ideal = [], []
    for group in range(8):
        chosen = (scores[group] > scores[group].mean()).tolist()
        weights = moved[group].exp().tolist()
        good = sum(w for w, c in zip(weights, chosen, strict=True) if c)
        for i in range(5):
            # At log-ratios of zero: the share in the chosen set less that in the group.
            push = chosen[i] / sum(chosen) - 1 / 5
            signal += push * gold[prompts[group], drawn[group, i]].item() / 8
            power += push**2 / 8
            at_zero.append(push)
            at_ideal.append(chosen[i] * weights[i] / good - weights[i] / sum(weights))
    assert found["snr"] == pytest.approx(signal / power**0.5, rel=1e-6)
    cosine = torch.cosine_similarity(torch.tensor(at_zero), torch.tensor(at_ideal), dim=0).item()
    assert found["cosine"] == pytest.approx(cosine, abs=1e-5)


def test_what_is_linear_and_what_a_population_teaches(study_worlds: Path) -> None:
    def of(loss: SetLoss, responses: int = 10) -> dict[str, float]:
        return CoefficientMap(seed=0, loss=loss, prompts=32, responses=responses)(study_worlds)

    weak, strong, ipo = of(MPO(beta=0.1)), of(MPO(beta=1.0)), of(IPO(beta=0.1, pairs="all"))
    assert weak["cosine"] > 0.97 > strong["cosine"] + 0.02
    assert ipo["cosine"] < weak["cosine"]
    # The scale of a loss, which beta is here, is no direction.
    assert weak["snr"] == pytest.approx(strong["snr"], rel=1e-4)
    # No tilt by gold in bins is above gold's own, and the best against the worst loses by n.
    world = load_world(study_worlds, 0)
    held_out = world.held_out
    ideal = Yardstick(world.reference[held_out], world.gold()[held_out], world.grammar.attributes)
    shares = ideal.ideal(0.25).exp()
    most = (shares * world.gold()[held_out]).sum(1).mean().item()
    few, many = (of(DPO(beta=0.1), n)["population_gold"] for n in (4, 32))
    assert many < few < most
    assert 0.9 * most < weak["population_gold"] < most
