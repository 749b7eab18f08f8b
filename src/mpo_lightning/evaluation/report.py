"""Results of ``validate`` and ``test``: a table to read, and a JSON file to keep."""

import json
import math
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.table import Table

from mpo_lightning.files import write_whole
from mpo_lightning.printable import printable
from mpo_lightning.training.metrics import METRICS, MetricInfo

__all__ = ["EvaluationReport"]

# Columns of the table where the output is no terminal.
WIDTH = 120
BETTER = {True: "higher", False: "lower", None: ""}


class EvaluationReport(Callback):
    """Prints the metrics of ``validate`` and ``test``, and writes them beside the logger's files.

    The file is named by the command and the checkpoint, ``test-last.json``; the settings are in it.
    One that is there already is replaced.
    """

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the results of ``validate``; validation during a fit goes to the loggers."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._report(trainer, pl_module, "validate", "val/")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the results of ``test``."""
        self._report(trainer, pl_module, "test", "test/")

    def _report(self, trainer: Trainer, module: Any, command: str, prefix: str) -> None:
        # Broadcast between processes, so all of them ask.
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        if not trainer.is_global_zero:
            return
        logged = trainer.callback_metrics.items()
        values = {n.removeprefix(prefix): float(v) for n, v in logged if n.startswith(prefix)}
        # Shown above the table, and kept beside the metrics in the file.
        values.pop("groups")
        checkpoint = None if trainer.ckpt_path is None else str(trainer.ckpt_path)
        groups = int(module.groups_counted)
        console = Console(highlight=False, markup=False, soft_wrap=True)
        if not console.is_terminal:
            console.width = WIDTH
        what = checkpoint or "no checkpoint, a fresh adapter"
        console.print(f"{command}: {what}, {groups:,} groups")
        console.print(_table(values, prefix))
        name = "base" if checkpoint is None else Path(checkpoint).stem
        path = folder / f"{command}-{name}.json"
        content = {
            "format": "mpo-lightning evaluation",
            "version": version("mpo-lightning"),
            "command": command,
            "checkpoint": checkpoint,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "groups": groups,
            # JSON has no NaN, the value of a metric that no group carried.
            "metrics": {n: v if math.isfinite(v) else None for n, v in values.items()},
            "settings": _settings(trainer),
        }
        replaced = " (the one that was there is replaced)" if path.exists() else ""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, (json.dumps(content, indent=2) + "\n").encode())
        console.print(printable(f"Wrote {path}{replaced}"))


def _table(values: dict[str, float], prefix: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    table.add_column("", justify="right")
    table.add_column("better")
    table.add_column("logged as", style="dim")
    # Metrics that are not in the table are shown by their names.
    ordered = [name for name in dict.fromkeys((*METRICS, *values)) if name in values]
    shown = {name: METRICS.get(name) or MetricInfo("Other", name) for name in ordered}
    for section in dict.fromkeys(metric.section for metric in shown.values()):
        table.add_row(section, style="bold")
        for name, metric in shown.items():
            if metric.section == section:
                value = "-" if math.isnan(values[name]) else f"{values[name]:.4f}"
                better = BETTER[metric.higher_is_better]
                table.add_row(f"  {metric.title}", value, better, f"{prefix}{name}")
    return table


def _settings(trainer: Trainer) -> Any:
    """Return all settings of the command line that are not null; None without a command line."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SaveConfigCallback):
            return json.loads(callback.parser.dump(callback.config, format="json"))
    return None
