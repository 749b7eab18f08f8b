"""Pairwise losses against the code of TRL's DPOTrainer, which runs without a model here."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl
from torch import Tensor

from mpo_lightning.losses import DPO, IPO, NCA, Hinge, RobustDPO, SetLoss
from mpo_lightning.losses.base import Measured

GROUPS, TOKENS, BETA = 24, 7, 0.3


def trl_loss(
    kind: str, policy: Tensor, reference: Tensor, lengths: Tensor, *, label_smoothing: float
) -> tuple[float, Tensor]:
    """Mean loss and gradient by per-token log-probabilities; all (2 * GROUPS, TOKENS).

    The trainer reads a few settings of its own and what a model returns; both are given here.
    """
    mask = (torch.arange(TOKENS) < lengths[:, None]).long()
    leaf = policy.clone().requires_grad_()
    zeros = torch.zeros(2 * GROUPS, TOKENS)

    def model(**_: Any) -> Any:
        return SimpleNamespace(
            log_probs=leaf * mask, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
        )

    totals = (reference * mask).sum(1)
    # A prompt of one token, then the response.
    whole = torch.cat([torch.zeros(2 * GROUPS, 1, dtype=torch.long), mask], dim=1)
    inputs = {
        "input_ids": torch.ones_like(whole),
        "attention_mask": torch.ones_like(whole),
        "completion_mask": whole,
        "ref_chosen_logps": totals[:GROUPS],
        "ref_rejected_logps": totals[GROUPS:],
    }
    metrics: dict[str, list[float]] = defaultdict(list)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            device="cpu", gather_for_metrics=lambda t: t, gather=lambda t: t
        ),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[kind],
        loss_weights=[1.0],
        beta=BETA,
        label_smoothing=label_smoothing,
        use_weighting=False,
        _metrics={"train": metrics},
        _total_train_tokens=0,
        _tp_size=1,
    )
    loss = trl.DPOTrainer._compute_loss(trainer, model, inputs, False)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.item(), gradient


@pytest.mark.parametrize(
    ("kind", "loss"),
    [
        ("sigmoid", DPO(beta=BETA)),
        ("sigmoid_norm", DPO(beta=BETA, length_normalized=True)),
        ("hinge", Hinge(beta=BETA)),
        ("ipo", IPO(beta=BETA, length_normalized=True)),
        ("robust", RobustDPO(beta=BETA, flipped=0.2)),
        ("nca_pair", NCA(beta=BETA, temperature=1e-4)),
    ],
)
def test_pairs_equal_trl(kind: str, loss: SetLoss) -> None:
    generator = torch.Generator().manual_seed(0)
    policy = -3 * torch.rand(2 * GROUPS, TOKENS, generator=generator)
    reference = -3 * torch.rand(2 * GROUPS, TOKENS, generator=generator)
    lengths = torch.randint(1, TOKENS + 1, (2 * GROUPS,), generator=generator)
    expected, expected_gradient = trl_loss(kind, policy, reference, lengths, label_smoothing=0.2)

    mask = torch.arange(TOKENS) < lengths[:, None]
    leaf = policy.clone().requires_grad_()

    def pairs(values: Tensor) -> Tensor:
        return torch.stack([values[:GROUPS], values[GROUPS:]], dim=1)

    measured = Measured(
        policy_logps=pairs((leaf * mask).sum(1)),
        reference_logps=pairs((reference * mask).sum(1)),
        lengths=pairs(lengths),
        scores=torch.tensor([[1.0, 0.0]]).repeat(GROUPS, 1),
        valid=torch.ones(GROUPS, 2, dtype=torch.bool),
    )
    found = loss.evaluate(measured).loss.mean()
    (gradient,) = torch.autograd.grad(found, leaf)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-7)
