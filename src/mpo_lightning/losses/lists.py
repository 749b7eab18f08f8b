"""Losses on more of the scores than two sets: targets, rankings, ordinal levels."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from mpo_lightning.checks import require, require_number
from mpo_lightning.losses.base import SetLoss, masked_float, set_mean
from mpo_lightning.losses.scores import binned, deviations, differs, ordered_pairs
from mpo_lightning.losses.sets import MPO

__all__ = [
    "GVPO",
    "NCA",
    "EachAgainstBelow",
    "InfoNCA",
    "LevelLoss",
    "LiPO",
    "MultiLevelMPO",
    "PlackettLuce",
    "ScoreTargetLoss",
    "Target",
]

Target = Literal["centred", "advantage", "quantile"]


@dataclass(frozen=True, kw_only=True)
class ScoreTargetLoss(SetLoss):
    """Base of the losses with a target for each response, made of ``S / temperature``.

    Args:
        temperature: divisor of the scores in the targets, in score units, > 0.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self, "temperature", "a number > 0", low=0, open_low=True)

    def targets(self, scores: Tensor, valid: Tensor) -> Tensor:
        """Soft targets, the softmax over each group, float64 (B, N); zero on padding."""
        return (scores.double() / self.temperature).masked_fill(~valid, -torch.inf).softmax(1)


@dataclass(frozen=True, kw_only=True)
class InfoNCA(ScoreTargetLoss):
    """InfoNCA: cross-entropy of ``softmax(beta * r)`` against the targets t. arXiv 2402.05369.

    Its gradient is zero exactly where ``beta * r = S / temperature + const``.

    Examples:
        >>> scores, valid = torch.tensor([[2.0, 0.0]]), torch.ones(1, 2, dtype=torch.bool)
        >>> log_ratios = torch.tensor([[20.0, 0.0]], requires_grad=True)
        >>> InfoNCA(beta=0.1)(log_ratios, scores, valid).backward()
        >>> log_ratios.grad.abs().max() < 1e-6  # 0.1 * 20 is the difference of the scores
        tensor(True)
    """

    title: ClassVar = "InfoNCA"
    latex: ClassVar = (
        r"L = -\sum_i t_i \log \mathrm{softmax}(\beta r)_i, \qquad "
        r"t = \mathrm{softmax}(S / \tau)"
    )
    symbols: ClassVar = r"$\tau$ is the temperature"
    arxiv: ClassVar = ("2402.05369",)

    def has_contrast(self, scores: Tensor, valid: Tensor) -> Tensor:
        """Return which groups have two responses: equal scores ask for equal likelihood ratios."""
        return valid.sum(1) > 1

    def __call__(self, log_ratios: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
        """Return the loss of each group, (B,)."""
        rewards = self.beta * masked_float(log_ratios, valid)
        log_shares = rewards.masked_fill(~valid, -torch.inf).log_softmax(1)
        targets = self.targets(scores, valid).to(rewards.dtype)
        return -(targets * torch.where(valid, log_shares, 0.0)).sum(1)


@dataclass(frozen=True, kw_only=True)
class NCA(ScoreTargetLoss):
    """NCA: ``-sum_i [t_i log sigmoid(beta r_i) + log sigmoid(-beta r_i) / n]``. arXiv 2402.05369.

    For n responses in the group. Its gradient is zero at ``beta * r_i = log(n t_i)``: absolute
    likelihoods, not only relative ones. For n = 2 and t = (1, 0) it is TRL's ``nca_pair``.

    Examples:
        >>> scores, valid = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
        >>> NCA()(torch.zeros(1, 2), scores, valid)  # 2 ln 2: t = 1/2, sigmoid(0) = 1/2
        tensor([1.3863])
    """

    title: ClassVar = "NCA"
    latex: ClassVar = (
        r"L = -\sum_i \left[ t_i \log \sigma(\beta r_i) + "
        r"\tfrac{1}{n} \log \sigma(-\beta r_i) \right], \qquad t = \mathrm{softmax}(S / \tau)"
    )
    symbols: ClassVar = r"$\tau$ is the temperature"
    arxiv: ClassVar = ("2402.05369",)

    def has_contrast(self, scores: Tensor, valid: Tensor) -> Tensor:
        """Return which groups have a response at all: each has an absolute target."""
        return valid.any(1)

    def __call__(self, log_ratios: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
        """Return the loss of each group, (B,)."""
        rewards = self.beta * masked_float(log_ratios, valid)
        targets = self.targets(scores, valid).to(rewards.dtype)
        n = valid.sum(1, keepdim=True)
        per_response = targets * logsigmoid(rewards) + logsigmoid(-rewards) / n
        return -torch.where(valid, per_response, 0.0).sum(1)


@dataclass(frozen=True, kw_only=True)
class GVPO(ScoreTargetLoss):
    """Regression of the rewards on the scores: GVPO, A*-PO or QRPO by ``target``.

    The mean over a group of ``(beta * r_i - T_i + c) ** 2`` with targets T of the scores; the three
    differ in the constant c, the log of a policy's normalisation (docs/mathematics.md, equation
    15). The loss and its gradient are zero at ``beta * r = T - c``, so a large log-ratio is pulled
    back as hard as a small one is pulled up.

    Args:
        target: "centred" (GVPO, arXiv 2504.19599): ``T = S / temperature``, and c makes the mean
            error of the group zero, so that only differences count; "advantage" (A*-PO, arXiv
            2505.20686): c is ``beta * log(mean exp(T / beta))`` over the group; "quantile" (QRPO,
            arXiv 2507.08068): T is the score's quantile in the group, from 0 to 1, divided by the
            temperature, and c is known exactly. The last two have absolute targets, as NCA has.

    Examples:
        >>> scores, valid = torch.tensor([[2.0, 0.0]]), torch.ones(1, 2, dtype=torch.bool)
        >>> GVPO(beta=0.1)(torch.tensor([[25.0, 5.0]]), scores, valid)  # 0.1 * 20 is 2 - 0
        tensor([0.])
        >>> GVPO(beta=0.1)(torch.zeros(1, 2), scores, valid)  # errors of 1 and -1
        tensor([1.])
    """

    title: ClassVar = "GVPO (regression of implicit rewards on scores)"
    latex: ClassVar = r"L = \frac{1}{n} \sum_i \left( \beta r_i - T_i + c \right)^2"
    symbols: ClassVar = (
        r"$T_i = S_i / \tau$ with the temperature $\tau$ and $c = \bar T - \beta \bar r$ "
        r"(target: centred) or $c = \beta \log \frac{1}{n} \sum_j e^{T_j / \beta}$ (advantage); "
        r"or $T_i = q_i / \tau$ with the quantile $q_i$ of the score in its group and "
        r"$c = \beta \log \int_0^1 e^{q / (\beta \tau)} dq$ (quantile)"
    )
    arxiv: ClassVar = ("2504.19599", "2505.20686", "2507.08068")

    target: Target = "centred"

    def has_contrast(self, scores: Tensor, valid: Tensor) -> Tensor:
        """Return which groups have two responses, or any if their targets are absolute."""
        return valid.sum(1) > 1 if self.target == "centred" else valid.any(1)

    def targets(self, scores: Tensor, valid: Tensor) -> Tensor:
        """Targets ``T - c`` of the rewards ``beta * r``, float64 (B, N); zero on padding.

        Those of "centred" hold up to a constant of the group; their mean is zero.
        """
        if self.target == "centred":
            return deviations(scores, valid) / self.temperature
        values = torch.where(valid, scores.double(), 0.0)
        n = valid.sum(1, keepdim=True).double()
        constant: Tensor | float
        if self.target == "advantage":
            values = values - values.masked_fill(~valid, -torch.inf).amax(1, keepdim=True)
            energies = values.masked_fill(~valid, -torch.inf) / (self.temperature * self.beta)
            constant = self.beta * (energies.logsumexp(1, keepdim=True) - n.log())
        else:
            equal = valid[:, None, :] & (values[:, :, None] == values[:, None, :])
            below = ordered_pairs(values, valid).sum(2)
            # Equal scores, a response's own included, count half: quantiles average 1/2.
            values = (below + equal.sum(2).double() / 2) / n
            rate = 1 / (self.temperature * self.beta)
            # The log of (e^rate - 1) / rate, whose power would overflow.
            constant = self.beta * (rate + math.log(-math.expm1(-rate) / rate))
        return torch.where(valid, values / self.temperature - constant, 0.0)

    def __call__(self, log_ratios: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
        """Return the loss of each group, (B,)."""
        rewards = self.beta * masked_float(log_ratios, valid)
        if self.target == "centred":
            rewards = rewards - set_mean(rewards, valid)[:, None]
        errors = rewards - self.targets(scores, valid).to(rewards.dtype)
        return set_mean(errors.square(), valid)


def _compared(levels: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sets that a loss over levels compares, seen from each response i.

    Returns:
        Bool (B, N, N): True at (i, j) where j's level is at least i's.
        Bool (B, N, N): True at (i, j) where j's level is i's.
        Bool (B, N): True at one response of each level but the lowest, the first one, so that each
        level counts once.
    """
    both = valid[:, :, None] & valid[:, None, :]
    at_least = both & (levels[:, None, :] >= levels[:, :, None])
    equal = both & (levels[:, None, :] == levels[:, :, None])
    n = levels.shape[1]
    earlier = torch.ones(n, n, dtype=torch.bool, device=levels.device).tril(-1)
    first = ~(equal & earlier).any(2) & ordered_pairs(levels, valid).any(2)
    return at_least, equal, first


def _log_masses(rewards: Tensor, members: Tensor, counted: Tensor) -> Tensor:
    """Logsumexp of the rewards of each response's set, (B, N); zero unless it is ``counted``."""
    # A padded slot's set is empty: the gradient of its logsumexp would be NaN.
    members = members | ~counted[:, :, None]
    spread = rewards[:, None, :].masked_fill(~members, -torch.inf).logsumexp(2)
    return torch.where(counted, spread, 0.0)


@dataclass(frozen=True, kw_only=True)
class LevelLoss(SetLoss):
    """Base of the losses over ordinal levels.

    Args:
        levels: number of bins of equal width over each group's range of scores, >= 2. Defaults to
            one level for each distinct score.
    """

    levels: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = self.levels is None or (isinstance(self.levels, int) and self.levels >= 2)
        require(self, "levels", whole, "none or a whole number >= 2")

    def has_contrast(self, scores: Tensor, valid: Tensor) -> Tensor:
        """Return which groups have two levels: their scores are not all equal."""
        return differs(scores, valid)

    def shifted_rewards(self, log_ratios: Tensor, valid: Tensor) -> Tensor:
        """Rewards ``beta * r`` less the largest of their group, (B, N); a shift changes no loss."""
        rewards = self.beta * masked_float(log_ratios, valid)
        top = rewards.detach().masked_fill(~valid, -torch.inf).amax(1, keepdim=True)
        return torch.where(valid, rewards - top, 0.0)


@dataclass(frozen=True, kw_only=True)
class PlackettLuce(LevelLoss):
    """Plackett-Luce over the ranking by score; equal scores are one level. arXiv 2305.18290, A.3.

    Each level against itself and all below: ``sum over levels k but the lowest of
    logsumexp(beta r over levels <= k) - logsumexp(beta r over level k)``. Where no two scores are
    equal it is the listwise loss of the paper; with two levels it is MPO.
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
        """Return the loss of each group, (B,)."""
        rewards = self.shifted_rewards(log_ratios, valid)
        at_least, equal, first = _compared(binned(scores, valid, self.levels), valid)
        at_most = (valid[:, :, None] & valid[:, None, :] & ~at_least) | equal
        terms = _log_masses(rewards, at_most, first) - _log_masses(rewards, equal, first)
        return terms.sum(1)


@dataclass(frozen=True, kw_only=True)
class MultiLevelMPO(LevelLoss):
    """MPO over ordinal levels: the mean of MPO's loss over all cuts between two levels.

    For each level but the lowest, responses of this level or above are chosen, the others rejected.
    With two levels it is MPO.

    Examples:
        >>> scores, valid = torch.tensor([[3.0, 2.0, 1.0]]), torch.ones(1, 3, dtype=torch.bool)
        >>> MultiLevelMPO()(torch.zeros(1, 3), scores, valid)  # (ln 3 + ln 3/2) / 2
        tensor([0.7520])
    """

    title: ClassVar = "MPO over all cuts between score levels"
    latex: ClassVar = MPO.latex
    symbols: ClassVar = (
        "it is the mean of this over the cuts between the levels of the scores, with "
        r"$Y^+ = \lbrace S \ge l_k \rbrace$; " + MPO.symbols
    )
    arxiv: ClassVar = ("2412.04628",)

    def __call__(self, log_ratios: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
        """Return the loss of each group, (B,)."""
        rewards = self.shifted_rewards(log_ratios, valid)
        at_least, _, first = _compared(binned(scores, valid, self.levels), valid)
        everyone = valid[:, None, :].expand_as(at_least)
        terms = _log_masses(rewards, everyone, first) - _log_masses(rewards, at_least, first)
        return terms.sum(1) / first.sum(1).clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class EachAgainstBelow(LevelLoss):
    """Each response by itself against all that score lower; equal scores do not compete.

    The mean over the responses i that have a lower-scored one of ``softplus(logsumexp(beta r over
    the lower-scored) - beta r_i)``. With two levels it is EachMPO; where no two scores are equal it
    is Plackett-Luce divided by the number of its terms. It follows what abstracts say of GraphDPO
    (arXiv 2605.08037), whose exact formula may differ.

    Examples:
        >>> scores, valid = torch.tensor([[3.0, 2.0, 1.0]]), torch.ones(1, 3, dtype=torch.bool)
        >>> EachAgainstBelow()(torch.zeros(1, 3), scores, valid)  # (ln 3 + ln 2) / 2
        tensor([0.8959])
    """

    title: ClassVar = "Each response against all that score lower"
    latex: ClassVar = (
        r"L = \frac{1}{\lvert A \rvert} \sum_{i \in A} -\log "
        r"\frac{e^{\beta r_i}}{e^{\beta r_i} + M_i}, \qquad "
        r"M_i = \sum_{S_j \lt S_i} e^{\beta r_j}"
    )
    symbols: ClassVar = r"$A$ are the responses that do not have the lowest score of their group"
    arxiv: ClassVar = ("2605.08037",)

    def __call__(self, log_ratios: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
        """Return the loss of each group, (B,)."""
        rewards = self.shifted_rewards(log_ratios, valid)
        below = ordered_pairs(binned(scores, valid, self.levels), valid)
        above_some = below.any(2)
        terms = softplus(_log_masses(rewards, below, above_some) - rewards)
        return set_mean(terms, above_some)


@dataclass(frozen=True, kw_only=True)
class LiPO(SetLoss):
    """LiPO-lambda: logistic loss of all pairs, weighted by their part in the ranking's quality.

    Source: arXiv 2402.01878, as commonly stated. A pair's weight is the change of DCG if the two
    swapped places: ``sum over S_i > S_j of |2**s_i - 2**s_j| *
    |1 / log(1 + rank_i) - 1 / log(1 + rank_j)| * softplus(beta r_j - beta r_i)``, with s the scores
    mapped to 0 to 1 within their group and rank the place by reward, 1 the highest. Equal rewards,
    such as all are at the start, rank by score and then by place in the group: with shared ranks
    the first gradient would be zero. Weights carry no gradient.
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
        """Return which groups have scores that are not all equal."""
        return differs(scores, valid)

    def __call__(self, log_ratios: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
        """Return the loss of each group, (B,)."""
        rewards = self.beta * masked_float(log_ratios, valid)
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
