"""Draws the README's picture from results that are kept in the repository.

    python docs/figures/results.py

Reads docs/results/methods/summary.json (`mpo-lightning study methods`) and
benchmarks/results/compute.json (`make bench`); writes `results.svg` beside this file.
"""

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from method import CHOSEN, PLAIN, PROMPT, REJECTED, save

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
STUDY = ROOT / "docs" / "results" / "methods" / "summary.json"
BENCH = ROOT / "benchmarks" / "results" / "compute.json"
# Losses that see one pair of a group, those that see all of it, and as many responses in pairs.
PAIR = {
    "DPO random pair": "DPO, random pair",
    "DPO fresh random pair": "DPO, a random pair an epoch",
    "DPO best-worst": "DPO, best and worst",
}
EQUAL = {"DPO 640 x 2": "DPO, 640 prompts x 2"}
GROUP = {
    "DPO all pairs": "DPO, all pairs",
    "MPO": "MPO",
    "W-MPO 0.5": "W-MPO, alpha = 0.5",
    "multi-level": "MultiLevelMPO",
    "InfoNCA 1": "InfoNCA",
    "IPO all pairs": "IPO, all pairs",
}
BETAS = ("0.1", "1")


def quality() -> dict[str, dict[str, dict[str, float]]]:
    """Expected gold score at 0.5 nat from the reference, by method and beta."""
    found = json.loads(STUDY.read_text(encoding="utf-8"))["measures"]["0.5"]
    return {
        name: {beta: found[f"beta {beta}: {name}"]["gold"] for beta in BETAS}
        for name in (*PAIR, *EQUAL, *GROUP)
    }


def speed() -> list[dict[str, Any]]:
    """Seconds of an optimizer step, TRL's and ours: even workloads with n = 8 and 32."""
    rows = json.loads(BENCH.read_text(encoding="utf-8"))["rows"]
    return [row for row in rows if row["n"] in (8, 32) and "ragged" not in row["workload"]]


def draw_quality(axis: Axes) -> None:
    """Two lines a method, one a beta, where all worlds have come that far."""
    found = quality()
    worlds = max(int(gold["count"]) for golds in found.values() for gold in golds.values())
    for height, (name, golds) in enumerate(reversed(found.items())):
        color = REJECTED if name in PAIR else PROMPT if name in EQUAL else CHOSEN
        for above, (beta, gold) in zip((0.15, -0.15), golds.items(), strict=True):
            if gold["count"] < worlds:
                continue
            at = [height + above]
            axis.plot([gold["low"], gold["high"]], at * 2, color=color)
            face = color if beta == BETAS[0] else "white"
            axis.scatter([gold["mean"]], at, edgecolors=color, facecolors=face, zorder=3)
    names = PAIR | EQUAL | GROUP
    axis.set_yticks(range(len(found)), [names[name] for name in reversed(found)])
    axis.set(
        title="quality at the same distance from the reference",
        xlabel=f"expected gold score at 0.5 nat, 95% intervals over {worlds} worlds",
    )
    legend = {
        "one pair of each group": REJECTED,
        "as many responses, in pairs": PROMPT,
        "all responses of a group": CHOSEN,
        "filled: beta 0.1, hollow: beta 1": PLAIN,
    }
    for height, (text, color) in enumerate(reversed(legend.items())):
        axis.text(0.03, 0.05 + 0.07 * height, text, color=color, transform=axis.transAxes)


def draw_speed(axis: Axes) -> None:
    """Two bars a workload."""
    rows = speed()
    for place, row in enumerate(reversed(rows)):
        seconds = row["seconds"]
        theirs, ours = seconds["trl"]["median"], seconds["shared"]["median"]
        axis.barh(place + 0.2, theirs, 0.38, color=PLAIN)
        axis.barh(place - 0.2, ours, 0.38, color=PROMPT)
        axis.text(theirs, place + 0.2, f" {row['speedup_vs_trl']:.1f}x", va="center")
    labels = [
        f"n = {row['n']}, {row['prompt_tokens']:.0f}:{row['response_tokens']:.0f}" for row in rows
    ]
    axis.set_yticks(range(len(rows)), list(reversed(labels)))
    axis.set(
        title="an optimizer step on the same responses",
        xlabel="seconds, two cores of an AMD EPYC (prompt:response tokens)",
    )
    axis.text(0.97, 0.95, "TRL 1.16, pairs", color=PLAIN, ha="right", transform=axis.transAxes)
    axis.text(0.97, 0.88, "here, group", color=PROMPT, ha="right", transform=axis.transAxes)


def draw_results() -> Figure:
    """Quality beside speed."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    FigureCanvasSVG(figure)
    left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    draw_quality(left)
    draw_speed(right)
    return figure


if __name__ == "__main__":
    save(draw_results(), HERE / "results.svg")
