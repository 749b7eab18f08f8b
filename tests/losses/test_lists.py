"""Losses with targets and over levels: numbers by hand, special cases, stationary points."""

import math
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid

from mpo_lightning.losses import DPO, GVPO, NCA, EachAgainstBelow, InfoNCA, PlackettLuce
from tests.losses.family import full, ragged, row, value_and_gradient, value_of
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


def test_gvpo_by_hand() -> None:
    """T = 7, 6, 5 and beta r = 4.5, 4, 3.5: less their means the errors are -1/2, 0, 1/2.

    The loss is 1/6; the gradient 2 beta error / 3 = -1/6, 0, 1/6.
    """
    loss = GVPO(beta=0.5, temperature=2)
    values, gradient = value_and_gradient(loss, row(9, 8, 7), row(14, 12, 10))
    assert values.item() == pytest.approx(1 / 6, rel=1e-12)
    assert gradient[0].tolist() == pytest.approx([-1 / 6, 0, 1 / 6], rel=1e-12, abs=1e-15)


def test_a_star_po_by_hand() -> None:
    """Beta tau = 1 and S = ln 3, 0: V = ln 2, so beta r is to be (ln 3/2)/2 and (ln 1/2)/2."""
    loss = GVPO(beta=0.5, temperature=2, target="advantage")
    targets = [math.log(3 / 2) / 2, math.log(1 / 2) / 2]
    values, gradient = value_and_gradient(loss, row(0, 0), row(math.log(3), 0))
    assert values.item() == pytest.approx(sum(t * t for t in targets) / 2, rel=1e-12)
    assert gradient[0].tolist() == pytest.approx([-0.5 * t for t in targets], rel=1e-12)


def test_qrpo_by_hand() -> None:
    """Scores 5, 1, 1, -7 have quantiles 7/8, 1/2, 1/2, 1/8; with beta tau = 1, Z = e - 1."""
    loss = GVPO(beta=0.5, temperature=2, target="quantile")
    targets = [(q - math.log(math.e - 1)) / 2 for q in (7 / 8, 1 / 2, 1 / 2, 1 / 8)]
    values, gradient = value_and_gradient(loss, row(0, 0, 0, 0), row(5, 1, 1, -7))
    assert values.item() == pytest.approx(sum(t * t for t in targets) / 4, rel=1e-12)
    assert gradient[0].tolist() == pytest.approx([-0.25 * t for t in targets], rel=1e-12)


TARGETS: list[Any] = ["centred", "advantage", "quantile"]


@pytest.mark.parametrize("target", TARGETS)
def test_gvpo_is_zero_at_its_targets_and_nowhere_near(target: Any) -> None:
    scores = row(3.0, 1.0, 1.0, -2.0)
    loss = GVPO(beta=0.3, temperature=1.5, target=target)
    optimum = loss.targets(scores, full(scores)) / 0.3
    if target == "centred":  # where InfoNCA has its optimum
        torch.testing.assert_close(optimum - optimum[:, :1], (scores - 3) / 1.5 / 0.3)
        optimum = optimum + 40
    value, gradient = value_and_gradient(loss, optimum, scores)
    assert value.item() == pytest.approx(0, abs=1e-24)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-13)
    moves = [row(0.1, 0, 0, 0), row(0, 0, 0, -0.1), row(0.1, 0.1, 0.1, 0.1)]
    for move in moves[: 2 if target == "centred" else 3]:
        assert value_of(loss, optimum + move, scores) > 1e-5


def test_a_star_pos_targets_are_a_policys_that_sums_to_one_over_the_group() -> None:
    log_ratios, scores, valid = ragged()
    loss = GVPO(beta=0.3, temperature=1.5, target="advantage")
    shares = torch.where(valid, (loss.targets(scores, valid) / 0.3).exp(), 0.0).sum(1)
    torch.testing.assert_close(shares / valid.sum(1), torch.ones(60).double())
    # With beta = 1 they are NCA's too: beta r = log(n t).
    same = GVPO(beta=1.0, temperature=1.5, target="advantage").targets(scores, valid)
    nca = NCA(beta=1.0, temperature=1.5)
    _, gradient = value_and_gradient(nca, same, scores, valid)
    assert gradient.abs().max() < 1e-13
    assert value_and_gradient(nca, log_ratios, scores, valid)[1].abs().max() > 0.1


@pytest.mark.parametrize("strength", [1e-3, 0.1, 100.0])
def test_qrpos_targets_are_a_policys_that_sums_to_one_over_uniform_quantiles(
    strength: float,
) -> None:
    """The targets are a line in the quantile: over quantiles spread evenly mean exp(r) is 1."""
    loss = GVPO(beta=strength / 2, temperature=2.0, target="quantile")
    top, bottom = (loss.targets(row(1, 0), full(row(1, 0))) / loss.beta)[0].tolist()
    # Quantiles 3/4 and 1/4 give the line r = slope * q + start.
    slope = 2 * (top - bottom)
    grid = (torch.arange(100_000).double() + 0.5) / 100_000
    log_ratios = bottom + slope * (grid - 0.25)
    assert log_ratios.logsumexp(0).item() - math.log(100_000) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("offset", [-7.0, 1e6 + 0.1])
def test_gvpo_does_not_see_the_origin_of_scores(target: Any, offset: float) -> None:
    log_ratios, scores, valid = ragged()
    loss = GVPO(beta=0.3, target=target)
    found = loss(log_ratios, scores + offset, valid)
    torch.testing.assert_close(found, loss(log_ratios, scores, valid), rtol=1e-8, atol=1e-8)


def test_gvpo_is_rebel_on_all_pairs() -> None:
    log_ratios, scores = 4 * torch.randn(20, 5).double(), torch.randn(20, 5).double()
    errors = 0.3 * log_ratios - scores
    pairs = (errors[:, :, None] - errors[:, None, :]).square().sum((1, 2)) / (2 * 25)
    torch.testing.assert_close(GVPO(beta=0.3)(log_ratios, scores, full(scores)), pairs)


def test_each_against_below_by_hand() -> None:
    """Scores 3, 2, 2, 1 and masses 2, 1, 3, 1: terms ln(7/2), ln 2, ln(4/3); the lowest has none.

    Lacking 5/7, 1/2, 1/4; each gives a third of it up, and the lower share what it lacks.
    """
    loss = EachAgainstBelow(beta=0.5)
    log_ratios = row(*(2 * math.log(mass) for mass in (2, 1, 3, 1)))
    values, gradient = value_and_gradient(loss, log_ratios, row(3, 2, 2, 1))
    expected = (math.log(7 / 2) + math.log(2) + math.log(4 / 3)) / 3
    assert values.item() == pytest.approx(expected, rel=1e-12)
    by_hand = [-5 / 7, -1 / 2 + 1 / 7, -1 / 4 + 3 / 7, 1 / 2 + 1 / 4 + 1 / 7]
    assert gradient[0].tolist() == pytest.approx([g / 6 for g in by_hand], rel=1e-12)


def test_ties_of_each_against_below_are_asked_for_one_by_one() -> None:
    """Of two tied best, one that leads satisfies Plackett-Luce, which goes on pushing it."""
    scores, log_ratios = row(2, 2, 1), row(9, -9, 0)
    for loss, stronger in ((EachAgainstBelow(beta=1.0), 1), (PlackettLuce(beta=1.0), 0)):
        _, gradient = value_and_gradient(loss, log_ratios, scores)
        assert gradient[0, stronger] < 100 * gradient[0, 1 - stronger]
