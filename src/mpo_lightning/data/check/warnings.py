"""Warnings of a check: when they are given, why they matter, and what to do."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from mpo_lightning.data.check.report import (
    CheckReport,
    ColumnBias,
    Comparison,
    Contrast,
    DataWarning,
    LengthBias,
    Tokens,
)
from mpo_lightning.data.check.trusted import FEWEST_PROMPTS, LEAST_BIAS, LEAST_SPARED, LOW_TAU
from mpo_lightning.data.rendering import RenderingRules
from mpo_lightning.data.report import DataReport
from mpo_lightning.data.tokens import SETTING

__all__ = ["KINDS", "TRUSTED_KINDS", "Kind", "find_trusted_warnings", "find_warnings"]

# Responses, or groups, that a value of a column must have for a warning about it.
ENOUGH = 30

Found = tuple[str, list[str]]
Of = TypeVar("Of")
Test = Callable[[Of, float], Found | None]


@dataclass(frozen=True)
class Kind(Generic[Of]):
    """A kind of warning.

    Attributes:
        name: the name that users see.
        threshold: number beyond which there is a warning.
        when: meaning of the number.
        why: why it matters.
        remedy: what to do.
        test: returns what was found and the first rows if a report exceeds the threshold.
    """

    name: str
    threshold: float
    when: str
    why: str
    remedy: str
    test: Test[Of]


KINDS: list[Kind[CheckReport]] = []
TRUSTED_KINDS: list[Kind[Comparison]] = []


def _kind(
    name: str, *, threshold: float, when: str, why: str, remedy: str
) -> Callable[[Test[CheckReport]], Test[CheckReport]]:
    """Add a kind of warning with the decorated test to `KINDS`."""

    def add(test: Test[CheckReport]) -> Test[CheckReport]:
        KINDS.append(Kind(name, threshold, when, why, remedy, test))
        return test

    return add


def find_warnings(report: CheckReport) -> list[DataWarning]:
    """Return the warnings that a report gives reason for, in the order of docs/data-check.md."""
    found = _given(KINDS, report)
    return found + find_trusted_warnings(report.trusted.comparison) if report.trusted else found


def find_trusted_warnings(comparison: Comparison) -> list[DataWarning]:
    """Return the warnings that trusted labels give reason for, in the order of `TRUSTED_KINDS`."""
    return _given(TRUSTED_KINDS, comparison)


def _given(kinds: list[Kind[Of]], of: Of) -> list[DataWarning]:
    warnings = []
    for kind in kinds:
        found = kind.test(of, kind.threshold)
        if found is not None:
            warnings.append(DataWarning(kind.name, found[0], kind.why, kind.remedy, found[1]))
    return warnings


def _of(count: int, whole: int, what: str) -> str:
    return f"{count:,} of {whole:,} {what} ({count / whole:.1%})"


# ------------------------------------------------------------------------------------------ rows


@_kind(
    "schema-notes",
    threshold=0,
    when="notes of the schema",
    why="Other columns of these rows contradict the score, or the row was changed to be "
    "read. A top score that is an error is an outlier, which deviation weighting "
    "amplifies.",
    remedy="Look at the rows; the schema's settings say what can be done about them.",
)
def _schema_notes(report: CheckReport, threshold: float) -> Found | None:
    noted = _noted(report.total.read)
    return None if noted is None else (f"responses noted while reading: {noted[0]}", noted[1])


def _noted(report: DataReport, endings: tuple[str, ...] = ("",)) -> Found | None:
    """Return the notes with certain endings and their numbers, and the first rows."""
    notes = [each for each in report.changed.most_common() if each[0].endswith(endings)]
    rows = [row for note, _ in notes for row in report.examples[note]]
    found = "; ".join(f"{count:,} {note}" for note, count in notes)
    return (found, list(dict.fromkeys(rows))[:3]) if notes else None


# Rules of rendering that stop training unless they are set.
ERRORS = tuple(
    f"({SETTING}{name})" for name, rule in vars(RenderingRules()).items() if rule == "error"
)


@_kind(
    "rendering",
    threshold=0,
    when="responses whose tokens contradict the data",
    why="Text that the chat template leaves out is not learned, and responses that become equal "
    "teach the opposite of each other. Training stops at such a row.",
    remedy="Use a chat template for training, repair the rows, or set the rule that is named to "
    "drop or keep.",
)
def _rendering(report: CheckReport, threshold: float) -> Found | None:
    noted = _noted(report.rendered, ERRORS)
    return None if noted is None else (f"responses not rendered as they are: {noted[0]}", noted[1])


# ---------------------------------------------------------------------------------------- scores


@_kind(
    "equal-scores",
    threshold=0.1,
    when="share of groups whose scores are all equal",
    why="Such a group has no chosen set and teaches nothing; it is dropped.",
    remedy="Score these responses on a finer scale, or sample more varied ones.",
)
def _equal_scores(report: CheckReport, threshold: float) -> Found | None:
    count = report.equal.count
    if count <= threshold * report.groups:
        return None
    return f"{_of(count, report.groups, 'groups')} have equal scores only", report.equal.rows


@_kind(
    "ties",
    threshold=0.3,
    when="share of pairs of a group with equal scores",
    why="Which of them is chosen depends on the rest of the group, not on the two. "
    "Pairwise losses skip them or pick one by its place.",
    remedy="Use scores of a finer scale, such as the mean over several judgements or a reward "
    "model's.",
)
def _ties(report: CheckReport, threshold: float) -> Found | None:
    ties = report.ties
    if ties.tied_pairs <= threshold * ties.pairs:
        return None
    return (
        f"{_of(ties.tied_pairs, ties.pairs, 'pairs of a group')} have equal scores; in "
        f"{_of(ties.best, report.groups, 'groups')} several responses share the best score",
        [],
    )


@_kind(
    "score-ceiling",
    threshold=0.3,
    when="share of responses that have the highest score of all, as others of their group do",
    why="The judge does not tell good responses apart, and those just below the top are "
    "pushed away as rejected.",
    remedy="Score on a wider scale, or by comparison within the group.",
)
def _score_ceiling(report: CheckReport, threshold: float) -> Found | None:
    ties, responses = report.ties, report.total.responses
    varies = report.total.scores.low != report.total.scores.high
    if not varies or ties.sharing_highest <= threshold * responses:
        return None
    share = _of(ties.sharing_highest, responses, "responses")
    return f"{share} have the highest score, {ties.highest:g}, as others of their group do", []


@_kind(
    "skewed-scores",
    threshold=1.0,
    when="skewness of deviations from the group's mean, either sign",
    why="A few extreme scores move the group's mean, and with it the border between chosen "
    "and rejected: ordinary responses end up on one side.",
    remedy="Look at the extreme scores. If they are far below the others (a negative skewness), "
    "split at the median and leave alpha at 0; far above them, use alpha_unit: std if alpha > 0.",
)
def _skewed_scores(report: CheckReport, threshold: float) -> Found | None:
    skewness = report.deviations.skewness
    if skewness is None or abs(skewness) <= threshold:
        return None
    side = "a few responses far above" if skewness > 0 else "a few responses far below"
    return f"skewness {skewness:.2f} of scores within groups: {side} their group's mean", []


@_kind(
    "outliers",
    threshold=0.001,
    when="share of responses beyond five root mean square deviations from their group's mean",
    why="W-MPO adds alpha times this distance to a response's energy: if its score is wrong, "
    "the error weighs most.",
    remedy="Check their scores. Otherwise use --alpha_unit std, a smaller alpha, or cap the "
    "scores.",
)
def _outliers(report: CheckReport, threshold: float) -> Found | None:
    outliers, responses = report.outliers, report.deviations.count
    if outliers.limit is None or outliers.count <= threshold * responses:
        return None
    return (
        f"{_of(outliers.count, responses, 'responses')} lie more than "
        f"{outliers.limit:.3g} from their group's mean score (five times the root mean square; "
        f"kurtosis {report.deviations.kurtosis or 0.0:.1f})",
        outliers.rows,
    )


@_kind(
    "lopsided-sets",
    threshold=0.5,
    when="share of groups of four or more with one chosen, or one rejected, response",
    why="MPO contrasts two sets. With a single response in one of them most of what a "
    "group of many responses could teach is gone: it is one response against all "
    "others.",
    remedy="Look at the score histogram for a ceiling, a floor or outliers; a split at the "
    "median gives even sets.",
)
def _lopsided_sets(report: CheckReport, threshold: float) -> Found | None:
    large = {n: sizes for n, sizes in report.sets.items() if n >= 4}
    whole = sum(sum(sizes.values()) - sizes.get(0, 0) for sizes in large.values())
    one_chosen = sum(sizes.get(1, 0) for sizes in large.values())
    one_rejected = sum(sizes.get(n - 1, 0) for n, sizes in large.items())
    if max(one_chosen, one_rejected) <= threshold * whole:
        return None
    what = "groups of four or more responses"
    return (
        f"{_of(one_chosen, whole, what)} have a single chosen response, "
        f"{one_rejected:,} ({one_rejected / whole:.1%}) a single rejected one",
        [],
    )


@_kind(
    "scale-varies",
    threshold=10.0,
    when="90th over 10th percentile of the groups' standard deviations",
    why="An alpha per unit of score is strong in one group and without effect in another.",
    remedy="Use alpha_unit: std, which measures in the group's own standard deviations.",
)
def _scale_varies(report: CheckReport, threshold: float) -> Found | None:
    std = report.group_std
    if std.p10 is None or std.p90 is None or std.p90 <= threshold * std.p10:
        return None
    return (
        f"the scores of a tenth of the groups spread less than {std.p10:.3g} (standard deviation), "
        f"those of another tenth more than {std.p90:.3g}",
        [],
    )


@_kind(
    "weight-dominance",
    threshold=0.1,
    when="share of groups of three or more where one response has over 0.9 of the weight",
    why="The loss sees one response and hardly the others: a large group works like a small one.",
    remedy="Lower alpha, or use alpha_unit: std.",
)
def _weight_dominance(report: CheckReport, threshold: float) -> Found | None:
    weights = report.weights
    if weights.dominated.count <= threshold * weights.even_of:
        return None
    what = "groups of three or more responses"
    return (
        f"with alpha {weights.alpha:g} (unit: {weights.alpha_unit}), one response has more than "
        f"0.9 of the weight in {_of(weights.dominated.count, weights.even_of, what)}",
        weights.dominated.rows,
    )


@_kind(
    "weight-without-effect",
    threshold=0.5,
    when="share of groups of three or more whose effective number of responses is over 0.99 n",
    why="With this alpha W-MPO is MPO.",
    remedy="Raise alpha to the scale of the scores, or use alpha_unit: std.",
)
def _weight_without_effect(report: CheckReport, threshold: float) -> Found | None:
    weights = report.weights
    # A power of zero weighs all alike by its definition.
    if not weights.alpha or not weights.power or weights.even <= threshold * weights.even_of:
        return None
    what = "groups of three or more responses"
    return (
        f"with alpha {weights.alpha:g} (unit: {weights.alpha_unit}), all responses weigh nearly "
        f"the same in {_of(weights.even, weights.even_of, what)}",
        [],
    )


# --------------------------------------------------------------------------------------- lengths


@_kind(
    "length-bias",
    threshold=0.3,
    when="mean correlation of score and length within groups, either sign",
    why="Length alone then tells chosen from rejected, and it is the easiest thing to "
    "learn. Summed log-probabilities make it easier still.",
    remedy="Control the judge for length, balance the groups, or use a length-normalised loss.",
)
def _length_bias(report: CheckReport, threshold: float) -> Found | None:
    def far(bias: LengthBias) -> bool:
        return bias.within is not None and abs(bias.within) > threshold

    kinds = [(report.bias, "characters")]
    if report.tokens is not None:
        kinds.append((report.tokens.bias, "tokens"))
    found = [
        f"correlation {bias.within:.2f} with the length in {unit} (chosen {bias.chosen:.0f}, "
        f"rejected {bias.rejected:.0f} {unit} on average)"
        for bias, unit in kinds
        if far(bias)
    ]
    return ("scores within groups: " + "; ".join(found), []) if found else None


@_kind(
    "beyond-max-length",
    threshold=0.01,
    when="share of responses that do not fit into max_length with their prompt",
    why="They are dropped with their group, dropped alone, or cut, as data.over_long says; "
    "where it concerns one set more than the other, what remains is biased.",
    remedy="Raise max_length, or choose data.over_long knowing these numbers.",
)
def _beyond_max_length(report: CheckReport, threshold: float) -> Found | None:
    tokens = report.tokens
    if tokens is None or tokens.beyond.count <= threshold * tokens.response.count:
        return None
    return (
        f"{_of(tokens.beyond.count, tokens.response.count, 'responses')} do not fit into "
        f"{tokens.max_length} tokens with their prompt{_by_set(tokens)}; "
        f"{_of(tokens.groups_beyond, report.groups, 'groups')} have such a response, "
        f"{tokens.prompts_beyond.count:,} of them a prompt that leaves no room",
        tokens.beyond.rows,
    )


def _by_set(tokens: Tokens) -> str:
    if not tokens.chosen:
        return ""
    chosen, rejected = (
        tokens.beyond_chosen / tokens.chosen,
        tokens.beyond_rejected / tokens.rejected,
    )
    return f" ({chosen:.1%} of the chosen, {rejected:.1%} of the rejected)"


# ----------------------------------------------------------------------------------------- texts


@_kind(
    "near-empty-responses",
    threshold=0.01,
    when="share of responses of at most 3 characters",
    why="Often failed generations. If one is chosen the model learns to say nothing.",
    remedy="Remove them with their scores, unless the answers are meant to be that short.",
)
def _near_empty_responses(report: CheckReport, threshold: float) -> Found | None:
    short, responses = report.duplicates.near_empty, report.total.responses
    if short.count <= threshold * responses:
        return None
    return f"{_of(short.count, responses, 'responses')} have at most 3 characters", short.rows


@_kind(
    "duplicate-responses",
    threshold=0.01,
    when="share of responses that repeat one of their group (case and white space ignored)",
    why="A repeated response counts twice in its set, and n is smaller than it looks.",
    remedy="Keep one of each, or sample at a higher temperature.",
)
def _duplicate_responses(report: CheckReport, threshold: float) -> Found | None:
    duplicates, responses = report.duplicates, report.total.responses
    if duplicates.normalized.count <= threshold * responses:
        return None
    return (
        f"{_of(duplicates.normalized.count, responses, 'responses')} repeat another one of their "
        f"group, {duplicates.exact.count:,} of them to the letter",
        duplicates.normalized.rows,
    )


@_kind(
    "contradicting-duplicates",
    threshold=0,
    when="groups in which the same response is chosen and rejected",
    why="The loss pulls the same text up and down at once; the judge contradicts itself.",
    remedy="Keep one of them with its mean score.",
)
def _contradicting_duplicates(report: CheckReport, threshold: float) -> Found | None:
    flagged = report.duplicates.contradicting
    if flagged.count <= threshold * report.groups:
        return None
    return (
        f"in {_of(flagged.count, report.groups, 'groups')} the same response is chosen and "
        f"rejected ({report.duplicates.unequal.count:,} groups score the same response "
        "differently)",
        flagged.rows,
    )


@_kind(
    "repeated-prompts",
    threshold=0.01,
    when="share of groups whose prompt came before (normalised)",
    why="A prompt split over several groups compares each response with some of the others "
    "only, and a split by rows puts it on both sides.",
    remedy="Join the groups of a prompt where their scores are comparable; use `data split` "
    "to divide the data.",
)
def _repeated_prompts(report: CheckReport, threshold: float) -> Found | None:
    flagged = report.duplicates.prompts
    if flagged.count <= threshold * report.groups:
        return None
    return f"{_of(flagged.count, report.groups, 'groups')} repeat a prompt", flagged.rows


@_kind(
    "shared-prompts",
    threshold=0,
    when="prompts that two of the files have in common",
    why="If one of the files is for validation or test, its numbers are too good.",
    remedy="Divide the data with `data split`, which keeps a prompt on one side.",
)
def _shared_prompts(report: CheckReport, threshold: float) -> Found | None:
    shared = [entry for entry in report.duplicates.shared if entry[2].count > threshold]
    if not shared:
        return None
    found = ", ".join(f"{flagged.count:,} by {a} and {b}" for a, b, flagged in shared)
    return f"prompts that files have in common: {found}", shared[0][2].rows


# --------------------------------------------------------------------------------------- columns


@_kind(
    "one-sided-column",
    threshold=0.95,
    when="share of a value's responses that are chosen, or rejected, of "
    f"{ENOUGH} responses or more",
    why="What tells the sets apart may then be the writer's style, not quality.",
    remedy="Add responses of that model that lose (or win), or leave it out.",
)
def _one_sided_column(report: CheckReport, threshold: float) -> Found | None:
    found = []
    for column, values in report.of_responses.items():
        if len(values) < 2:
            continue
        for value in values:
            if value.chosen is None or value.contrasted < ENOUGH:
                continue
            if value.chosen > threshold or value.chosen < 1 - threshold:
                found.append(
                    f"{column} {value.name!r}: {value.chosen:.1%} of {value.contrasted:,} "
                    "responses are chosen"
                )
    return ("; ".join(found), []) if found else None


@_kind(
    "source-without-contrast",
    threshold=0.5,
    when=f"share of a value's groups without contrast, of {ENOUGH} groups or more",
    why="Most of this source is dropped, and the mixture is not what it seems.",
    remedy="Score it in another way, or leave it out knowingly.",
)
def _source_without_contrast(report: CheckReport, threshold: float) -> Found | None:
    found = [
        f"{column} {value.name!r}: {_of(value.no_contrast, value.groups, 'groups')} have no "
        "contrast"
        for column, values in report.of_groups.items()
        for value in values
        if value.groups >= ENOUGH and value.no_contrast > threshold * value.groups
    ]
    return ("; ".join(found), []) if found else None


# -------------------------------------------------------------------------------- trusted labels


def _trusted_kind(
    name: str, *, threshold: float, when: str, why: str, remedy: str
) -> Callable[[Callable[[Comparison, float], str | None]], None]:
    """Add a kind of warning with the decorated test to `TRUSTED_KINDS`."""

    def add(test: Callable[[Comparison, float], str | None]) -> None:
        def found(comparison: Comparison, threshold: float) -> Found | None:
            text = test(comparison, threshold)
            return None if text is None else (text, [])

        TRUSTED_KINDS.append(Kind(name, threshold, when, why, remedy, found))

    return add


def _interval(contrast: Contrast) -> str:
    return f"{contrast.value:.2f} [{contrast.low:.2f}, {contrast.high:.2f}]"


def _is_told(contrast: Contrast, threshold: float) -> bool:
    """Whether a value exceeds a threshold and is told from zero."""
    low, value = contrast.low, contrast.value
    return low is not None and value is not None and value > threshold and low > 0


@_trusted_kind(
    "few-trusted-labels",
    threshold=FEWEST_PROMPTS,
    when="fewer prompts with two labels in a group",
    why="Prompts are what varies independently: so few of them say nothing of the others.",
    remedy="Label the groups of more prompts; the report says how many are needed for what.",
)
def _few_trusted_labels(comparison: Comparison, threshold: float) -> str | None:
    if comparison.prompts >= threshold:
        return None
    return f"{comparison.prompts} prompts have two labels or more in a group"


@_trusted_kind(
    "low-agreement",
    threshold=LOW_TAU,
    when="upper end of the interval of Kendall's tau-b within groups is lower",
    why="The scores order less than two thirds of the pairs as the trusted labels do: most of "
    "what weights amplify is error.",
    remedy="Do not weight by these scores (alpha 0) nor learn their size (InfoNCA); judge again, "
    "or take the mean of several judgements.",
)
def _low_agreement(comparison: Comparison, threshold: float) -> str | None:
    order = comparison.order
    if order.high is None or order.high >= threshold:
        return None
    return f"tau-b of scores and trusted labels within groups is {_interval(order)}"


@_trusted_kind(
    "unsure-differences",
    threshold=LEAST_SPARED,
    when="upper end of the interval of the share of errors that the largest quarter of differences "
    "in score is spared, against the others, is lower",
    why="Deviation weights and InfoNCA go by the size of the differences, and larger ones are "
    "hardly surer here.",
    remedy="Do not weight by them (alpha 0); or use ranks (data.normalize_scores: rank), or "
    "alpha_unit: std where `scale-varies` is given, and check again.",
)
def _unsure_differences(comparison: Comparison, threshold: float) -> str | None:
    spared = comparison.spared
    if spared.high is None or spared.high >= threshold:
        return None
    return (
        "pairs whose scores differ most are in the wrong order, by the trusted labels, as often as "
        f"the others but for a share of {_interval(spared)}"
    )


@_trusted_kind(
    "wrong-best",
    threshold=LEAST_BIAS,
    when="shortfall of the trusted place of the best-scored responses, and its interval is above 0",
    why="Some of the highest scores are wrong, and those are what InfoNCA and pairs of the best "
    "and the worst learn most from.",
    remedy="Judge the best-scored responses again, or leave them out. Until then no InfoNCA, which "
    "follows the scores most.",
)
def _wrong_best(comparison: Comparison, threshold: float) -> str | None:
    best = comparison.best_shortfall
    if not _is_told(best, threshold):
        return None
    return _end(comparison, "best", best, "below")


@_trusted_kind(
    "wrong-worst",
    threshold=LEAST_BIAS,
    when="excess of the trusted place of the worst-scored responses, and its interval is above 0",
    why="Some of the lowest scores are wrong, and good responses are pushed away hardest.",
    remedy="Judge the worst-scored responses again, or leave them out. Deviation weights may stay.",
)
def _wrong_worst(comparison: Comparison, threshold: float) -> str | None:
    worst = comparison.worst_excess
    if not _is_told(worst, threshold):
        return None
    return _end(comparison, "worst", worst, "above")


def _end(comparison: Comparison, name: str, contrast: Contrast, side: str) -> str:
    (place,) = (each.place for each in comparison.places if each.name == name)
    return (
        f"the trusted place (0 to 1) of the {name}-scored responses is {place.value:.2f}, "
        f"{_interval(contrast)} {side} what the others' scores lead one to expect"
    )


@_trusted_kind(
    "favoured-column",
    threshold=LEAST_BIAS,
    when="change of the place by the scores beyond that by the trusted labels, either sign, and "
    "its interval excludes 0",
    why="The judge has a taste that the trusted labels do not share, and the policy learns it.",
    remedy="Judge again by instructions against it; or subtract what the column adds to the scores "
    "(docs/data-check.md has the lines), and check again.",
)
def _favoured_column(comparison: Comparison, threshold: float) -> str | None:
    found = [
        _favour(column) for column in comparison.columns if _is_favoured(column.beyond, threshold)
    ]
    return "; ".join(found) or None


def _is_favoured(beyond: Contrast, threshold: float) -> bool:
    if beyond.value is None or beyond.low is None or beyond.high is None:
        return False
    return abs(beyond.value) > threshold and (beyond.low > 0 or beyond.high < 0)


def _favour(column: ColumnBias) -> str:
    name = column.column if column.value is None else f"{column.column} {column.value!r}"
    return (
        f"{name} changes a response's place (0 to 1) by {column.judged.value:+.2f} in the scores, "
        f"by {column.trusted.value:+.2f} in the trusted labels: {_interval(column.beyond)} beyond"
    )
