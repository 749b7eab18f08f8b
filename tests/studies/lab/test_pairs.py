"""Random pairs: which pairs are drawn, how often, and whether another epoch draws others."""

from collections import Counter
from itertools import combinations

import pytest
import torch
from torch import Tensor

from mpo_lightning.losses import DPO
from mpo_lightning.studies.lab.pairs import BestAgainstRandomDPO, FreshPairDPO

GROUPS, N = 3000, 4


@pytest.fixture
def scores() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(GROUPS, N, generator=generator, dtype=torch.float64)


def drawn(loss: DPO, scores: Tensor) -> list[tuple[int, int]]:
    """One pair of each group, (winner, loser)."""
    found = loss.drawn(scores, torch.ones_like(scores, dtype=torch.bool))
    places = found.nonzero()
    assert places[:, 0].tolist() == list(range(len(scores)))
    pairs = [(winner, loser) for _, winner, loser in places.tolist()]
    assert all(
        row[winner] > row[loser]
        for row, (winner, loser) in zip(scores.tolist(), pairs, strict=True)
    )
    return pairs


def uniform(counts: Counter[int], kinds: int, of: int) -> bool:
    """Within five standard errors."""
    share = 1 / kinds
    off = max(abs(counts[kind] - of * share) for kind in range(kinds))
    return off < 5 * (of * share * (1 - share)) ** 0.5


def test_fresh_pairs(scores: Tensor) -> None:
    epochs = [drawn(FreshPairDPO(epoch=epoch), scores) for epoch in range(8)]
    assert epochs[0] == drawn(DPO(pairs="random"), scores)
    assert epochs[3] == drawn(FreshPairDPO(epoch=3), scores)
    numbers = {frozenset(pair): number for number, pair in enumerate(combinations(range(N), 2))}
    kinds = [[numbers[frozenset(pair)] for pair in epoch] for epoch in epochs]
    for of_epoch in kinds:
        assert uniform(Counter(of_epoch), 6, GROUPS)
    # Two epochs agree as often as chance has them agree.
    agree = sum(a == b for a, b in zip(kinds[1], kinds[2], strict=True))
    assert abs(agree - GROUPS / 6) < 5 * (GROUPS * 5 / 36) ** 0.5
    # Over the epochs a group sees most of its six pairs: 6 (1 - (5/6) ** 8) = 4.6.
    seen = sum(len(set(of_group)) for of_group in zip(*kinds, strict=True)) / GROUPS
    assert seen == pytest.approx(6 * (1 - (5 / 6) ** 8), abs=0.1)


def test_best_against_random(scores: Tensor) -> None:
    pairs = drawn(BestAgainstRandomDPO(), scores)
    assert [winner for winner, _ in pairs] == scores.argmax(1).tolist()
    ranks = (scores[:, :, None] > scores[:, None, :]).sum(2)
    losers = Counter(ranks[group, loser].item() for group, (_, loser) in enumerate(pairs))
    assert uniform(losers, N - 1, GROUPS)
    # A group of one score has no pair; ties of the best are no losers.
    ties = torch.tensor([[1.0, 1.0, 1.0], [2.0, 2.0, 0.0]])
    found = BestAgainstRandomDPO().drawn(ties, torch.ones(2, 3, dtype=torch.bool))
    assert found.sum((1, 2)).tolist() == [0, 1]
    assert found[1, :2, 2].any()
