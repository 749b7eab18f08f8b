"""Results of a study: carried out, written into a folder and printed."""

import csv
import gzip
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpo_lightning.errors import UserError
from mpo_lightning.markdown import table
from mpo_lightning.studies.lab.conditions import Findings, Form
from mpo_lightning.studies.lab.runner import Runner

__all__ = ["StudyError", "run_study"]

SUMMARY = "summary.json"
# The printed table, as Markdown.
TABLE = "table.md"
CSV = ".csv.gz"


class StudyError(UserError):
    """Error of a study that cannot be run as asked."""


def run_study(
    name: str, study: Callable[[Runner, Form], Findings], form: Form, out: Path, *, workers: int
) -> Findings:
    """Run a study, without the runs that the folder already holds, and write its results.

    Args:
        name: its name.
        study: its function.
        form: size of the study.
        out: folder of the results.
        workers: number of processes.

    Raises:
        StudyError: if the folder holds another study.
    """
    _refuse_other(name, out)
    started = time.monotonic()
    with Runner(out, workers=workers) as runner:
        findings = study(runner, form)
    _write(name, form, out, findings)
    _show(findings.shown)
    print(
        f"{runner.performed} runs made now, {time.monotonic() - started:.0f} s. "
        f"Results in {out}: {SUMMARY}, {TABLE}, {', '.join(_files(findings))}"
    )
    return findings


def _files(findings: Findings) -> list[str]:
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


def _write(name: str, form: Form, out: Path, findings: Findings) -> None:
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
