"""InfoNCA and NCA: numbers by hand, special cases, stationary points."""

import math
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid

from mpo_lightning.losses import DPO, NCA, InfoNCA
from tests.losses.family import full, row, value_and_gradient, value_of
from tests.losses.oracle import plain_shares


def test_info_nca_by_hand() -> None:
    """Temperature 2, S = 2 ln 3, 0: t = 3/4, 1/4. beta = 1/2, r = 0, 2 ln 4: shares 1/5, 4/5.

    The loss is 3/4 ln 5 + 1/4 ln 5/4; the gradient beta (share - t) = -11/40, +11/40.
    """
    values, gradient = value_and_gradient(
        InfoNCA(beta=0.5, temperature=2), row(0, 2 * math.log(4)), row(2 * math.log(3), 0)
    )
    assert values.item() == pytest.approx(math.log(5) - math.log(4) / 4, rel=1e-12)
    assert gradient[0].tolist() == pytest.approx([-11 / 40, 11 / 40], rel=1e-12)


def test_nca_by_hand() -> None:
    """Temperature 1, S = ln 3, 0: t = 3/4, 1/4. beta = 1, r = ln 3, 0: sigmoids 3/4, 1/2.

    The loss is -[3/4 ln 3/4 + 1/2 ln 1/4] - [1/4 ln 1/2 + 1/2 ln 1/2]; the gradient
    beta (sigmoid (t + 1/n) - t) = 3/4 * 5/4 - 3/4, 1/2 * 3/4 - 1/4 = 3/16, 1/8.
    """
    values, gradient = value_and_gradient(
        NCA(beta=1, temperature=1), row(math.log(3), 0), row(math.log(3), 0)
    )
    expected = -0.75 * math.log(0.75) - 0.5 * math.log(0.25) - 0.75 * math.log(0.5)
    assert values.item() == pytest.approx(expected, rel=1e-12)
    assert gradient[0].tolist() == pytest.approx([3 / 16, 1 / 8], rel=1e-12)


def test_nca_of_a_sharp_pair_is_the_nca_pair_of_trl() -> None:
    log_ratios = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)).double() * 9
    scores = row(1.0, 0.0).repeat(50, 1)
    found = NCA(beta=0.3, temperature=1e-4)(log_ratios, scores, full(scores))
    winner, loser = (0.3 * log_ratios).unbind(1)
    expected = -logsigmoid(winner) - 0.5 * logsigmoid(-winner) - 0.5 * logsigmoid(-loser)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("pairs", ["best-worst", "all"])
def test_dpo_of_a_sharp_pair_is_info_nca(pairs: Any) -> None:
    log_ratios, scores = row(1.5, -2.0), row(1.0, 0.0)
    found = value_of(InfoNCA(beta=0.3, temperature=1e-4), log_ratios, scores)
    expected = value_of(DPO(beta=0.3, pairs=pairs), log_ratios, scores)
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("constant", [0.0, -3.0, 40.0])
def test_info_nca_is_stationary_at_the_scores_up_to_a_constant(constant: float) -> None:
    scores = row(3.0, 1.0, 1.0, -2.0)
    loss = InfoNCA(beta=0.3, temperature=1.5)
    optimum = (scores / 1.5 + constant) / 0.3
    _, gradient = value_and_gradient(loss, optimum, scores)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-14)
    for slot in range(4):
        moved = optimum.clone()
        moved[0, slot] += 0.1
        assert value_of(loss, moved, scores) > value_of(loss, optimum, scores)


def test_nca_is_stationary_at_absolute_values() -> None:
    """At beta r = ln(n t), with t from plain Python; a constant more is not stationary."""
    scores = row(3.0, 1.0, 1.0, -2.0)
    loss = NCA(beta=0.3, temperature=1.5)
    targets = plain_shares([2.0, 2 / 3, 2 / 3, -4 / 3])
    optimum = row(*(math.log(4 * t) / 0.3 for t in targets))
    _, gradient = value_and_gradient(loss, optimum, scores)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-14)
    for move in (row(0.1, 0, 0, 0), row(0, 0, 0, 0.1), row(0.1, 0.1, 0.1, 0.1)):
        for moved in (optimum + move, optimum - move):
            assert value_of(loss, moved, scores) > value_of(loss, optimum, scores)
