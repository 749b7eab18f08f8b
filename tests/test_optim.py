"""The shipped schedule, against its values by hand."""

import math

import pytest
import torch
from torch.optim import SGD

from mpo_lightning.optim import WarmupCosine, at_step


def test_linear_warm_up_then_half_a_cosine() -> None:
    """Two steps of ten warm up; step k after them has (1 + cos(pi k / 8)) / 2 of the rate."""
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = WarmupCosine(warmup=0.2)(optimizer, 10)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    expected = [0.0, 1.0] + [1 + math.cos(math.pi * k / 8) for k in range(8)]
    assert rates == pytest.approx(expected)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0)


@pytest.mark.parametrize("warmup", [-0.1, 1.0, math.nan])
def test_share_of_warm_up_is_checked(warmup: float) -> None:
    with pytest.raises(ValueError, match="WarmupCosine: warmup must be in"):
        WarmupCosine(warmup=warmup)


def test_a_schedule_at_a_step_leaves_the_optimizer_alone() -> None:
    groups = [{"params": [torch.zeros(1)], "lr": 2.0}, {"params": [torch.zeros(1)], "lr": 1.0}]
    optimizer = SGD(groups)
    scheduler, rates = at_step(WarmupCosine(warmup=0.2), 10, optimizer, 3)
    assert scheduler.last_epoch == 3
    expected = [0.0, 1.0, 2.0, 1 + math.cos(math.pi / 8)]
    assert rates == [pytest.approx([rate, rate / 2]) for rate in expected]
    assert [group["lr"] for group in optimizer.param_groups] == [2.0, 1.0]
