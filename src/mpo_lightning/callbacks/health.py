"""TrainingHealth: warnings when the logged metrics show that a run goes wrong."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from mpo_lightning.callbacks.health_checks import (
    CHECKS,
    Check,
    Finding,
    Recent,
    Row,
    Thresholds,
    mean_of,
    sampled_length_drift,
)
from mpo_lightning.checks import check_settings
from mpo_lightning.training.loggers import log_text
from mpo_lightning.training.metrics import METRIC_NAMES
from mpo_lightning.training.module import MPOModule

__all__ = ["HealthWarning", "TrainingHealth"]


class HealthWarning(UserWarning):
    """Warning that a run goes wrong."""


class TrainingHealth(Callback):
    """Checks the metrics of each optimizer step for a run that goes wrong.

    Each check warns once, with the numbers and settings to try, and again only when the value has
    become clearly worse; a resumed run does not repeat warnings. Nothing is changed or stopped.
    docs/watching.md explains the checks.

    Args:
        thresholds: thresholds of the checks.
        ignore: checks to leave out.
    """

    def __init__(
        self,
        *,
        thresholds: Thresholds = Thresholds(),  # noqa: B008 (frozen)
        ignore: Sequence[Check] = (),
    ) -> None:
        self.thresholds = thresholds
        self.ignore: Sequence[Check] = ignore
        check_settings(self)
        unknown = set(ignore) - set(CHECKS)
        if unknown:
            raise ValueError(
                f"health.ignore: there are no checks {sorted(unknown)}; there are "
                f"{', '.join(CHECKS)}."
            )
        # Warnings in order, each with its step.
        self.findings: list[tuple[int, Finding]] = []
        self._steps = 0
        self._rows: list[Row] = []
        self._first: Row | None = None
        self._severity: dict[str, float] = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Run the checks after an optimizer step."""
        assert isinstance(pl_module, MPOModule)
        if trainer.global_step <= self._steps:
            return
        self._steps = trainer.global_step
        values = trainer.callback_metrics
        row = {name: values[f"train/{name}"].item() for name in (*METRIC_NAMES, "groups")}
        row["lr"] = values["lr"].item()
        self._rows = [*self._rows[1 - self.thresholds.window :], row]
        if len(self._rows) < self.thresholds.window:
            return
        now = mean_of(self._rows)
        self._first = self._first or now
        recent = Recent(
            steps=self._steps,
            rows=self._rows,
            now=now,
            first=self._first,
            beta=pl_module.loss.beta,
            alpha=getattr(pl_module.loss, "alpha", None),
        )
        for name, check in CHECKS.items():
            if name not in self.ignore:
                self._warn(trainer, check(recent, self.thresholds))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the length of the sampled responses, if there are any."""
        values = trainer.callback_metrics
        if "samples/length" in values and "length_drift" not in self.ignore:
            length = values["samples/length"].item()
            reference = values["samples/reference_length"].item()
            self._warn(trainer, sampled_length_drift(length, reference, self.thresholds))

    def _warn(self, trainer: Trainer, finding: Finding | None) -> None:
        if finding is None:
            return
        before = self._severity.get(finding.check)
        if before is not None and finding.severity < before * self.thresholds.again:
            return
        self._severity[finding.check] = finding.severity
        self.findings.append((trainer.global_step, finding))
        again = "" if before is None else ", worse than before"
        message = f"Step {trainer.global_step}, {finding.check}{again}: {finding.message}"
        rank_zero_warn(message, category=HealthWarning)
        if trainer.is_global_zero:
            log_text(trainer, "health", message, trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Summarise the warnings in a line."""
        if self._steps < self.thresholds.window:
            rank_zero_info(
                f"Training health: not checked, {self._steps} steps are fewer than "
                f"health.thresholds.window ({self.thresholds.window})."
            )
            return
        warned = ", ".join(self._severity) or "no warnings"
        rank_zero_info(f"Training health after {self._steps} steps: {warned}.")

    def state_dict(self) -> dict[str, Any]:
        """Return the last metrics and the warnings so far, for a resumed run."""
        return {
            "steps": self._steps,
            "rows": [dict(row) for row in self._rows],
            "first": self._first and dict(self._first),
            "severity": dict(self._severity),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them."""
        self._steps = state_dict["steps"]
        self._rows = state_dict["rows"]
        self._first = state_dict["first"]
        self._severity = state_dict["severity"]
