"""Picture of a run's logged metrics, for its model card."""

import csv
from pathlib import Path

from mpo_lightning.training.metrics import METRICS

__all__ = ["Rows", "draw", "read_metrics"]

Rows = list[dict[str, float]]


def read_metrics(path: Path, *, steps: int) -> Rows:
    """Read Lightning's ``metrics.csv`` up to an optimizer step; empty cells are left out."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [
            {name: float(value) for name, value in row.items() if name and value}
            for row in csv.DictReader(file)
        ]
    return [row for row in rows if row["step"] <= steps]


def draw(rows: Rows, path: Path) -> bool:
    """Draw the labelled metrics over the steps; return False if the rows hold none of them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    logged = {name for row in rows for name in row}
    panels = {
        metric.label: names
        for name, metric in METRICS.items()
        if metric.label is not None
        and (names := [n for n in (f"train/{name}", f"val/{name}") if n in logged])
    }
    if not panels:
        return False
    # A figure of its own on the Agg canvas leaves pyplot's global backend alone.
    figure = Figure(figsize=(4 * len(panels), 3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (label, names) in zip(axes, panels.items(), strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            steps, values = zip(*points, strict=True)
            axis.plot(steps, values, label=name, marker="o" if len(steps) < 8 else None)
        axis.set(title=label.capitalize(), xlabel="step")
        axis.legend()
    figure.savefig(path, dpi=120)
    return True
