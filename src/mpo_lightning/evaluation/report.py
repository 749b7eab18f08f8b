"""What ``validate`` and ``test`` found: a table to read, and a JSON file to keep."""

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

__all__ = ["EvaluationReport"]

# In plain words; docs/metrics.md defines each. What is not among them is shown by its own name.
SECTIONS: dict[str, dict[str, str]] = {
    "Loss": {"loss": "loss, mean over groups"},
    "Rewards (beta times log-ratio)": {
        "rewards/chosen": "of the chosen responses",
        "rewards/rejected": "of the rejected responses",
        "rewards/margin": "chosen minus rejected",
        "rewards/accuracy": "pairs in order",
        "rewards/top1": "highest reward is best-scored",
        "rewards/kendall_tau": "agreement with the scores' order (tau-b)",
    },
    "Sets": {
        "chosen_mass": "share of the mass on the chosen set",
        "effective_chosen": "evenness within the chosen set",
        "lengths/chosen": "length of the chosen responses, tokens",
        "lengths/rejected": "length of the rejected responses, tokens",
        "lengths/kendall_tau": "agreement of rewards with lengths (tau-b)",
        "lengths/score_tau": "agreement of scores with lengths (tau-b)",
        "sizes/chosen": "chosen responses of a group",
        "sizes/rejected": "rejected responses of a group",
        "scores/deviation": "mean distance of scores from their group's mean",
    },
    "Log-probabilities, nats": {
        "logps/chosen": "of the chosen responses, policy",
        "logps/rejected": "of the rejected responses, policy",
        "log_ratios/chosen": "of the chosen responses, policy minus reference",
        "log_ratios/rejected": "of the rejected responses, policy minus reference",
        "kl": "reference minus policy, all responses",
    },
}
OTHER = "Other"
# Of a file or pipe, which has no width of its own.
WIDTH = 120


class EvaluationReport(Callback):
    """Prints the metrics of ``validate`` and ``test``, and writes them beside the logger's files.

    The file is named by the command and the checkpoint, ``test-last.json``; the settings are in it.
    One that is there already is replaced.
    """

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell what ``validate`` found; validation during a fit is the logger's."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._tell(trainer, pl_module, "validate", "val/")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell what ``test`` found."""
        self._tell(trainer, pl_module, "test", "test/")

    def _tell(self, trainer: Trainer, module: Any, command: str, prefix: str) -> None:
        # On all processes, which agree on it.
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        if not trainer.is_global_zero:
            return
        logged = trainer.callback_metrics.items()
        values = {n.removeprefix(prefix): float(v) for n, v in logged if n.startswith(prefix)}
        # Told above the table, and in the file beside the metrics.
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
            # JSON knows no NaN, which is a metric that no group carried.
            "metrics": {n: v if math.isfinite(v) else None for n, v in values.items()},
            "settings": _settings(trainer),
        }
        replaced = " (the one that was there is replaced)" if path.exists() else ""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, (json.dumps(content, indent=2) + "\n").encode())
        console.print(f"Wrote {path}{replaced}")


def _table(values: dict[str, float], prefix: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    table.add_column("", justify="right")
    table.add_column("logged as", style="dim")
    named = {name for section in SECTIONS.values() for name in section}
    others = {name: name for name in values if name not in named}
    for title, section in {**SECTIONS, OTHER: others}.items():
        present = [name for name in section if name in values]
        if present:
            table.add_row(title, style="bold")
        for name in present:
            value = values[name]
            shown = "-" if math.isnan(value) else f"{value:.4f}"
            table.add_row(f"  {section[name]}", shown, f"{prefix}{name}")
    return table


def _settings(trainer: Trainer) -> Any:
    """All settings of the command line that are not null; none where there is no command line."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SaveConfigCallback):
            return json.loads(callback.parser.dump(callback.config, format="json"))
    return None
