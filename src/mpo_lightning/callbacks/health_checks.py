"""By which numbers a training run that goes wrong is known, and what helps.

Each signature is a function of what the last optimizer steps measured: metrics as
docs/metrics.md defines them, exact on any number of processes. It gives a `Finding`, or nothing.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

__all__ = [
    "SIGNATURES",
    "Finding",
    "Limits",
    "Recent",
    "Signature",
    "mean_of",
    "sampled_length_drift",
]

Signature = Literal[
    "loss_variation", "few_rejected", "collapse", "slow", "displacement", "length_drift"
]
Row = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """From where on a number is told; docs/watching.md says why these.

    Args:
        window: optimizer steps that are looked at together.
        loss_variation: variation of a group's loss, in parts of the loss of the first window.
        rejected_share: least share of rejected responses among those of both sets.
        chosen_mass: most mass of the chosen set.
        spread: least part of the chosen sets' responses, beyond one each, that takes part.
        slow_after: optimizer steps after which there should be progress.
        slow_accuracy: accuracy that is progress.
        slow_margin: margin that is progress.
        displacement: fall of the chosen responses' log-probability, in nats a token.
        length_tau: by how much Kendall's tau-b of rewards and lengths may differ from that of
            scores and lengths.
        moved: nats by which log-ratios must differ from zero before their order says anything.
        sampled_length: longest sampled responses, and shortest, as a ratio to the reference's.
        again: a finding is told again when it is so many times as bad as when it was told last.
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
        if self.window < 3:
            raise ValueError(f"health.limits.window must be >= 3, got {self.window}.")
        for name in ("sampled_length", "again"):
            if not getattr(self, name) > 1:
                raise ValueError(f"health.limits.{name} must be > 1, got {getattr(self, name)}.")


@dataclass(frozen=True)
class Finding:
    """What was found.

    Attributes:
        signature: its name.
        severity: how far beyond its limit, 1 at the limit.
        message: what was seen, in numbers, and what to try.
    """

    signature: Signature
    severity: float
    message: str


@dataclass(frozen=True, kw_only=True)
class Recent:
    """What a signature reads.

    Attributes:
        steps: optimizer steps of the run so far.
        rows: metrics of the last of them, a window full, with the number of groups and the
            learning rate of each.
        now: the means of these, over groups.
        first: the means over the run's first window.
        beta: of the loss.
        alpha: of the loss; none if it has no deviation weights.
    """

    steps: int
    rows: Sequence[Row]
    now: Row
    first: Row
    beta: float
    alpha: float | None


def mean_of(rows: Sequence[Row]) -> Row:
    """Each metric's mean over the groups of these steps; NaN if no step has it."""
    result = {}
    for name in rows[0]:
        known = [row for row in rows if not math.isnan(row[name])]
        groups = sum(row["groups"] for row in known)
        result[name] = (
            sum(row[name] * row["groups"] for row in known) / groups if groups else math.nan
        )
    return result


def loss_variation(recent: Recent, limits: Limits) -> Finding | None:
    """Losses that differ widely between batches: scores that are not calibrated.

    How far a step's loss lies from the line through its neighbours, so that a loss that falls does
    not vary; times the root of the groups of a step, so that it is that of a group however many are
    in a step.
    """
    losses = [row["loss"] for row in recent.rows if math.isfinite(row["loss"])]
    start = recent.first["loss"]
    # Some losses may be negative, such as RobustDPO: there is no part of that.
    if len(losses) < 3 or not start > 0:
        return None
    bends = [before - 2 * loss + after for before, loss, after in _threes(losses)]
    # Of independent losses with variance v a bend has 6 v.
    of_step = math.sqrt(sum(bend**2 for bend in bends) / len(bends) / 6)
    of_group = of_step * math.sqrt(recent.now["groups"])
    severity = of_group / start / limits.loss_variation
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


def _threes(values: list[float]) -> Iterator[tuple[float, float, float]]:
    return zip(values, values[1:], values[2:], strict=False)


def few_rejected(recent: Recent, limits: Limits) -> Finding | None:
    """Chosen sets that hold nearly all: the loss is small from the start and teaches little."""
    chosen, rejected = recent.now["sizes/chosen"], recent.now["sizes/rejected"]
    share = rejected / (chosen + rejected)
    if not share < limits.rejected_share:
        return None
    return Finding(
        "few_rejected",
        _below(limits.rejected_share, share),
        f"few responses are rejected: {rejected:.1f} a group beside {chosen:.1f} chosen, so that "
        f"the chosen set holds {recent.first['chosen_mass']:.0%} of the mass before anything is "
        "learned. Try: another partition, such as model.loss.partition: AboveQuantile or "
        "TopBottom; data.keep_responses: balanced with data.max_responses; more low-scored "
        "responses in the data.",
    )


def _below(limit: float, value: float) -> float:
    """How far a share has fallen below its limit; 4 at most, since it may go to nothing."""
    return limit / max(value, limit / 4)


def collapse(recent: Recent, limits: Limits) -> Finding | None:
    """A trivial solution: the chosen set, or one response of it, has all the mass."""
    mass, size = recent.now["chosen_mass"], recent.now["sizes/chosen"]
    takes_all = _below(1 - limits.chosen_mass, 1 - mass)
    # How many of the chosen responses take part, beyond the one that always does.
    others = (recent.now["effective_chosen"] * size - 1) / (size - 1) if size >= 1.5 else math.nan
    alone = 0.0 if math.isnan(others) else _below(limits.spread, others)
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
            f"{recent.now['effective_chosen'] * size:.2f} of them take part ({sets})"
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


def slow(recent: Recent, limits: Limits) -> Finding | None:
    """No progress after many steps: beta, alpha or the learning rate.

    The loss itself is no measure of it: it goes with the sizes of the sets that a step happens to
    hold. While the learning rate still rises nothing is asked for.
    """
    rates = [row["lr"] for row in recent.rows]
    if recent.steps < limits.slow_after or rates[-1] > rates[0]:
        return None
    accuracy, margin = recent.now["rewards/accuracy"], recent.now["rewards/margin"]
    if not (accuracy < limits.slow_accuracy or margin < limits.slow_margin):
        return None
    weights = ""
    if recent.alpha:
        weight = recent.alpha * recent.now["scores/deviation"]
        weights = (
            f" model.loss.alpha {recent.alpha:g} weighs deviations with {weight:.3g} nats, beside "
            "which such a margin is little: a smaller one."
        )
    return Finding(
        "slow",
        recent.steps / limits.slow_after,
        f"training hardly moves: after {recent.steps} steps {accuracy:.1%} of pairs are in order "
        f"(50% is chance), with a margin of {margin:+.4f} at model.loss.beta {recent.beta:g}; the "
        f"loss went from {recent.first['loss']:.4f} to {recent.now['loss']:.4f}. Try: a higher "
        f"learning rate (model.optimizer, here {rates[-1]:.1e}); a larger model.loss.beta.{weights}"
        " If nothing helps, scores and responses may not belong together: mpo-lightning data "
        "check.",
    )


def displacement(recent: Recent, limits: Limits) -> Finding | None:
    """The chosen responses themselves become less likely (arXiv 2410.08847)."""
    ratio, length = recent.now["log_ratios/chosen"], recent.now["lengths/chosen"]
    fall = -ratio / length
    if not fall >= limits.displacement:
        return None
    of_rejected = -recent.now["log_ratios/rejected"] / recent.now["lengths/rejected"]
    return Finding(
        "displacement",
        fall / limits.displacement,
        f"the chosen responses become less likely themselves: by {-ratio:.1f} nats on average, "
        f"{fall:.2f} a token (rejected ones: "
        f"{of_rejected:.2f} a token, margin {recent.now['rewards/margin']:+.2f}). What becomes "
        "likelier instead is in neither set. "
        f"Try: model.loss.likelihood: 0.1; a larger model.loss.beta (here {recent.beta:g}); a "
        f"lower learning rate (here {recent.now['lr']:.1e}); fewer trainer.max_epochs; "
        "and look at samples (samples.count: 4).",
    )


def length_drift(recent: Recent, limits: Limits) -> Finding | None:
    """Rewards that follow length more than the scores do, either way."""
    moved = max(abs(recent.now[f"log_ratios/{which}"]) for which in ("chosen", "rejected"))
    rewards, scores = recent.now["lengths/kendall_tau"], recent.now["lengths/score_tau"]
    gap = rewards - scores
    if moved < limits.moved or not abs(gap) >= limits.length_tau:
        return None
    kind = "longer" if gap > 0 else "shorter"
    return Finding(
        "length_drift",
        abs(gap) / limits.length_tau,
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


def sampled_length_drift(length: float, reference: float, limits: Limits) -> Finding | None:
    """Sampled responses that become much longer or shorter than the reference's.

    Args:
        length: mean tokens of the policy's samples.
        reference: of the reference's, to the same prompts.
        limits: how much is too much.
    """
    ratio = max(length, reference) / max(min(length, reference), 1.0)
    if ratio < limits.sampled_length:
        return None
    kind = "longer" if length > reference else "shorter"
    return Finding(
        "length_drift",
        math.log(ratio) / math.log(limits.sampled_length),
        f"sampled responses become {kind}: {length:.0f} tokens on average, the reference's "
        f"{reference:.0f} to the same prompts. {_LENGTH_ADVICE}",
    )


SIGNATURES: dict[Signature, Callable[[Recent, Limits], Finding | None]] = {
    "loss_variation": loss_variation,
    "few_rejected": few_rejected,
    "collapse": collapse,
    "slow": slow,
    "displacement": displacement,
    "length_drift": length_drift,
}
assert set(SIGNATURES) == set(get_args(Signature))
