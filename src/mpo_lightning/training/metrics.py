"""Metrics of a run over its groups: weighted sums and their weights, never means of means."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric

from mpo_lightning.losses.base import LossOutput, Measured, set_mean
from mpo_lightning.losses.scores import deviations, ordered_pairs

__all__ = [
    "METRICS",
    "METRIC_NAMES",
    "GroupMetrics",
    "MetricInfo",
    "group_statistics",
    "kendall_tau_b",
]


class MetricInfo(NamedTuple):
    """How a metric is shown; docs/metrics.md defines each.

    Attributes:
        section: heading of its part of the evaluation table.
        title: its line there.
        higher_is_better: None where neither direction is good by itself.
        label: its name on the progress bar and above a model card's picture; None for metrics that
            are shown on neither.
        bar_format: its format on the progress bar.
    """

    section: str
    title: str
    higher_is_better: bool | None = None
    label: str | None = None
    bar_format: str = ".3f"


_REWARDS, _SETS, _LOGPS = "Rewards (beta times log-ratio)", "Sets", "Log-probabilities, nats"
METRICS = {
    "loss": MetricInfo("Loss", "loss, mean over groups", False, "loss"),
    "rewards/chosen": MetricInfo(_REWARDS, "of the chosen responses", True),
    "rewards/rejected": MetricInfo(_REWARDS, "of the rejected responses", False),
    "rewards/margin": MetricInfo(_REWARDS, "chosen minus rejected", True, "margin", "+.3f"),
    "rewards/accuracy": MetricInfo(_REWARDS, "pairs in order", True, "accuracy", ".2f"),
    "rewards/top1": MetricInfo(_REWARDS, "highest reward is best-scored", True),
    "rewards/kendall_tau": MetricInfo(_REWARDS, "agreement with the scores' order (tau-b)", True),
    "chosen_mass": MetricInfo(_SETS, "share of the mass on the chosen set", True),
    "effective_chosen": MetricInfo(_SETS, "evenness within the chosen set", True),
    "logps/chosen": MetricInfo(_LOGPS, "of the chosen responses, policy", True),
    "logps/rejected": MetricInfo(_LOGPS, "of the rejected responses, policy", False),
    "kl": MetricInfo(_LOGPS, "reference minus policy, all responses"),
    "lengths/chosen": MetricInfo(_SETS, "length of the chosen responses, tokens"),
    "lengths/rejected": MetricInfo(_SETS, "length of the rejected responses, tokens"),
    "lengths/kendall_tau": MetricInfo(_SETS, "agreement of rewards with lengths (tau-b)"),
    "lengths/score_tau": MetricInfo(_SETS, "agreement of scores with lengths (tau-b)"),
    "log_ratios/chosen": MetricInfo(
        _LOGPS, "of the chosen responses, policy minus reference", True
    ),
    "log_ratios/rejected": MetricInfo(
        _LOGPS, "of the rejected responses, policy minus reference", False
    ),
    "sizes/chosen": MetricInfo(_SETS, "chosen responses of a group"),
    "sizes/rejected": MetricInfo(_SETS, "rejected responses of a group"),
    "scores/deviation": MetricInfo(_SETS, "mean distance of scores from their group's mean"),
}
METRIC_NAMES = tuple(METRICS)


def kendall_tau_b(first: Tensor, second: Tensor, valid: Tensor) -> Tensor:
    """Return Kendall's tau-b between two rankings of each group's responses, float64 (B,).

    Ties are corrected for in both rankings (Kendall 1945). Where a ranking ties all responses the
    coefficient is undefined, and zero here.

    Args:
        first: values, (B, N).
        second: values, (B, N).
        valid: bool (B, N).

    Examples:
        >>> first, second = torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[9.0, 1.0, 5.0]])
        >>> kendall_tau_b(first, second, first > 0)  # two pairs agree, one does not
        tensor([0.3333], dtype=torch.float64)
    """
    return _tau_b(ordered_pairs(first, valid), ordered_pairs(second, valid))


def _tau_b(higher_first: Tensor, higher_second: Tensor) -> Tensor:
    """Return Kendall's tau-b from the ordered pairs of two rankings, bool (B, N, N) each."""
    concordant = (higher_first & higher_second).sum((1, 2))
    discordant = (higher_first & higher_second.transpose(1, 2)).sum((1, 2))
    untied_first = higher_first.sum((1, 2)).double()
    untied_second = higher_second.sum((1, 2)).double()
    scale = (untied_first * untied_second).sqrt()
    return (concordant - discordant) / torch.where(scale > 0, scale, 1.0)


def group_statistics(measured: Measured, output: LossOutput) -> dict[str, tuple[Tensor, Tensor]]:
    """Return each metric's value and weight per group, ``{name: ((B,), (B,))}`` for METRIC_NAMES.

    A metric is the sum of value times weight over the sum of weights. Definitions are in
    docs/metrics.md. Shares of the chosen set use rewards alone, without a loss's deviation weights,
    so that losses can be compared.

    Args:
        measured: log-probabilities, lengths and scores of the responses.
        output: loss, rewards and sets of each group.
    """
    valid, scores, lengths = measured.valid, measured.scores, measured.lengths
    policy_logps = measured.policy_logps.detach().float()
    log_ratios = torch.where(valid, measured.log_ratios, 0.0).detach().float()
    loss, rewards, chosen, rejected = output
    rewards = torch.where(valid, rewards, 0.0).detach().float()
    # A group without contrast has no sets: responses of one set have nothing to compare with.
    has_both = (chosen.any(1) & rejected.any(1))[:, None]
    chosen, rejected = chosen & has_both, rejected & has_both
    contrast = has_both[:, 0].float()
    group = torch.ones_like(contrast)

    by_score, by_reward, by_length = (ordered_pairs(x, valid) for x in (scores, rewards, lengths))
    winners = by_score & chosen[:, :, None] & rejected[:, None, :]
    gap = rewards[:, :, None] - rewards[:, None, :]
    in_order = torch.where(winners, (gap > 0).float() + 0.5 * (gap == 0), 0.0).sum((1, 2))
    pairs = winners.sum((1, 2)).float()

    # Scores and rewards may tie: the share of top-rewarded responses that are best-scored is the
    # probability that a random one of them is best-scored.
    values = scores.double().masked_fill(~valid, -torch.inf)
    best = values == values.amax(1, keepdim=True)
    masked_rewards = rewards.masked_fill(~valid, -torch.inf)
    top = masked_rewards == masked_rewards.amax(1, keepdim=True)
    hit = (best & top).sum(1).float() / top.sum(1)

    # Shares of both sets' mass, without responses that are in neither set.
    members = torch.where(has_both, chosen | rejected, valid)
    shares = rewards.masked_fill(~members, -torch.inf).softmax(1)
    within = masked_rewards.masked_fill(~chosen, -torch.inf)
    within = torch.where(contrast[:, None] > 0, within, 0.0).softmax(1)
    entropy = -torch.xlogy(within, within).sum(1)
    chosen_reward, rejected_reward = set_mean(rewards, chosen), set_mean(rewards, rejected)
    return {
        "loss": (loss.detach().float(), group),
        "rewards/chosen": (chosen_reward, contrast),
        "rewards/rejected": (rejected_reward, contrast),
        "rewards/margin": (chosen_reward - rejected_reward, contrast),
        "rewards/accuracy": (in_order / pairs.clamp(min=1), pairs),
        "rewards/top1": (hit, contrast),
        "rewards/kendall_tau": (_tau_b(by_reward, by_score).float(), contrast),
        "chosen_mass": (torch.where(chosen, shares, 0.0).sum(1), contrast),
        "effective_chosen": (entropy.exp() / chosen.sum(1).clamp(min=1), contrast),
        "logps/chosen": (set_mean(policy_logps, chosen), contrast),
        "logps/rejected": (set_mean(policy_logps, rejected), contrast),
        "kl": (set_mean(-log_ratios, valid), group),
        "lengths/chosen": (set_mean(lengths.float(), chosen), contrast),
        "lengths/rejected": (set_mean(lengths.float(), rejected), contrast),
        "lengths/kendall_tau": (_tau_b(by_reward, by_length).float(), contrast),
        "lengths/score_tau": (_tau_b(by_score, by_length).float(), contrast),
        "log_ratios/chosen": (set_mean(log_ratios, chosen), contrast),
        "log_ratios/rejected": (set_mean(log_ratios, rejected), contrast),
        "sizes/chosen": (chosen.sum(1).float(), contrast),
        "sizes/rejected": (rejected.sum(1).float(), contrast),
        "scores/deviation": (
            set_mean(deviations(scores, valid).abs().float(), chosen | rejected),
            contrast,
        ),
    }


class GroupMetrics(Metric):
    """Weighted means over groups, exact on any number of processes and batches.

    All metrics are one state of sums and weights, so that a step costs one reduction.
    (A MetricCollection would also merge metrics whose states are equal, as at step 0, where every
    reward is zero.) ``compute`` returns ``{name: value}`` for METRIC_NAMES and ``groups``, the
    number of groups counted.

    Examples:
        >>> two_groups = {name: (torch.tensor([4.0, 1.0]), torch.ones(2)) for name in METRIC_NAMES}
        >>> metrics = GroupMetrics()
        >>> metrics.update(two_groups, counted=torch.tensor([True, False]))
        >>> metrics.compute()["loss"]
        tensor(4.)
    """

    full_state_update = False
    totals: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Rows: sums of value * weight, sums of weight. The last column counts groups.
        zeros = torch.zeros(2, len(METRIC_NAMES) + 1, dtype=torch.float64)
        self.add_state("totals", default=zeros, dist_reduce_fx="sum")

    def update(self, statistics: dict[str, tuple[Tensor, Tensor]], counted: Tensor) -> None:
        """Add a batch.

        Args:
            statistics: value and weight per group of each metric, (B,) each.
            counted: bool (B,), False for groups that do not count.
        """
        values = torch.stack([statistics[name][0] for name in METRIC_NAMES]).double()
        weights = torch.stack([statistics[name][1] for name in METRIC_NAMES]).double() * counted
        weighted = torch.where(weights > 0, values * weights, 0.0)
        groups = counted.sum().expand(2)
        sums = torch.stack([weighted.sum(1), weights.sum(1)])
        # Not in place: a state that was reset in inference mode cannot be changed outside it.
        self.totals = self.totals + torch.cat([sums, groups[:, None]], dim=1)

    def compute(self) -> dict[str, Tensor]:
        """Return the weighted means, NaN for metrics without weight, and ``groups``."""
        sums, weights = self.totals
        means = (sums / weights)[:-1].float()
        result = dict(zip(METRIC_NAMES, means.unbind(), strict=True))
        return {**result, "groups": sums[-1].float()}

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Module:
        """Follow a module to another device but not to another dtype.

        Precision plugins cast whole modules, and bf16 cannot count beyond 256.
        """
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), exclude_state)
