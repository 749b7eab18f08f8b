"""Results of a check of scored groups, as numbers."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass

from mpo_lightning.data.report import DataReport

__all__ = [
    "CheckReport",
    "ColumnBias",
    "Comparison",
    "Contrast",
    "DataWarning",
    "DifferenceBin",
    "Duplicates",
    "Estimate",
    "FileReport",
    "Flagged",
    "LengthBias",
    "Lengths",
    "OfGroups",
    "OfResponses",
    "Outliers",
    "PlaceBin",
    "Quantiles",
    "Summary",
    "Ties",
    "Tokens",
    "TrustedReport",
    "Weights",
]


@dataclass(frozen=True)
class Flagged:
    """A count, with examples.

    Attributes:
        count: number of things counted.
        rows: "file:row" of the first three groups among them.
    """

    count: int
    rows: list[str]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Moments and range of numbers; None where undefined.

    Attributes:
        count: number of values.
        mean: mean.
        std: standard deviation (population form).
        skewness: third standardised moment.
        kurtosis: fourth standardised moment minus 3.
        low: smallest value.
        high: largest value.
    """

    count: int
    mean: float | None = None
    std: float | None = None
    skewness: float | None = None
    kurtosis: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Lengths:
    """Mean and quantiles of lengths in characters or tokens; None where there are none."""

    count: int
    mean: float | None
    low: int | None
    p5: int | None
    median: int | None
    p95: int | None
    p99: int | None
    high: int | None


@dataclass(frozen=True, kw_only=True)
class Quantiles:
    """Quantiles of a number that each group has; None where there are no groups.

    Attributes:
        count: number of groups.
        p10: 10th percentile.
        median: 50th percentile.
        p90: 90th percentile.
    """

    count: int
    p10: float | None = None
    median: float | None = None
    p90: float | None = None


@dataclass(frozen=True, kw_only=True)
class FileReport:
    """Counts of one file, or of all files together.

    Attributes:
        read: counts of rows read, kept, dropped and unusable, and the schema's notes.
        no_contrast: groups without contrast: the partition rule leaves one of their sets empty.
            They are among the dropped.
        responses: responses of all groups that could be read.
        scores: summary of their scores.
    """

    read: DataReport
    no_contrast: int
    responses: int
    scores: Summary


@dataclass(frozen=True, kw_only=True)
class Ties:
    """Equal scores.

    Attributes:
        groups: groups in which at least two responses have the same score.
        pairs: pairs of responses of the same group.
        tied_pairs: pairs with equal scores.
        best: groups in which several responses share the best score.
        highest: highest score of all.
        at_highest: responses that have it.
        sharing_highest: those of them whose group has several.
    """

    groups: int
    pairs: int
    tied_pairs: int
    best: int
    highest: float | None
    at_highest: int
    sharing_highest: int


@dataclass(frozen=True, kw_only=True)
class LengthBias:
    """Relation of scores to lengths.

    Attributes:
        groups: groups with contrast in which both scores and lengths vary.
        within: Pearson's correlation of score and length among a group's responses, averaged over
            these groups. Differences between prompts have no part in it. Of a pair it is 1 where
            the longer response scores higher, and -1 where the shorter one does.
        pooled: Pearson's correlation over all responses, prompts mixed, for comparison.
        chosen: mean length of the chosen responses.
        rejected: mean length of the rejected responses.
    """

    groups: int
    within: float | None
    pooled: float | None
    chosen: float | None
    rejected: float | None


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Lengths in tokens.

    Attributes:
        prompt: lengths of the rendered prompts.
        response: lengths of the responses, end of turn included.
        max_length: limit on prompt + response.
        beyond: responses beyond the limit.
        beyond_chosen: chosen responses beyond the limit.
        beyond_rejected: rejected responses beyond the limit.
        chosen: chosen responses.
        rejected: rejected responses.
        groups_beyond: groups with a response beyond the limit.
        prompts_beyond: groups whose prompt leaves no room for a response.
        bias: relation of scores to lengths in tokens.
    """

    prompt: Lengths
    response: Lengths
    max_length: int
    beyond: Flagged
    beyond_chosen: int
    beyond_rejected: int
    chosen: int
    rejected: int
    groups_beyond: int
    prompts_beyond: Flagged
    bias: LengthBias


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Weights of the responses at the start of training, softmax(alpha |S - mean S| ** power).

    Attributes:
        alpha: strength.
        power: exponent.
        alpha_unit: "score" or "std".
        largest: largest weight of each group with contrast.
        effective: exp(entropy of its weights) over its number of responses n: 1 where all weigh
            the same, 1 / n where one response has all the weight.
        dominated: groups of at least three responses, one of which has more than 0.9 of the weight.
        even: groups of at least three responses in which ``effective`` is above 0.99.
        even_of: groups of at least three responses: of two, both always weigh the same.
    """

    alpha: float
    power: float
    alpha_unit: str
    largest: Quantiles
    effective: Quantiles
    dominated: Flagged
    even: int
    even_of: int


@dataclass(frozen=True, kw_only=True)
class Outliers:
    """Responses that lie far from their group's mean score.

    Attributes:
        limit: five times the root mean square of all deviations; None where it is 0 or undefined.
        count: responses beyond it.
        rows: "file:row (deviation)" of the three largest deviations.
    """

    limit: float | None
    count: int
    rows: list[str]


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """Repeated texts.

    Attributes:
        exact: responses that repeat another one of their group to the letter.
        normalized: responses that do so when case and white space are ignored.
        unequal: groups in which the same response has different scores.
        contradicting: groups in which the same response is chosen and rejected.
        near_empty: responses of at most three characters, white space at the ends ignored.
        prompts: groups whose normalised prompt came before, in whichever file.
        shared: for each two files that share prompts, their names and the number of such prompts.
    """

    exact: Flagged
    normalized: Flagged
    unequal: Flagged
    contradicting: Flagged
    near_empty: Flagged
    prompts: Flagged
    shared: list[tuple[str, str, Flagged]]


@dataclass(frozen=True, kw_only=True)
class OfResponses:
    """Responses with one value in a column that has a value a response, such as the model.

    Attributes:
        name: the value.
        responses: number of responses.
        mean: mean of their scores.
        deviation: mean of score minus the group's mean score.
        contrasted: responses in groups with contrast.
        chosen: share of these that are chosen.
        best: share of these that have their group's best score.
    """

    name: str
    responses: int
    mean: float
    deviation: float
    contrasted: int
    chosen: float | None
    best: float | None


@dataclass(frozen=True, kw_only=True)
class OfGroups:
    """Groups with one value in a column that has a value a row, such as the source.

    Attributes:
        name: the value.
        groups: number of groups.
        responses: number of their responses.
        mean: mean score of the responses.
        std: root mean square of score minus the group's mean score.
        no_contrast: groups without contrast.
    """

    name: str
    groups: int
    responses: int
    mean: float
    std: float
    no_contrast: int


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """An estimate with its 95 % interval; None where the labels do not determine it."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class Contrast(Estimate):
    """What a warning about trusted labels goes by; None where the labels do not determine it.

    Attributes:
        value: the estimate.
        low: lower end of the interval. The intervals of all contrasts of a comparison hold
            together in 95 % of comparisons.
        high: its upper end.
        noticeable: the value nearest to that of a sound judge that would have been warned of with a
            probability of 80 %.
        needed: labels with which ``target`` would be, if their groups were as these are.
        target: a value that matters.
    """

    noticeable: float | None
    needed: int | None
    target: float


@dataclass(frozen=True, kw_only=True)
class DifferenceBin:
    """Pairs of a group whose scores differ by about as much.

    Attributes:
        low: smallest difference.
        high: largest difference.
        pairs: number of pairs.
        agree: share of them in which the trusted labels agree with the order; equal ones half.
    """

    low: float
    high: float
    pairs: int
    agree: Estimate


@dataclass(frozen=True, kw_only=True)
class PlaceBin:
    """Labelled responses by the place of their score in their whole group.

    Attributes:
        name: "best" and "worst" are those that have the group's highest and lowest score, "upper"
            and "lower" the others of each half.
        labels: their number.
        place: mean of the share of the other labelled responses of the group that the trusted
            labels put below them, equal ones half.
        agree: share of the pairs with one of them whose order the trusted labels agree with.
    """

    name: str
    labels: int
    place: Estimate
    agree: Estimate


@dataclass(frozen=True, kw_only=True)
class ColumnBias:
    """What a column changes in a response's place (0 to 1) in its group.

    Attributes:
        column: name of the column.
        value: the text whose responses are set against the others; None for a column of numbers,
            of which the highest of a group is set against its lowest.
        labels: labelled responses with this text, or with a number.
        judged: change in the place by the checked scores.
        trusted: change in the place by the trusted labels.
        beyond: the former minus the latter. The interval holds whether the trusted labels are
            exact or as noisy as the scores.
    """

    column: str
    value: str | None
    labels: int
    judged: Estimate
    trusted: Estimate
    beyond: Contrast


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Comparison of scores with trusted labels, within groups.

    Attributes:
        prompts: prompts with at least two labelled responses in a group.
        groups: such groups.
        labels: labelled responses in these.
        alone: labelled responses that are the only one of their group, left out.
        tests: number of contrasts.
        tau: mean Kendall's tau-b of the groups in which both scores and labels vary.
        order: the same, as a contrast with `LOW_TAU`.
        differences: agreement by the size of the difference in score, ascending.
        spared: share of the disagreement on the other differences that the largest are spared: 0
            where they are no surer, 1 where they are never wrong.
        places: agreement by place, from worst to best.
        best_shortfall: how far the trusted place of the best-scored responses is below the line
            through those of the others.
        worst_excess: how far that of the worst-scored responses is above it.
        columns: biases by column.
    """

    prompts: int
    groups: int
    labels: int
    alone: int
    tests: int
    tau: Estimate
    order: Contrast
    differences: list[DifferenceBin]
    spared: Contrast
    places: list[PlaceBin]
    best_shortfall: Contrast
    worst_excess: Contrast
    columns: list[ColumnBias]


@dataclass(frozen=True, kw_only=True)
class TrustedReport:
    """A file of trusted labels, and what they say of the scores.

    Attributes:
        read: counts of its rows; what is kept are rows with a label that was matched, and such
            labels.
        labels: labels in all rows that could be read.
        unknown_prompts: labels of prompts that the checked data do not have.
        unknown_responses: labels of responses that the prompt's groups do not have.
        comparison: what the others say.
    """

    read: DataReport
    labels: int
    unknown_prompts: Flagged
    unknown_responses: Flagged
    comparison: Comparison


@dataclass(frozen=True)
class DataWarning:
    """Something that a user should look at before training.

    Attributes:
        name: kind of warning; docs/data-check.md lists them with their thresholds.
        found: what was found, with numbers.
        why: why it matters.
        remedy: what to do.
        rows: "file:row" of the first rows concerned.
    """

    name: str
    found: str
    why: str
    remedy: str
    rows: list[str]


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """All results of a check.

    Attributes:
        files: report of each file.
        total: report of all files together.
        rendered: differences between data and tokens in all files; none without a tokenizer.
        histogram: ``(from, to, count)`` of the scores; a single value where both are equal.
        deviations: summary of score minus the group's mean score, over all groups with contrast.
        group_skewness: mean over these groups of the skewness of a group's scores.
        group_kurtosis: mean of their kurtosis (minus 3). Both are bounded by the number of
            responses.
        group_std: standard deviation of a group's scores, over these groups.
        sets: number of groups by number of responses (first key) and by size of the chosen set
            (second key), which is 0 in groups without contrast.
        equal: groups whose scores are all equal.
        ties: equal scores.
        prompt_chars: lengths of the prompts in characters, all messages together.
        response_chars: lengths of the responses in characters.
        bias: relation of scores to lengths in characters.
        tokens: lengths in tokens; None without a tokenizer.
        weights: deviation weights of the groups with contrast.
        outliers: responses far from their group's mean.
        duplicates: repeated texts.
        of_responses: for each column with a value a response, its values, most frequent first.
        of_groups: for each column with a value a row, its values, most frequent first.
        trusted: comparison with trusted labels; None without any, and without groups.
        warnings: warnings, in the order of docs/data-check.md.
    """

    files: list[FileReport]
    total: FileReport
    rendered: DataReport
    histogram: list[tuple[float, float, int]]
    deviations: Summary
    group_skewness: float | None
    group_kurtosis: float | None
    group_std: Quantiles
    sets: dict[int, dict[int, int]]
    equal: Flagged
    ties: Ties
    prompt_chars: Lengths
    response_chars: Lengths
    bias: LengthBias
    tokens: Tokens | None
    weights: Weights
    outliers: Outliers
    duplicates: Duplicates
    of_responses: dict[str, list[OfResponses]]
    of_groups: dict[str, list[OfGroups]]
    trusted: TrustedReport | None
    warnings: list[DataWarning]

    @property
    def groups(self) -> int:
        """Number of groups that could be read."""
        return sum(self.groups_of_size.values())

    @property
    def groups_of_size(self) -> dict[int, int]:
        """Number of groups by number of responses."""
        return {n: sum(chosen.values()) for n, chosen in self.sets.items()}

    @property
    def groups_of_chosen(self) -> dict[int, int]:
        """Number of groups by size of the chosen set, ascending."""
        total = sum(map(Counter, self.sets.values()), Counter())
        return dict(sorted(total.items()))

    def to_json(self, indent: int | None = None) -> str:
        """Return JSON; numbers that are not finite are null."""
        return json.dumps(_plain(self), indent=indent, allow_nan=False)


def _plain(value: object) -> object:
    # Not asdict, which does not know how to copy a Counter.
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
