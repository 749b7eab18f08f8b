"""Views of a check's report: text for one screen, and a picture."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from mpo_lightning.data.check.report import (
    CheckReport,
    ColumnBias,
    Contrast,
    Estimate,
    Flagged,
    LengthBias,
    Lengths,
    Quantiles,
    Summary,
    TrustedReport,
)
from mpo_lightning.data.groups import DataError
from mpo_lightning.printable import printable

__all__ = ["draw_picture", "format_report", "format_warnings"]

BAR = 30
# Values of a column, and sizes of groups or sets, that are shown.
SHOWN_VALUES = 8


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:,.{digits}g}" if abs(value) < 1e3 else f"{value:,.0f}"


def _share(count: int, whole: int) -> str:
    return f"{count:,} ({count / whole:.1%})" if whole else f"{count:,}"


def _flagged(flagged: Flagged, whole: int) -> str:
    first = f", first {flagged.rows[0]}" if flagged.rows else ""
    return _share(flagged.count, whole) + first


def _moments(summary: Summary) -> str:
    return (
        f"std {_number(summary.std)}, "
        f"{_number(summary.low)} to {_number(summary.high)}, "
        f"skewness {_number(summary.skewness)}, kurtosis {_number(summary.kurtosis)}"
    )


def _lengths(lengths: Lengths) -> str:
    return (
        f"mean {_number(lengths.mean)}, median {_number(lengths.median)}, "
        f"5% to 95% {_number(lengths.p5)} to {_number(lengths.p95)}, "
        f"{_number(lengths.low)} to {_number(lengths.high)}"
    )


def _quantiles(quantiles: Quantiles) -> str:
    p10, median, p90 = map(_number, (quantiles.p10, quantiles.median, quantiles.p90))
    return f"median {median}, 10% to 90% {p10} to {p90}"


def _bias(bias: LengthBias) -> str:
    return (
        f"within groups {_number(bias.within)}, prompts mixed {_number(bias.pooled)}; "
        f"chosen {_number(bias.chosen)}, rejected {_number(bias.rejected)} long"
    )


def format_report(report: CheckReport) -> str:
    """Return the report as text, without its warnings; names and texts of data are printable."""
    trusted = _trusted(report.trusted) if report.trusted else ()
    lines = [*_files(report), "", *_statistics(report), *_columns(report), *trusted, *_lost(report)]
    return "\n".join(map(printable, lines))


def _files(report: CheckReport) -> Iterator[str]:
    counts = ("groups", "bad", "skipped", "no contrast", "usable", "responses")
    rows: list[tuple[str, ...]] = [("file", *counts, "mean score")]
    for file in [*report.files, report.total] if len(report.files) > 1 else report.files:
        read = file.read
        no_contrast, dropped = file.no_contrast, read.dropped.total()
        numbers = (read.groups, read.failed, dropped - no_contrast, no_contrast, read.kept)
        cells = (f"{number:,}" for number in (*numbers, file.responses))
        rows.append((read.data, *cells, _number(file.scores.mean)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *others in rows:
        columns = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        yield "  ".join([name.ljust(widths[0]), *columns])


def _statistics(report: CheckReport) -> Iterator[str]:
    groups, responses, scores = report.groups, report.total.responses, report.total.scores
    yield "responses a group   " + _counts(report.groups_of_size)
    yield "chosen              " + _counts(report.groups_of_chosen) + " (0: no contrast)"
    yield f"scores              mean {_number(scores.mean)}, {_moments(scores)}"
    yield "  within groups     " + _moments(report.deviations)
    yield (
        f"  of a group        std {_quantiles(report.group_std)}; mean skewness "
        f"{_number(report.group_skewness)}, kurtosis {_number(report.group_kurtosis)}"
    )
    widest = max((count for *_, count in report.histogram), default=1)
    for low, high, count in report.histogram:
        label = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        bar = "#" * round(BAR * count / widest)
        yield f"  {label:>22}  {bar:<{BAR}} {_share(count, responses)}"
    ties = report.ties
    yield (
        f"ties                {_share(ties.tied_pairs, ties.pairs)} of the pairs; "
        f"{_share(ties.best, groups)} groups share their best score; "
        f"{_share(ties.at_highest, responses)} responses have the highest"
    )
    limit = _number(report.outliers.limit)
    yield f"outliers            {report.outliers.count:,} beyond {limit} from their group's mean"
    weights = report.weights
    yield (
        f"weights at start    alpha {weights.alpha:g} ({weights.alpha_unit}), power "
        f"{weights.power:g}: largest {_quantiles(weights.largest)}; effective responses / n "
        f"{_quantiles(weights.effective)}"
    )
    yield "prompt characters   " + _lengths(report.prompt_chars)
    yield "response characters " + _lengths(report.response_chars)
    yield "score and length    " + _bias(report.bias)
    if report.tokens is not None:
        tokens = report.tokens
        yield "prompt tokens       " + _lengths(tokens.prompt)
        yield "response tokens     " + _lengths(tokens.response)
        yield "score and tokens    " + _bias(tokens.bias)
        yield (
            f"beyond {tokens.max_length:<12,} {_flagged(tokens.beyond, responses)} responses, "
            f"{_share(tokens.groups_beyond, groups)} groups, "
            f"{tokens.prompts_beyond.count:,} prompts"
        )
    duplicates = report.duplicates
    yield (
        f"repeated responses  {duplicates.exact.count:,} to the letter, "
        f"{_flagged(duplicates.normalized, responses)} normalised"
    )
    yield f"near-empty          {_flagged(duplicates.near_empty, responses)}"
    yield f"repeated prompts    {_flagged(duplicates.prompts, groups)}"


def _counts(counts: dict[int, int]) -> str:
    whole = sum(counts.values())
    common = sorted(counts, key=lambda size: -counts[size])[:SHOWN_VALUES]
    parts = [f"{size}: {_share(counts[size], whole)}" for size in sorted(common)]
    rest = f", {len(counts) - len(common)} other sizes" * (len(counts) > len(common))
    return ", ".join(parts) + rest


def _columns(report: CheckReport) -> Iterator[str]:
    for column, responses in report.of_responses.items():
        yield f"{column} (of responses)"
        for value in responses[:SHOWN_VALUES]:
            chosen = "-" if value.chosen is None else f"{value.chosen:.1%}"
            best = "-" if value.best is None else f"{value.best:.1%}"
            yield (
                f"  {value.name[:40]:<40}  {value.responses:,} responses, mean "
                f"{_number(value.mean)} ({_number(value.deviation)} to the group's), chosen "
                f"{chosen}, best {best}"
            )
        yield from _more(len(responses))
    for column, groups in report.of_groups.items():
        yield f"{column} (of groups)"
        for of in groups[:SHOWN_VALUES]:
            yield (
                f"  {of.name[:40]:<40}  {of.groups:,} groups, mean {_number(of.mean)}, std within "
                f"groups {_number(of.std)}, no contrast {_share(of.no_contrast, of.groups)}"
            )
        yield from _more(len(groups))


def _more(count: int) -> Iterator[str]:
    if count > SHOWN_VALUES:
        yield f"  and {count - SHOWN_VALUES} more (all of them with --json)"


def _interval(estimate: Estimate, sign: str = "") -> str:
    if estimate.value is None:
        return "-"
    value = f"{estimate.value:{sign}.2f}"
    if estimate.low is None or estimate.high is None:
        return value
    return f"{value} [{estimate.low:.2f}, {estimate.high:.2f}]"


def _trusted(report: TrustedReport) -> Iterator[str]:
    found, read = report.comparison, report.read
    yield (
        f"trusted labels      {read.data}: {read.responses:,} of {report.labels:,} matched; used "
        f"{found.labels:,} in {found.groups:,} groups of {found.prompts:,} prompts"
    )
    for flagged, what in (
        (report.unknown_prompts, "of prompts that are not checked"),
        (report.unknown_responses, "of other responses"),
        (Flagged(found.alone, []), "alone in their group"),
    ):
        if flagged.count:
            yield f"  not used          {_flagged(flagged, report.labels)} {what}"
    yield f"  tau-b             {_interval(found.tau)} within groups"
    for bin in found.differences:
        yield (
            f"  {f'differ by {bin.low:.3g} to {bin.high:.3g}':<30}  {bin.pairs:,} pairs, agree "
            f"{_interval(bin.agree)}"
        )
    for place in found.places:
        yield (
            f"  {place.name + ' by score':<30}  {place.labels:,} labels, trusted place "
            f"{_interval(place.place)}, pairs agree {_interval(place.agree)}"
        )
    for column in found.columns:
        yield (
            f"  {_effect(column)[:30]:<30}  {column.labels:,} labels, place by score "
            f"{_interval(column.judged, '+')}, trusted {_interval(column.trusted, '+')}"
        )
    yield (
        f"  what warnings go by: {found.tests} intervals that hold together in 95%; told: what "
        "would have been noticed with a probability of 80%"
    )
    for name, contrast, side in (
        ("tau-b", found.order, "or less"),
        ("errors that largest differences spare", found.spared, "or less"),
        ("best by score, shortfall", found.best_shortfall, "or more"),
        ("worst by score, excess", found.worst_excess, "or more"),
        *((f"{_effect(each)}, beyond", each.beyond, "either way") for each in found.columns),
    ):
        yield f"    {name[:40]:<40}  {_interval(contrast)}; {_power(contrast, side)}"
    for reason, count in read.dropped.most_common():
        first = ", ".join(read.examples[reason])
        yield f"  not used          {count:,} rows {reason} (first: {first})"
    for line in read.failures():
        yield f"  {line}"


def _effect(column: ColumnBias) -> str:
    return column.column if column.value is None else f"{column.column} {column.value!r}"


def _power(contrast: Contrast, side: str) -> str:
    if contrast.noticeable is None or contrast.needed is None:
        return "told: unknown"
    return (
        f"told: {contrast.noticeable:.2f} {side}, and {contrast.target:g} {side} with "
        f"{contrast.needed:,} labels"
    )


def _lost(report: CheckReport) -> Iterator[str]:
    read, rendered = report.total.read, report.rendered
    for what, counts, examples in (
        ("dropped", read.dropped, read.examples),
        ("noted", read.changed, read.examples),
        ("rendered", rendered.changed, rendered.examples),
    ):
        for reason, count in counts.most_common():
            yield f"{what}: {count:,} {reason} (first: {', '.join(examples[reason])})"
    yield from read.failures()


def format_warnings(report: CheckReport) -> list[str]:
    """Return each warning as text."""
    return [
        printable(f"{warning.name}: {warning.found}.")
        + (f" First: {printable(', '.join(warning.rows))}." if warning.rows else "")
        + f"\n    Why: {warning.why}\n    What to do: {warning.remedy}"
        for warning in report.warnings
    ]


def draw_picture(report: CheckReport, path: str | Path) -> None:
    """Draw scores, set sizes, group sizes and weights to a file (``.png``, ``.svg``, ``.pdf``).

    Raises:
        DataError: if matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DataError(
            "The picture needs matplotlib: pip install 'mpo-lightning[plots]'"
        ) from error

    # Not a figure of pyplot, which would change its global backend.
    figure = Figure(figsize=(12, 7), layout="constrained")
    FigureCanvasAgg(figure)
    scores, chosen, sizes, spread = figure.subplots(2, 2).flat
    lows, highs, counts = zip(*report.histogram, strict=True) if report.histogram else ((),) * 3
    width = [high - low or 0.8 * _gap(lows) for low, high in zip(lows, highs, strict=True)]
    alike = all(low == high for low, high in zip(lows, highs, strict=True))
    scores.bar(lows, counts, width, align="center" if alike else "edge")
    scores.set(title="Scores", xlabel="score", ylabel="responses")
    for axis, groups, title, label in (
        (sizes, report.groups_of_size, "Responses of a group", "n"),
        (chosen, report.groups_of_chosen, "Chosen set (0: no contrast)", "|Y+|"),
    ):
        axis.bar(list(groups), list(groups.values()))
        limits = min(groups, default=0) - 1, max(groups, default=0) + 1
        axis.set(title=title, xlabel=label, ylabel="groups", xlim=limits)
        axis.xaxis.get_major_locator().set_params(integer=True)
    weights = report.weights
    quantiles = {"largest weight": weights.largest, "effective / n": weights.effective}
    for place, numbers in enumerate(quantiles.values()):
        if numbers.p10 is not None and numbers.median is not None:
            spread.plot([numbers.p10, numbers.p90], [place, place], linewidth=6, alpha=0.5)
            spread.plot([numbers.median], [place], "k|", markersize=14)
    spread.set_yticks(range(len(quantiles)), list(quantiles))
    title = f"Weights: 10%, median, 90% of groups (alpha {weights.alpha:g}, {weights.alpha_unit})"
    spread.set(title=title, xlim=(0, 1), ylim=(-0.5, len(quantiles) - 0.5))
    figure.suptitle(", ".join(file.read.data for file in report.files[:4]))
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: the picture cannot be written ({error}).") from error


def _gap(values: tuple[float, ...]) -> float:
    return min((b - a for a, b in pairwise(values)), default=1.0)
