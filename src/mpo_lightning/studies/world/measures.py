"""Exact measures of a policy: sums over all responses to held-out prompts.

Shapes: ``P`` prompts, ``R`` responses, ``K`` attributes. All float64. Policies are compared by what
they write where they write a response: probabilities are normalised over the responses, and the
probability of anything else is a measure of its own. Otherwise a policy that leaves the responses
would spend a part of the divergence, at which policies are compared, on leaving.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["Point", "Yardstick", "at_divergence", "group_measures"]

Point = Mapping[str, float]


@dataclass(frozen=True)
class Yardstick:
    """Measures policies on some prompts.

    Attributes:
        reference: log-probability of each response under the reference, normalised, (P, R).
        gold: true quality, (P, R).
        attributes: (R, K).
    """

    reference: Tensor
    gold: Tensor
    attributes: Tensor

    def tilt(self, strength: float) -> Tensor:
        """Return the policy of most gold at its divergence, reference * exp(strength * gold)."""
        return (self.reference + strength * self.gold).log_softmax(1)

    def divergence(self, logps: Tensor) -> float:
        """Return KL(policy || reference) in nats, mean over prompts."""
        return (logps.exp() * (logps - self.reference)).sum(1).mean().item()

    def ideal(self, divergence: float) -> Tensor:
        """Return the tilt of a divergence; its strength is below 64 and exact to 1e-9."""
        low, high = 0.0, 64.0
        for _ in range(36):
            middle = (low + high) / 2
            if self.divergence(self.tilt(middle)) < divergence:
                low = middle
            else:
                high = middle
        return self.tilt(low)

    @cached_property
    def _worse_under_reference(self) -> Tensor:
        """Probability that a response of the reference is worse, ties half, (P, R)."""
        order = self.gold.argsort(1)
        gold = self.gold.gather(1, order).contiguous()
        below = torch.nn.functional.pad(self.reference.exp().gather(1, order).cumsum(1), (1, 0))
        first = torch.searchsorted(gold, gold, right=False)
        after = torch.searchsorted(gold, gold, right=True)
        worse = (below.gather(1, first) + below.gather(1, after)) / 2
        return torch.empty_like(worse).scatter_(1, order, worse)

    @cached_property
    def acceptable(self) -> Tensor:
        """Mean attributes of the responses of the reference that are better than its mean, (P, K).

        The distribution that the paper's theorem compares with.
        """
        weights = self.reference.exp()
        mean = (weights * self.gold).sum(1, keepdim=True)
        weights = torch.where(self.gold > mean, weights, 0.0)
        return weights / weights.sum(1, keepdim=True) @ self.attributes

    def __call__(self, logps: Tensor) -> dict[str, float]:
        """Return all measures of a policy.

        - ``kl``: divergence from the reference, nats;
        - ``outside``: probability that it writes anything but a response;
        - ``gold``: expected gold score, in standard deviations of the reference, of which the
          reference has 0;
        - ``gold_of_all``: the same where anything else is as good as the worst response;
        - ``ideal_gold``: the most that any policy of this divergence has;
        - ``win_rate``: against the reference, ties half;
        - ``bias``: mean over attributes of how far the expected attribute (mean over prompts) is
          from that of the ideal policy of the same divergence, divided by root (2 kl);
        - ``gap 0``, ``gap 1``, ...: the same of each attribute, with its sign;
        - ``acceptable_bias``: mean over attributes of how far the expected attribute is from that
          of the reference's acceptable responses, not divided;
        - ``distance``: total variation distance from the ideal policy;
        - ``rarity``: how much less likely than the ideal policy's its responses are under the
          reference, nats.

        All but ``outside`` and ``gold_of_all`` are of the policy's responses.

        Args:
            logps: log-probability of each response, whose exponentials sum to at most one, (P, R).
        """
        outside = (1 - logps.exp().sum(1)).clamp(min=0.0)
        logps = logps.log_softmax(1)
        shares = logps.exp()
        divergence = self.divergence(logps)
        ideal = self.ideal(divergence).exp()
        # At the reference itself there is no direction yet.
        scale = (2 * divergence) ** -0.5 if divergence > 1e-9 else 0.0
        gaps = scale * ((shares - ideal) @ self.attributes).mean(0)
        off = (shares @ self.attributes - self.acceptable).mean(0).abs().mean().item()
        gold = (shares * self.gold).sum(1)
        return {
            "kl": divergence,
            "gold": gold.mean().item(),
            "gold_of_all": torch.lerp(gold, self.gold.amin(1), outside).mean().item(),
            "ideal_gold": (ideal * self.gold).sum(1).mean().item(),
            "outside": outside.mean().item(),
            "win_rate": (shares * self._worse_under_reference).sum(1).mean().item(),
            "bias": gaps.abs().mean().item(),
            "acceptable_bias": off,
            "distance": (shares - ideal).abs().sum(1).mean().item() / 2,
            "rarity": ((ideal - shares) * self.reference).sum(1).mean().item(),
            **{f"gap {number}": gap for number, gap in enumerate(gaps.tolist())},
        }


def group_measures(log_ratios: Tensor, chosen: Tensor, beta: float) -> dict[str, float]:
    """Measure the change of the responses of the groups trained on.

    - ``effective_chosen``: exp(entropy of softmax(beta * r) over the chosen set) over its size;
    - ``chosen_shift``, ``rejected_shift``: mean change of log-probability, nats.

    Groups without contrast do not count.

    Args:
        log_ratios: (B, N), no padding.
        chosen: bool (B, N).
        beta: pull towards the reference.
    """
    contrast = chosen.any(1)
    log_ratios, chosen = log_ratios[contrast], chosen[contrast]
    within = (beta * log_ratios).masked_fill(~chosen, -torch.inf).softmax(1)
    entropy = -torch.xlogy(within, within).sum(1)

    def mean_over(members: Tensor) -> float:
        return (torch.where(members, log_ratios, 0.0).sum(1) / members.sum(1)).mean().item()

    return {
        "effective_chosen": (entropy.exp() / chosen.sum(1)).mean().item(),
        "chosen_shift": mean_over(chosen),
        "rejected_shift": mean_over(~chosen),
    }


def at_divergence(trajectory: Sequence[Point], divergence: float) -> dict[str, float] | None:
    """Interpolate the measures where a trajectory first reaches a divergence; None if it does not.

    Linear in the square root of kl, in which gold is nearly linear near the reference.

    Args:
        trajectory: points in the order of training, each with a "kl".
        divergence: divergence in nats.
    """
    for before, after in pairwise(trajectory):
        if before["kl"] < divergence <= after["kl"]:
            low, high = max(before["kl"], 0.0) ** 0.5, after["kl"] ** 0.5
            part = (divergence**0.5 - low) / (high - low)
            return {name: before[name] + part * (after[name] - before[name]) for name in before}
    return None
