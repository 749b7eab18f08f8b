"""Checks that recognise a failing run from its logged metrics, each with suggested remedies.

Each check is a function of the metrics of the last optimizer steps, as docs/metrics.md defines
them, which are exact on any number of processes. It returns a `Finding`, or None.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from mpo_lightning.checks import check_settings

__all__ = [
    "CHECKS",
    "Check",
    "Finding",
    "Recent",
    "Thresholds",
    "mean_of",
    "sampled_length_drift",
]

Check = Literal[
    "loss_variation", "few_rejected", "collapse", "slow", "displacement", "length_drift"
]
Row = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Thresholds beyond which a warning is given; docs/watching.md explains each value.

    Args:
        window: number of optimizer steps whose metrics are averaged.
        loss_variation: warn if the standard deviation of a group's loss exceeds this multiple of
            the loss of the first window.
        rejected_share: warn if less than this fraction of the responses in both sets is rejected.
        chosen_mass: warn if the chosen set has more than this fraction of the probability mass.
        spread: warn if fewer than this fraction of the chosen responses (not counting the top one)
            carry probability mass.
        slow_after: number of optimizer steps after which progress is expected.
        slow_accuracy: warn of slow training if the accuracy is below this.
        slow_margin: warn of slow training if the reward margin is below this.
        displacement: warn if the log-probability of the chosen responses has fallen by this many
            nats per token.
        length_tau: warn if Kendall's tau-b of rewards and lengths differs by this much from that of
            scores and lengths.
        moved: mean log-ratio, in nats, below which the order of rewards is not checked.
        sampled_length: warn if sampled responses are longer or shorter than the reference's by
            this factor.
        again: repeat a warning when the value is this many times as bad as at the last warning.
    """

    window: int = 20
    loss_variation: float = 1.0
    rejected_share: float = 0.2
    chosen_mass: float = 0.98
    spread: float = 0.1
    slow_after: int = 100
    slow_accuracy: float = 0.53
    slow_margin: float = 0.01
    displacement: float = 0.1
    length_tau: float = 0.3
    moved: float = 1.0
    sampled_length: float = 1.5
    again: float = 2.0

    def __post_init__(self) -> None:
        check_settings(self)
        if self.window < 3:
            raise ValueError(f"health.thresholds.window must be >= 3, got {self.window}.")
        for name in ("sampled_length", "again"):
            value = getattr(self, name)
            if not value > 1:
                raise ValueError(f"health.thresholds.{name} must be > 1, got {value}.")


@dataclass(frozen=True)
class Finding:
    """A warning of a check.

    Attributes:
        check: name of the check.
        severity: value as a multiple of its threshold, >= 1.
        message: the numbers, and settings to try.
    """

    check: Check
    severity: float
    message: str


@dataclass(frozen=True, kw_only=True)
class Recent:
    """Input of the checks.

    Attributes:
        steps: number of optimizer steps of the run so far.
        rows: metrics of each step of the last window, with ``groups``, their number, and ``lr``,
            the learning rate.
        now: means of the rows, over groups.
        first: means over the run's first window.
        beta: the loss's beta.
        alpha: the loss's alpha; None if it has no deviation weights.
    """

    steps: int
    rows: Sequence[Row]
    now: Row
    first: Row
    beta: float
    alpha: float | None


def mean_of(rows: Sequence[Row]) -> Row:
    """Mean of each metric over the groups of these steps; NaN if no step has it."""
    result = {}
    for name in rows[0]:
        known = [row for row in rows if not math.isnan(row[name])]
        groups = sum(row["groups"] for row in known)
        result[name] = (
            sum(row[name] * row["groups"] for row in known) / groups if groups else math.nan
        )
    return result


def loss_variation(recent: Recent, thresholds: Thresholds) -> Finding | None:
    """Check for losses that differ widely between batches: scores that are not calibrated.

    The variation is the distance of a step's loss from the mean of its neighbours, which a steady
    fall does not increase. It is multiplied by the root of the number of groups in a step,
    which gives the variation of a single group.
    """
    losses = [row["loss"] for row in recent.rows if math.isfinite(row["loss"])]
    start = recent.first["loss"]
    # RobustDPO and the like may be negative: a multiple of that means nothing.
    if len(losses) < 3 or not start > 0:
        return None
    # Second differences of independent losses with variance v have variance 6 v.
    of_step = math.sqrt(np.square(np.diff(losses, 2)).mean() / 6)
    of_group = of_step * math.sqrt(recent.now["groups"])
    severity = of_group / start / thresholds.loss_variation
    if severity < 1:
        return None
    deviation = recent.now["scores/deviation"]
    weights, smaller = "", ""
    if recent.alpha:
        weights = (
            f" Scores deviate from their group's mean by {deviation:.3g} on average; times "
            f"model.loss.alpha {recent.alpha:g} that is {recent.alpha * deviation:.3g} nats of "
            "weight in the loss, where 1 is much."
        )
        smaller = f"model.loss.alpha {recent.alpha / max(1, recent.alpha * deviation):.2g} or 0; "
    return Finding(
        "loss_variation",
        severity,
        f"the loss varies widely between batches: by {of_group:.2f} a group over the last "
        f"{len(losses)} steps, where it was {start:.2f} in the first ones. Scores may be on "
        f"several scales or hold outliers.{weights} Try: mpo-lightning data check on the data; "
        f"data.normalize_scores: z-score; {smaller}more groups in a step "
        "(trainer.accumulate_grad_batches); trainer.gradient_clip_val: 1.0; a lower learning rate "
        f"(here {recent.now['lr']:.1e}).",
    )


def few_rejected(recent: Recent, thresholds: Thresholds) -> Finding | None:
    """Check for chosen sets that hold nearly all responses: the loss starts small."""
    chosen, rejected = recent.now["sizes/chosen"], recent.now["sizes/rejected"]
    share = rejected / (chosen + rejected)
    if not share < thresholds.rejected_share:
        return None
    return Finding(
        "few_rejected",
        _below(thresholds.rejected_share, share),
        f"few responses are rejected: {rejected:.1f} a group beside {chosen:.1f} chosen, so that "
        f"the chosen set holds {recent.first['chosen_mass']:.0%} of the mass before anything is "
        "learned. Try: another partition, such as model.loss.partition: AboveQuantile or "
        "TopBottom; data.keep_responses: balanced with data.max_responses; more low-scored "
        "responses in the data.",
    )


def _below(threshold: float, value: float) -> float:
    """Severity of a share below its threshold; at most 4, since a share may fall to zero."""
    return threshold / max(value, threshold / 4)


def collapse(recent: Recent, thresholds: Thresholds) -> Finding | None:
    """Check for a trivial solution: the chosen set, or one response of it, has all the mass."""
    mass, size = recent.now["chosen_mass"], recent.now["sizes/chosen"]
    takes_all = _below(1 - thresholds.chosen_mass, 1 - mass)
    # Fraction of the chosen responses that carry mass, not counting the one that always does.
    others = (recent.now["effective_chosen"] * size - 1) / (size - 1) if size >= 1.5 else math.nan
    alone = 0.0 if math.isnan(others) else _below(thresholds.spread, others)
    severity = max(takes_all, alone)
    if not severity >= 1:
        return None
    sets = f"{size:.1f} chosen and {recent.now['sizes/rejected']:.1f} rejected responses a group"
    if takes_all >= alone:
        what = (
            f"the chosen sets hold {mass:.1%} of the mass ({sets}), the loss is "
            f"{recent.now['loss']:.3f}: there is nothing left to learn from these groups but "
            "their noise"
        )
    else:
        what = (
            f"one response of each chosen set takes nearly all of its mass: "
            f"{recent.now['effective_chosen'] * size:.2f} of them carry mass ({sets})"
        )
    return Finding(
        "collapse",
        severity,
        f"the policy collapses onto a trivial solution: {what}. Try: fewer trainer.max_epochs; a "
        f"lower learning rate (here {recent.now['lr']:.1e}); a larger model.loss.beta (here "
        f"{recent.beta:g}), which needs smaller steps for the same margin; model.loss: EachMPO, "
        "which asks for every chosen response; more rejected responses (model.loss.partition, "
        "data.keep_responses: balanced).",
    )


def slow(recent: Recent, thresholds: Thresholds) -> Finding | None:
    """Check for lack of progress after many steps: beta, alpha or the learning rate.

    The loss itself does not measure progress, since it depends on the sizes of a step's sets. No
    progress is expected while the learning rate still rises.
    """
    rates = [row["lr"] for row in recent.rows]
    if recent.steps < thresholds.slow_after or rates[-1] > rates[0]:
        return None
    accuracy, margin = recent.now["rewards/accuracy"], recent.now["rewards/margin"]
    if not (accuracy < thresholds.slow_accuracy or margin < thresholds.slow_margin):
        return None
    weights = ""
    if recent.alpha:
        weight = recent.alpha * recent.now["scores/deviation"]
        weights = (
            f" A smaller model.loss.alpha: {recent.alpha:g} weighs deviations with {weight:.3g} "
            "nats, beside which such a margin is little."
        )
    return Finding(
        "slow",
        recent.steps / thresholds.slow_after,
        f"training hardly moves: after {recent.steps} steps {accuracy:.1%} of pairs are in order "
        f"(50% is chance), with a margin of {margin:+.4f} at model.loss.beta {recent.beta:g}; the "
        f"loss went from {recent.first['loss']:.4f} to {recent.now['loss']:.4f}. Try: a higher "
        f"learning rate (model.optimizer, here {rates[-1]:.1e}); a larger model.loss.beta.{weights}"
        " If nothing helps, scores and responses may not belong together: mpo-lightning data "
        "check.",
    )


def displacement(recent: Recent, thresholds: Thresholds) -> Finding | None:
    """Check for likelihood displacement: chosen responses become unlikely (arXiv 2410.08847)."""
    ratio, length = recent.now["log_ratios/chosen"], recent.now["lengths/chosen"]
    fall = -ratio / length
    if not fall >= thresholds.displacement:
        return None
    of_rejected = -recent.now["log_ratios/rejected"] / recent.now["lengths/rejected"]
    return Finding(
        "displacement",
        fall / thresholds.displacement,
        f"the chosen responses become less likely themselves: by {-ratio:.1f} nats on average, "
        f"{fall:.2f} a token (rejected ones: "
        f"{of_rejected:.2f} a token, margin {recent.now['rewards/margin']:+.2f}). What becomes "
        "likelier instead is in neither set. "
        f"Try: model.loss.likelihood: 0.1; a larger model.loss.beta (here {recent.beta:g}); a "
        f"lower learning rate (here {recent.now['lr']:.1e}); fewer trainer.max_epochs; "
        "and look at samples (samples.count: 4).",
    )


def length_drift(recent: Recent, thresholds: Thresholds) -> Finding | None:
    """Check for rewards that follow length more than the scores do, in either direction."""
    moved = max(abs(recent.now[f"log_ratios/{which}"]) for which in ("chosen", "rejected"))
    rewards, scores = recent.now["lengths/kendall_tau"], recent.now["lengths/score_tau"]
    gap = rewards - scores
    if moved < thresholds.moved or not abs(gap) >= thresholds.length_tau:
        return None
    kind = "longer" if gap > 0 else "shorter"
    return Finding(
        "length_drift",
        abs(gap) / thresholds.length_tau,
        f"rewards follow length more than scores do: {kind} responses gain. Kendall's tau-b of "
        f"reward and length is {rewards:+.2f}, of score and length {scores:+.2f} (chosen "
        f"{recent.now['lengths/chosen']:.0f} tokens, rejected {recent.now['lengths/rejected']:.0f})"
        f". {_LENGTH_ADVICE}",
    )


_LENGTH_ADVICE = (
    "Try: model.loss.length_normalized: true, with model.loss.beta larger by about the tokens of a "
    "response; data in which length and score go together less; a lower learning rate; and look at "
    "samples (samples.count: 4)."
)


def sampled_length_drift(length: float, reference: float, thresholds: Thresholds) -> Finding | None:
    """Check for sampled responses that are much longer or shorter than the reference's.

    Args:
        length: mean number of tokens of the policy's samples.
        reference: mean number of tokens of the reference's, to the same prompts.
        thresholds: ``sampled_length`` is read.
    """
    ratio = max(length, reference) / max(min(length, reference), 1.0)
    if ratio < thresholds.sampled_length:
        return None
    kind = "longer" if length > reference else "shorter"
    return Finding(
        "length_drift",
        math.log(ratio) / math.log(thresholds.sampled_length),
        f"sampled responses become {kind}: {length:.0f} tokens on average, the reference's "
        f"{reference:.0f} to the same prompts. {_LENGTH_ADVICE}",
    )


CHECKS: dict[Check, Callable[[Recent, Thresholds], Finding | None]] = {
    "loss_variation": loss_variation,
    "few_rejected": few_rejected,
    "collapse": collapse,
    "slow": slow,
    "displacement": displacement,
    "length_drift": length_drift,
}
assert set(CHECKS) == set(get_args(Check))
