"""Losses with settings of all kinds, random groups, and values and gradients of them."""

import pytest
import torch
from torch import Tensor

from mpo_lightning.losses import (
    DPO,
    GVPO,
    IPO,
    MDPO,
    MIPO,
    MPO,
    NCA,
    AboveMean,
    AboveQuantile,
    AboveThreshold,
    AboveTrimmedMean,
    BestRest,
    EachAgainstBelow,
    EachMPO,
    Hinge,
    InfoNCA,
    LiPO,
    MultiLevelMPO,
    PlackettLuce,
    RobustDPO,
    SetLoss,
    SimPO,
    TopBottom,
)

LOSSES: list[SetLoss] = [
    MPO(beta=0.3),
    MPO(beta=0.3, alpha=0.7),
    MPO(beta=0.3, alpha=0.4, power=2.0),
    MPO(beta=0.3, alpha=0.7, deviation="signed"),
    MPO(beta=0.3, gamma=3.0),
    MPO(beta=0.3, alpha=0.7, alpha_unit="std"),
    MPO(beta=0.5, alpha=1.3, power=0.5, deviation="signed", gamma=2.0, alpha_unit="std"),
    DPO(beta=0.3),
    DPO(beta=0.3, pairs="all"),
    InfoNCA(beta=0.3, temperature=1.5),
    NCA(beta=0.3, temperature=1.5),
    MPO(beta=0.3, alpha=0.4, partition=TopBottom(k=2), gamma=2.0),
    MPO(beta=0.3, partition=AboveQuantile()),
    MPO(beta=0.3, partition=AboveThreshold(threshold=1.0)),
    EachMPO(beta=0.3),
    EachMPO(beta=0.3, alpha=0.7, gamma=2.0, partition=AboveQuantile(quantile=0.7)),
    DPO(beta=0.3, pairs="sets"),
    DPO(beta=0.3, pairs="sets", partition=BestRest()),
    IPO(beta=0.3),
    IPO(beta=0.3, pairs="all"),
    Hinge(beta=0.3, pairs="all"),
    RobustDPO(beta=0.3, flipped=0.2, pairs="all"),
    SimPO(beta=0.3, margin=0.7),
    SimPO(beta=0.3, margin=0.7, pairs="sets", partition=TopBottom(k=1)),
    MDPO(beta=0.3),
    MDPO(beta=0.3, partition=TopBottom(k=2)),
    MIPO(beta=0.3),
    MIPO(beta=0.3, partition=AboveTrimmedMean()),
    PlackettLuce(beta=0.3),
    PlackettLuce(beta=0.3, levels=3),
    MultiLevelMPO(beta=0.3),
    MultiLevelMPO(beta=0.3, levels=3),
    LiPO(beta=0.3),
    EachMPO(beta=0.3, alpha=0.7, deviation="signed", partition=TopBottom(k=2)),
    EachAgainstBelow(beta=0.3),
    EachAgainstBelow(beta=0.3, levels=3),
    GVPO(beta=0.3, temperature=1.5),
    GVPO(beta=0.3, temperature=1.5, target="advantage"),
    GVPO(beta=0.3, temperature=1.5, target="quantile"),
]
MPO_LOSSES = [loss for loss in LOSSES if isinstance(loss, MPO) and loss.partition == AboveMean()]
each_loss = pytest.mark.parametrize("loss", LOSSES, ids=str)


def row(*values: float) -> Tensor:
    """One group, float64 (1, n)."""
    return torch.tensor([values], dtype=torch.float64)


def full(values: Tensor) -> Tensor:
    """Every slot holds a response."""
    return torch.ones_like(values, dtype=torch.bool)


def value_of(loss: SetLoss, log_ratios: Tensor, scores: Tensor) -> float:
    """The loss of one group without padding."""
    return loss(log_ratios, scores, full(scores)).item()


def value_and_gradient(
    loss: SetLoss, log_ratios: Tensor, scores: Tensor, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Losses, (B,), and the gradient of their sum by the log-ratios, (B, N)."""
    leaf = log_ratios.detach().clone().requires_grad_()
    values = loss(leaf, scores, full(scores) if valid is None else valid)
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach(), gradient


def ragged(count: int = 60, slots: int = 8, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Log-ratios, scores and valid of groups with 1 to 7 responses at scattered slots; ties."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, slots, (count,), generator=generator)
    valid = torch.rand(count, slots, generator=generator).argsort(1) < sizes[:, None]
    log_ratios = 4 * torch.randn(count, slots, generator=generator, dtype=torch.float64)
    scores = torch.randint(0, 5, (count, slots), generator=generator).double()
    return log_ratios, scores, valid
