"""Check scored groups before training: what is there, what will be dropped, what looks wrong.

    from mpo_lightning.data.check.run import check

    report = check("train.jsonl", alpha=0.5)
    print(report.deviations.skewness, [warning.name for warning in report.warnings])

Groups are read once and not kept; what memory holds grows by 20 bytes a group (a hash of its
prompt) and with the different lengths that occur.
"""

import sys
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np

from mpo_lightning.data.check.report import CheckReport, Duplicates, Lengths, Quantiles, Summary
from mpo_lightning.data.check.report import Tokens as TokenReport
from mpo_lightning.data.check.streaming import Flagged
from mpo_lightning.data.check.tally import FileTally, GroupTally, total_of
from mpo_lightning.data.check.warnings import find_warnings
from mpo_lightning.data.counting import Sources, count_outcome
from mpo_lightning.data.groups import DataError, PreferenceGroup
from mpo_lightning.data.prompt_identity import prompt_key
from mpo_lightning.data.report import DataReport
from mpo_lightning.data.schemas.base import Schema
from mpo_lightning.data.tokens import Boundary, GroupTokenizer, PromptFormat
from mpo_lightning.losses import AboveMean, Partition
from mpo_lightning.losses.scores import AlphaUnit

__all__ = ["check"]

TokenLengths = Callable[[PreferenceGroup], tuple[int, list[int]]]


def check(
    files: str | Sequence[str],
    *,
    schema: Schema | None = None,
    columns: Mapping[str, str] | None = None,
    default_split: str = "train",
    transform: Callable[[PreferenceGroup], PreferenceGroup] | None = None,
    tokenizer: Any = None,
    max_length: int = 2048,
    prompt_format: PromptFormat = "auto",
    boundary: Boundary = "strict",
    partition: Partition | None = None,
    alpha: float = 0.0,
    power: float = 1.0,
    alpha_unit: AlphaUnit = "score",
    by: Sequence[str] = ("models", "source"),
) -> CheckReport:
    """Read sources of scored groups through and say what is in them.

    A row that cannot be used is counted, not raised; so is everything that would be dropped.

    Args:
        files: a source or several; see `open_source`.
        schema: shape of the rows; found from the first row's columns if none.
        columns: other names of columns: the name in the source, and the name to read it as.
        default_split: split of a hub id or saved DatasetDict that names none.
        transform: applied to each group before it is counted.
        tokenizer: a Hugging Face tokenizer, to count tokens; none counts characters only.
        max_length: limit on prompt + response, in tokens.
        prompt_format: see `GroupTokenizer`.
        boundary: see `GroupTokenizer`.
        partition: the loss's; above the group's mean against the rest if none.
        alpha: strength of deviation weights, >= 0; see `deviation_log_weights`.
        power: exponent of the deviation, >= 0.
        alpha_unit: "score" or "std".
        by: columns with a text a row, or a text a response, whose values are told apart.

    Raises:
        DataError: if a source cannot be read at all.
    """
    for name, value in (("alpha", alpha), ("power", power)):
        if not 0 <= value < float("inf"):
            raise DataError(f"{name} must be a number >= 0, got {value}.")
    names = [files] if isinstance(files, str) else list(files)
    sources = Sources(files=names, schema=schema, columns=columns, default_split=default_split)
    lengths = None if tokenizer is None else _token_lengths(tokenizer, prompt_format, boundary)
    tally = GroupTally(
        partition=partition or AboveMean(),
        alpha=alpha,
        power=power,
        alpha_unit=alpha_unit,
        max_length=max_length,
        by=by,
    )
    prompts = PromptTally(names)
    tallies = []
    for number, name in enumerate(names):
        file = FileTally(DataReport(name))
        for outcome in sources.outcomes(name):
            group = count_outcome(outcome, file.read)
            if group is None:
                continue
            try:
                group = group if transform is None else transform(group)
                tokens = None if lengths is None else lengths(group)
            except DataError as error:
                file.read.fail(error)
                continue
            tally.add(group, file, tokens)
            prompts.add(group, number)
        tally.flush(file)
        tallies.append(file)
    report = _report(tally, tallies, prompts, with_tokens=lengths is not None)
    return replace(report, warnings=find_warnings(report))


def _token_lengths(tokenizer: Any, prompt_format: PromptFormat, boundary: Boundary) -> TokenLengths:
    tokenize = GroupTokenizer(
        tokenizer,
        # Nothing is cut or dropped: it is to be counted.
        max_length=sys.maxsize,
        over_long="error",
        prompt_format=prompt_format,
        boundary=boundary,
    )

    def lengths(group: PreferenceGroup) -> tuple[int, list[int]]:
        tokens = tokenize(group, DataReport(group.source))
        assert tokens is not None
        return len(tokens.prompt), list(map(len, tokens.responses))

    return lengths


class PromptTally:
    """Which prompts come again, in which file.

    Args:
        files: names of the files.
    """

    def __init__(self, files: Sequence[str]) -> None:
        self.files = list(files)
        self._keys = bytearray()
        self._rows = array("q")
        self._parts = array("i")
        # Rows are named by the file that holds them, of which a folder has several.
        self._names: dict[tuple[str, int], int] = {}

    def add(self, group: PreferenceGroup, file: int) -> None:
        """Take in the prompt of a group of a file."""
        self._keys += prompt_key(group.prompt)
        name, _, row = group.source.rpartition(":")
        self._rows.append(int(row))
        self._parts.append(self._names.setdefault((name, file), len(self._names)))

    def report(self) -> tuple[Flagged, list[tuple[str, str, Flagged]]]:
        """Groups whose prompt came before, and prompts that two files have in common."""
        keys = np.frombuffer(bytes(self._keys), dtype=np.uint64)
        names = list(self._names)
        # Stable: groups with the same prompt stay in the order in which they came.
        order = np.argsort(keys, kind="stable")
        repeats = np.zeros(len(keys), dtype=np.bool_)
        repeats[order[1:]] = keys[order[1:]] == keys[order[:-1]]

        def places(numbers: Any) -> list[str]:
            return [f"{names[self._parts[i]][0]}:{self._rows[i]}" for i in numbers.tolist()]

        where = np.flatnonzero(repeats)
        repeated = Flagged(len(where), places(where[:3]))
        file_of_part = np.array([file for _, file in names], dtype=np.int64)
        files = file_of_part[np.array(self._parts, dtype=np.int64)]
        shared = []
        # The first group of each prompt in each file.
        firsts = {}
        for number in range(len(self.files) * (len(self.files) > 1)):
            mine = np.flatnonzero(files == number)
            different, first = np.unique(keys[mine], return_index=True)
            firsts[number] = different, mine[first]
        for a, b in combinations(firsts, 2):
            common, _, place = np.intersect1d(
                firsts[a][0], firsts[b][0], assume_unique=True, return_indices=True
            )
            if len(common):
                rows = places(np.sort(firsts[b][1][place])[:3])
                shared.append((self.files[a], self.files[b], Flagged(len(common), rows)))
        return repeated, shared


def _report(
    tally: GroupTally, files: Sequence[FileTally], prompts: PromptTally, *, with_tokens: bool
) -> CheckReport:
    repeated, shared = prompts.report()
    chosen, rejected = (tally.bias.counts[name] for name in ("chosen", "rejected"))
    tokens = TokenReport(
        prompt=Lengths.of(tally.prompt_tokens),
        response=Lengths.of(tally.response_tokens),
        max_length=tally.max_length,
        beyond=tally.beyond,
        beyond_chosen=tally.beyond_of_set["chosen"],
        beyond_rejected=tally.beyond_of_set["rejected"],
        chosen=chosen,
        rejected=rejected,
        groups_beyond=tally.groups_beyond,
        prompts_beyond=tally.prompts_beyond,
        bias=tally.token_bias.report(),
    )
    of_responses = {column.name: column.of_responses() for column in tally.columns}
    of_groups = {column.name: column.of_groups() for column in tally.columns}
    return CheckReport(
        files=[file.report() for file in files],
        total=total_of(files, tally.scores),
        histogram=tally.histogram.rows(16),
        deviations=Summary.of(tally.deviations),
        group_skewness=tally.report_shape("skewness"),
        group_kurtosis=tally.report_shape("kurtosis"),
        group_std=Quantiles.of(tally.group_std),
        sets={n: dict(sorted(sizes.items())) for n, sizes in sorted(tally.sets.items())},
        equal=tally.equal,
        ties=tally.report_ties(),
        prompt_chars=Lengths.of(tally.prompt_chars),
        response_chars=Lengths.of(tally.response_chars),
        bias=tally.bias.report(),
        tokens=tokens if with_tokens else None,
        weights=tally.report_weights(),
        outliers=tally.report_outliers(),
        duplicates=Duplicates(
            exact=tally.exact,
            normalized=tally.normalized,
            unequal=tally.unequal,
            contradicting=tally.contradicting,
            near_empty=tally.near_empty,
            prompts=repeated,
            shared=shared,
        ),
        of_responses={name: values for name, values in of_responses.items() if values},
        of_groups={name: values for name, values in of_groups.items() if values},
        warnings=[],
    )
