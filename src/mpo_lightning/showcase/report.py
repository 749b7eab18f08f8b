"""Report of the show case: what training changed, with intervals over prompts."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mpo_lightning.evaluation.win_rates import Estimate, mean_over_prompts
from mpo_lightning.files import write_whole
from mpo_lightning.markdown import table
from mpo_lightning.showcase.constraints import KINDS
from mpo_lightning.showcase.measures import MEASURES, Answers, met_by_kind, paired, read_answers
from mpo_lightning.toy.report import draw_curves, read_predictions

__all__ = ["report"]

SPLITS: Final = {"test": "trained kinds", "other-kinds": "kinds never trained"}
COLUMNS: Final = ("prompts", "measure", "before", "after", "difference [95% interval]")
SIDES: Final = ("before", "after")
COLOURS: Final = {"before": "tab:gray", "after": "tab:blue"}
SHOWN: Final = 10
RESAMPLES: Final = 10_000
PICTURE: Final = "showcase.png"


def report(run: Path) -> None:
    """Print the table, and write the report with its pictures beside the files that it reads.

    It reads ``{test,other-kinds}-{before,after}-scored`` (folders of `score`),
    ``predictions.parquet`` and ``comparison.json`` in ``run/report``, and the run's
    ``metrics.csv``. It writes ``report.md``, ``report.json`` and the pictures there.

    Args:
        run: folder of the run.

    Raises:
        DataError: if the answers cannot be read.
        FileNotFoundError: if a file is missing.
    """
    folder = run / "report"
    answers = {
        split: {side: read_answers(folder / f"{split}-{side}-scored") for side in SIDES}
        for split in SPLITS
    }
    compared = {split: _compared(of["before"], of["after"]) for split, of in answers.items()}
    kinds = {
        split: {side: met_by_kind(of[side]) for side in SIDES} for split, of in answers.items()
    }
    comparison = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    # Policy minus reference, over answers that the policy wrote.
    after = read_predictions(folder / "predictions.parquet")["test-after-scored"]
    divergence = fmean(after["log_ratio"])
    draw_curves(run / "metrics.csv", folder / "curves.png")
    _draw(compared, kinds, folder / PICTURE)
    rows = [_row(split, name, of) for split in SPLITS for name, of in compared[split].items()]
    shown = table(COLUMNS, rows)
    wins = comparison["win_rate"]
    notes = (
        f"Win rate against the base on the test prompts {wins['value']:.2f} "
        f"[{wins['low']:.2f}, {wins['high']:.2f}], a tie counts 1/2. KL(policy || base) "
        f"{divergence:.2f} nats an answer. Intervals are bootstraps over prompts."
    )
    content = {
        "compared": {
            split: {
                name: {column: asdict(value) for column, value in estimates.items()}
                for name, estimates in of.items()
            }
            for split, of in compared.items()
        },
        "prompts": {split: len(of["before"].keys() & of["after"]) for split, of in answers.items()},
        "kinds": kinds,
        "kl": divergence,
        "win_rate": wins,
    }
    write_whole(folder / "report.json", (json.dumps(content, indent=2) + "\n").encode())
    page = [
        *("# Before and after", shown, notes),
        *(f"![Constraints met before and after]({PICTURE})", "![Training](curves.png)"),
        f"## The first answer to each of the first {SHOWN} test prompts",
        _side_by_side(answers["test"]),
    ]
    write_whole(folder / "report.md", ("\n\n".join(page) + "\n").encode())
    print(f"{shown}\n\n{notes}\n\nreport   {(folder / 'report.md').resolve()}")
    print(f"picture  {(folder / PICTURE).resolve()}")


def _compared(
    before: Mapping[int, Answers], after: Mapping[int, Answers]
) -> dict[str, dict[str, Estimate]]:
    draws = {"resamples": RESAMPLES, "seed": 0}
    found = {}
    for measure in MEASURES:
        first, second = paired(before, after, measure)
        found[measure] = {
            "before": mean_over_prompts(first, **draws),
            "after": mean_over_prompts(second, **draws),
            "difference": mean_over_prompts(second - first, **draws),
        }
    return found


def _row(split: str, measure: str, of: Mapping[str, Estimate]) -> list[str]:
    form = ".1f" if measure == "words" else ".3f"
    gain = of["difference"]
    return [
        *(f"{split}: {SPLITS[split]}", measure),
        *(format(of[side].value, form) for side in SIDES),
        f"{gain.value:+{form}} [{gain.low:+{form}}, {gain.high:+{form}}]",
    ]


def _side_by_side(answers: Mapping[str, Mapping[int, Answers]]) -> str:
    # The first prompts of the file, and the first answer of each: chosen before anything was seen.
    keys = sorted(answers["before"].keys() & answers["after"].keys())[:SHOWN]
    rows = []
    for key in keys:
        cells = [answers["before"][key].prompt]
        for side in SIDES:
            of = answers[side][key]
            cells.append(f"({of.scores[0]:g}) {of.responses[0].strip()}")
        rows.append(cells)
    return table(("prompt", "before (score)", "after (score)"), rows)


def _draw(
    compared: Mapping[str, Mapping[str, Mapping[str, Estimate]]],
    kinds: Mapping[str, Mapping[str, Mapping[str, float]]],
    picture: Path,
) -> None:
    """Draw the shares met, of all constraints and by kind, before and after."""
    # A figure of its own on the Agg canvas: pyplot's global backend is not touched.
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[2, 3])
    labels: list[str] = []
    for split, title in SPLITS.items():
        for measure in ("share of constraints met", "both met"):
            place = len(labels)
            labels.append(f"{measure},\n{title}")
            for side, shift in zip(SIDES, (0.17, -0.17), strict=True):
                of = compared[split][measure][side]
                ends = [[of.value - of.low], [of.high - of.value]]
                colour = COLOURS[side]
                left.barh(place + shift, of.value, 0.32, xerr=ends, color=colour, ecolor="0.3")
    left.set_yticks(range(len(labels)), labels)
    left.set(title="All constraints", xlabel="share of answers")
    met: dict[str, dict[str, Any]] = {side: {} for side in SIDES}
    for of_split in kinds.values():
        for side in SIDES:
            met[side] |= of_split[side]
    names = [name for name in KINDS if name in met["before"] and name in met["after"]]
    for place, name in enumerate(names):
        ends = [met[side][name] for side in SIDES]
        right.plot(ends, [place, place], color="0.7", zorder=1)
        for side, value in zip(SIDES, ends, strict=True):
            right.scatter(value, place, color=COLOURS[side], label=side if place == 0 else None)
    right.set_yticks(
        range(len(names)),
        [
            f"{name} (never trained)" if name in kinds["other-kinds"]["before"] else name
            for name in names
        ],
    )
    right.set(title="By kind of constraint", xlabel="share of answers that meet it")
    right.set_xlim(-0.02, 1.02)
    right.legend()
    for axis in (left, right):
        axis.invert_yaxis()
    figure.savefig(picture, dpi=120)
