"""SetLoss: the base of all losses, with the settings that all share.

Shapes, in all files of this folder: ``B`` groups, ``N`` response slots in a group.

- ``log_ratios`` float (B, N): policy minus reference log-probability of each response, in nats; the
  settings ``reference_free`` and ``length_normalized`` change what is subtracted and the unit.
- ``scores`` float (B, N): scores from a judge or reward model; higher is better.
- ``valid`` bool (B, N): True where the slot holds a response. Other slots are padding: they may
  hold anything, NaN included, and touch neither values nor gradients.
- result float (B,): one loss per group, not averaged.

Arithmetic is at least fp32 and stays in log space. Scores are compared in float64. The equations
and their sources are in docs/mathematics.md.

Each setting is described once, under ``Args:`` of the class that introduces it; the command line's
help and docs/settings.md list inherited settings too.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from mpo_lightning.checks import check_settings, require_number
from mpo_lightning.losses.partition import AboveMean

__all__ = ["LossOutput", "Measured", "SetLoss", "masked_float", "set_mean"]


def masked_float(log_ratios: Tensor, members: Tensor) -> Tensor:
    """Log-ratios in fp32 (float64 stays), zero outside ``members``: no NaN enters a gradient."""
    dtype = torch.promote_types(log_ratios.dtype, torch.float32)
    return torch.where(members, log_ratios.to(dtype), 0.0)


def set_mean(values: Tensor, members: Tensor) -> Tensor:
    """Mean of each group's values over a set, (B,); zero where the set is empty."""
    return torch.where(members, values, 0.0).sum(1) / members.sum(1).clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Log-probabilities of a batch's responses under both models, with lengths and scores.

    Attributes:
        policy_logps: log-probability of each response under the policy, nats, (B, N).
        reference_logps: the same under the reference.
        lengths: number of tokens of each response, long (B, N).
        scores: (B, N).
        valid: bool (B, N).
    """

    policy_logps: Tensor
    reference_logps: Tensor
    lengths: Tensor
    scores: Tensor
    valid: Tensor

    @cached_property
    def log_ratios(self) -> Tensor:
        """Policy minus reference log-probability of each response, nats, (B, N)."""
        return self.policy_logps - self.reference_logps


class LossOutput(NamedTuple):
    """Loss of each group, with the rewards and sets for metrics.

    Attributes:
        loss: (B,).
        rewards: implicit reward of each response, without gradient, (B, N).
        chosen: chosen set, bool (B, N).
        rejected: rejected set, bool (B, N).
    """

    loss: Tensor
    rewards: Tensor
    chosen: Tensor
    rejected: Tensor


@dataclass(frozen=True, kw_only=True)
class SetLoss(ABC):
    """A loss over whole groups, ready to call: ``loss(log_ratios, scores, valid)`` gives (B,).

    Subclass it for a loss of your own; ``class_path`` in a configuration names the subclass.

    Args:
        beta: pull towards the reference, per nat, > 0 (0.01 to 1 is usual); a response's implicit
            reward is ``beta * log_ratio``.
        reference_free: use the policy's log-probability in place of the log-ratio; nothing but a
            small learning rate then holds the policy near the reference.
        length_normalized: divide log-ratios by the number of tokens they sum, the end token
            included: nats per token. Beta must grow with it, by about the usual length of a
            response: 2 to 10 instead of 0.01 to 0.05 with 200 tokens.
        likelihood: weight of a likelihood term on the chosen set, >= 0: the mean over it of the
            negative log-probability per token, in nats, is added (arXiv 2604.15602). For a loss
            without sets these are the responses above the group's mean score.

    Examples:
        >>> from mpo_lightning.losses import MPO
        >>> scores, valid = torch.tensor([[3.0, 1.0], [2.0, 2.0]]), torch.ones(2, 2).bool()
        >>> loss = MPO(beta=0.1)
        >>> loss(torch.zeros(2, 2), scores, valid)  # ln 2, and no contrast
        tensor([0.6931, 0.0000])
        >>> loss.has_contrast(scores, valid)
        tensor([ True, False])
    """

    # For model cards, in the notation of docs/mathematics.md. A class needs a `latex` of its own:
    # an inherited equation may be that of another loss.
    title: ClassVar[str] = ""
    latex: ClassVar[str] = ""
    symbols: ClassVar[str] = ""
    arxiv: ClassVar[tuple[str, ...]] = ()

    beta: float = 0.1
    reference_free: bool = False
    length_normalized: bool = False
    likelihood: float = 0.0

    def __post_init__(self) -> None:
        check_settings(self)
        require_number(self, "beta", "a number > 0", low=0, open_low=True)
        require_number(self, "likelihood", "a number >= 0", low=0)

    @abstractmethod
    def __call__(self, log_ratios: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
        """Return the loss of each group, (B,); all arguments are (B, N)."""

    def sets(self, scores: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen and rejected set, bool (B, N) each, for metrics and the likelihood term.

        Defaults to the responses above the group's mean score, and the rest.
        """
        return AboveMean()(scores, valid)

    def has_contrast(self, scores: Tensor, valid: Tensor) -> Tensor:
        """Return which groups can have a gradient other than zero under this loss, bool (B,).

        Defaults to the groups in which both sets hold a response.
        """
        chosen, rejected = self.sets(scores, valid)
        return chosen.any(1) & rejected.any(1)

    def compared(self, measured: Measured) -> Tensor:
        """Log-ratios as ``reference_free`` and ``length_normalized`` define them, (B, N).

        They are the first argument of ``__call__``.
        """
        compared = measured.policy_logps if self.reference_free else measured.log_ratios
        return compared / measured.lengths.clamp(min=1) if self.length_normalized else compared

    def rewards(self, measured: Measured) -> Tensor:
        """Implicit reward of each response, ``beta * compared``, without gradient, (B, N)."""
        return self.beta * self.compared(measured).detach()

    def evaluate(self, measured: Measured) -> LossOutput:
        """Loss of each group, likelihood term included, with the rewards and sets for metrics."""
        compared = self.compared(measured)
        scores, valid = measured.scores, measured.valid
        loss = self(compared, scores, valid)
        chosen, rejected = self.sets(scores, valid)
        if self.likelihood:
            members = chosen & rejected.any(1, keepdim=True)
            per_token = masked_float(measured.policy_logps, members) / measured.lengths.clamp(min=1)
            loss = loss - self.likelihood * set_mean(per_token, members)
        return LossOutput(loss, self.beta * compared.detach(), chosen, rejected)
