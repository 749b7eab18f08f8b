"""Losses that contrast a chosen with a rejected set: MPO, W-MPO, EachMPO, MDPO, MIPO."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from mpo_lightning.losses.base import LossOfSets, set_mean, working
from mpo_lightning.losses.checks import require_choice, require_instance, require_number
from mpo_lightning.losses.partition import AboveMean, Partition
from mpo_lightning.losses.scores import AlphaUnit, Deviation, deviation_log_weights

__all__ = ["MDPO", "MIPO", "MPO", "EachMPO", "each_mpo_loss", "mean_margin", "mpo_loss"]


def _contrasted(
    log_ratios: Tensor, chosen: Tensor, rejected: Tensor, beta: float, log_weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Energies and both sets; of a group without contrast zeros, all chosen and all rejected.

    Energies are those of members, shifted so that the largest of a group is zero: no loss here sees
    a shift, and without it two large numbers would not be subtracted.
    """
    contrast = (chosen.any(1) & rejected.any(1))[:, None]
    members = contrast & (chosen | rejected)
    energy = beta * working(log_ratios, members)
    if log_weights is not None:
        energy = energy + torch.where(members, log_weights, 0.0).to(energy.dtype)
    top = energy.detach().masked_fill(~members, -torch.inf).amax(1, keepdim=True)
    energy = torch.where(members, energy - torch.where(contrast, top, 0.0), 0.0)
    return energy, chosen | ~contrast, rejected | ~contrast


def _logsumexp(energy: Tensor, members: Tensor) -> Tensor:
    """Log of a set's mass, (B,); the set holds something."""
    return energy.masked_fill(~members, -torch.inf).logsumexp(1)


def mpo_loss(
    log_ratios: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    *,
    beta: float,
    log_weights: Tensor | None = None,
) -> Tensor:
    """Negative log of the share of both sets' mass that falls on the chosen set, (B,).

    docs/mathematics.md, equation 1 (arXiv 2412.04628): with energies ``E = beta * r + w``,
    ``logsumexp(E over both sets) - logsumexp(E over chosen)``. With one chosen and one rejected
    response and equal weights this is the DPO loss (arXiv 2305.18290, equation 7). At ``r = 0,
    w = 0`` it is ``log(number in both / number chosen)``. A group without contrast (nothing chosen,
    or nothing rejected) has loss and gradient zero; so has a response in neither set.

    Args:
        log_ratios: policy minus reference log-probabilities, nats, (B, N).
        chosen: bool (B, N).
        rejected: bool (B, N), disjoint from ``chosen``.
        beta: pull towards the reference, > 0.
        log_weights: w, added to the energies outside beta, (B, N); None weighs all alike.
    """
    energy, chosen, rejected = _contrasted(log_ratios, chosen, rejected, beta, log_weights)
    return _logsumexp(energy, chosen | rejected) - _logsumexp(energy, chosen)


def each_mpo_loss(
    log_ratios: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    *,
    beta: float,
    log_weights: Tensor | None = None,
) -> Tensor:
    """Mean over the chosen of the negative log of each one's share beside the rejected set, (B,).

    docs/mathematics.md, "The winner takes all": ``mean over chosen i of softplus(logsumexp(E over
    rejected) - E_i)``. With one chosen response it is ``mpo_loss``. Arguments as there.
    """
    contrast = chosen.any(1) & rejected.any(1)
    energy, every, rejected = _contrasted(log_ratios, chosen, rejected, beta, log_weights)
    per_response = softplus(_logsumexp(energy, rejected)[:, None] - energy)
    return torch.where(contrast, set_mean(per_response, every), 0.0)


def mean_margin(log_ratios: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
    """Mean log-ratio of the chosen minus that of the rejected, (B,); zero without contrast."""
    contrast = (chosen.any(1) & rejected.any(1))[:, None]
    values = working(log_ratios, contrast & (chosen | rejected))
    return set_mean(values, chosen) - set_mean(values, rejected)


@dataclass(frozen=True, kw_only=True)
class _PartitionLoss(LossOfSets):
    """What losses on two sets share: the rule that makes the sets."""

    partition: Partition = AboveMean()  # noqa: RUF009 (frozen)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_instance(self, "partition", Partition)

    def sets(self, scores: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen and rejected set of the partition rule, bool (B, N) each."""
        return self.partition(scores, valid)


@dataclass(frozen=True, kw_only=True)
class _WeightedLoss(_PartitionLoss):
    """What MPO and EachMPO share: the weights of W-MPO. Settings are described in MPO."""

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
        require_choice(self, "deviation", Deviation)
        require_choice(self, "alpha_unit", AlphaUnit)

    def _log_weights(self, scores: Tensor, valid: Tensor, rejected: Tensor) -> Tensor:
        """Log-weight of each response, ``log gamma`` on rejected ones included, float64 (B, N)."""
        weights = deviation_log_weights(
            scores,
            valid,
            alpha=self.alpha,
            power=self.power,
            deviation=self.deviation,
            alpha_unit=self.alpha_unit,
        )
        # torch.where keeps float64; a number times a bool tensor takes the default dtype instead.
        return torch.where(rejected, weights + math.log(self.gamma), weights)


@dataclass(frozen=True, kw_only=True)
class MPO(_WeightedLoss):
    """Multi-Preference Optimization; W-MPO when ``alpha > 0``. arXiv 2412.04628.

    The chosen set holds the responses that score above their group's mean, unless ``partition``
    says otherwise. Texts on the method differ about the weights; this class adds
    ``alpha * |S - mean S| ** power`` to the energies, outside beta. An alpha that a text puts
    inside beta is this alpha divided by beta. With ``reference_free`` and ``length_normalized`` it
    is the core of REFA (arXiv 2412.16378).

    Args:
        beta: pull towards the reference, > 0.
        reference_free: the policy's log-probability takes the log-ratio's place.
        length_normalized: log-ratios per token; beta must grow with it.
        likelihood: weight of a likelihood term on the chosen set, >= 0.
        partition: which responses are chosen, which rejected, which neither.
        alpha: strength of the deviation weights, >= 0; 0 is MPO, above 0 W-MPO.
        power: exponent of the deviation, >= 0.
        deviation: "absolute" (the default) or "signed" (as in REFA, arXiv 2412.16378); from the
            mean score of the whole group, whatever the partition.
        gamma: factor on the rejected responses' terms, > 0 (REFA uses 2 to 4).
        alpha_unit: "score": alpha counts per unit of score, so 1-to-10 scores and reward-model
            scores of spread 0.02 need very different values; "std": per standard deviation of the
            group's scores.
    """

    title: ClassVar = "Multi-Preference Optimization (MPO)"
    latex: ClassVar = r"L = -\log \frac{\sum_{i \in Y^+} e^{E_i}}{\sum_{j=1}^{n} e^{E_j}}"
    arxiv: ClassVar = ("2412.04628",)

    def given_sets(
        self, log_ratios: Tensor, scores: Tensor, valid: Tensor, chosen: Tensor, rejected: Tensor
    ) -> Tensor:
        """The loss of each group, (B,)."""
        weights = self._log_weights(scores, valid, rejected)
        return mpo_loss(log_ratios, chosen, rejected, beta=self.beta, log_weights=weights)


@dataclass(frozen=True, kw_only=True)
class EachMPO(_WeightedLoss):
    """MPO with each chosen response by itself against the rejected set: no winner takes all.

    The mean over the chosen stands outside the logarithm, so that a chosen response that lags is
    pulled harder than one that leads.

    Args:
        beta: pull towards the reference, > 0.
        reference_free: the policy's log-probability takes the log-ratio's place.
        length_normalized: log-ratios per token; beta must grow with it.
        likelihood: weight of a likelihood term on the chosen set, >= 0.
        partition: which responses are chosen, which rejected, which neither.
        alpha: strength of the deviation weights, >= 0.
        power: exponent of the deviation, >= 0.
        deviation: "absolute" or "signed".
        gamma: factor on the rejected responses' terms, > 0.
        alpha_unit: "score" or "std", as in MPO.
    """

    title: ClassVar = "MPO with each chosen response by itself"
    latex: ClassVar = (
        r"L = \frac{1}{\lvert Y^+ \rvert} \sum_{i \in Y^+} "
        r"-\log \frac{e^{E_i}}{e^{E_i} + M}, \qquad M = \sum_{j \in Y^-} e^{E_j}"
    )
    arxiv: ClassVar = ("2412.04628",)

    def given_sets(
        self, log_ratios: Tensor, scores: Tensor, valid: Tensor, chosen: Tensor, rejected: Tensor
    ) -> Tensor:
        """The loss of each group, (B,)."""
        weights = self._log_weights(scores, valid, rejected)
        return each_mpo_loss(log_ratios, chosen, rejected, beta=self.beta, log_weights=weights)


@dataclass(frozen=True, kw_only=True)
class MDPO(_PartitionLoss):
    """DPO on the sets' means: ``-log sigmoid(beta * (mean r+ - mean r-))``. arXiv 2410.12138.

    Args:
        beta: pull towards the reference, > 0.
        reference_free: the policy's log-probability takes the log-ratio's place.
        length_normalized: log-ratios per token; beta must grow with it.
        likelihood: weight of a likelihood term on the chosen set, >= 0.
        partition: which responses are chosen, which rejected, which neither.
    """

    title: ClassVar = "DPO on the sets' means"
    latex: ClassVar = r"-\log \sigma(\beta d)"
    symbols: ClassVar = (
        r"$d = \frac{1}{\lvert Y^+ \rvert} \sum_{Y^+} r_i - "
        r"\frac{1}{\lvert Y^- \rvert} \sum_{Y^-} r_j$"
    )
    arxiv: ClassVar = ("2410.12138",)

    def given_sets(
        self, log_ratios: Tensor, scores: Tensor, valid: Tensor, chosen: Tensor, rejected: Tensor
    ) -> Tensor:
        """The loss of each group, (B,)."""
        margin = self.beta * mean_margin(log_ratios, chosen, rejected)
        return torch.where(chosen.any(1) & rejected.any(1), softplus(-margin), 0.0)


@dataclass(frozen=True, kw_only=True)
class MIPO(_PartitionLoss):
    """IPO on the sets' means: ``(mean r+ - mean r- - 1 / (2 beta)) ** 2``. arXiv 2410.12138.

    Args:
        beta: pull towards the reference, > 0: the margin that is aimed at is ``1 / (2 beta)`` nats.
        reference_free: the policy's log-probability takes the log-ratio's place.
        length_normalized: log-ratios per token; beta must grow with it.
        likelihood: weight of a likelihood term on the chosen set, >= 0.
        partition: which responses are chosen, which rejected, which neither.
    """

    title: ClassVar = "IPO on the sets' means"
    latex: ClassVar = r"\left( d - \tfrac{1}{2 \beta} \right)^2"
    symbols: ClassVar = MDPO.symbols
    arxiv: ClassVar = ("2410.12138",)

    def given_sets(
        self, log_ratios: Tensor, scores: Tensor, valid: Tensor, chosen: Tensor, rejected: Tensor
    ) -> Tensor:
        """The loss of each group, (B,)."""
        distance = mean_margin(log_ratios, chosen, rejected) - 1 / (2 * self.beta)
        return torch.where(chosen.any(1) & rejected.any(1), distance.square(), 0.0)
