"""Loggers of a run: TensorBoard and CSV by default; texts and configuration in all of them."""

import json
from itertools import count
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

__all__ = ["RunConfig", "keep_metrics", "log_text", "run_loggers"]


def run_loggers(folder: str | Path, name: str = "lightning_logs") -> list[Logger]:
    """Make TensorBoard and CSV loggers for the run's ``version_N`` folder, N as Lightning counts.

    Args:
        folder: root folder of the run.
        name: folder in it that holds the versions, numbered by Lightning.
    """
    tensorboard = TensorBoardLogger(folder, name=name, default_hp_metric=False)
    return [tensorboard, CSVLogger(folder, name=name, version=tensorboard.version)]


@rank_zero_only
def keep_metrics(logger: CSVLogger) -> None:
    """Rename the ``metrics.csv`` of an earlier run in a fixed folder; Lightning would remove it."""
    found = Path(logger.log_dir, "metrics.csv")
    if found.is_file():
        names = (found.with_name(f"metrics-{number}.csv") for number in count(1))
        free = next(name for name in names if not name.exists())
        found.rename(free)
        rank_zero_info(f"{found} of an earlier run is now {free.name}")


def log_text(trainer: Trainer, tag: str, text: str, step: int) -> None:
    """Log a Markdown text to each of the run's loggers that takes texts.

    Call it on the first process only.
    """
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(tag, text, step)
        elif isinstance(logger, WandbLogger):
            logger.log_text(tag, columns=["step", "text"], data=[[str(step), text]])


class RunConfig(SaveConfigCallback):
    """Writes Lightning's ``config.yaml``, and logs its content to the run's loggers."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Log the configuration."""
        text = self.parser.dump(self.config, skip_unset=False)
        log_text(trainer, "config", f"```yaml\n{text}\n```", 0)
        for logger in trainer.loggers:
            if not isinstance(logger, TensorBoardLogger | CSVLogger):
                as_json = self.parser.dump(self.config, skip_unset=False, format="json")
                logger.log_hyperparams(json.loads(as_json))
