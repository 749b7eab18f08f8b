"""The progress of a run in terminals, notebooks and log files."""

import sys
from time import monotonic
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

__all__ = ["RunProgressBar"]

# What is shown of the logged metrics, the name on the bar first.
TRAINING = (
    ("loss", "train/loss", "{:.3f}"),
    ("margin", "train/rewards/margin", "{:+.3f}"),
    ("accuracy", "train/rewards/accuracy", "{:.2f}"),
    ("tokens/s", "system/tokens_per_second", "{:,.0f}"),
    ("GiB", "system/memory_gib", "{:.2f}"),
)
VALIDATION = tuple(
    (name, metric.replace("train/", "val/"), form)
    for name, metric, form in TRAINING
    if metric.startswith("train/")
)


def _shows_bars() -> bool:
    """Whether a line that is written again and again is seen as one: terminals and notebooks."""
    return sys.stdout.isatty() or hasattr(sys, "ps1")


class RunProgressBar(TQDMProgressBar):
    """What matters of a run in one line: time left, loss, margin, accuracy, speed and memory.

    A bar in terminals and notebooks. Where output goes to a file, a plain line once in a while
    instead, since bars would fill it. The result of each validation is a line of its own. Values
    are the logged metrics, those of the last optimizer step.

    Args:
        refresh_rate: batches between two looks at the bar; 0 shows none.
        line_seconds: seconds between two lines in a log file.
    """

    def __init__(self, refresh_rate: int = 1, line_seconds: float = 30.0) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self.line_seconds = line_seconds
        self._lines = False
        self._line_at = 0.0
        # Of the first batch of this process, which the others are timed from.
        self._first_at: float | None = None
        self._done = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose between bars and lines; only the first process shows any."""
        super().setup(trainer, pl_module, stage)
        self._lines = self.is_enabled and not _shows_bars()
        if self._lines:
            self.disable()

    def init_train_tqdm(self) -> Tqdm:
        """The training bar: little bar, much text."""
        return Tqdm(
            desc=self.train_description,
            disable=self.is_disabled,
            leave=True,
            dynamic_ncols=True,
            file=sys.stdout,
            bar_format="{desc} |{bar:8}| {n_fmt}/{total_fmt}{postfix}",
        )

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What the bar shows, as texts."""
        left = self._seconds_left(trainer)
        shown = {} if left is None else {"left": Tqdm.format_interval(left)}
        return shown | _shown(trainer, TRAINING)

    def _seconds_left(self, trainer: Trainer) -> float | None:
        """Of the whole run, at the pace so far, validation and all; None where nobody knows."""
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
        """Begin to count."""
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
        """Move the bar, or write a line when it is time."""
        if self._first_at is None:
            # The first batch also checks the model, and tells nothing of the others.
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
        """Close the bar of the validation and tell its result."""
        super().on_validation_end(trainer, pl_module)
        found = _shown(trainer, VALIDATION)
        if trainer.state.fn == "fit" and not trainer.sanity_checking and found:
            self._write(f"Validation at step {trainer.global_step}: {_joined(found)}")

    def _write(self, line: str) -> None:
        if self._lines:
            print(line, flush=True)
        else:
            self.print(line)


def _shown(trainer: Trainer, which: tuple[tuple[str, str, str], ...]) -> dict[str, str]:
    values = trainer.callback_metrics
    return {
        name: form.format(values[metric].item()) for name, metric, form in which if metric in values
    }


def _joined(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
