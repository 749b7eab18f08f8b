"""Pairwise losses on pairs drawn from a group: which pairs, and what each of them costs."""

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mpo_lightning.losses.base import LossOfSets, working
from mpo_lightning.losses.checks import require_choice, require_instance, require_number
from mpo_lightning.losses.partition import AboveMean, Partition
from mpo_lightning.losses.scores import ordered_pairs

__all__ = ["DPO", "IPO", "Hinge", "PairLoss", "Pairs", "RobustDPO", "SimPO", "drawn_pairs"]

Pairs = Literal["best-worst", "random", "all", "sets"]


def _best_worst(scores: Tensor, valid: Tensor) -> Tensor:
    values = scores.double()
    best = values.masked_fill(~valid, -torch.inf).argmax(1)
    # argmin returns the first minimum; of the flipped row that is the last one.
    last = values.masked_fill(~valid, torch.inf).flip(1).argmin(1)
    worst = values.shape[1] - 1 - last
    pair = torch.zeros_like(valid[:, :, None] & valid[:, None, :])
    pair[torch.arange(len(values), device=values.device), best, worst] = True
    return pair & ordered_pairs(scores, valid)


def _mixed(bits: Tensor) -> Tensor:
    """Integers whose bits all depend on all bits of the given ones, int64, same shape."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        # The shift is arithmetic; only the bits that a logical one would leave are kept.
        bits = (bits ^ ((bits >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return bits ^ ((bits >> 31) & ((1 << 33) - 1))


def _random_pair(scores: Tensor, valid: Tensor) -> Tensor:
    """One of the ordered pairs, each as likely; a function of the group's scores alone."""
    values = torch.where(valid, scores.double(), 0.0) + 0.0  # -0.0 is 0.0
    n = values.shape[1]
    earlier = torch.ones(n, n, dtype=torch.bool, device=values.device).tril(-1)
    equal = (values[:, :, None] == values[:, None, :]) & valid[:, None, :] & earlier
    # Which of its equals a response is, so that equal scores still make pairs of their own.
    keys = _mixed(_mixed(values.view(torch.int64)) + equal.sum(2))
    seed = torch.where(valid, keys, 0).sum(1)[:, None, None]
    tickets = _mixed(_mixed(keys[:, :, None] * 3 + seed) + keys[:, None, :])
    pairs = ordered_pairs(scores, valid)
    tickets = tickets.masked_fill(~pairs, torch.iinfo(torch.int64).max).flatten(1)
    drawn = torch.zeros_like(tickets, dtype=torch.bool)
    drawn.scatter_(1, tickets.argmin(1, keepdim=True), True)
    return drawn.view_as(pairs) & pairs


def drawn_pairs(scores: Tensor, valid: Tensor, *, pairs: Pairs, partition: Partition) -> Tensor:
    """The pairs of each group, bool (B, N, N): True at (winner, loser).

    Args:
        scores: (B, N).
        valid: bool (B, N).
        pairs: "best-worst" takes the first of the best-scored and the last of the worst-scored
            responses; "random" one pair of unequal scores, each as likely, always the same for the
            same scores; "all" every pair of unequal scores; "sets" every chosen with every rejected
            response.
        partition: makes the sets of "sets".
    """
    if pairs == "sets":
        chosen, rejected = partition(scores, valid)
        return chosen[:, :, None] & rejected[:, None, :]
    rules = {"best-worst": _best_worst, "random": _random_pair, "all": ordered_pairs}
    return rules[pairs](scores, valid)


@dataclass(frozen=True, kw_only=True)
class PairLoss(LossOfSets):
    """A loss on pairs: the mean over a group's pairs of what each costs.

    A group without a pair has loss zero. Where one pair is drawn metrics read its winner and loser
    as the two sets, and else the sets of ``partition``.

    Args:
        beta: pull towards the reference, > 0.
        reference_free: the policy's log-probability takes the log-ratio's place.
        length_normalized: log-ratios per token; beta must grow with it.
        likelihood: weight of a likelihood term on the chosen set, >= 0.
        pairs: "best-worst" (one pair a group), "random" (one pair, seeded by the group's scores),
            "all" (all pairs of unequal scores) or "sets" (all pairs of chosen and rejected).
        partition: makes the chosen and the rejected set.
    """

    symbols: ClassVar = r"$h = \beta (r_w - r_l)$ is the margin of a winner and a loser"

    pairs: Pairs = "best-worst"
    partition: Partition = AboveMean()  # noqa: RUF009 (frozen)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(self, "pairs", Pairs)
        require_instance(self, "partition", Partition)

    @abstractmethod
    def of_margins(self, margins: Tensor) -> Tensor:
        """What a pair costs whose rewards ``beta * r`` are that far apart; same shape."""

    def drawn(self, scores: Tensor, valid: Tensor) -> Tensor:
        """The pairs of each group, bool (B, N, N): True at (winner, loser)."""
        return drawn_pairs(scores, valid, pairs=self.pairs, partition=self.partition)

    def given_sets(
        self, log_ratios: Tensor, scores: Tensor, valid: Tensor, chosen: Tensor, rejected: Tensor
    ) -> Tensor:
        """The loss of each group, (B,)."""
        values = working(log_ratios, valid)
        if self.pairs == "all":
            drawn = ordered_pairs(scores, valid)
        else:
            drawn = chosen[:, :, None] & rejected[:, None, :]
        margins = self.beta * torch.where(drawn, values[:, :, None] - values[:, None, :], 0.0)
        per_pair = torch.where(drawn, self.of_margins(margins), 0.0)
        return per_pair.sum((1, 2)) / drawn.sum((1, 2)).clamp(min=1)

    def sets(self, scores: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Winner and loser of the one pair, or the sets of the partition; bool (B, N) each."""
        if self.pairs in ("all", "sets"):
            return self.partition(scores, valid)
        drawn = self.drawn(scores, valid)
        return drawn.any(2), drawn.any(1)

    def has_contrast(self, scores: Tensor, valid: Tensor) -> Tensor:
        """Whether the group has a pair, bool (B,)."""
        return self.drawn(scores, valid).any(2).any(1)


@dataclass(frozen=True, kw_only=True)
class DPO(PairLoss):
    """Direct Preference Optimization: ``-log sigmoid(h)`` of a margin h. arXiv 2305.18290, eq. 7.

    Args:
        beta: pull towards the reference, > 0.
        reference_free: the policy's log-probability takes the log-ratio's place.
        length_normalized: log-ratios per token; beta must grow with it.
        likelihood: weight of a likelihood term on the chosen set, >= 0.
        pairs: "best-worst", "random", "all" or "sets".
        partition: makes the chosen and the rejected set.
    """

    title: ClassVar = "Direct Preference Optimization (DPO)"
    latex: ClassVar = r"-\log \sigma(h)"
    arxiv: ClassVar = ("2305.18290",)

    def of_margins(self, margins: Tensor) -> Tensor:
        """``-log sigmoid(h)``."""
        return -logsigmoid(margins)


@dataclass(frozen=True, kw_only=True)
class IPO(PairLoss):
    """IPO: ``(r_winner - r_loser - 1 / (2 beta)) ** 2``. arXiv 2310.12036.

    TRL's ``ipo`` is this one with ``length_normalized``.

    Args:
        beta: pull towards the reference, > 0: the margin that is aimed at is ``1 / (2 beta)`` nats.
        reference_free: the policy's log-probability takes the log-ratio's place.
        length_normalized: log-ratios per token; beta must grow with it.
        likelihood: weight of a likelihood term on the chosen set, >= 0.
        pairs: "best-worst", "random", "all" or "sets".
        partition: makes the chosen and the rejected set.
    """

    title: ClassVar = "IPO"
    latex: ClassVar = r"(h - \frac12)^2 / \beta^2"
    arxiv: ClassVar = ("2310.12036",)

    def of_margins(self, margins: Tensor) -> Tensor:
        """``((h - 1/2) / beta) ** 2``."""
        return ((margins - 0.5) / self.beta).square()


@dataclass(frozen=True, kw_only=True)
class Hinge(PairLoss):
    """Hinge loss ``max(0, 1 - h)`` of a margin h. arXiv 2305.10425.

    Args:
        beta: pull towards the reference, > 0.
        reference_free: the policy's log-probability takes the log-ratio's place.
        length_normalized: log-ratios per token; beta must grow with it.
        likelihood: weight of a likelihood term on the chosen set, >= 0.
        pairs: "best-worst", "random", "all" or "sets".
        partition: makes the chosen and the rejected set.
    """

    title: ClassVar = "Hinge loss on pairs"
    latex: ClassVar = r"\max(0, 1 - h)"
    arxiv: ClassVar = ("2305.10425",)

    def of_margins(self, margins: Tensor) -> Tensor:
        """``max(0, 1 - h)``."""
        return (1 - margins).relu()


@dataclass(frozen=True, kw_only=True)
class RobustDPO(PairLoss):
    """DPO whose expectation under flipped labels is that of DPO under clean ones. arXiv 2403.00409.

    Args:
        beta: pull towards the reference, > 0.
        reference_free: the policy's log-probability takes the log-ratio's place.
        length_normalized: log-ratios per token; beta must grow with it.
        likelihood: weight of a likelihood term on the chosen set, >= 0.
        pairs: "best-worst", "random", "all" or "sets".
        partition: makes the chosen and the rejected set.
        flipped: how often a pair's order is believed to be wrong, from 0 (DPO) to below 0.5.
    """

    title: ClassVar = "Robust DPO"
    latex: ClassVar = r"\frac{-(1 - f) \log \sigma(h) + f \log \sigma(-h)}{1 - 2 f}"
    symbols: ClassVar = PairLoss.symbols + ", $f$ the part of flipped labels"
    arxiv: ClassVar = ("2403.00409",)

    flipped: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self, "flipped", "a number >= 0 and < 0.5", low=0, high=0.5, open_high=True)

    def of_margins(self, margins: Tensor) -> Tensor:
        """``(-(1 - f) log sigmoid(h) + f log sigmoid(-h)) / (1 - 2 f)``."""
        clean, flipped = -logsigmoid(margins), -logsigmoid(-margins)
        return ((1 - self.flipped) * clean - self.flipped * flipped) / (1 - 2 * self.flipped)


@dataclass(frozen=True, kw_only=True)
class SimPO(PairLoss):
    """DPO on log-probabilities per token, without reference, past a margin. arXiv 2405.14734.

    Args:
        beta: scale of the log-probabilities per token, > 0; the paper takes 2 to 10.
        likelihood: weight of a likelihood term on the chosen set, >= 0.
        pairs: "best-worst", "random", "all" or "sets".
        partition: makes the chosen and the rejected set.
        margin: by how much the winner is to exceed the loser, nats per token, >= 0: the paper's
            gamma divided by beta.
    """

    title: ClassVar = "SimPO"
    latex: ClassVar = r"-\log \sigma(h - \beta m)"
    symbols: ClassVar = (
        PairLoss.symbols + ", per token and without reference, $m$ the target margin"
    )
    arxiv: ClassVar = ("2405.14734",)

    # What the loss is, not what may be set. Defaults that differ from another loss's would not do:
    # a command line that names another loss keeps the values of settings that both have.
    reference_free: bool = field(default=True, init=False)
    length_normalized: bool = field(default=True, init=False)
    margin: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self, "margin", "a number >= 0", low=0)

    def of_margins(self, margins: Tensor) -> Tensor:
        """``-log sigmoid(h - beta * margin)``."""
        return -logsigmoid(margins - self.beta * self.margin)
