"""SetLoss: what every loss of the family has, and the settings that all share.

Shapes, in all files of this folder: ``B`` groups, ``N`` response slots in a group.

- ``log_ratios`` float (B, N): policy minus reference log-probability of each response, in nats (or
  what the settings ``reference_free`` and ``length_normalized`` put in its place).
- ``scores`` float (B, N): what a judge or reward model gave; higher is better.
- ``valid`` bool (B, N): True where the slot holds a response. Other slots are padding: they may
  hold anything, NaN included, and touch neither values nor gradients.
- result float (B,): one loss per group; nothing is averaged here.

Arithmetic is at least fp32 and stays in log space. Scores are compared in float64. The equations
and their sources are in docs/mathematics.md.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from mpo_lightning.losses.checks import require, require_number
from mpo_lightning.losses.partition import AboveMean

__all__ = ["LossOfSets", "LossOutput", "Measured", "SetLoss", "set_mean", "working"]


def working(log_ratios: Tensor, members: Tensor) -> Tensor:
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
        lengths: tokens that each of them sums, long (B, N).
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
    """Loss of each group, with the rewards and sets that it compared.

    Attributes:
        loss: (B,).
        rewards: ``beta`` times the log-ratio that the loss compares, without gradient, (B, N).
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
        beta: pull towards the reference, > 0 (0.01 to 1 is usual); a response's implicit reward is
            ``beta * log_ratio``.
        reference_free: the policy's log-probability takes the log-ratio's place; nothing but a
            small learning rate then holds the policy near the reference.
        length_normalized: log-ratios are divided by the number of tokens they sum, the end token
            included: nats per token. Beta must grow with it, by about the usual length of a
            response: 2 to 10 for what is 0.01 to 0.05 with 200 tokens.
        likelihood: weight of a likelihood term on the chosen set, >= 0: the mean over it of the
            negative log-probability per token is added (arXiv 2604.15602).
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
        require_number(self, "beta", "a number > 0", low=0, open_low=True)
        require_number(self, "likelihood", "a number >= 0", low=0)
        for name in ("reference_free", "length_normalized"):
            require(self, name, isinstance(getattr(self, name), bool), "true or false")

    @abstractmethod
    def __call__(self, log_ratios: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
        """One loss per group: all arguments (B, N), the result (B,)."""

    def sets(self, scores: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen and rejected set, bool (B, N) each, as metrics and the likelihood term read them.

        A loss that knows no sets is measured on those of the mean.
        """
        return AboveMean()(scores, valid)

    def has_contrast(self, scores: Tensor, valid: Tensor) -> Tensor:
        """Whether a group teaches this loss something, bool (B,): its gradient is not always zero.

        Unless a loss says otherwise: both sets hold a response.
        """
        chosen, rejected = self.sets(scores, valid)
        return chosen.any(1) & rejected.any(1)

    def compared(self, measured: Measured) -> Tensor:
        """Log-ratios as the settings want them, (B, N): what ``__call__`` is given."""
        compared = measured.policy_logps if self.reference_free else measured.log_ratios
        return compared / measured.lengths.clamp(min=1) if self.length_normalized else compared

    def rewards(self, measured: Measured) -> Tensor:
        """Implicit reward of each response, ``beta * compared``, without gradient, (B, N)."""
        return self.beta * self.compared(measured).detach()

    def evaluate(self, measured: Measured) -> LossOutput:
        """Loss of each group, likelihood term included, with the rewards and sets behind it."""
        compared = self.compared(measured)
        scores, valid = measured.scores, measured.valid
        chosen, rejected = self.sets(scores, valid)
        loss = self.given_sets(compared, scores, valid, chosen, rejected)
        if self.likelihood:
            members = chosen & rejected.any(1, keepdim=True)
            per_token = working(measured.policy_logps, members) / measured.lengths.clamp(min=1)
            loss = loss - self.likelihood * set_mean(per_token, members)
        return LossOutput(loss, self.beta * compared.detach(), chosen, rejected)

    def given_sets(
        self, log_ratios: Tensor, scores: Tensor, valid: Tensor, chosen: Tensor, rejected: Tensor
    ) -> Tensor:
        """The loss of each group, (B,), where its sets are known; same as ``__call__``."""
        return self(log_ratios, scores, valid)


@dataclass(frozen=True, kw_only=True)
class LossOfSets(SetLoss):
    """A loss that reads its sets from the scores, once: ``given_sets`` computes it."""

    def __call__(self, log_ratios: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
        """The loss of each group, (B,)."""
        return self.given_sets(log_ratios, scores, valid, *self.sets(scores, valid))

    @abstractmethod
    def given_sets(
        self, log_ratios: Tensor, scores: Tensor, valid: Tensor, chosen: Tensor, rejected: Tensor
    ) -> Tensor:
        """The loss of each group, (B,), of its chosen and rejected set, bool (B, N) each."""
