"""Set-level preference losses: pure functions of ``(log_ratios, scores, valid)``.

Shapes, everywhere in this file: ``B`` groups, ``N`` response slots in a group.

- ``log_ratios`` float (B, N): policy minus reference log-probability of each response, in nats.
- ``scores`` float (B, N): what a judge or reward model gave; higher is better.
- ``valid`` bool (B, N): True where the slot holds a response. Other slots are padding: they may
  hold anything, NaN included, and touch neither values nor gradients.
- result float (B,): one loss per group; nothing is averaged here.

Arithmetic is at least fp32 and stays in log space. Scores are compared in float64. The equations
and their sources are in docs/mathematics.md.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

__all__ = [
    "DPO",
    "MPO",
    "NCA",
    "InfoNCA",
    "SetLoss",
    "chosen_set",
    "deviation_log_weights",
    "deviations",
    "dpo_loss",
    "info_nca_loss",
    "mpo_loss",
    "nca_loss",
    "ordered_pairs",
]

Deviation = Literal["absolute", "signed"]
AlphaUnit = Literal["score", "std"]
Pairs = Literal["best-worst", "all"]

# ------------------------------------------------------------------------------- scores and sets


def deviations(scores: Tensor, valid: Tensor) -> Tensor:
    """Score minus the group's mean score, float64 (B, N); zero on padding.

    A deviation within a few units in the last place of the group's largest score is rounding (three
    scores of 0.1 do not average to 0.1 exactly) and becomes zero.
    """
    values = torch.where(valid, scores.double(), 0.0)
    mean = values.sum(1, keepdim=True) / valid.sum(1, keepdim=True)
    deviation = torch.where(valid, values - mean, 0.0)
    rounding = 8 * torch.finfo(torch.float64).eps * values.abs().amax(1, keepdim=True)
    return torch.where(deviation.abs() <= rounding, 0.0, deviation)


def chosen_set(scores: Tensor, valid: Tensor) -> Tensor:
    """The chosen set of each group, bool (B, N): responses that score above the group's mean.

    The rejected set is ``valid & ~chosen``. Where all scores of a group are equal the chosen set is
    empty: the group has no contrast.
    """
    return deviations(scores, valid) > 0


def ordered_pairs(scores: Tensor, valid: Tensor) -> Tensor:
    """Bool (B, N, N): True at (i, j) where both are responses and i scores higher than j."""
    values = scores.double()
    both = valid[:, :, None] & valid[:, None, :]
    return both & (values[:, :, None] > values[:, None, :])


def deviation_log_weights(
    scores: Tensor,
    valid: Tensor,
    *,
    alpha: float,
    power: float = 1.0,
    deviation: Deviation = "absolute",
    alpha_unit: AlphaUnit = "score",
) -> Tensor:
    """Log-weights of W-MPO: ``alpha * |S_i - mean S| ** power``, float64 (B, N), zero on padding.

    Args:
        scores: scores, (B, N).
        valid: True where there is a response, (B, N).
        alpha: strength, >= 0. Its unit is 1 / score ** power for ``alpha_unit="score"``.
        power: exponent of the deviation; 0 shifts all energies of a group alike, which is MPO (with
            absolute deviations).
        deviation: "absolute" lifts outliers on both sides; "signed" keeps the deviation's sign.
        alpha_unit: "std" divides deviations by the group's (population) standard deviation first.
    """
    delta = deviations(scores, valid)
    if alpha_unit == "std":
        std = (delta.square().sum(1, keepdim=True) / valid.sum(1, keepdim=True)).sqrt()
        delta = delta / torch.where(std > 0, std, 1.0)
    size = delta.abs() ** power
    if deviation == "signed":
        size = delta.sign() * size
    return torch.where(valid, alpha * size, 0.0)


# ---------------------------------------------------------------------------------- pure losses


def _working(log_ratios: Tensor, valid: Tensor) -> Tensor:
    """Log-ratios in fp32 (float64 stays), zero on padding so that no NaN enters a gradient."""
    dtype = torch.promote_types(log_ratios.dtype, torch.float32)
    return torch.where(valid, log_ratios.to(dtype), 0.0)


def mpo_loss(
    log_ratios: Tensor,
    chosen: Tensor,
    valid: Tensor,
    *,
    beta: float,
    log_weights: Tensor | None = None,
) -> Tensor:
    """Negative log of the share of a group's mass that falls on its chosen set, (B,).

    docs/mathematics.md, equation 1 (arXiv 2412.04628): with energies ``E = beta * r + w``,
    ``logsumexp(E over all) - logsumexp(E over chosen)``. With one chosen and one rejected response
    and equal weights this is the DPO loss (arXiv 2305.18290, equation 7). At ``r = 0, w = 0`` it is
    ``log(n / number chosen)``. A group without contrast (nothing chosen, or nothing rejected) has
    loss and gradient zero.

    Args:
        log_ratios: policy minus reference log-probabilities, nats, (B, N).
        chosen: bool (B, N), a subset of ``valid``.
        valid: bool (B, N).
        beta: pull towards the reference, > 0.
        log_weights: w, added to the energies outside beta, (B, N); None weighs all alike.
    """
    energy = beta * _working(log_ratios, valid)
    if log_weights is not None:
        energy = energy + log_weights.to(energy.dtype)
    # The loss does not see a shift of its group; without it two large numbers are not subtracted.
    energy = energy - energy.detach().masked_fill(~valid, -torch.inf).amax(1, keepdim=True)
    chosen = chosen & valid
    # A group without contrast: "all of the group against all of it" is exactly zero.
    chosen = torch.where(chosen.any(1, keepdim=True), chosen, valid)
    of_chosen = energy.masked_fill(~chosen, -torch.inf).logsumexp(1)
    of_all = energy.masked_fill(~valid, -torch.inf).logsumexp(1)
    return of_all - of_chosen


def dpo_loss(
    log_ratios: Tensor,
    scores: Tensor,
    valid: Tensor,
    *,
    beta: float,
    pairs: Pairs = "best-worst",
) -> Tensor:
    """DPO on pairs drawn from the group: ``-log sigmoid(beta * (r_winner - r_loser))``, (B,).

    Source: arXiv 2305.18290, equation 7. A group whose scores are all equal has no pair: loss zero.

    Args:
        log_ratios: policy minus reference log-probabilities, nats, (B, N).
        scores: scores, (B, N).
        valid: bool (B, N).
        beta: pull towards the reference, > 0.
        pairs: "best-worst" takes the first of the best-scored and the last of the worst-scored
            responses; "all" averages over every pair with a higher and a lower score.
    """
    rewards = beta * _working(log_ratios, valid)
    winners = ordered_pairs(scores, valid)
    if pairs == "best-worst":
        values = scores.double()
        best = values.masked_fill(~valid, -torch.inf).argmax(1)
        # argmin returns the first minimum; of the flipped row that is the last one.
        last = values.masked_fill(~valid, torch.inf).flip(1).argmin(1)
        worst = values.shape[1] - 1 - last
        row = torch.arange(len(values), device=values.device)
        of_pair = torch.zeros_like(winners)
        of_pair[row, best, worst] = True
        winners = winners & of_pair
    margin = rewards[:, :, None] - rewards[:, None, :]
    per_pair = torch.where(winners, -logsigmoid(margin), 0.0)
    return per_pair.sum((1, 2)) / winners.sum((1, 2)).clamp(min=1)


def _score_targets(scores: Tensor, valid: Tensor, temperature: float) -> Tensor:
    """``softmax(S / temperature)`` over each group, float64 (B, N), zero on padding."""
    return (scores.double() / temperature).masked_fill(~valid, -torch.inf).softmax(1)


def info_nca_loss(
    log_ratios: Tensor, scores: Tensor, valid: Tensor, *, beta: float, temperature: float
) -> Tensor:
    """InfoNCA: cross-entropy of ``softmax(beta * r)`` against ``softmax(S / temperature)``, (B,).

    Source: arXiv 2402.05369. Stationary exactly where ``beta * r = S / temperature + const``.
    """
    rewards = beta * _working(log_ratios, valid)
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
    rewards = beta * _working(log_ratios, valid)
    targets = _score_targets(scores, valid, temperature).to(rewards.dtype)
    per_response = targets * logsigmoid(rewards) + logsigmoid(-rewards) / valid.sum(1, keepdim=True)
    return -torch.where(valid, per_response, 0.0).sum(1)


# --------------------------------------------------------------------------- configured losses


def _require(name: str, value: float, condition: bool, expected: str) -> None:
    if not (math.isfinite(value) and condition):
        raise ValueError(f"{name} must be {expected}, got {value}.")


def _require_choice(name: str, value: str, annotation: object) -> None:
    choices = get_args(annotation)
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")


@dataclass(frozen=True, kw_only=True)
class SetLoss(ABC):
    """A loss over whole groups, ready to call: ``loss(log_ratios, scores, valid)`` gives (B,).

    Subclass it for a loss of your own; ``class_path`` in a configuration names the subclass.

    Args:
        beta: pull towards the reference, > 0 (0.01 to 1 is usual); a response's implicit reward is
            ``beta * log_ratio``.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        _require(f"{type(self).__name__}: beta", self.beta, self.beta > 0, "a number > 0")

    @abstractmethod
    def __call__(self, log_ratios: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
        """One loss per group: all arguments (B, N), the result (B,)."""

    def has_contrast(self, scores: Tensor, valid: Tensor) -> Tensor:
        """Whether each group teaches this loss something, bool (B,)."""
        return chosen_set(scores, valid).any(1)


@dataclass(frozen=True, kw_only=True)
class MPO(SetLoss):
    """Multi-Preference Optimization; W-MPO when ``alpha > 0``. arXiv 2412.04628.

    The chosen set holds the responses that score above their group's mean. Texts on the method
    differ about the weights; this class adds ``alpha * |S - mean S| ** power`` to the energies,
    outside beta. An alpha that a text puts inside beta is this alpha divided by beta.

    Args:
        beta: pull towards the reference, > 0.
        alpha: strength of the deviation weights, >= 0; 0 is MPO, above 0 W-MPO.
        power: exponent of the deviation, >= 0.
        deviation: "absolute" (the default) or "signed" (as in REFA, arXiv 2412.16378).
        gamma: factor on the rejected responses' terms, > 0 (REFA uses 2 to 4).
        alpha_unit: "score": alpha counts per unit of score, so 1-to-10 scores and reward-model
            scores of spread 0.02 need very different values; "std": per standard deviation of the
            group's scores.
    """

    alpha: float = 0.0
    power: float = 1.0
    deviation: Deviation = "absolute"
    gamma: float = 1.0
    alpha_unit: AlphaUnit = "score"

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        _require(f"{name}: alpha", self.alpha, self.alpha >= 0, "a number >= 0")
        _require(f"{name}: power", self.power, self.power >= 0, "a number >= 0")
        _require(f"{name}: gamma", self.gamma, self.gamma > 0, "a number > 0")
        _require_choice(f"{name}: deviation", self.deviation, Deviation)
        _require_choice(f"{name}: alpha_unit", self.alpha_unit, AlphaUnit)

    def __call__(self, log_ratios: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
        """The loss of each group, (B,)."""
        chosen = chosen_set(scores, valid)
        log_weights = deviation_log_weights(
            scores,
            valid,
            alpha=self.alpha,
            power=self.power,
            deviation=self.deviation,
            alpha_unit=self.alpha_unit,
        )
        # torch.where keeps float64; a number times a bool tensor takes the default dtype instead.
        rejected = valid & ~chosen
        log_weights = torch.where(rejected, log_weights + math.log(self.gamma), log_weights)
        return mpo_loss(log_ratios, chosen, valid, beta=self.beta, log_weights=log_weights)


@dataclass(frozen=True, kw_only=True)
class DPO(SetLoss):
    """Direct Preference Optimization on pairs of the group. arXiv 2305.18290, equation 7.

    Args:
        beta: pull towards the reference, > 0.
        pairs: "best-worst" (one pair a group) or "all" (mean over all pairs of unequal scores).
    """

    pairs: Pairs = "best-worst"

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_choice(f"{type(self).__name__}: pairs", self.pairs, Pairs)

    def __call__(self, log_ratios: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
        """The loss of each group, (B,)."""
        return dpo_loss(log_ratios, scores, valid, beta=self.beta, pairs=self.pairs)


@dataclass(frozen=True, kw_only=True)
class _ScoreTargetLoss(SetLoss):
    """What InfoNCA and NCA share: scores become targets through a temperature.

    Args:
        beta: pull towards the reference, > 0.
        temperature: divisor of the scores in the targets' softmax, in score units, > 0.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        name = f"{type(self).__name__}: temperature"
        _require(name, self.temperature, self.temperature > 0, "a number > 0")


@dataclass(frozen=True, kw_only=True)
class InfoNCA(_ScoreTargetLoss):
    """InfoNCA: softmax cross-entropy against score targets. arXiv 2402.05369.

    Args:
        beta: pull towards the reference, > 0.
        temperature: divisor of the scores in the targets' softmax, in score units, > 0.
    """

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
        temperature: divisor of the scores in the targets' softmax, in score units, > 0.
    """

    def __call__(self, log_ratios: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
        """The loss of each group, (B,)."""
        return nca_loss(log_ratios, scores, valid, beta=self.beta, temperature=self.temperature)
