"""Check scored groups before training: what is there, what will be dropped, what looks wrong.

    from mpo_lightning.data.check.run import check

    report = check("train.jsonl", alpha=0.5)
    print(report.deviations.skewness, [warning.name for warning in report.warnings])

Texts are not kept. A group takes about 40 bytes and each of its responses 20 while groups are read,
and about four times as much while statistics are computed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mpo_lightning.batch import TokenGroup
from mpo_lightning.checks import check_arguments
from mpo_lightning.data.check.report import CheckReport
from mpo_lightning.data.check.sections import make_report
from mpo_lightning.data.check.table import GroupTable
from mpo_lightning.data.check.trusted_labels import TrustedLabels
from mpo_lightning.data.check.warnings import find_warnings
from mpo_lightning.data.groups import DataError, PreferenceGroup
from mpo_lightning.data.reading import Sources
from mpo_lightning.data.rendering import RenderingRules
from mpo_lightning.data.report import DataReport
from mpo_lightning.data.schemas.base import Schema
from mpo_lightning.data.tokens import Boundary, GroupTokenizer, PromptFormat, load_tokenizer
from mpo_lightning.losses import AboveMean, Partition
from mpo_lightning.losses.scores import AlphaUnit

__all__ = ["check"]


def check(
    files: str | Sequence[str],
    *,
    schema: Schema | None = None,
    columns: Mapping[str, str] | None = None,
    default_split: str | None = None,
    transform: Callable[[PreferenceGroup], PreferenceGroup] | None = None,
    tokenizer: Any = None,
    max_length: int = 2048,
    prompt_format: PromptFormat = "auto",
    boundary: Boundary = "auto",
    chat_template_kwargs: dict[str, Any] | None = None,
    partition: Partition | None = None,
    alpha: float = 0.0,
    power: float = 1.0,
    alpha_unit: AlphaUnit = "score",
    by: Sequence[str] = ("models", "source"),
    trusted: str | None = None,
) -> CheckReport:
    """Read scored groups and report what is in them.

    A row that cannot be used is counted, not raised; so is everything that would be dropped.

    Args:
        files: a source or several; see `open_source`.
        schema: format of the rows. Defaults to the one that the first row's columns show.
        columns: other names of columns: the name in the source, and the name to read it as.
        default_split: split of a source of several splits that names none; see `open_source`.
        transform: applied to each group before it is counted.
        tokenizer: a Hugging Face tokenizer, or its folder or hub id, to count tokens. Defaults to
            counting characters only.
        max_length: limit on prompt + response, in tokens.
        prompt_format: as in training (data.prompt_format); see `PreferenceDataModule`.
        boundary: as in training (data.boundary); see `PreferenceDataModule`.
        chat_template_kwargs: as in training (data.chat_template_kwargs).
        partition: rule that splits a group into chosen and rejected responses. Defaults to
            `AboveMean`.
        alpha: strength of deviation weights, >= 0; see `deviation_log_weights`.
        power: exponent of the deviation, >= 0.
        alpha_unit: unit of alpha: "score" or "std".
        by: columns with a text a row, or a text a response, whose values are told apart; with
            ``trusted`` also a number a response.
        trusted: file of trusted labels: some of the responses of some of the prompts, in rows of
            any format, with the scores of a better judge.

    Raises:
        DataError: if a source cannot be read at all, or no trusted label belongs to a response.
    """
    check_arguments(check, locals())
    for name, value in (("alpha", alpha), ("power", power)):
        if not 0 <= value < float("inf"):
            raise DataError(f"{name} must be a number >= 0, got {value}.")
    names = [files] if isinstance(files, str) else list(files)
    sources = Sources(files=names, schema=schema, columns=columns, default_split=default_split)
    tokenize = None
    if isinstance(tokenizer, str):
        tokenizer = load_tokenizer(tokenizer)
    if tokenizer is not None:
        # Everything is counted, and nothing left out.
        rules = RenderingRules.counting()
        tokenize = GroupTokenizer.without_limit(
            tokenizer,
            prompt_format,
            boundary,
            rendering=rules,
            template_arguments=chat_template_kwargs or {},
        )
    labels = None if trusted is None else TrustedLabels(replace(sources, files=[trusted]), by)
    table = GroupTable(by)
    reads, rendered = [], DataReport("total")
    for number, name in enumerate(names):
        read = DataReport(name)
        reads.append(read)
        for result in sources.results(name):
            group = result.count_in(read)
            if group is None:
                continue
            try:
                group = group if transform is None else transform(group)
                tokens = None if tokenize is None else _lengths(tokenize(group, rendered))
            except DataError as error:
                read.fail(error)
                continue
            table.add(group, number, tokens)
            if labels is not None:
                labels.match(group)
    # Sums of scores near the end of float64's range are infinite, and quotients of what does not
    # vary undefined; what follows from them is reported as undefined.
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        report = make_report(
            table,
            reads,
            rendered,
            partition=partition or AboveMean(),
            alpha=alpha,
            power=power,
            alpha_unit=alpha_unit,
            max_length=None if tokenize is None else max_length,
        )
    # Without a group the rows that cannot be used say why.
    if labels is not None and report.groups:
        report = replace(report, trusted=labels.report(names))
    return replace(report, warnings=find_warnings(report))


def _lengths(tokens: TokenGroup | None) -> tuple[int, list[int]]:
    assert tokens is not None
    return len(tokens.prompt), list(map(len, tokens.responses))
