"""MPO and its relatives on two sets: numbers by hand, special cases, and what gradients promise."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from mpo_lightning.losses import DPO, MPO, EachMPO, SetLoss, TopBottom
from tests.losses.family import MPO_LOSSES, full, ragged, row, value_and_gradient, value_of


def test_mpo_by_hand() -> None:
    """Scores 5, 4, 1, 2 have mean 3: the first two are chosen.

    With beta = 1/2 and r = 2 ln 3, 2 ln 2, 0, 0 the masses are 3, 2, 1, 1, so the chosen set holds
    5/7 and the loss is ln(7/5). Within the chosen set p = 3/5, 2/5; over all q = 3, 2, 1, 1 over 7.
    Gradients: -beta p (1 - 5/7) = -3/35, -2/35 and beta q = 1/14, 1/14.
    """
    log_ratios = row(2 * math.log(3), 2 * math.log(2), 0, 0)
    values, gradient = value_and_gradient(MPO(beta=0.5), log_ratios, row(5, 4, 1, 2))
    assert values.item() == pytest.approx(math.log(7 / 5), rel=1e-12)
    assert gradient[0].tolist() == pytest.approx([-3 / 35, -2 / 35, 1 / 14, 1 / 14], rel=1e-12)


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({}, 1 / 3),
        ({"alpha": math.log(2)}, 4 / 9),
        ({"alpha": math.log(2), "power": 2.0}, 16 / 33),
        ({"alpha": math.log(2), "deviation": "signed"}, 16 / 21),
        ({"alpha": math.log(2), "gamma": 3.0}, 4 / 19),
        ({"alpha": math.log(2) * math.sqrt(8 / 3), "alpha_unit": "std"}, 4 / 9),
        ({"gamma": 3.0}, 1 / 7),
    ],
    ids=str,
)
def test_weights_by_hand(settings: dict[str, Any], share: float) -> None:
    """Scores 5, 3, 1 have mean 3: only the first is chosen. Deviations 2, 0, -2, variance 8/3.

    At r = 0 the masses are the weights. With alpha = ln 2: absolute 4, 1, 4, hence 4/9; squared
    16, 1, 16, hence 16/33; signed 4, 1, 1/4, hence 16/21; gamma = 3 on the rejected 4, 3, 12, hence
    4/19. Dividing by the standard deviation sqrt(8/3) is undone by an alpha that large.
    """
    found = value_of(MPO(beta=0.1, **settings), row(0, 0, 0), row(5, 3, 1))
    assert found == pytest.approx(-math.log(share), rel=1e-12)


@pytest.mark.parametrize(
    ("deviation", "expected"),
    [
        ("absolute", [-0.348, -0.086, -0.086, 0.039, 0.160, 0.321]),
        ("signed", [-0.018, -0.004, -0.004, 0.020, 0.005, 0.002]),
    ],
)
@pytest.mark.parametrize("beta", [0.05, 1.0])
def test_gradients_of_the_two_kinds_of_deviation(
    deviation: Any, expected: list[float], beta: float
) -> None:
    """Scores 9, 7, 7, 4, 2, 1 (mean 5), alpha = 0.7, r = 0; gradients in units of beta.

    Absolute: w = 2.8, 1.4, 1.4, 0.7, 2.1, 2.8, masses 16.44, 4.06, 4.06, 2.01, 8.17, 16.44, sum
    51.18. The chosen hold 24.55, so 1 - sigma = .520 and the first gets -.520 * 16.44 / 24.55.
    Signed: w = 2.8, 1.4, 1.4, -0.7, -2.1, -2.8; the rejected hold .68 of 25.24.
    """
    loss = MPO(beta=beta, alpha=0.7, deviation=deviation)
    _, gradient = value_and_gradient(loss, torch.zeros(1, 6).double(), row(9, 7, 7, 4, 2, 1))
    assert (gradient[0] / beta).tolist() == pytest.approx(expected, abs=5.01e-4)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [-0.250, -0.250, -0.250, 0.250, 0.250, 0.250]),
        ({"alpha": 0.7}, [-0.502, -0.124, -0.124, 0.057, 0.230, 0.463]),
        ({"alpha": 0.7, "deviation": "signed"}, [-0.502, -0.124, -0.124, 0.548, 0.135, 0.067]),
    ],
    ids=str,
)
def test_weights_of_each_mpo_share_a_push_out(
    settings: dict[str, Any], expected: list[float]
) -> None:
    """Scores 9, 7, 7, 4, 2, 1 at r = 0: each side is pushed by 3/4, the shares e^w in its set.

    w = 2.8, 1.4, 1.4 | 0.7, 2.1, 2.8: of the chosen the best has 16.44 / 24.55, of the rejected the
    worst 16.44 / 26.62. The best response is pulled hardest.
    """
    loss = EachMPO(beta=0.2, **settings)
    value, gradient = value_and_gradient(loss, row(0, 0, 0, 0, 0, 0), row(9, 7, 7, 4, 2, 1))
    assert value.item() == pytest.approx(math.log(4), rel=1e-12)
    assert (gradient[0] / 0.2).tolist() == pytest.approx(expected, abs=5.01e-4)


@pytest.mark.parametrize("unit", ["score", "std"])
def test_each_mpo_pulls_the_best_hardest_and_pushes_the_worst_hardest(unit: Any) -> None:
    loss = EachMPO(alpha=1.3, alpha_unit=unit)
    _, scores, valid = ragged(seed=7)
    chosen, rejected = loss.sets(scores, valid)
    _, gradient = value_and_gradient(loss, torch.zeros_like(scores), scores, valid)
    several = 0
    for g, s, c, r in zip(gradient, scores, chosen, rejected, strict=True):
        if not c.any() or not r.any():
            continue
        for of_set, sign in ((c, -1), (r, 1)):
            order = (sign * s[of_set]).argsort()
            pushes = (sign * g[of_set])[order]
            apart = (s[of_set] - s.new_tensor(s[c | r].tolist()).mean()).abs()[order]
            assert torch.equal(pushes.argsort(stable=True), apart.argsort(stable=True))
            several += len(apart.unique()) > 1
        # The total is what it is without weights.
        assert g[c].sum().item() == pytest.approx(-0.1 * len(s[r]) / (1 + len(s[r])), rel=1e-12)
    assert several > 10


def test_each_mpo_without_strength_or_power_has_no_weights() -> None:
    log_ratios, scores, valid = ragged()
    expected = EachMPO(beta=0.3)(log_ratios, scores, valid)
    for loss in (EachMPO(beta=0.3, alpha=0.0, power=2.0), EachMPO(beta=0.3, alpha=5.0, power=0.0)):
        found = loss(log_ratios, scores, valid)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "loss", [MPO(beta=0.3), MPO(beta=0.3, alpha=2.0), EachMPO(beta=0.3, alpha=2.0)], ids=str
)
@pytest.mark.parametrize("swap", [False, True])
def test_two_responses_are_dpo(loss: SetLoss, swap: bool) -> None:
    """Absolute deviations of two responses are equal and cancel."""
    log_ratios = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)).double() * 9
    scores = row(7.0, 2.5).repeat(50, 1)
    expected = -logsigmoid(0.3 * (log_ratios[:, 0] - log_ratios[:, 1]))
    if swap:
        log_ratios, scores = log_ratios.flip(1), scores.flip(1)
    torch.testing.assert_close(loss(log_ratios, scores, full(scores)), expected, rtol=1e-10, atol=0)
    found = DPO(beta=0.3)(log_ratios, scores, full(scores))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_two_responses_with_signed_deviations_add_a_margin() -> None:
    """The weights are +-alpha (S+ - S-)/2, so alpha (S+ - S-) enters the sigmoid."""
    found = value_of(MPO(beta=0.3, alpha=0.2, deviation="signed"), row(1.5, 4.0), row(7.0, 2.5))
    expected = math.log1p(math.exp(-(0.3 * (1.5 - 4.0) + 0.2 * 4.5)))
    assert found == pytest.approx(expected, rel=1e-12)


def test_one_chosen_response_is_cross_entropy() -> None:
    log_ratios = torch.randn(20, 5, generator=torch.Generator().manual_seed(0)).double() * 9
    scores = row(1, 0, 9, 1, 2).repeat(20, 1)
    found = MPO(beta=0.3)(log_ratios, scores, full(scores))
    expected = cross_entropy(0.3 * log_ratios, torch.full((20,), 2), reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    ("scores", "chosen"), [([1, 2], 1), ([5, 4, 1, 2], 2), ([9, 9, 9, 9, 1], 4), ([9, 1, 1], 1)]
)
def test_the_first_step_has_a_known_loss(scores: list[float], chosen: int) -> None:
    """At r = 0 the loss is ln(n / number chosen)."""
    n = len(scores)
    found = value_of(MPO(), torch.zeros(1, n), row(*scores))
    assert found == pytest.approx(math.log(n / chosen), rel=1e-6)


def test_power_zero_is_mpo() -> None:
    log_ratios, scores, valid = ragged()
    found = MPO(beta=0.3, alpha=5.0, power=0.0)(log_ratios, scores, valid)
    expected = MPO(beta=0.3)(log_ratios, scores, valid)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("loss", MPO_LOSSES, ids=str)
def test_a_groups_gradients_sum_to_zero_and_push_by_what_is_unsolved(loss: MPO) -> None:
    """Either side is pushed by beta (1 - sigma), sigma being the chosen set's share."""
    log_ratios, scores, valid = ragged(seed=4)
    values, gradient = value_and_gradient(loss, log_ratios, scores, valid)
    torch.testing.assert_close(gradient.sum(1), torch.zeros(60).double(), rtol=0, atol=1e-14)
    push = loss.beta * (1 - (-values).exp())
    torch.testing.assert_close(gradient.clamp(min=0).sum(1), push, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(-gradient.clamp(max=0).sum(1), push, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("loss", MPO_LOSSES, ids=str)
def test_mpo_is_nowhere_stationary(loss: MPO) -> None:
    """Each rejected response is pushed down and each chosen one up, at any finite log-ratios."""
    log_ratios, scores, valid = ragged(seed=5)
    chosen, _ = loss.sets(scores, valid)
    contrast = chosen.any(1)
    _, gradient = value_and_gradient(loss, log_ratios, scores, valid)
    assert contrast.sum() > 30
    assert (gradient[chosen] < 0).all()
    assert (gradient[valid & ~chosen & contrast[:, None]] > 0).all()


def test_the_winner_takes_all_within_the_above_mean_set() -> None:
    """Gradients of the chosen are as their masses: e^0.3 to 1 for log-ratios 1 and 0."""
    _, gradient = value_and_gradient(MPO(beta=0.3), row(1, 0, 5, -2), row(4, 4, 0, 0))
    assert (gradient[0, 0] / gradient[0, 1]).item() == pytest.approx(math.exp(0.3), rel=1e-12)


@pytest.mark.parametrize("scale", [0.125, 1.0, 1000.0])
@pytest.mark.parametrize("offset", [-7.0, 1e6 + 0.1])
def test_mpo_does_not_see_unit_or_origin_of_scores(scale: float, offset: float) -> None:
    log_ratios, scores, valid = ragged()
    found = MPO(beta=0.3)(log_ratios, scale * scores + offset, valid)
    torch.testing.assert_close(found, MPO(beta=0.3)(log_ratios, scores, valid), rtol=0, atol=0)


def test_mpo_sees_more_of_the_scores_than_their_order() -> None:
    """0, 2, 3 have mean 5/3, two above; their cubes 0, 8, 27 have mean 35/3, one above."""
    scores = row(0, 2, 3)
    values = [value_of(MPO(), torch.zeros(1, 3).double(), s) for s in (scores, scores**3)]
    assert values == pytest.approx([math.log(3 / 2), math.log(3)])


def test_std_unit_does_not_see_the_unit_of_scores() -> None:
    log_ratios, scores, valid = ragged()

    def values(scale: float, unit: Any) -> Tensor:
        loss = MPO(beta=0.3, alpha=0.7, alpha_unit=unit)
        return loss(log_ratios, scale * scores, valid)

    torch.testing.assert_close(values(0.01, "std"), values(1, "std"), rtol=1e-10, atol=1e-12)
    assert (values(0.01, "score") - values(1, "score")).abs().max() > 0.1


def test_a_response_in_neither_set_touches_nothing() -> None:
    scores = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]], dtype=torch.float64)
    valid = torch.ones(1, 5, dtype=torch.bool)
    without = torch.tensor([[True, True, False, True, True]])
    ratios = torch.tensor([[1.0, -2.0, torch.nan, 0.5, 3.0]], dtype=torch.float64)
    for loss in (MPO(partition=TopBottom()), EachMPO(partition=TopBottom())):
        leaf = ratios.clone().requires_grad_()
        value = loss(leaf, scores, valid)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        assert gradient[0, 2] == 0
        torch.testing.assert_close(value, loss(ratios, scores, without))


def test_a_large_common_offset_costs_no_precision() -> None:
    ratios = torch.tensor([[0.3, -0.2, 0.1]])
    scores, valid = torch.tensor([[3.0, 1.0, 2.0]]), torch.ones(1, 3, dtype=torch.bool)
    # 1024 leaves the differences exact to 1e-4; the loss must not lose more.
    shifted = MPO(beta=1.0)(ratios + 1024, scores, valid)
    exact = MPO(beta=1.0)((ratios + 1024).double(), scores, valid)
    assert abs(shifted.double() - exact).item() < 2e-7
