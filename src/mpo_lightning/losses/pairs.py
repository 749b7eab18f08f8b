"""Losses on pairs of a group's responses: which pairs, and the cost of each."""

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mpo_lightning.checks import require_instance, require_number
from mpo_lightning.losses.base import SetLoss, masked_float
from mpo_lightning.losses.partition import AboveMean, Partition
from mpo_lightning.losses.scores import ordered_pairs

__all__ = ["DPO", "IPO", "Hinge", "PairLoss", "Pairs", "RobustDPO", "SimPO"]

Pairs = Literal["best-worst", "random", "all", "sets"]


def _best_worst(scores: Tensor, valid: Tensor) -> Tensor:
    """Pair of the first best-scored and the last worst-scored response, if their scores differ."""
    values = scores.double()
    best = values.masked_fill(~valid, -torch.inf).argmax(1)
    # argmin returns the first minimum; of the flipped row that is the last one.
    last = values.masked_fill(~valid, torch.inf).flip(1).argmin(1)
    worst = values.shape[1] - 1 - last
    pair = torch.zeros_like(valid[:, :, None] & valid[:, None, :])
    pair[torch.arange(len(values), device=values.device), best, worst] = True
    return pair & ordered_pairs(scores, valid)


def _splitmix64(bits: Tensor) -> Tensor:
    """Hash of int64 values, same shape: the finalizer of the random number generator SplitMix64."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        # The shift is arithmetic; only the bits that a logical one would leave are kept.
        bits = (bits ^ ((bits >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return bits ^ ((bits >> 31) & ((1 << 33) - 1))


def _random_pair(scores: Tensor, valid: Tensor) -> Tensor:
    """One of the ordered pairs, each equally likely, seeded by the group's scores alone."""
    values = torch.where(valid, scores.double(), 0.0) + 0.0  # -0.0 is 0.0
    n = values.shape[1]
    earlier = torch.ones(n, n, dtype=torch.bool, device=values.device).tril(-1)
    equal = (values[:, :, None] == values[:, None, :]) & valid[:, None, :] & earlier
    # Responses with equal scores are numbered, so that each makes pairs of its own.
    keys = _splitmix64(_splitmix64(values.view(torch.int64)) + equal.sum(2))
    seed = torch.where(valid, keys, 0).sum(1)[:, None, None]
    tickets = _splitmix64(_splitmix64(keys[:, :, None] * 3 + seed) + keys[:, None, :])
    pairs = ordered_pairs(scores, valid)
    tickets = tickets.masked_fill(~pairs, torch.iinfo(torch.int64).max).flatten(1)
    drawn = torch.zeros_like(tickets, dtype=torch.bool)
    drawn.scatter_(1, tickets.argmin(1, keepdim=True), True)
    return drawn.view_as(pairs) & pairs


@dataclass(frozen=True, kw_only=True)
class PairLoss(SetLoss):
    """Base of the losses on pairs: the mean cost of a group's pairs.

    A group without a pair has loss zero. The sets, for metrics, are the winner and the loser where
    one pair is drawn, and otherwise those of ``partition``.

    Args:
        pairs: "best-worst" (the first of the best-scored against the last of the worst-scored
            responses), "random" (one pair of unequal scores, seeded by the group's scores), "all"
            (all pairs of unequal scores) or "sets" (every chosen with every rejected response).
        partition: rule that makes the chosen and the rejected set.
    """

    symbols: ClassVar = r"$h = \beta (r_w - r_l)$ is the margin of a winner and a loser"

    pairs: Pairs = "best-worst"
    partition: Partition = AboveMean()  # noqa: RUF009 (frozen)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_instance(self, "partition", Partition)

    @abstractmethod
    def of_margins(self, margins: Tensor) -> Tensor:
        """Cost of pairs whose rewards ``beta * r`` differ by these margins; same shape."""

    def drawn(self, scores: Tensor, valid: Tensor) -> Tensor:
        """Pairs of each group, bool (B, N, N): True at (winner, loser)."""
        if self.pairs == "sets":
            chosen, rejected = self.partition(scores, valid)
            return chosen[:, :, None] & rejected[:, None, :]
        rules = {"best-worst": _best_worst, "random": _random_pair, "all": ordered_pairs}
        return rules[self.pairs](scores, valid)

    def __call__(self, log_ratios: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
        """Return the loss of each group, (B,)."""
        values = masked_float(log_ratios, valid)
        drawn = self.drawn(scores, valid)
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
        """Return which groups have a pair, bool (B,)."""
        return self.drawn(scores, valid).any(2).any(1)


@dataclass(frozen=True, kw_only=True)
class DPO(PairLoss):
    """Direct Preference Optimization: ``-log sigmoid(h)`` of a margin h. arXiv 2305.18290, eq. 7.

    Examples:
        >>> log_ratios, scores = torch.tensor([[9.0, 5.0, 1.0]]), torch.tensor([[3.0, 2.0, 1.0]])
        >>> DPO(beta=0.5)(log_ratios, scores, valid=torch.ones(1, 3, dtype=torch.bool))
        tensor([0.0181])
        >>> -torch.tensor(0.5 * (9 - 1)).sigmoid().log()  # the best against the worst
        tensor(0.0181)
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
        beta: pull towards the reference, > 0: the target margin is ``1 / (2 beta)`` nats.
    """

    title: ClassVar = "IPO"
    latex: ClassVar = r"(h - \frac12)^2 / \beta^2"
    arxiv: ClassVar = ("2310.12036",)

    def of_margins(self, margins: Tensor) -> Tensor:
        """``((h - 1/2) / beta) ** 2``."""
        return ((margins - 0.5) / self.beta).square()


@dataclass(frozen=True, kw_only=True)
class Hinge(PairLoss):
    """Hinge loss ``max(0, 1 - h)`` of a margin h. arXiv 2305.10425."""

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
        flipped: assumed share of pairs whose order is wrong, from 0 (DPO) to below 0.5.
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
        margin: required lead of the winner over the loser, nats per token, >= 0: the paper's gamma
            divided by beta.
    """

    title: ClassVar = "SimPO"
    latex: ClassVar = r"-\log \sigma(h - \beta m)"
    symbols: ClassVar = (
        PairLoss.symbols + ", per token and without reference, $m$ the target margin"
    )
    arxiv: ClassVar = ("2405.14734",)

    # These define the loss and cannot be set. Defaults that differ from another loss's would not
    # do: a command line that names another loss keeps the values of settings that both have.
    reference_free: bool = field(default=True, init=False)
    length_normalized: bool = field(default=True, init=False)
    margin: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self, "margin", "a number >= 0", low=0)

    def of_margins(self, margins: Tensor) -> Tensor:
        """``-log sigmoid(h - beta * margin)``."""
        return -logsigmoid(margins - self.beta * self.margin)
