"""Losses that contrast a chosen with a rejected set: MPO, W-MPO, EachMPO, MDPO, MIPO."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from mpo_lightning.checks import require_instance, require_number
from mpo_lightning.losses.base import SetLoss, masked_float, set_mean
from mpo_lightning.losses.partition import AboveMean, Partition
from mpo_lightning.losses.scores import AlphaUnit, Deviation, deviation_log_weights

__all__ = ["MDPO", "MIPO", "MPO", "EachMPO", "PartitionLoss", "WeightedLoss"]


@dataclass(frozen=True, kw_only=True)
class PartitionLoss(SetLoss):
    """Base of the losses on two sets, which a partition rule makes.

    Args:
        partition: rule that decides which responses are chosen, which rejected, which neither.
    """

    partition: Partition = AboveMean()  # noqa: RUF009 (frozen)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_instance(self, "partition", Partition)

    def sets(self, scores: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen and rejected set of the partition rule, bool (B, N) each."""
        return self.partition(scores, valid)


@dataclass(frozen=True, kw_only=True)
class WeightedLoss(PartitionLoss):
    """Base of MPO and EachMPO: rewards ``beta * r`` with the log-weights w of W-MPO.

    Args:
        alpha: strength of the deviation weights, >= 0; 0 leaves them out.
        power: exponent of the deviation, >= 0.
        deviation: "absolute" or "signed" (as in REFA, arXiv 2412.16378) deviation from the mean
            score of the whole group, whatever the partition.
        gamma: factor on the rejected responses' terms, > 0 (REFA uses 2 to 4).
        alpha_unit: "score": alpha counts per unit of score, so 1-to-10 scores and reward-model
            scores of spread 0.02 need very different values; "std": per standard deviation of the
            group's scores.
    """

    symbols: ClassVar = (
        r"$E_i = \beta r_i + w_i$ with log-weights $w_i = \alpha \lvert \Delta_i \rvert^{p}$ "
        r"from the deviations $\Delta_i = S_i - \bar S$ ($\alpha = 0$: none); "
        r"$\gamma$ multiplies the rejected terms"
    )

    alpha: float = 0.0
    power: float = 1.0
    deviation: Deviation = "absolute"
    gamma: float = 1.0
    alpha_unit: AlphaUnit = "score"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self, "alpha", "a number >= 0", low=0)
        require_number(self, "power", "a number >= 0", low=0)
        require_number(self, "gamma", "a number > 0", low=0, open_low=True)

    def log_weights(self, scores: Tensor, valid: Tensor) -> Tensor:
        """Log-weights w of the responses, without gamma, float64 (B, N); zero on padding."""
        return deviation_log_weights(
            scores,
            valid,
            alpha=self.alpha,
            power=self.power,
            deviation=self.deviation,
            alpha_unit=self.alpha_unit,
        )

    def contrasted(
        self, log_ratios: Tensor, log_weights: Tensor, chosen: Tensor, rejected: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Energies ``beta * r + w``, gamma included, (B, N), and both sets, bool (B, N) each.

        Energies are zero outside both sets, and shifted so that the largest of each group is zero.
        In a group without contrast all energies are zero, and both sets hold every slot.
        """
        contrast = (chosen.any(1) & rejected.any(1))[:, None]
        members = contrast & (chosen | rejected)
        # torch.where keeps float64; a number times a bool tensor takes the default dtype instead.
        weights = torch.where(rejected, log_weights + math.log(self.gamma), log_weights)
        energy = self.beta * masked_float(log_ratios, members)
        energy = energy + torch.where(members, weights, 0.0).to(energy.dtype)
        # A common shift changes no loss here, and keeps two large numbers from being subtracted.
        top = energy.detach().masked_fill(~members, -torch.inf).amax(1, keepdim=True)
        energy = torch.where(members, energy - torch.where(contrast, top, 0.0), 0.0)
        # Without contrast every slot is chosen and rejected: all logsumexps of the group are then
        # equal, so that their difference, and its gradient, is exactly 0 without a special case.
        return energy, chosen | ~contrast, rejected | ~contrast


def _log_mass(energy: Tensor, members: Tensor) -> Tensor:
    """Logsumexp of the energies of a nonempty set, (B,)."""
    return energy.masked_fill(~members, -torch.inf).logsumexp(1)


@dataclass(frozen=True, kw_only=True)
class MPO(WeightedLoss):
    """Multi-Preference Optimization; W-MPO when ``alpha > 0``. arXiv 2412.04628.

    The negative log of the chosen set's share of the mass of both sets (docs/mathematics.md,
    equation 1): ``logsumexp(E over both sets) - logsumexp(E over chosen)`` with energies
    ``E = beta * r + w``. With one chosen and one rejected response and equal weights this is the
    DPO loss (arXiv 2305.18290, equation 7). At ``r = 0, w = 0`` it is ``log(number in both / number
    chosen)``. A group without contrast (nothing chosen, or nothing rejected) has loss and gradient
    zero; so has a response in neither set.

    The chosen set holds the responses that score above their group's mean, unless ``partition``
    says otherwise. Texts on the method differ about the weights; this class adds
    ``w = alpha * |S - mean S| ** power`` outside beta. An alpha that a text puts inside beta is
    this alpha divided by beta. With ``reference_free`` and ``length_normalized`` it is the core of
    REFA (arXiv 2412.16378).

    Examples:
        Scores 5, 4, 1, 2 have mean 3: the first two are chosen. Masses ``exp(beta * r)`` are 3, 2,
        1, 1, so the chosen set holds 5/7, and the loss is ln(7/5).

        >>> log_ratios = 2 * torch.tensor([[3.0, 2.0, 1.0, 1.0]]).log()
        >>> scores = torch.tensor([[5.0, 4.0, 1.0, 2.0]])
        >>> valid = torch.ones(1, 4, dtype=torch.bool)
        >>> MPO(beta=0.5)(log_ratios, scores, valid)
        tensor([0.3365])
    """

    title: ClassVar = "Multi-Preference Optimization (MPO)"
    latex: ClassVar = r"L = -\log \frac{\sum_{i \in Y^+} e^{E_i}}{\sum_{j=1}^{n} e^{E_j}}"
    arxiv: ClassVar = ("2412.04628",)

    def __call__(self, log_ratios: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
        """Return the loss of each group, (B,)."""
        energy, chosen, rejected = self.contrasted(
            log_ratios, self.log_weights(scores, valid), *self.sets(scores, valid)
        )
        return _log_mass(energy, chosen | rejected) - _log_mass(energy, chosen)


def _log_shares(log_weights: Tensor, members: Tensor) -> Tensor:
    """Log of each member's share of its set's weight, (B, N); zero outside the set."""
    shares = log_weights.masked_fill(~members, -torch.inf).log_softmax(1)
    return torch.where(members, shares, 0.0)


@dataclass(frozen=True, kw_only=True)
class EachMPO(WeightedLoss):
    """MPO with each chosen response by itself against the rejected set: no winner takes all.

    The mean over the chosen stands outside the logarithm, so that a chosen response that lags is
    pulled harder than one that leads: ``sum over chosen i of a_i * softplus(log M - beta * r_i)``
    with ``M = gamma * |rejected| * sum over rejected j of b_j * exp(beta * r_j)``
    (docs/mathematics.md, equation 9). The shares a and b, the softmax of the log-weights w over
    either set, are equal for ``alpha = 0``. They say how a set's gradient is shared out, not how
    large it is: inside the logarithm a chosen response's weight would count as a lead that it has
    already, and the best would be pulled least. With one chosen response and no weights it is MPO.

    Examples:
        >>> log_ratios, scores = torch.zeros(1, 3), torch.tensor([[5.0, 4.0, 1.0]])
        >>> EachMPO()(log_ratios, scores, valid=torch.ones(1, 3, dtype=torch.bool))  # ln 2
        tensor([0.6931])
    """

    title: ClassVar = "MPO with each chosen response by itself"
    latex: ClassVar = (
        r"L = \sum_{i \in Y^+} -a_i \log \frac{e^{\beta r_i}}{e^{\beta r_i} + M}, \qquad "
        r"M = \gamma \lvert Y^- \rvert \sum_{j \in Y^-} b_j e^{\beta r_j}"
    )
    symbols: ClassVar = (
        r"$a$ and $b$ are the softmax over $Y^+$ and over $Y^-$ of the log-weights "
        r"$w_i = \alpha \lvert \Delta_i \rvert^{p}$ from the deviations "
        r"$\Delta_i = S_i - \bar S$ ($\alpha = 0$: equal shares); "
        r"$\gamma$ multiplies the rejected terms"
    )
    arxiv: ClassVar = ("2412.04628",)

    def __call__(self, log_ratios: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
        """Return the loss of each group, (B,)."""
        chosen, rejected = self.sets(scores, valid)
        contrast = chosen.any(1) & rejected.any(1)
        weights = self.log_weights(scores, valid)
        shares = torch.where(chosen, _log_shares(weights, chosen).exp(), 0.0)
        count = rejected.sum(1, keepdim=True).clamp(min=1).double()
        within = torch.where(rejected, _log_shares(weights, rejected) + count.log(), 0.0)
        energy, _, against = self.contrasted(log_ratios, within, chosen, rejected)
        terms = softplus(_log_mass(energy, against)[:, None] - energy)
        summed = torch.where(chosen, shares.to(energy.dtype) * terms, 0.0).sum(1)
        return torch.where(contrast, summed, 0.0)


def _mean_margin(log_ratios: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
    """Mean log-ratio of the chosen minus that of the rejected, (B,); zero without contrast."""
    contrast = (chosen.any(1) & rejected.any(1))[:, None]
    values = masked_float(log_ratios, contrast & (chosen | rejected))
    return set_mean(values, chosen) - set_mean(values, rejected)


@dataclass(frozen=True, kw_only=True)
class MDPO(PartitionLoss):
    """DPO on the sets' means: ``-log sigmoid(beta * (mean r+ - mean r-))``. arXiv 2410.12138."""

    title: ClassVar = "DPO on the sets' means"
    latex: ClassVar = r"-\log \sigma(\beta d)"
    symbols: ClassVar = (
        r"$d = \frac{1}{\lvert Y^+ \rvert} \sum_{Y^+} r_i - "
        r"\frac{1}{\lvert Y^- \rvert} \sum_{Y^-} r_j$"
    )
    arxiv: ClassVar = ("2410.12138",)

    def __call__(self, log_ratios: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
        """Return the loss of each group, (B,)."""
        chosen, rejected = self.sets(scores, valid)
        margin = self.beta * _mean_margin(log_ratios, chosen, rejected)
        return torch.where(chosen.any(1) & rejected.any(1), softplus(-margin), 0.0)


@dataclass(frozen=True, kw_only=True)
class MIPO(PartitionLoss):
    """IPO on the sets' means: ``(mean r+ - mean r- - 1 / (2 beta)) ** 2``. arXiv 2410.12138.

    Args:
        beta: pull towards the reference, > 0: the target margin is ``1 / (2 beta)`` nats.
    """

    title: ClassVar = "IPO on the sets' means"
    latex: ClassVar = r"\left( d - \tfrac{1}{2 \beta} \right)^2"
    symbols: ClassVar = MDPO.symbols
    arxiv: ClassVar = ("2410.12138",)

    def __call__(self, log_ratios: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
        """Return the loss of each group, (B,)."""
        chosen, rejected = self.sets(scores, valid)
        distance = _mean_margin(log_ratios, chosen, rejected) - 1 / (2 * self.beta)
        return torch.where(chosen.any(1) & rejected.any(1), distance.square(), 0.0)
