"""Losses on pairs: numbers by hand, and the pairs that are drawn."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mpo_lightning.losses import DPO
from tests.losses.family import ragged, row, value_and_gradient, value_of


def test_dpo_by_hand() -> None:
    """Scores 3, 2, 1, beta = 1, r = ln 3, 0, ln 3.

    Pairs and margins: (0, 1) ln 3, (0, 2) 0, (1, 2) -ln 3, so sigmoids 3/4, 1/2, 1/4. Best against
    worst is the second alone: ln 2. All: (ln 4/3 + ln 2 + ln 4) / 3 = ln(32/3) / 3.
    """
    log_ratios, scores = row(math.log(3), 0, math.log(3)), row(3, 2, 1)
    assert value_of(DPO(beta=1), log_ratios, scores) == pytest.approx(math.log(2), rel=1e-12)
    found = value_of(DPO(beta=1, pairs="all"), log_ratios, scores)
    assert found == pytest.approx(math.log(32 / 3) / 3, rel=1e-12)


def test_best_worst_takes_the_first_best_and_the_last_worst() -> None:
    """Scores 1, 5, 5, 1, 1 and a padded 9: slot 1 against slot 4; at r = 0 the push is 1/2."""
    valid = torch.tensor([[True] * 5 + [False]])
    values, gradient = value_and_gradient(
        DPO(beta=1), torch.zeros(1, 6), row(1, 5, 5, 1, 1, 9), valid
    )
    assert values.item() == pytest.approx(math.log(2))
    assert gradient[0].tolist() == [0, -0.5, 0, 0, 0.5, 0]


@pytest.mark.parametrize("pairs", ["best-worst", "all"])
def test_dpo_sees_the_order_of_scores_only(pairs: Any) -> None:
    log_ratios, scores, valid = ragged()
    loss = DPO(beta=0.3, pairs=pairs)
    found = loss(log_ratios, scores.exp() - 100, valid)
    torch.testing.assert_close(found, loss(log_ratios, scores, valid), rtol=0, atol=0)


def drawn(scores: Tensor, valid: Tensor) -> Tensor:
    return DPO(pairs="random").drawn(scores, valid)


def test_a_random_pair_is_one_ordered_pair_and_always_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 5, (300, 6), generator=generator).double()
    valid = torch.rand(300, 6, generator=generator) < 0.8
    pairs = drawn(scores, valid)
    differs = [len(set(s[v].tolist())) > 1 for s, v in zip(scores, valid, strict=True)]
    assert pairs.sum((1, 2)).tolist() == [int(d) for d in differs]
    for number, winner, loser in pairs.nonzero().tolist():
        assert valid[number, winner]
        assert valid[number, loser]
        assert scores[number, winner] > scores[number, loser]
    # In another batch, with other padding, in fp32, in another order.
    assert torch.equal(drawn(scores[7:9], valid[7:9]), pairs[7:9])
    assert torch.equal(drawn(torch.where(valid, scores, torch.nan).float(), valid), pairs)
    order = torch.randperm(6, generator=generator)
    turned = drawn(scores[:, order], valid[:, order])
    expected = pairs[:, order][:, :, order]
    # Which of two equals is drawn may change.
    turned_scores = scores[:, order]
    for first, second in zip(turned.nonzero().tolist(), expected.nonzero().tolist(), strict=True):
        number = first[0]
        assert second[0] == number
        assert turned_scores[number, first[1:]].equal(turned_scores[number, second[1:]])


def test_every_pair_is_as_likely() -> None:
    """Chi-squared over the six pairs of four scores, and over the pairs of 2, 2, 1."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(6000, 4, generator=generator, dtype=torch.float64).sort(1).values
    counts = drawn(scores, torch.ones(6000, 4, dtype=torch.bool)).sum(0)
    counts = counts[counts > 0].double()
    assert len(counts) == 6
    assert ((counts - 1000).square() / 1000).sum() < 20.5  # 0.1 % point, five degrees of freedom
    low = torch.rand(6000, 1, generator=generator, dtype=torch.float64)
    tied = torch.cat([low + 1, low + 1, low], dim=1)
    first, second = drawn(tied, torch.ones(6000, 3, dtype=torch.bool)).sum(0)[:2, 2].tolist()
    assert first + second == 6000
    assert abs(first - 3000) < 130  # 3.3 standard deviations
