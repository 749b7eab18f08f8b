"""What a check of scored groups found, as numbers."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass

from mpo_lightning.data.check.streaming import Flagged, IntegerCounts, Moments, Sample
from mpo_lightning.data.report import DataReport

__all__ = [
    "CheckReport",
    "DataWarning",
    "Duplicates",
    "FileReport",
    "LengthBias",
    "Lengths",
    "OfGroups",
    "OfResponses",
    "Outliers",
    "Quantiles",
    "Summary",
    "Ties",
    "Tokens",
    "Weights",
]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Of all values, exact; what is undefined is None.

    Attributes:
        count: number of values.
        mean: their mean.
        std: standard deviation (population form).
        skewness: third standardised moment.
        kurtosis: fourth standardised moment minus 3.
        low: the smallest.
        high: the largest.
    """

    count: int
    mean: float | None
    std: float | None
    skewness: float | None
    kurtosis: float | None
    low: float | None
    high: float | None

    @classmethod
    def of(cls, moments: Moments) -> "Summary":
        """The summary of a tally."""
        some = moments.count > 0
        return cls(
            count=moments.count,
            mean=moments.mean if some and math.isfinite(moments.mean) else None,
            std=moments.std,
            skewness=moments.skewness,
            kurtosis=moments.kurtosis,
            low=moments.low if some else None,
            high=moments.high if some else None,
        )


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Lengths in characters or tokens, exact."""

    count: int
    mean: float | None
    low: int | None
    p5: int | None
    median: int | None
    p95: int | None
    p99: int | None
    high: int | None

    @classmethod
    def of(cls, counts: IntegerCounts) -> "Lengths":
        """The summary of a tally."""
        low, p5, median, p95, p99, high = map(counts.quantile, (0.0, 0.05, 0.5, 0.95, 0.99, 1.0))
        return cls(
            count=counts.total,
            mean=counts.mean,
            low=low,
            p5=p5,
            median=median,
            p95=p95,
            p99=p99,
            high=high,
        )


@dataclass(frozen=True, kw_only=True)
class Quantiles:
    """Quantiles of one number a group.

    Attributes:
        count: number of groups.
        p10: a tenth of the groups lie below.
        median: half of them.
        p90: nine tenths.
        exact: False where they are estimated from a sample of the groups.
    """

    count: int
    p10: float | None
    median: float | None
    p90: float | None
    exact: bool

    @classmethod
    def of(cls, sample: Sample) -> "Quantiles":
        """The quantiles of a tally."""
        p10, median, p90 = sample.quantiles((0.1, 0.5, 0.9))
        return cls(count=sample.seen, p10=p10, median=median, p90=p90, exact=sample.is_exact)


@dataclass(frozen=True, kw_only=True)
class FileReport:
    """One file, or all of them.

    Attributes:
        read: what became of the rows: kept, dropped, failed, and the schema's notes.
        responses: responses of all groups that could be read.
        scores: their scores.
    """

    read: DataReport
    responses: int
    scores: Summary


@dataclass(frozen=True, kw_only=True)
class Ties:
    """Equal scores.

    Attributes:
        groups: groups in which at least two responses have the same score.
        pairs: pairs of responses of the same group.
        tied_pairs: those with equal scores.
        best: groups in which several responses share the best score.
        highest: the highest score of all.
        at_highest: responses that have it.
    """

    groups: int
    pairs: int
    tied_pairs: int
    best: int
    highest: float | None
    at_highest: int


@dataclass(frozen=True, kw_only=True)
class LengthBias:
    """How scores go with lengths.

    Attributes:
        groups: groups in which both scores and lengths vary.
        within: mean over these groups of Pearson's correlation of score and length among a group's
            responses. What distinguishes prompts has no part in it; of pairs it is the share in
            which the longer response scores higher minus the share in which the shorter one does.
        pooled: Pearson's correlation over all responses, prompts mixed, for comparison.
        chosen: mean length of the chosen responses.
        rejected: mean length of the rejected responses (of groups with a chosen one).
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
        prompt: tokens of the rendered prompts.
        response: tokens of the responses, end of turn included.
        max_length: the limit on prompt + response.
        beyond: responses beyond the limit.
        beyond_chosen: those of them that are chosen.
        beyond_rejected: those that are rejected.
        chosen: chosen responses.
        rejected: rejected responses of groups with a chosen one.
        groups_beyond: groups with a response beyond the limit.
        prompts_beyond: groups whose prompt leaves no room for a response.
        bias: how scores go with lengths in tokens.
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
        largest: a group's largest weight.
        effective: exp(entropy of the weights) over the number of responses: 1 where all weigh the
            same, 1 / n where one response has all the weight.
        dominated: groups of at least three responses one of which has more than 0.9 of the weight.
        even: groups in which `effective` is above 0.99.
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
        limit: five times the root mean square of all deviations.
        count: responses beyond it.
        more: whether there may be more than were counted.
        rows: the first of the largest deviations, "file:row (deviation)".
    """

    limit: float | None
    count: int
    more: bool
    rows: list[str]


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """Repeated texts.

    Attributes:
        exact: responses that repeat another one of their group.
        normalized: the same, upper and lower case and white space ignored.
        unequal: groups in which the same response has different scores.
        contradicting: groups in which the same response is chosen and rejected.
        near_empty: responses of at most three characters, white space at the ends ignored.
        prompts: groups whose prompt came before, normalised, in whichever file.
        shared: for each two of the files that share prompts: their names, how many prompts, and the
            first rows.
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
    """The responses with one value in a column that has one a response, such as the model.

    Attributes:
        name: the value.
        responses: how many.
        mean: their mean score.
        deviation: mean of score minus the group's mean score.
        contrasted: responses in groups with a chosen and a rejected set.
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
    """The groups with one value in a column that has one a row, such as the source.

    Attributes:
        name: the value.
        groups: how many.
        responses: their responses.
        mean: mean score of the responses.
        std: root mean square deviation from the groups' mean scores.
        equal: groups whose scores are all equal.
    """

    name: str
    groups: int
    responses: int
    mean: float
    std: float
    equal: int


@dataclass(frozen=True, kw_only=True)
class DataWarning:
    """Something that a user should look at before training.

    Attributes:
        name: of the kind of warning; docs/data-check.md lists them with their thresholds.
        found: what was found, with numbers.
        why: why it matters.
        remedy: what to do.
        rows: the first rows concerned, "file:row".
    """

    name: str
    found: str
    why: str
    remedy: str
    rows: list[str]


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """All that a check found.

    Attributes:
        files: each file.
        total: all files together.
        histogram: ``(from, to, count)`` of the scores; a value of its own where both are equal.
        deviations: of score minus the group's mean score, over all groups with a chosen set: the
            moments of scores within groups.
        group_skewness: mean over these groups of the skewness of a group's scores.
        group_kurtosis: the same of kurtosis (minus 3). Both are bounded by the number of responses.
        group_std: standard deviation of a group's scores, over these groups.
        sets: how many groups have so many responses (first key), and so many of them in the chosen
            set (second key); none chosen means that all scores are equal.
        equal: groups whose scores are all equal.
        ties: equal scores.
        prompt_chars: lengths of the prompts, all messages together.
        response_chars: lengths of the responses.
        bias: how scores go with lengths in characters.
        tokens: lengths in tokens, where a tokenizer was given.
        weights: what deviation weighting makes of the groups with a chosen set.
        outliers: responses far from their group's mean.
        duplicates: repeated texts.
        of_responses: per column, its values, most frequent first.
        of_groups: the same for columns with one value a row.
        warnings: what should be looked at.
    """

    files: list[FileReport]
    total: FileReport
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
    warnings: list[DataWarning]

    @property
    def groups(self) -> int:
        """Groups that could be read."""
        return sum(self.groups_of_size.values())

    @property
    def groups_of_size(self) -> dict[int, int]:
        """How many groups have so many responses."""
        return {n: sum(chosen.values()) for n, chosen in self.sets.items()}

    def to_json(self, indent: int | None = None) -> str:
        """As JSON; numbers beyond JSON's are null."""
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
