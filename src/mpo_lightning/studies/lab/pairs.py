"""Pairwise baselines as practitioners draw their pairs, beside those of the package."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mpo_lightning.losses import DPO

__all__ = ["BestAgainstRandomDPO", "FreshPairDPO"]


@dataclass(frozen=True, kw_only=True)
class FreshPairDPO(DPO):
    """DPO on one random pair of a group, another one in each epoch.

    Args:
        epoch: number of the epoch, set as training goes on.
    """

    epoch: int = 0

    def drawn(self, scores: Tensor, valid: Tensor) -> Tensor:
        """Pair of each group, bool (B, N, N): True at (winner, loser)."""
        # The pair is seeded by the scores: a common factor draws another and keeps their order.
        return DPO(pairs="random").drawn(scores.double() * (1 + 1e-9 * self.epoch), valid)


@dataclass(frozen=True, kw_only=True)
class BestAgainstRandomDPO(DPO):
    """DPO on the best response and a random other one, the recipe of Zephyr (arXiv 2310.16944)."""

    def drawn(self, scores: Tensor, valid: Tensor) -> Tensor:
        """Pair of each group, bool (B, N, N): True at (winner, loser)."""
        best = DPO().drawn(scores, valid).any(2)
        lower = valid & (scores < scores.masked_fill(~valid, -torch.inf).amax(1, keepdim=True))
        # Responses stand in the order in which they were drawn: the first lower one is random.
        first = lower & (lower.cumsum(1) == 1)
        return best[:, :, None] & first[:, None, :]
