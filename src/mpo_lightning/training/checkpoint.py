"""Checkpoints written whole or not at all, each with an adapter folder beside it."""

import os
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from mpo_lightning.digests import check_seal, seal
from mpo_lightning.errors import CheckpointError, ResumeError, require_same
from mpo_lightning.files import adapter_folder, other_save, to_disk, whole_folder
from mpo_lightning.model.policy import PolicyError, require_finite

__all__ = [
    "AdapterCheckpointIO",
    "RunCheckpoint",
    "read_checkpoint",
    "refuse_links",
    "require_same_run",
]

# Called with the folder, the checkpoint and its seal.
WriteAdapter = Callable[[Path, dict[str, Any], str], None]


def read_checkpoint(
    checkpoint: str | os.PathLike[str], load: Callable[[], dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Check a checkpoint file against its seal, and read it.

    Warns if the adapter folder beside it is of another save, or lost in one.

    Args:
        checkpoint: the file.
        load: reads it, as plain values only. Defaults to torch's own way, memory-mapped.

    Raises:
        DamagedError: if it is not what was written, or holds NaN.
        ResumeError: if it holds code, or is no checkpoint.
    """
    path = Path(checkpoint)
    check_seal(path, remedy="Resume from another checkpoint, or begin anew.")
    try:
        content: dict[str, Any] = (load or partial(_load, path))()
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        if "Weights only load failed" in str(error):
            why = "holds code or other objects, which are not loaded: it may be damaged, or not of"
            raise ResumeError(f"{checkpoint} {why} this package.") from error
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ResumeError(f"{checkpoint} cannot be read as a checkpoint: {why}") from error
    require_finite(path, content.get("state_dict", {}))
    for optimizer in content.get("optimizer_states", []):
        states = {n: s for n, s in optimizer.get("state", {}).items() if isinstance(s, dict)}
        moments = {f"optimizer state {n}.{k}": v for n, s in states.items() for k, v in s.items()}
        # A second moment may have become infinite; NaN is no number that training makes.
        require_finite(path, moments, infinity=True)
    _warn_of_other_save(path)
    return content


def _warn_of_other_save(checkpoint: Path) -> None:
    folder = adapter_folder(checkpoint)
    # A checkpoint may have been copied without its folder.
    lost = folder.with_name(f".{folder.name}.old").is_dir()
    if (folder.is_dir() or lost) and (found := other_save(folder)):
        rank_zero_warn(found)


def _load(path: Path) -> Any:
    return torch.load(path, mmap=True, map_location="cpu", weights_only=True)


class AdapterCheckpointIO(CheckpointIO):
    """Checkpoint I/O that writes and removes an adapter folder with every checkpoint.

    The adapter is taken from the checkpoint itself, so that sharded weights are gathered once. Both
    are written in full under temporary names and then renamed: a run that is killed while it saves
    leaves the previous checkpoint.

    Args:
        inner: reads and writes the checkpoint file.
        write_adapter: writes the adapter in a checkpoint as a folder.
    """

    def __init__(self, inner: CheckpointIO, write_adapter: WriteAdapter) -> None:
        self.inner = inner
        self.write_adapter = write_adapter

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write the adapter folder and the checkpoint.

        Raises:
            CheckpointError: if they cannot be written; the previous ones stay.
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
                self.inner.save_checkpoint(checkpoint, new_file, storage_options)
                self.write_adapter(new_folder, checkpoint, seal(new_file))
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
        """Read a checkpoint.

        Raises:
            DamagedError: if it is not what was written, or holds NaN.
            ResumeError: if it cannot be read as plain values.
        """
        return read_checkpoint(path, lambda: self.inner.load_checkpoint(path, *args, **kwargs))

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint and then its adapter folder."""
        self.inner.remove_checkpoint(path)
        shutil.rmtree(adapter_folder(path), ignore_errors=True)


def refuse_links(trainer: Trainer) -> None:
    """Refuse checkpoints that are links to others.

    A link has no adapter folder, and Lightning makes one where it should save: the steps since the
    checkpoint that it points at would be lost at the end of the run, or on SIGTERM.

    Raises:
        CheckpointError: if a callback of the trainer makes such links.
    """
    savers: list[Any] = trainer.checkpoint_callbacks
    if any(getattr(saver, "save_last", None) == "link" for saver in savers):
        raise CheckpointError(
            "checkpoint.save_last: a link would point at an earlier checkpoint and have no adapter "
            "folder: the steps since would be lost at the run's end. Set it to true: last.ckpt "
            "then holds the last step. It is as small as the adapter and its optimizer state."
        )


def require_same_run(
    checkpoint: dict[str, Any],
    *,
    adapter_shapes: dict[str, list[int]],
    base: dict[str, str],
    optimizer_param_indexing: str | None,
) -> None:
    """Check that a checkpoint is of this adapter on this base, and can be resumed from.

    Args:
        checkpoint: a checkpoint, with or without its weights.
        adapter_shapes: shape of each trained parameter of this run.
        base: identity of this run's base.
        optimizer_param_indexing: parameters that this strategy numbers in the optimizer's state;
            None where that state is not used.

    Raises:
        PolicyError: if the checkpoint's adapter has other layers or shapes.
        ResumeError: if its base or the numbering of its optimizer's state differs.
    """
    if "base" not in checkpoint:
        raise ResumeError(
            "The file is no checkpoint of this package: it does not say which base its adapter "
            "belongs to."
        )
    remedy = "Use the model.policy settings that wrote it."
    found = checkpoint["adapter_shapes"]
    weights = checkpoint.get("state_dict")
    if found == adapter_shapes and weights is not None:
        found = {name: list(value.shape) for name, value in weights.items()}
    if found != adapter_shapes:
        names = sorted(found.keys() | adapter_shapes.keys())
        differing = [n for n in names if found.get(n) != adapter_shapes.get(n)]
        name = differing[0]
        raise PolicyError(
            f"The checkpoint's adapter is not this run's: {len(differing)} weights differ. "
            f"First {name}: {found.get(name, 'absent')} in the checkpoint, "
            f"{adapter_shapes.get(name, 'absent')} here. {remedy}"
        )
    require_same("base model", checkpoint["base"], base, remedy)
    indexing = checkpoint["optimizer_param_indexing"]
    if optimizer_param_indexing not in (None, indexing):
        raise ResumeError(
            f"The checkpoint numbers the optimizer's state by {indexing}, this strategy by "
            f"{optimizer_param_indexing}. Lightning's own FSDPStrategy and ModelParallelStrategy "
            "resume from their own checkpoints only; mpo_lightning.strategy.FSDP2 and unsharded "
            "runs from each other's."
        )


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, which also saves at the run's end and on SIGTERM.

    Where validation does not come at the end of each epoch, Lightning saves after validation only,
    and the steps after the last one would be lost.

    On SIGTERM all processes end the run between two batches, and save. After any other exception
    there is nothing to save that the previous checkpoint lacks, and processes that did not fail
    would wait for those that did.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have this run replace an existing ``last.ckpt``; Lightning would write a second one."""
        super().on_train_start(trainer, pl_module)
        if self.dirpath is None:
            return
        last = Path(self.dirpath, f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}")
        if last.exists():
            self.last_model_path = str(last)
            if trainer.ckpt_path is None:
                rank_zero_warn(f"{last} is of an earlier run. This run replaces it when it saves.")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step as ``last.ckpt``, and print where it is."""
        super().on_train_end(trainer, pl_module)
        if self.save_last and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        if self.last_model_path:
            folder = adapter_folder(self.last_model_path)
            rank_zero_info(f"Saved {self.last_model_path}, and the adapter alone: {folder}")

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save ``last.ckpt`` on SIGTERM."""
        if isinstance(exception, SIGTERMException) and trainer.global_step > 0:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
            rank_zero_info(f"SIGTERM: saved {self.last_model_path}")
            return
        super().on_exception(trainer, pl_module, exception)
