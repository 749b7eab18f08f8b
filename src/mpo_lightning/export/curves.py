"""What a run has logged, as a picture for its model card."""

import csv
from pathlib import Path

__all__ = ["Rows", "draw", "read_metrics"]

Rows = list[dict[str, float]]

PANELS = (
    ("loss", "Loss"),
    ("rewards/margin", "Reward margin"),
    ("rewards/accuracy", "Reward accuracy"),
)
STAGES = ("train", "val")


def read_metrics(path: Path, *, steps: int) -> Rows:
    """The rows of Lightning's ``metrics.csv`` up to an optimizer step; empty cells are left out."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [
            {name: float(value) for name, value in row.items() if name and value}
            for row in csv.DictReader(file)
        ]
    return [row for row in rows if row["step"] <= steps]


def draw(rows: Rows, path: Path) -> bool:
    """Draw what was logged of loss, margin and accuracy; False where that is nothing."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    logged = {name for row in rows for name in row}
    panels = {
        title: [f"{stage}/{name}" for stage in STAGES if f"{stage}/{name}" in logged]
        for name, title in PANELS
    }
    panels = {title: names for title, names in panels.items() if names}
    if not panels:
        return False
    # A figure of its own on the Agg canvas: pyplot's global backend is not touched.
    figure = Figure(figsize=(4 * len(panels), 3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, names) in zip(axes, panels.items(), strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            steps, values = zip(*points, strict=True)
            axis.plot(steps, values, label=name, marker="o" if len(steps) < 8 else None)
        axis.set(title=title, xlabel="step")
        axis.legend()
    figure.savefig(path, dpi=120)
    return True
