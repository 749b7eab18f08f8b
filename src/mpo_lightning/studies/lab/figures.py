"""Panels and ways of drawing intervals that the studies' figures share."""

from collections.abc import Sequence
from typing import Any

from mpo_lightning.studies.lab.conditions import PRIMARY, Contrast, RunOutcome, paired
from mpo_lightning.studies.lab.statistics import Interval, mean_interval

__all__ = ["differences_over", "dots_of_seeds", "lines", "panels"]


def panels(
    titles: Sequence[str], xlabel: str = "", *, width: float = 5.0, height: float = 4.0
) -> tuple[Any, list[Any]]:
    """Make a figure with a panel for each title side by side, of a width and height in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * len(titles), height), layout="constrained")
    axes = figure.subplots(1, len(titles), squeeze=False)[0]
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel=xlabel)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def _label_rows(axis: Any, labels: Sequence[str]) -> None:
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.5, -0.5)


def lines(axis: Any, x: Sequence[float], values: Sequence[Interval], label: str) -> None:
    """Draw means over x with their intervals as a band; what no seed has reached is left out."""
    points = [(at, value) for at, value in zip(x, values, strict=True) if value.count]
    x, values = [at for at, _ in points], [value for _, value in points]
    (line,) = axis.plot(x, [value.mean for value in values], "o-", label=label, markersize=4)
    if all(value.count > 1 for value in values):
        low, high = [value.low for value in values], [value.high for value in values]
        axis.fill_between(x, low, high, color=line.get_color(), alpha=0.15)


def differences_over(
    axis: Any, x: Sequence[float], outcomes: Sequence[RunOutcome], labels: Sequence[str], name: str
) -> None:
    """Draw the paired differences of conditions from the first of them over x, a dot a seed."""
    differences = [list(paired(outcomes, (label,), labels[:1]).values()) for label in labels]
    lines(axis, x, [mean_interval(values) for values in differences], name)
    color = axis.lines[-1].get_color()
    for at, values in zip(x, differences, strict=True):
        axis.plot([at] * len(values), values, ".", color=color, alpha=0.3, markersize=3)
    axis.axhline(0, color="grey", linewidth=1)


def dots_of_seeds(outcomes: Sequence[RunOutcome], named: Sequence[Contrast]) -> Any:
    """Draw each contrast's paired differences: a dot a seed, the mean and its interval."""
    figure, (axis,) = panels(
        [f"Difference of gold at {PRIMARY:g} nat"], width=8.0, height=1 + 0.35 * len(named)
    )
    for row, contrast in enumerate(named):
        values = list(paired(outcomes, contrast.plus, contrast.minus).values())
        axis.plot(values, [row + 0.18] * len(values), "o", color="C0", alpha=0.35, markersize=3)
        mean = mean_interval(values)
        if mean.count:
            axis.plot(mean.mean, row - 0.12, "D", color="black", markersize=4)
        if mean.count > 1:
            axis.plot([mean.low, mean.high], [row - 0.12] * 2, color="black")
    axis.axvline(0, color="grey", linewidth=1)
    _label_rows(axis, [contrast.name for contrast in named])
    return figure
