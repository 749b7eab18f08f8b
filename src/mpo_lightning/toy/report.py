"""Report of the quick start: the table's row of a run, and a picture of its training curves.

It reads the files that `mpo-lightning fit`, `compare` and `predict` have written.
"""

import csv
import json
from pathlib import Path
from statistics import fmean
from typing import Final

import pyarrow.parquet as pq
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLUMNS: Final = (
    *("seed", "gold score before", "after", "gain [95% interval]", "win rate against the base"),
    *("KL, nats", "tokens before", "after"),
)
CURVES: Final = {
    "Loss": "loss",
    "Reward margin (nats)": "rewards/margin",
    "Reward accuracy": "rewards/accuracy",
    # Estimated from the responses in the data, which the reference wrote.
    "KL(reference || policy) on the data (nats)": "kl",
}
"""Panels of the picture, and the metric that each shows for training and validation."""


def report(run: Path, seed: int) -> None:
    """Print the table's row of a run, and draw its training curves to `quickstart.png`.

    Args:
        run: Folder of the run, with `metrics.csv`, and in its folder `report` `comparison.json` and
            `predictions.parquet`, with the responses of `before-scored` and `after-scored`.
        seed: Seed of the run, for the table.

    Raises:
        FileNotFoundError: If one of the three files is missing.
    """
    row = [str(seed), *measured(run / "report")]
    draw_curves(run / "metrics.csv", run / "quickstart.png")
    print("\n".join(f"| {' | '.join(cells)} |" for cells in (COLUMNS, ["---"] * len(row), row)))
    print(f"\npicture  {(run / 'quickstart.png').resolve()}")
    print(f"adapter  {(run / 'checkpoints' / 'last-adapter').resolve()}")


def measured(folder: Path) -> list[str]:
    """Return the cells of the table's row behind the seed."""
    found = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    before, after = (found[model]["score"] for model in ("reference", "policy"))
    gain, wins = (
        f"{found[name]['value']:.2f} [{found[name]['low']:.2f}, {found[name]['high']:.2f}]"
        for name in ("score_difference", "win_rate")
    )
    of = read_predictions(folder / "predictions.parquet")
    tokens = [fmean(of[f"{side}-scored"]["tokens"]) for side in ("before", "after")]
    # Policy minus reference, over responses that the policy wrote.
    divergence = fmean(of["after-scored"]["log_ratio"])
    return [
        *(f"{before:.2f}", f"{after:.2f}", gain, wins, f"{divergence:.2f}"),
        *(f"{mean:.1f}" for mean in tokens),
    ]


def read_predictions(path: Path) -> dict[str, dict[str, list[float]]]:
    """Read tokens and log-ratios (policy minus reference) of the responses in a prediction file.

    Args:
        path: what `predict` wrote of folders that `score` wrote.

    Returns:
        the two columns of each folder, by its name.
    """
    of: dict[str, dict[str, list[float]]] = {}
    for row in pq.read_table(path).to_pylist():
        columns = of.setdefault(Path(row["file"]).parent.name, {"tokens": [], "log_ratio": []})
        for name, values in columns.items():
            values.append(row[name])
    return of


def draw_curves(metrics: Path, picture: Path) -> None:
    """Draw the metrics of `CURVES` over the optimizer steps.

    Args:
        metrics: The metrics.csv of Lightning's CSVLogger, in which a row has values of either
            training or validation, and empty cells.
        picture: PNG file to write.
    """
    with metrics.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    # A figure of its own on the Agg canvas: pyplot's global backend is not touched.
    figure = Figure(figsize=(9, 6.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (title, metric) in zip(figure.subplots(2, 2).flat, CURVES.items(), strict=True):
        for column in (f"train/{metric}", f"val/{metric}"):
            points = [(int(row["step"]), float(row[column])) for row in rows if row[column]]
            steps, values = zip(*points, strict=True)
            axis.plot(steps, values, label=column, marker="o" if len(steps) < 8 else None)
        axis.set(title=title, xlabel="step")
        axis.legend()
    figure.savefig(picture, dpi=120)
