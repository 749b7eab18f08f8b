"""The progress of a run in terminals, notebooks and log files."""

import sys
from time import monotonic
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from mpo_lightning.training.metrics import METRICS

__all__ = ["RunProgressBar"]

SYSTEM = (
    ("tokens/s", "system/tokens_per_second", ",.0f"),
    ("GiB", "system/memory_gib", ".2f"),
)


def _shows_bars() -> bool:
    """Whether the output redraws lines, as terminals and notebooks do."""
    return sys.stdout.isatty() or hasattr(sys, "ps1")


class RunProgressBar(TQDMProgressBar):
    """Progress of a run in one line: time left, loss, margin, accuracy, speed and memory.

    Terminals and notebooks show a bar. Output that goes to a file gets a plain line once in a
    while instead, since a bar would fill the file. Each validation adds a line with its result.
    Values are the logged metrics of the last optimizer step.

    Args:
        refresh_rate: number of batches between two updates of the bar; 0 shows none.
        line_seconds: number of seconds between two lines in a log file.
    """

    def __init__(self, refresh_rate: int = 1, line_seconds: float = 30.0) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self.line_seconds = line_seconds
        self._lines = False
        self._line_at = 0.0
        # Time at the end of the first batch of this process, from which the others are timed.
        self._first_at: float | None = None
        self._done = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose between bar and lines; only the first process shows either."""
        super().setup(trainer, pl_module, stage)
        self._lines = self.is_enabled and not _shows_bars()
        if self._lines:
            self.disable()

    def init_train_tqdm(self) -> Tqdm:
        """Return the training bar: a short bar, and room for text."""
        return Tqdm(
            desc=self.train_description,
            disable=self.is_disabled,
            leave=True,
            dynamic_ncols=True,
            file=sys.stdout,
            bar_format="{desc} |{bar:8}| {n_fmt}/{total_fmt}{postfix}",
        )

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return the texts that the bar shows."""
        left = self._seconds_left(trainer)
        shown = {} if left is None else {"left": Tqdm.format_interval(left)}
        return shown | _shown(trainer, "train", *SYSTEM)

    def _seconds_left(self, trainer: Trainer) -> float | None:
        """Return the seconds left of the whole run at its pace so far, validation included.

        None before the second batch, and for a run without an end.
        """
        loop, epochs = trainer.fit_loop, trainer.max_epochs
        left = float("inf")
        if epochs not in (None, -1):
            left = trainer.num_training_batches * epochs - loop.total_batch_idx - 1
        if trainer.max_steps != -1:
            steps = trainer.max_steps - trainer.global_step
            left = min(left, steps * trainer.accumulate_grad_batches)
        if self._first_at is None or self._done == 0 or left == float("inf"):
            return None
        return max(0.0, left) * (monotonic() - self._first_at) / self._done

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the timing."""
        super().on_train_start(trainer, pl_module)
        self._first_at, self._done, self._line_at = None, 0, monotonic()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Move the bar, or write a line when one is due."""
        if self._first_at is None:
            # The first batch also checks the model: its time says nothing of the others'.
            self._first_at = monotonic()
        else:
            self._done += 1
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        last = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
        if self._lines and (last or monotonic() - self._line_at >= self.line_seconds):
            self._line_at = monotonic()
            self._write(
                f"Epoch {trainer.current_epoch} {batch_idx + 1}/{trainer.num_training_batches}, "
                f"step {trainer.global_step}: {_joined(self.get_metrics(trainer, pl_module))}"
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the validation's bar and write its result."""
        super().on_validation_end(trainer, pl_module)
        found = _shown(trainer, "val")
        if trainer.state.fn == "fit" and not trainer.sanity_checking and found:
            self._write(f"Validation at step {trainer.global_step}: {_joined(found)}")

    def _write(self, line: str) -> None:
        if self._lines:
            print(line, flush=True)
        else:
            self.print(line)


def _shown(trainer: Trainer, stage: str, *others: tuple[str, str, str]) -> dict[str, str]:
    """Return the logged ones of a stage's labelled metrics and of others, by label, as texts."""
    values = trainer.callback_metrics
    labelled = [
        (metric.label, f"{stage}/{name}", metric.bar_format)
        for name, metric in METRICS.items()
        if metric.label is not None
    ]
    return {
        label: format(values[name].item(), form)
        for label, name, form in (*labelled, *others)
        if name in values
    }


def _joined(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
