"""Checkpoints that are there whole or not at all, with an adapter folder beside each."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from mpo_lightning.errors import CheckpointError
from mpo_lightning.files import to_disk, whole_folder

__all__ = ["AdapterCheckpointIO", "RunCheckpoint", "adapter_folder"]

WriteAdapter = Callable[[Path, dict[str, Any]], None]


def adapter_folder(checkpoint: str | os.PathLike[str]) -> Path:
    """The adapter folder beside a checkpoint: ``last.ckpt`` has ``last-adapter``."""
    path = Path(checkpoint)
    return path.with_name(f"{path.stem}-adapter")


class AdapterCheckpointIO(CheckpointIO):
    """Writes and removes an adapter folder with every checkpoint, through whatever asked for it.

    The adapter is taken from the checkpoint itself, so that sharded weights are gathered once. Both
    are written in full under names that nothing looks for, and then take their places: a run that
    is killed while it saves leaves the checkpoint that was there before.

    Args:
        inner: what reads and writes the checkpoint file.
        write_adapter: writes what a checkpoint holds of the adapter as a folder.
    """

    def __init__(self, inner: CheckpointIO, write_adapter: WriteAdapter) -> None:
        self.inner = inner
        self.write_adapter = write_adapter

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write the adapter folder and the checkpoint.

        Raises:
            CheckpointError: if they cannot be written; those that were there before are untouched.
        """
        if "://" in str(path):
            raise CheckpointError(
                f"{path}: checkpoints go to local folders, from which they can be copied "
                "elsewhere. Set trainer.default_root_dir to one."
            )
        file, folder = Path(path), adapter_folder(path)
        # One name for all saves: what a killed run has left is overwritten.
        new_file = file.with_name(f".{file.name}.partial")
        try:
            with whole_folder(folder) as new_folder:
                self.write_adapter(new_folder, checkpoint)
                self.inner.save_checkpoint(checkpoint, new_file, storage_options)
                to_disk(new_file)
            new_file.replace(file)
        except OSError as error:
            before = "the one before it is untouched" if file.exists() else "there was none before"
            raise CheckpointError(
                f"{file}: the checkpoint cannot be written: {error}. Of this name {before}. Make "
                "room or give access, and go on from the last checkpoint with --ckpt_path last."
            ) from error
        finally:
            new_file.unlink(missing_ok=True)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint."""
        return self.inner.load_checkpoint(path, *args, **kwargs)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint and then its adapter folder."""
        self.inner.remove_checkpoint(path)
        shutil.rmtree(adapter_folder(path), ignore_errors=True)


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, which also saves at the run's end and when it is told to end.

    Where validation comes at other times than the end of each epoch, Lightning saves after
    validation only, and the steps after the last one would be lost.

    A run that is told to end (SIGTERM) does so between two batches, on all processes. After any
    other exception there is nothing to save that a checkpoint before it does not hold, and
    processes that did not fail would wait for those that did.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the ``last.ckpt`` that is there, not a second one beside it: it is this run's."""
        super().on_train_start(trainer, pl_module)
        if self.dirpath is None:
            return
        last = Path(self.dirpath, f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}")
        if last.exists():
            self.last_model_path = str(last)
            if trainer.ckpt_path is None:
                rank_zero_warn(f"{last} is of an earlier run. This run replaces it when it saves.")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have ``last.ckpt`` hold the last step, and say where it is."""
        super().on_train_end(trainer, pl_module)
        if self.save_last and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        if self.last_model_path:
            folder = adapter_folder(self.last_model_path)
            rank_zero_info(f"Saved {self.last_model_path}, and the adapter alone: {folder}")

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save ``last.ckpt``, if the run was told to end."""
        if isinstance(exception, SIGTERMException) and trainer.global_step > 0:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
            rank_zero_info(f"Told to end: saved {self.last_model_path}")
            return
        super().on_exception(trainer, pl_module, exception)
