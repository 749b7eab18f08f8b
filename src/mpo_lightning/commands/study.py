"""``mpo-lightning study NAME --out DIR``: check the paper's claims in a world of known rewards."""

import csv
import gzip
import io
import json
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpo_lightning.commands.names import COMMANDS
from mpo_lightning.commands.parser import SettingsParser
from mpo_lightning.errors import UserError
from mpo_lightning.markdown import table

if TYPE_CHECKING:
    # Takes seconds to import, for which the check of the arguments need not wait.
    from mpo_lightning.studies.lab.conditions import Findings, Form

__all__ = ["STUDIES", "StudyError", "main"]

STUDIES = {
    "methods": "All methods at the same budget.",
    "responses": "Bias over the number of responses: of samples, and of trained policies.",
    "deviation": "Strength of the deviation weights, with clean and noisy scores.",
    "calibration": "Miscalibrated judges, with and without remedies.",
    "correlation": "Responses that are not independent, a quality that does not add up.",
    "sets": "Labels of sets by their sum, best, mean or worst response.",
    "skew": "Shapes of score distributions, and rules that split groups.",
    "levels": "Ordinal levels: multi-level losses against two sets.",
    "scaling": "Time, memory and quality with 2 to 512 responses.",
}
SUMMARY = "summary.json"
# The printed table, as Markdown.
TABLE = "table.md"
CSV = ".csv.gz"


class StudyError(UserError):
    """Error of a study that cannot be run as asked."""


def _make_parser() -> SettingsParser:
    listed = "\n".join(f"  {name.ljust(13)}{purpose}" for name, purpose in STUDIES.items())
    purpose = f"{COMMANDS['study'].purpose}\n\n{listed}"
    parser = SettingsParser(prog="mpo-lightning study", description=purpose)
    parser.add_argument("name", choices=list(STUDIES), help="name of the study")
    parser.add_argument("--out", type=str, required=True, help="folder of the results")
    parser.add_argument(
        "--quick", action="store_true", help="a small form, as a test; not evidence"
    )
    own = "number of seeds. Defaults to the study's own"
    parser.add_argument("--seeds", type=int | None, default=None, help=own)
    parser.add_argument("--workers", type=int, default=2, help="number of one-thread processes")
    return parser


def main(args: list[str]) -> None:
    """Run ``mpo-lightning study``.

    Args:
        args: arguments, beginning with the command's name.
    """
    chosen = _make_parser().parse_args(args[1:])
    for name in ("seeds", "workers"):
        if chosen[name] is not None and chosen[name] < 1:
            raise StudyError(f"--{name} must be at least 1, got {chosen[name]}.")
    missing = [name for name in ("matplotlib", "scipy") if find_spec(name) is None]
    if missing:
        raise StudyError(
            f"Studies need {' and '.join(missing)}: pip install 'mpo-lightning[studies]'."
        )
    from mpo_lightning.studies.lab.conditions import Form

    form = Form(quick=chosen.quick, seeds=chosen.seeds)
    run_study(chosen.name, form, Path(chosen.out).expanduser(), workers=chosen.workers)


def run_study(name: str, form: "Form", out: Path, *, workers: int) -> "Findings":
    """Run a study, without the runs that the folder already holds, and write its results.

    Args:
        name: one of STUDIES.
        form: size of the study.
        out: folder of the results.
        workers: number of processes.

    Raises:
        StudyError: if the folder holds another study.
    """
    from mpo_lightning.studies.lab.runner import Runner

    _refuse_other(name, out)
    started = time.monotonic()
    study = import_module(f"mpo_lightning.studies.{name}").study
    with Runner(out, workers=workers) as runner:
        findings: Findings = study(runner, form)
    _write(name, form, out, findings)
    _show(findings.shown)
    print(
        f"{runner.performed} runs made now, {time.monotonic() - started:.0f} s. "
        f"Results in {out}: {SUMMARY}, {TABLE}, {', '.join(_files(findings))}"
    )
    return findings


def _files(findings: "Findings") -> list[str]:
    return [
        *(f"{table}{CSV}" for table in findings.tables),
        *(f"{figure}.png" for figure in findings.figures),
    ]


def _refuse_other(name: str, out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise StudyError(f"--out: {out} is a file. Name a folder.")
    path = out / SUMMARY
    if not path.is_file():
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["study"]
    except (ValueError, KeyError, TypeError):
        found = "another program"
    if found != name:
        raise StudyError(f"--out: {path} is of {found}, not of {name}. Name another folder.")


def _write(name: str, form: "Form", out: Path, findings: "Findings") -> None:
    for title, rows in findings.tables.items():
        _write_csv(out / f"{title}{CSV}", rows)
    for figure, draw in findings.figures.items():
        draw().savefig(out / f"{figure}.png", dpi=150)
    content = {"study": name, "form": "quick" if form.quick else "full", **findings.summary}
    (out / SUMMARY).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    shown = table(list(findings.shown[0]), [list(row.values()) for row in findings.shown])
    (out / TABLE).write_text(shown + "\n", encoding="utf-8")


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    # Without a time of writing, equal tables are equal files.
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    writer.writerows(rows)
    path.write_bytes(gzip.compress(text.getvalue().encode(), mtime=0))


def _show(rows: Sequence[Mapping[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*rows[0])
    for row in rows:
        table.add_row(*row.values())
    Console().print(table)
