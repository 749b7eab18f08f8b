"""Deviations, weights and ordered pairs of scores, by hand and at any magnitude."""

import math
from typing import Any

import pytest
import torch

from mpo_lightning.losses import deviation_log_weights, deviations, ordered_pairs
from tests.losses.family import full, row


@pytest.mark.parametrize("n", [2, 3, 5, 7, 31, 100, 1001])
def test_equal_scores_are_equal_at_any_size_and_magnitude(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    score = torch.rand(300, 1, generator=generator, dtype=torch.float64) - 0.5
    scores = (score * torch.logspace(-9, 9, 300, dtype=torch.float64)[:, None]).repeat(1, n)
    assert deviations(scores, full(scores)).eq(0).all()


def test_deviations_are_computed_in_float64_whatever_comes_in() -> None:
    scores = torch.tensor([[0.1, 0.1, 0.1], [1.0, 2.0, 6.0]])
    found = deviations(scores, full(scores))
    assert found.dtype == torch.float64
    assert found.tolist() == [[0, 0, 0], [-2, -1, 3]]


def test_ordered_pairs_by_hand() -> None:
    """Scores 2, 1, 2 and a padded slot: the pairs are (0, 1) and (2, 1)."""
    found = ordered_pairs(row(2, 1, 2, 9), torch.tensor([[True, True, True, False]]))
    assert found.nonzero().tolist() == [[0, 0, 1], [0, 2, 1]]
    # Equal in fp32.
    close = row(1e6 + 0.12, 1e6 + 0.11)
    assert ordered_pairs(close, full(close)).nonzero().tolist() == [[0, 0, 1]]


def test_deviation_log_weights_by_hand() -> None:
    """Scores 6, 2, 1 have mean 3 and deviations 3, -1, -2; their variance is (9+1+4)/3 = 14/3."""
    scores, valid = row(6, 2, 1, 50), torch.tensor([[True, True, True, False]])

    def weights(**settings: Any) -> list[float]:
        return deviation_log_weights(scores, valid, **settings)[0].tolist()

    std = math.sqrt(14 / 3)
    assert weights(alpha=0.5) == [1.5, 0.5, 1.0, 0.0]
    assert weights(alpha=0.5, deviation="signed") == [1.5, -0.5, -1.0, 0.0]
    assert weights(alpha=0.5, power=2.0) == [4.5, 0.5, 2.0, 0.0]
    assert weights(alpha=0.5, power=2.0, deviation="signed") == [4.5, -0.5, -2.0, 0.0]
    assert weights(alpha=0.5, power=0.0) == [0.5, 0.5, 0.5, 0.0]
    assert weights(alpha=2.0, alpha_unit="std") == pytest.approx([6 / std, 2 / std, 4 / std, 0])
