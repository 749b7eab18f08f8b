"""Settings of all losses: with or without reference, per token, and the likelihood term."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mpo_lightning.losses import (
    DPO,
    MPO,
    NCA,
    AboveThreshold,
    LiPO,
    SetLoss,
    SimPO,
    TopBottom,
)
from mpo_lightning.losses.base import Measured

NAN = math.nan
POLICY = torch.tensor([[-12.0, -30.0, -8.0, NAN], [-5.0, -7.0, NAN, NAN]], dtype=torch.float64)
REFERENCE = torch.tensor([[-10.0, -33.0, -8.0, NAN], [-9.0, -6.0, NAN, NAN]], dtype=torch.float64)
LENGTHS = torch.tensor([[4, 10, 2, 0], [5, 7, 0, 0]])
SCORES = torch.tensor([[5.0, 4.0, 1.0, NAN], [2.0, 2.0, NAN, NAN]], dtype=torch.float64)
VALID = ~SCORES.isnan()


def measured(policy: Tensor) -> Measured:
    return Measured(
        policy_logps=policy, reference_logps=REFERENCE, lengths=LENGTHS, scores=SCORES, valid=VALID
    )


def of_logps(loss: SetLoss, policy: Tensor = POLICY) -> Tensor:
    return loss.evaluate(measured(policy)).loss


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [-2.0, 3.0, 0.0]),
        ({"length_normalized": True}, [-0.5, 0.3, 0.0]),
        ({"reference_free": True}, [-12.0, -30.0, -8.0]),
        ({"reference_free": True, "length_normalized": True}, [-3.0, -3.0, -4.0]),
    ],
    ids=str,
)
def test_log_ratios_by_hand(settings: dict[str, Any], expected: list[float]) -> None:
    loss = MPO(beta=0.5, **settings)
    found = loss.compared(measured(POLICY))
    assert found[0, :3].tolist() == pytest.approx(expected)
    # Scores 5, 4, 1 have mean 10/3: the first two are chosen.
    masses = [math.exp(0.5 * r) for r in expected]
    value, no_contrast = of_logps(loss).tolist()
    assert value == pytest.approx(-math.log((masses[0] + masses[1]) / sum(masses)))
    assert no_contrast == 0


def test_likelihood_term_by_hand() -> None:
    """The chosen have 3 and 3 nats per token, so 0.25 * 3 is added; without contrast nothing."""
    without, with_term = of_logps(MPO(beta=0.5)), of_logps(MPO(beta=0.5, likelihood=0.25))
    assert (with_term - without).tolist() == pytest.approx([0.75, 0.0])
    # Of the best alone: 12 nats in 4 tokens; of two chosen and none rejected: nothing.
    loss = MPO(beta=0.5, likelihood=1.0, partition=TopBottom(k=1))
    assert of_logps(loss)[0].item() == pytest.approx(3 + math.log1p(math.exp(1.0)))
    assert of_logps(MPO(likelihood=1.0, partition=AboveThreshold(threshold=0))).tolist() == [0, 0]


@pytest.mark.parametrize(
    "loss",
    [
        MPO(beta=0.5, length_normalized=True, likelihood=0.3),
        MPO(beta=0.5, reference_free=True, likelihood=0.3, partition=TopBottom(k=1)),
        DPO(beta=0.5, pairs="random", likelihood=0.3),
        NCA(beta=0.5, likelihood=0.3),
        SimPO(beta=0.5, pairs="all"),
        LiPO(beta=0.5, length_normalized=True),
    ],
    ids=str,
)
def test_gradients_by_log_probabilities(loss: SetLoss) -> None:
    """Against finite differences; padding holds NaN and gets no gradient."""
    leaf = POLICY.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(of_logps(loss, leaf).sum(), leaf)
    assert gradient.isfinite().all()
    assert gradient[~VALID].eq(0).all()
    step = 1e-5
    for group, slot in VALID.nonzero().tolist():
        moved = torch.zeros_like(POLICY)
        moved[group, slot] = step
        change = of_logps(loss, POLICY + moved) - of_logps(loss, POLICY - moved)
        assert change.sum().item() / (2 * step) == pytest.approx(
            gradient[group, slot].item(), rel=1e-6, abs=1e-8
        )
    assert gradient[0].abs().sum() > 0.01


def test_half_precision_log_probabilities_give_fp32() -> None:
    loss = MPO(beta=0.5, likelihood=0.3)
    assert of_logps(loss, POLICY.float()).dtype == torch.float64
    halves = replace(measured(POLICY.bfloat16()), reference_logps=REFERENCE.bfloat16())
    found = loss.evaluate(halves).loss
    assert found.dtype == torch.float32


def test_a_loss_of_ones_own_has_all_of_it() -> None:
    class Sum(SetLoss):
        def __call__(self, log_ratios: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
            return torch.where(valid, log_ratios, 0.0).sum(1)

    assert of_logps(Sum(reference_free=True, length_normalized=True)).tolist() == [-10, -2]
    assert of_logps(Sum(likelihood=1.0)).tolist() == pytest.approx([1 + 3, 3])
    assert Sum().has_contrast(SCORES, VALID).tolist() == [True, False]


def test_a_call_of_ones_own_is_what_is_evaluated() -> None:
    """A subclass of any loss, which says nothing but how it is called."""

    class Halved(MPO):
        def __call__(self, log_ratios: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
            return super().__call__(log_ratios, scores, valid) / 2

    torch.testing.assert_close(of_logps(Halved()), of_logps(MPO()) / 2)
    assert of_logps(MPO())[0] > 0
