"""The report of a check, section by section, from the arrays of all groups."""

from collections import Counter
from collections.abc import Collection, Sequence
from itertools import combinations, pairwise

import numpy as np
import torch

from mpo_lightning.data.check.report import (
    CheckReport,
    Duplicates,
    FileReport,
    Flagged,
    LengthBias,
    OfGroups,
    OfResponses,
    Outliers,
    Summary,
    Ties,
    Tokens,
    Weights,
)
from mpo_lightning.data.check.statistics import (
    Bools,
    Floats,
    Integers,
    correlation,
    histogram,
    length_summary,
    mean,
    quantiles,
    summary,
)
from mpo_lightning.data.check.table import GroupTable, ScoredGroups, ValueColumn
from mpo_lightning.data.report import DataReport
from mpo_lightning.losses import Partition, deviation_log_weights
from mpo_lightning.losses.scores import AlphaUnit

__all__ = ["make_report"]

OUTLIER = 5.0
DOMINATED = 0.9
EVEN = 0.99


def make_report(
    table: GroupTable,
    reads: Sequence[DataReport],
    rendered: DataReport,
    *,
    partition: Partition,
    alpha: float,
    power: float,
    alpha_unit: AlphaUnit,
    max_length: int | None,
) -> CheckReport:
    """Compute the sections of a report but trusted labels and warnings.

    The settings are those of `check`.

    ``reads`` has, for each file, counts of the rows that gave no group, and is completed here.
    ``rendered`` has the differences between data and tokens.
    ``max_length`` is None where tokens were not counted.
    """
    groups = ScoredGroups.split(table, partition)
    rule = type(partition).__name__
    files = [_file_report(groups, number, read, rule) for number, read in enumerate(reads)]
    deviations = summary(groups.deviations[groups.spread(groups.contrast)])
    std, skewness, kurtosis = _group_shapes(groups)
    of_responses = {name: _values_of_responses(groups, c) for name, c in table.columns.items()}
    of_groups = {name: _values_of_groups(groups, c) for name, c in table.columns.items()}
    return CheckReport(
        files=files,
        total=FileReport(
            read=DataReport.total(reads),
            no_contrast=sum(file.no_contrast for file in files),
            responses=len(groups.scores),
            scores=summary(groups.scores),
        ),
        rendered=rendered,
        histogram=histogram(groups.scores),
        deviations=deviations,
        group_skewness=mean(skewness),
        group_kurtosis=mean(kurtosis),
        group_std=quantiles(std),
        sets=_set_sizes(groups),
        equal=groups.flagged(np.flatnonzero(groups.equal)),
        ties=_ties(groups),
        prompt_chars=length_summary(np.asarray(table.prompt_chars)),
        response_chars=length_summary(np.asarray(table.chars)),
        bias=_length_bias(groups, np.asarray(table.chars)),
        tokens=None if max_length is None else _token_lengths(groups, max_length),
        weights=_weights(groups, alpha=alpha, power=power, alpha_unit=alpha_unit),
        outliers=_outliers(groups, deviations),
        duplicates=_duplicates(groups, [read.data for read in reads]),
        of_responses={name: values for name, values in of_responses.items() if values},
        of_groups={name: values for name, values in of_groups.items() if values},
        trusted=None,
        warnings=[],
    )


def _file_report(groups: ScoredGroups, number: int, read: DataReport, rule: str) -> FileReport:
    """Report the file of this number; ``read`` has counted its rows that gave no group."""
    start, stop = np.searchsorted(groups.table.files, [number, number + 1]).tolist()
    contrast = groups.contrast[start:stop]
    scores = groups.scores[groups.bounds[start] : groups.bounds[stop]]
    read.kept = int(contrast.sum())
    read.responses = int(groups.counts[start:stop][contrast].sum())
    read.drop_without_contrast(
        contrast, groups.equal[start:stop], rule, lambda group: groups.table.row(start + group)
    )
    no_contrast = len(contrast) - read.kept
    return FileReport(
        read=read, no_contrast=no_contrast, responses=len(scores), scores=summary(scores)
    )


# ---------------------------------------------------------------------------------------- scores


def _set_sizes(groups: ScoredGroups) -> dict[int, dict[int, int]]:
    """Count the groups by number of responses, and by how many of them are chosen."""
    chosen = groups.sums(groups.chosen.astype(np.int64))
    pairs = Counter(zip(groups.counts.tolist(), chosen.tolist(), strict=True))
    sizes: dict[int, dict[int, int]] = {}
    for (n, of_chosen), count in sorted(pairs.items()):
        sizes.setdefault(n, {})[of_chosen] = count
    return sizes


def _ties(groups: ScoredGroups) -> Ties:
    """Count equal scores."""
    ordered = np.empty_like(groups.scores)
    for _, slots in groups.blocks():
        ordered[slots] = np.sort(groups.scores[slots], axis=1)
    # Runs of equal scores within groups.
    begins = np.ones(len(ordered) + 1, dtype=np.bool_)
    begins[1:-1] = ordered[1:] != ordered[:-1]
    begins[groups.bounds] = True
    starts = np.flatnonzero(begins)
    runs = np.diff(starts)
    best = runs[np.searchsorted(starts, groups.bounds[1:]) - 1]
    highest = float(groups.scores.max()) if len(groups.scores) else None
    at_highest = groups.sums((groups.scores == highest).astype(np.int64))
    return Ties(
        groups=len(np.unique(groups.of_responses(starts[:-1][runs > 1]))),
        pairs=int((groups.counts * (groups.counts - 1) // 2).sum()),
        tied_pairs=int((runs * (runs - 1) // 2).sum()),
        best=int((best > 1).sum()),
        highest=highest,
        at_highest=int(at_highest.sum()),
        sharing_highest=int(at_highest[at_highest > 1].sum()),
    )


def _group_shapes(groups: ScoredGroups) -> tuple[Floats, Floats, Floats]:
    """Standard deviation, skewness and kurtosis of each group with contrast, in that order.

    Skewness and kurtosis are left out where the scores are equal but for rounding.
    """
    # Divided by the largest first, so that powers neither overflow nor vanish.
    size = groups.highest(np.abs(groups.deviations))
    unit = groups.deviations / groups.spread(np.where(size > 0, size, 1.0))
    second, third, fourth = (
        (groups.sums(unit**power) / groups.counts)[groups.contrast] for power in (2, 3, 4)
    )
    varies = second > 0
    return (
        size[groups.contrast] * np.sqrt(second),
        third[varies] / second[varies] ** 1.5,
        fourth[varies] / second[varies] ** 2 - 3,
    )


def _outliers(groups: ScoredGroups, deviations: Summary) -> Outliers:
    """Find responses far from their group's mean, given a summary of all deviations."""
    if not deviations.std:
        return Outliers(limit=None, count=0, rows=[])
    limit = OUTLIER * deviations.std
    size = np.abs(groups.deviations)
    beyond = np.flatnonzero((size > limit) & groups.spread(groups.contrast))
    # Stable: of equal deviations the first.
    largest = beyond[np.argsort(-size[beyond], kind="stable")[:3]]
    named = zip(groups.of_responses(largest).tolist(), size[largest].tolist(), strict=True)
    rows = [f"{groups.table.row(group)} ({value:.3g} from its mean)" for group, value in named]
    return Outliers(limit=limit, count=len(beyond), rows=rows)


def _weights(groups: ScoredGroups, *, alpha: float, power: float, alpha_unit: AlphaUnit) -> Weights:
    """Describe the deviation weights of the groups with contrast; see `deviation_log_weights`."""
    largest, effective = np.zeros((2, len(groups.counts)))
    for rows, slots in groups.blocks():
        scores = torch.from_numpy(groups.scores[slots])
        valid = torch.ones_like(scores, dtype=torch.bool)
        of_group = deviation_log_weights(
            scores, valid, alpha=alpha, power=power, alpha_unit=alpha_unit
        ).softmax(1)
        largest[rows] = of_group.amax(1)
        effective[rows] = torch.special.entr(of_group).sum(1).exp() / scores.shape[1]
    several = groups.contrast & (groups.counts > 2)
    return Weights(
        alpha=alpha,
        power=power,
        alpha_unit=alpha_unit,
        largest=quantiles(largest[groups.contrast]),
        effective=quantiles(effective[groups.contrast]),
        dominated=groups.flagged(np.flatnonzero(several & (largest > DOMINATED))),
        even=int((several & (effective > EVEN)).sum()),
        even_of=int(several.sum()),
    )


# --------------------------------------------------------------------------------------- lengths


def _length_bias(groups: ScoredGroups, lengths: Integers) -> LengthBias:
    """Relate scores to lengths of responses, (R,)."""

    def unit(values: Floats) -> Floats:
        # Divided by the largest first, so that squares neither overflow nor vanish.
        values = values / groups.spread(groups.highest(np.abs(values)))
        result: Floats = values / groups.spread(np.sqrt(groups.sums(values * values)))
        return result

    floats = lengths.astype(np.float64)
    varies = groups.highest(floats) > -groups.highest(-floats)
    used = varies & groups.contrast & ~groups.equal
    centred = floats - groups.spread(groups.sums(floats) / groups.counts)
    within = groups.sums(unit(groups.deviations) * unit(centred))[used]
    return LengthBias(
        groups=len(within),
        within=mean(within),
        pooled=correlation(groups.scores, floats),
        chosen=mean(floats[groups.chosen]),
        rejected=mean(floats[groups.rejected]),
    )


def _token_lengths(groups: ScoredGroups, max_length: int) -> Tokens:
    """Describe lengths in tokens, and count what exceeds the limit on prompt + response."""
    prompts, responses = np.asarray(groups.table.prompt_tokens), np.asarray(groups.table.tokens)
    beyond = groups.spread(prompts) + responses > max_length
    of_groups = groups.of_responses(np.flatnonzero(beyond))
    return Tokens(
        prompt=length_summary(prompts),
        response=length_summary(responses),
        max_length=max_length,
        beyond=groups.flagged(of_groups),
        beyond_chosen=int((beyond & groups.chosen).sum()),
        beyond_rejected=int((beyond & groups.rejected).sum()),
        chosen=int(groups.chosen.sum()),
        rejected=int(groups.rejected.sum()),
        groups_beyond=len(np.unique(of_groups)),
        prompts_beyond=groups.flagged(np.flatnonzero(prompts >= max_length)),
        bias=_length_bias(groups, responses),
    )


# ----------------------------------------------------------------------------------------- texts


def _duplicates(groups: ScoredGroups, files: Sequence[str]) -> Duplicates:
    """Find repeated texts, in groups and in the files of these names."""
    table = groups.table
    repeats, repeated = np.asarray(table.repeats), np.asarray(table.repeated)
    of_groups = groups.of_responses(repeats)
    unequal = groups.scores[repeats] != groups.scores[repeated]
    contradicting = groups.chosen[repeats] != groups.chosen[repeated]
    keys = np.asarray(table.prompt_keys)
    # Stable: groups with the same prompt stay in the order in which they came.
    order = np.argsort(keys, kind="stable")
    came_before = np.sort(order[1:][keys[order[1:]] == keys[order[:-1]]])
    return Duplicates(
        exact=groups.flagged(groups.of_responses(np.asarray(table.exact_repeats))),
        normalized=groups.flagged(of_groups),
        unequal=groups.flagged(np.unique(of_groups[unequal])),
        contradicting=groups.flagged(np.unique(of_groups[contradicting])),
        near_empty=groups.flagged(groups.of_responses(np.asarray(table.near_empty))),
        prompts=groups.flagged(came_before),
        shared=_shared_prompts(groups, files),
    )


def _shared_prompts(groups: ScoredGroups, files: Sequence[str]) -> list[tuple[str, str, Flagged]]:
    keys = np.asarray(groups.table.prompt_keys)
    starts = np.searchsorted(groups.table.files, range(len(files) + 1)).tolist()
    # Each file's different prompts, and where they come first.
    prompts = [np.unique(keys[start:stop], return_index=True) for start, stop in pairwise(starts)]
    shared = []
    for a, b in combinations(range(len(files)), 2):
        common, _, place = np.intersect1d(
            prompts[a][0], prompts[b][0], assume_unique=True, return_indices=True
        )
        if len(common):
            first = np.sort(starts[b] + prompts[b][1][place])
            shared.append((files[a], files[b], groups.flagged(first)))
    return shared


# --------------------------------------------------------------------------------------- columns


def _sums_by_value(
    names: Collection[str], numbers: Integers, *arrays: Floats | Bools | Integers
) -> list[tuple[str, list[float]]]:
    """Count the entries of each value of a column, and sum arrays over them.

    Args:
        names: the column's values.
        numbers: number of each entry's value; -1 where it has none.
        arrays: what is summed.

    Returns:
        name, and count with sums, of each value that occurs, most frequent first.
    """
    known = np.flatnonzero(numbers >= 0)
    of_values = numbers[known]
    counts = np.bincount(of_values, minlength=len(names))
    sums = [counts, *(np.bincount(of_values, array[known], len(names)) for array in arrays)]
    rows = zip(names, np.stack(sums, axis=1).tolist(), strict=True)
    return sorted((row for row in rows if row[1][0]), key=lambda row: -row[1][0])


def _values_of_responses(groups: ScoredGroups, column: ValueColumn) -> list[OfResponses]:
    """Describe the responses with each value that belongs to responses."""
    contrast = groups.spread(groups.contrast)
    best = groups.scores == groups.spread(groups.highest(groups.scores))
    arrays = groups.scores, groups.deviations, contrast, groups.chosen, contrast & best
    return [
        OfResponses(
            name=name,
            responses=int(count),
            mean=scores / count,
            deviation=deviations / count,
            contrasted=int(contrasted),
            chosen=chosen / contrasted if contrasted else None,
            best=of_best / contrasted if contrasted else None,
        )
        for name, (count, scores, deviations, contrasted, chosen, of_best) in _sums_by_value(
            column.numbers, np.asarray(column.of_responses), *arrays
        )
    ]


def _values_of_groups(groups: ScoredGroups, column: ValueColumn) -> list[OfGroups]:
    """Describe the groups with each value that belongs to rows."""
    scores, squares = groups.sums(groups.scores), groups.sums(np.square(groups.deviations))
    arrays = groups.counts, scores, squares, ~groups.contrast
    return [
        OfGroups(
            name=name,
            groups=int(count),
            responses=int(responses),
            mean=score / responses,
            std=float(np.sqrt(square / responses)),
            no_contrast=int(no_contrast),
        )
        for name, (count, responses, score, square, no_contrast) in _sums_by_value(
            column.numbers, np.asarray(column.of_groups), *arrays
        )
    ]
