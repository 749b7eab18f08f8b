"""How sample bias falls with n: independent responses as the theorem says, correlated ones not."""

import math
from pathlib import Path

import pytest
import torch

from mpo_lightning.studies.lab.sample_bias import SampleBias
from mpo_lightning.studies.lab.statistics import log_log_slope
from mpo_lightning.studies.world.world import GroupSampling, load_world

SIZES = (2, 10, 40)


def test_bias_of_independent_responses_falls_as_one_over_root_n(study_worlds: Path) -> None:
    found = SampleBias(seed=0, sizes=SIZES)(study_worlds)
    bias = list(found["acceptable"].values())
    assert log_log_slope(SIZES, bias) == pytest.approx(-0.5, abs=0.03)
    assert log_log_slope(SIZES, list(found["chosen"].values())) == pytest.approx(-0.5, abs=0.1)
    # Means of many are normal: E|mean - true mean| = s root(2 / (pi n)).
    world = load_world(study_worlds, 0)
    gold, shares = world.gold()[world.held_out], world.reference[world.held_out].exp()
    shares = torch.where(gold > (shares * gold).sum(1, keepdim=True), shares, 0.0)
    shares /= shares.sum(1, keepdim=True)
    attributes = world.grammar.attributes
    spread = (shares @ attributes.square() - (shares @ attributes).square()).sqrt().mean().item()
    exact = [spread * math.sqrt(2 / (math.pi * n)) for n in SIZES]
    assert bias == pytest.approx(exact, rel=0.02)


def test_bias_of_correlated_responses_has_a_floor(study_worlds: Path) -> None:
    shared = SampleBias(seed=0, sizes=SIZES, sampling=GroupSampling(shared=0.9))
    found = shared(study_worlds)["chosen"]
    assert found["40"] > 0.75 * found["2"]
