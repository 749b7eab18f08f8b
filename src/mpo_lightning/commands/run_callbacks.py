"""Callbacks and loggers that the command line adds to a run."""

import re
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import CSVLogger

from mpo_lightning.callbacks.health import TrainingHealth
from mpo_lightning.callbacks.progress import RunProgressBar
from mpo_lightning.callbacks.samples import Samples
from mpo_lightning.errors import UserError
from mpo_lightning.evaluation.report import EvaluationReport
from mpo_lightning.training.loggers import keep_metrics, run_loggers

__all__ = ["add_callback_settings", "name_missing_library", "run_callbacks"]


def add_callback_settings(parser: LightningArgumentParser) -> None:
    """Add ``progress``, ``samples`` (off by default) and ``health`` to the arguments."""
    parser.add_lightning_class_args(RunProgressBar, "progress")
    parser.add_lightning_class_args(Samples, "samples")
    parser.set_defaults({"samples.count": 0})
    parser.add_lightning_class_args(TrainingHealth, "health")


def run_callbacks(
    trainer: dict[str, Any], callbacks: list[Callback], *, fitting: bool
) -> list[Callback]:
    """Return the callbacks of a run, and set the trainer's loggers unless some are set.

    Args:
        trainer: settings of the trainer, changed in place.
        callbacks: callbacks made from the settings of the command line.
        fitting: whether the command is fit.
    """
    if trainer.get("logger") in (None, True):
        trainer["logger"] = run_loggers(trainer.get("default_root_dir") or ".")
    if fitting:
        for logger in _as_list(trainer["logger"]):
            if isinstance(logger, CSVLogger):
                keep_metrics(logger)
    else:
        # metrics.csv holds the training's metrics; other commands' results have their own file.
        trainer["logger"] = [
            each for each in _as_list(trainer["logger"]) if not isinstance(each, CSVLogger)
        ]
    others = _as_list(trainer.get("callbacks"))
    # A progress bar among the user's callbacks replaces ours.
    if trainer.get("enable_progress_bar") is False or any(
        isinstance(callback, ProgressBar) for callback in others
    ):
        callbacks = [c for c in callbacks if not isinstance(c, RunProgressBar)]
    return [*callbacks, EvaluationReport()]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] if value else []


def name_missing_library(error: Exception) -> None:
    """Report in one line a library that a logger needs; the parser would list all types.

    Raises:
        UserError: if the error is caused by a library that is not installed.
    """
    missing = re.search(r"Requirement '([\w.-]+)[^']*' not met", str(error))
    if missing is None:
        return
    library = missing[1]
    package = "'mpo-lightning[wandb]'" if library == "wandb" else library
    raise UserError(
        f"trainer.logger needs {library}, which is not installed: pip install {package}"
    ) from error
