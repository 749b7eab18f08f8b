"""Losses that read scores beyond two sets: soft targets, rankings, ordinal levels."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mpo_lightning.losses.base import SetLoss, working
from mpo_lightning.losses.checks import require, require_number
from mpo_lightning.losses.scores import binned, differs, ordered_pairs
from mpo_lightning.losses.sets import MPO

__all__ = [
    "NCA",
    "InfoNCA",
    "LiPO",
    "MultiLevelMPO",
    "PlackettLuce",
    "info_nca_loss",
    "lipo_loss",
    "multi_level_loss",
    "nca_loss",
    "plackett_luce_loss",
]


def _score_targets(scores: Tensor, valid: Tensor, temperature: float) -> Tensor:
    """``softmax(S / temperature)`` over each group, float64 (B, N), zero on padding."""
    return (scores.double() / temperature).masked_fill(~valid, -torch.inf).softmax(1)


def info_nca_loss(
    log_ratios: Tensor, scores: Tensor, valid: Tensor, *, beta: float, temperature: float
) -> Tensor:
    """InfoNCA: cross-entropy of ``softmax(beta * r)`` against ``softmax(S / temperature)``, (B,).

    Source: arXiv 2402.05369. Stationary exactly where ``beta * r = S / temperature + const``.
    """
    rewards = beta * working(log_ratios, valid)
    log_shares = rewards.masked_fill(~valid, -torch.inf).log_softmax(1)
    targets = _score_targets(scores, valid, temperature).to(rewards.dtype)
    return -(targets * torch.where(valid, log_shares, 0.0)).sum(1)


def nca_loss(
    log_ratios: Tensor, scores: Tensor, valid: Tensor, *, beta: float, temperature: float
) -> Tensor:
    """NCA: ``-sum_i [t_i log sigmoid(beta r_i) + log sigmoid(-beta r_i) / n]``, (B,).

    Source: arXiv 2402.05369, with ``t = softmax(S / temperature)`` and n responses in the group.
    Stationary at ``beta * r_i = log(n t_i)``: absolute likelihoods, not only relative ones. For
    n = 2 and t = (1, 0) it is TRL's ``nca_pair``.
    """
    rewards = beta * working(log_ratios, valid)
    targets = _score_targets(scores, valid, temperature).to(rewards.dtype)
    per_response = targets * logsigmoid(rewards) + logsigmoid(-rewards) / valid.sum(1, keepdim=True)
    return -torch.where(valid, per_response, 0.0).sum(1)


def _compared(levels: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each response i whom it is compared with, and which responses stand for their level.

    Returns:
        Bool (B, N, N), (i, j): j's level is at least i's. Bool (B, N, N): they are of one level.
        Bool (B, N): i is the first of its level, and a lower one is there.
    """
    both = valid[:, :, None] & valid[:, None, :]
    at_least = both & (levels[:, None, :] >= levels[:, :, None])
    equal = both & (levels[:, None, :] == levels[:, :, None])
    n = levels.shape[1]
    earlier = torch.ones(n, n, dtype=torch.bool, device=levels.device).tril(-1)
    stands = ~(equal & earlier).any(2) & ordered_pairs(levels, valid).any(2)
    return at_least, equal, stands


def _log_masses(rewards: Tensor, members: Tensor, stands: Tensor) -> Tensor:
    """Log of the mass of a set for each response, (B, N); zero for those that don't stand."""
    members = members | ~stands[:, :, None]
    spread = rewards[:, None, :].masked_fill(~members, -torch.inf).logsumexp(2)
    return torch.where(stands, spread, 0.0)


def _shifted(log_ratios: Tensor, valid: Tensor, beta: float) -> Tensor:
    """Rewards less the largest of their group, (B, N); a common shift is not seen."""
    rewards = beta * working(log_ratios, valid)
    top = rewards.detach().masked_fill(~valid, -torch.inf).amax(1, keepdim=True)
    return torch.where(valid, rewards - top, 0.0)


def plackett_luce_loss(log_ratios: Tensor, levels: Tensor, valid: Tensor, *, beta: float) -> Tensor:
    """Plackett-Luce over levels, (B,): each level against itself and all below, summed.

    ``sum over levels k but the lowest of logsumexp(beta r over levels <= k) - logsumexp(beta r over
    level k)``. Where no two levels are equal it is the listwise loss of arXiv 2305.18290, app. A.3;
    with two levels it is MPO.

    Args:
        log_ratios: policy minus reference log-probabilities, nats, (B, N).
        levels: float (B, N), higher is better.
        valid: bool (B, N).
        beta: pull towards the reference, > 0.
    """
    rewards = _shifted(log_ratios, valid, beta)
    at_least, equal, stands = _compared(levels, valid)
    at_most = (valid[:, :, None] & valid[:, None, :] & ~at_least) | equal
    terms = _log_masses(rewards, at_most, stands) - _log_masses(rewards, equal, stands)
    return terms.sum(1)


def multi_level_loss(log_ratios: Tensor, levels: Tensor, valid: Tensor, *, beta: float) -> Tensor:
    """The mean of MPO's loss over all cuts between levels, (B,).

    For each level but the lowest, what is of this level or above is chosen and the rest rejected.
    With two levels it is MPO. Arguments as in ``plackett_luce_loss``.
    """
    rewards = _shifted(log_ratios, valid, beta)
    at_least, _, stands = _compared(levels, valid)
    everyone = valid[:, None, :].expand_as(at_least)
    terms = _log_masses(rewards, everyone, stands) - _log_masses(rewards, at_least, stands)
    return terms.sum(1) / stands.sum(1).clamp(min=1)


def lipo_loss(log_ratios: Tensor, scores: Tensor, valid: Tensor, *, beta: float) -> Tensor:
    """LiPO-lambda: a logistic loss on all pairs, weighted by what swapping them would change, (B,).

    Source: arXiv 2402.01878, as commonly stated. ``sum over S_i > S_j of |2**s_i - 2**s_j| *
    |1 / log(1 + rank_i) - 1 / log(1 + rank_j)| * softplus(beta r_j - beta r_i)``, with s the scores
    mapped to 0 to 1 within their group and rank the place by reward, 1 the highest. Equal rewards,
    such as all are at the start, rank by score and then by place in the group: with shared ranks
    the first step would teach nothing. Weights carry no gradient.
    """
    rewards = beta * working(log_ratios, valid)
    pairs = ordered_pairs(scores, valid)
    values = scores.double()
    low = values.masked_fill(~valid, torch.inf).amin(1, keepdim=True)
    high = values.masked_fill(~valid, -torch.inf).amax(1, keepdim=True)
    gains = torch.exp2((values - low) / torch.where(high > low, high - low, 1.0))
    n = values.shape[1]
    earlier = torch.ones(n, n, dtype=torch.bool, device=values.device).tril(-1)
    fixed = rewards.detach()
    tied = fixed[:, None, :] == fixed[:, :, None]
    before = (values[:, None, :] > values[:, :, None]) | (
        (values[:, None, :] == values[:, :, None]) & earlier
    )
    ahead = valid[:, None, :] & ((fixed[:, None, :] > fixed[:, :, None]) | (tied & before))
    discounts = 1 / (2 + ahead.sum(2)).double().log()
    change = (gains[:, :, None] - gains[:, None, :]).abs()
    weights = change * (discounts[:, :, None] - discounts[:, None, :]).abs()
    margins = torch.where(pairs, rewards[:, :, None] - rewards[:, None, :], 0.0)
    weights = torch.where(pairs, weights, 0.0).to(rewards.dtype)
    return -(weights * logsigmoid(margins)).sum((1, 2))


@dataclass(frozen=True, kw_only=True)
class _ScoreTargetLoss(SetLoss):
    """What InfoNCA and NCA share: scores become targets through a temperature."""

    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self, "temperature", "a number > 0", low=0, open_low=True)


@dataclass(frozen=True, kw_only=True)
class InfoNCA(_ScoreTargetLoss):
    """InfoNCA: softmax cross-entropy against score targets. arXiv 2402.05369.

    Args:
        beta: pull towards the reference, > 0.
        reference_free: the policy's log-probability takes the log-ratio's place.
        length_normalized: log-ratios per token; beta must grow with it.
        likelihood: weight of a likelihood term on the responses above the mean score, >= 0.
        temperature: divisor of the scores in the targets' softmax, in score units, > 0.
    """

    title: ClassVar = "InfoNCA"
    latex: ClassVar = (
        r"L = -\sum_i t_i \log \mathrm{softmax}(\beta r)_i, \qquad "
        r"t = \mathrm{softmax}(S / \tau)"
    )
    symbols: ClassVar = r"$\tau$ is the temperature"
    arxiv: ClassVar = ("2402.05369",)

    def has_contrast(self, scores: Tensor, valid: Tensor) -> Tensor:
        """Two responses are enough: equal scores ask for equal likelihood ratios."""
        return valid.sum(1) > 1

    def __call__(self, log_ratios: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
        """The loss of each group, (B,)."""
        return info_nca_loss(
            log_ratios, scores, valid, beta=self.beta, temperature=self.temperature
        )


@dataclass(frozen=True, kw_only=True)
class NCA(_ScoreTargetLoss):
    """NCA: per-response logistic loss against score targets. arXiv 2402.05369.

    Args:
        beta: pull towards the reference, > 0.
        reference_free: the policy's log-probability takes the log-ratio's place.
        length_normalized: log-ratios per token; beta must grow with it.
        likelihood: weight of a likelihood term on the responses above the mean score, >= 0.
        temperature: divisor of the scores in the targets' softmax, in score units, > 0.
    """

    title: ClassVar = "NCA"
    latex: ClassVar = (
        r"L = -\sum_i \left[ t_i \log \sigma(\beta r_i) + "
        r"\tfrac{1}{n} \log \sigma(-\beta r_i) \right], \qquad t = \mathrm{softmax}(S / \tau)"
    )
    symbols: ClassVar = r"$\tau$ is the temperature"
    arxiv: ClassVar = ("2402.05369",)

    def has_contrast(self, scores: Tensor, valid: Tensor) -> Tensor:
        """Any response is enough: it has an absolute target."""
        return valid.any(1)

    def __call__(self, log_ratios: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
        """The loss of each group, (B,)."""
        return nca_loss(log_ratios, scores, valid, beta=self.beta, temperature=self.temperature)


@dataclass(frozen=True, kw_only=True)
class _LevelLoss(SetLoss):
    """What losses over ordinal levels share: how scores become levels."""

    levels: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = self.levels is None or (isinstance(self.levels, int) and self.levels >= 2)
        require(self, "levels", whole, "none or a whole number >= 2")

    def has_contrast(self, scores: Tensor, valid: Tensor) -> Tensor:
        """Whether there are two levels: the scores are not all equal."""
        return differs(scores, valid)


@dataclass(frozen=True, kw_only=True)
class PlackettLuce(_LevelLoss):
    """Plackett-Luce over the ranking by score; equal scores are one level. arXiv 2305.18290, A.3.

    Args:
        beta: pull towards the reference, > 0.
        reference_free: the policy's log-probability takes the log-ratio's place.
        length_normalized: log-ratios per token; beta must grow with it.
        likelihood: weight of a likelihood term on the responses above the mean score, >= 0.
        levels: bins of equal width over each group's range of scores; none: each distinct score is
            a level.
    """

    title: ClassVar = "Plackett-Luce"
    latex: ClassVar = (
        r"L = \sum_{k=1}^{m-1} \left[ \mathrm{LSE}_{S \le l_k}(\beta r) - "
        r"\mathrm{LSE}_{S = l_k}(\beta r) \right]"
    )
    symbols: ClassVar = (
        r"$l_1 \gt \dots \gt l_m$ are the levels of the scores, "
        r"$\mathrm{LSE}_A(E)$ is $\log \sum_{i \in A} e^{E_i}$"
    )
    arxiv: ClassVar = ("2305.18290",)

    def __call__(self, log_ratios: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
        """The loss of each group, (B,)."""
        levels = binned(scores, valid, self.levels)
        return plackett_luce_loss(log_ratios, levels, valid, beta=self.beta)


@dataclass(frozen=True, kw_only=True)
class MultiLevelMPO(_LevelLoss):
    """MPO over ordinal levels: the mean over all cuts of what is above against what is below.

    Args:
        beta: pull towards the reference, > 0.
        reference_free: the policy's log-probability takes the log-ratio's place.
        length_normalized: log-ratios per token; beta must grow with it.
        likelihood: weight of a likelihood term on the responses above the mean score, >= 0.
        levels: bins of equal width over each group's range of scores; none: each distinct score is
            a level.
    """

    title: ClassVar = "MPO over all cuts between score levels"
    latex: ClassVar = MPO.latex
    symbols: ClassVar = (
        "it is the mean of this over the cuts between the levels of the scores, with "
        r"$Y^+ = \lbrace S \ge l_k \rbrace$; " + MPO.symbols
    )
    arxiv: ClassVar = ("2412.04628",)

    def __call__(self, log_ratios: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
        """The loss of each group, (B,)."""
        levels = binned(scores, valid, self.levels)
        return multi_level_loss(log_ratios, levels, valid, beta=self.beta)


@dataclass(frozen=True, kw_only=True)
class LiPO(SetLoss):
    """LiPO-lambda: pairs weighted by their part in the ranking's quality. arXiv 2402.01878.

    Args:
        beta: pull towards the reference, > 0.
        reference_free: the policy's log-probability takes the log-ratio's place.
        length_normalized: log-ratios per token; beta must grow with it.
        likelihood: weight of a likelihood term on the responses above the mean score, >= 0.
    """

    title: ClassVar = "LiPO-lambda"
    latex: ClassVar = (
        r"L = \sum_{S_i \gt S_j} \lvert 2^{s_i} - 2^{s_j} \rvert \cdot \left\lvert "
        r"\frac{1}{\log(1 + \rho_i)} - \frac{1}{\log(1 + \rho_j)} \right\rvert \cdot "
        r"\log(1 + e^{-\beta (r_i - r_j)})"
    )
    symbols: ClassVar = (
        r"$s$ are the scores mapped to 0 to 1 within the group, $\rho_i$ is the rank by reward"
    )
    arxiv: ClassVar = ("2402.01878",)

    def has_contrast(self, scores: Tensor, valid: Tensor) -> Tensor:
        """Whether the scores are not all equal."""
        return differs(scores, valid)

    def __call__(self, log_ratios: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
        """The loss of each group, (B,)."""
        return lipo_loss(log_ratios, scores, valid, beta=self.beta)
