"""Panels and ways of drawing intervals that the studies' figures share."""

from collections.abc import Mapping, Sequence
from typing import Any

from mpo_lightning.studies.lab.statistics import Interval

__all__ = ["bars", "lines", "panels", "rows_of_points"]


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


def bars(axis: Any, labels: Sequence[str], values: Sequence[Interval]) -> None:
    """Draw means as points with their intervals, one row a label, the first on top."""
    for row, value in enumerate(values):
        if value.count == 0:
            continue
        axis.plot(value.mean, row, "o", color="C0")
        if value.count > 1:
            axis.plot([value.low, value.high], [row, row], color="C0")
    _label_rows(axis, labels)


def lines(axis: Any, x: Sequence[float], values: Sequence[Interval], label: str) -> None:
    """Draw means over x with their intervals as a band; what no seed has reached is left out."""
    points = [(at, value) for at, value in zip(x, values, strict=True) if value.count]
    x, values = [at for at, _ in points], [value for _, value in points]
    (line,) = axis.plot(x, [value.mean for value in values], "o-", label=label, markersize=4)
    if all(value.count > 1 for value in values):
        low, high = [value.low for value in values], [value.high for value in values]
        axis.fill_between(x, low, high, color=line.get_color(), alpha=0.15)


def rows_of_points(
    axis: Any, rows: Sequence[str], values: Mapping[str, Sequence[Interval]]
) -> None:
    """Draw one row a scenario and one colour a method: means with their intervals."""
    count = len(values)
    for number, (name, of_rows) in enumerate(values.items()):
        shift = (number - (count - 1) / 2) * 0.7 / count
        color = f"C{number % 10}"
        marker = "os^Dv"[number // 10]
        shown = [(row + shift, value) for row, value in enumerate(of_rows) if value.count]
        axis.plot(
            [value.mean for _, value in shown],
            [row for row, _ in shown],
            marker,
            color=color,
            label=name,
            markersize=4,
        )
        for row, value in shown:
            if value.count > 1:
                axis.plot([value.low, value.high], [row, row], color=color, linewidth=1)
    _label_rows(axis, rows)
