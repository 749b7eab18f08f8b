"""TrainingHealth: says in plain words when a run shows signs of going wrong."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from mpo_lightning.callbacks.health_checks import (
    SIGNATURES,
    Finding,
    Limits,
    Recent,
    Row,
    Signature,
    mean_of,
    sampled_length_drift,
)
from mpo_lightning.training.loggers import log_text
from mpo_lightning.training.metrics import METRIC_NAMES
from mpo_lightning.training.module import MPOModule

__all__ = ["HealthWarning", "TrainingHealth"]


class HealthWarning(UserWarning):
    """A run shows a sign of going wrong."""


class TrainingHealth(Callback):
    """Looks at what each optimizer step measured for signs of a run that goes wrong.

    Each sign is told once, with its numbers and what to try, and again only if it has become
    clearly worse; also by a run that goes on from a checkpoint. Nothing is changed or stopped. The
    signs are those of docs/watching.md.

    Args:
        limits: from where on a sign is told.
        ignore: signs that are not looked for.
    """

    def __init__(
        self,
        *,
        limits: Limits = Limits(),  # noqa: B008 (frozen)
        ignore: Sequence[Signature] = (),
    ) -> None:
        unknown = set(ignore) - set(SIGNATURES)
        if unknown:
            raise ValueError(
                f"health.ignore: {sorted(unknown)} are no signs; there are {', '.join(SIGNATURES)}."
            )
        self.limits = limits
        self.ignore = tuple(ignore)
        # What was told, in order: the step and the finding.
        self.told: list[tuple[int, Finding]] = []
        self._steps = 0
        self._rows: list[Row] = []
        self._first: Row | None = None
        self._severity: dict[str, float] = {}

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """After an optimizer step, look at it and at those before it."""
        assert isinstance(pl_module, MPOModule)
        if trainer.global_step <= self._steps:
            return
        self._steps = trainer.global_step
        values = trainer.callback_metrics
        row = {name: values[f"train/{name}"].item() for name in (*METRIC_NAMES, "groups")}
        row["lr"] = values["lr"].item()
        self._rows = [*self._rows[1 - self.limits.window :], row]
        if len(self._rows) < self.limits.window:
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
        for name, look in SIGNATURES.items():
            if name not in self.ignore:
                self._tell(trainer, look(recent, self.limits))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at how long the samples are, where there are any."""
        values = trainer.callback_metrics
        if "samples/length" in values and "length_drift" not in self.ignore:
            length, reference = values["samples/length"], values["samples/reference_length"]
            self._tell(trainer, sampled_length_drift(length.item(), reference.item(), self.limits))

    def _tell(self, trainer: Trainer, finding: Finding | None) -> None:
        if finding is None:
            return
        before = self._severity.get(finding.signature)
        if before is not None and finding.severity < before * self.limits.again:
            return
        self._severity[finding.signature] = finding.severity
        self.told.append((trainer.global_step, finding))
        again = "" if before is None else ", worse than before"
        message = f"Step {trainer.global_step}, {finding.signature}{again}: {finding.message}"
        rank_zero_warn(message, category=HealthWarning)
        if trainer.is_global_zero:
            log_text(trainer, "health", message, trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say in a line what was told."""
        if self._steps < self.limits.window:
            rank_zero_info(
                f"Training health: not looked at, {self._steps} steps are fewer than "
                f"health.limits.window ({self.limits.window})."
            )
            return
        told = ", ".join(self._severity) or "nothing to tell"
        rank_zero_info(f"Training health after {self._steps} steps: {told}.")

    def state_dict(self) -> dict[str, Any]:
        """What was seen and told, for a run that goes on."""
        return {
            "steps": self._steps,
            "rows": [dict(row) for row in self._rows],
            "first": self._first and dict(self._first),
            "severity": dict(self._severity),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._steps = state_dict["steps"]
        self._rows = state_dict["rows"]
        self._first = state_dict["first"]
        self._severity = state_dict["severity"]
