"""One fit at a time in a folder of checkpoints."""

import os
import socket
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from mpo_lightning.errors import CheckpointError

__all__ = ["OneRun"]


class OneRun(Callback):
    """Callback that keeps other fits out of the folders of this one's checkpoints.

    The system releases the locks of a process that ends, however it ends. The first process of a
    run holds them for all.

    Args:
        trainer: the run's trainer.

    Raises:
        CheckpointError: if another fit writes into one of the folders.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._held: list[int] = []
        if trainer.state.fn != TrainerFn.FITTING or not trainer.is_global_zero:
            return
        savers: list[Any] = trainer.checkpoint_callbacks
        # A folder that a logger names is the run's own.
        named = {saver.dirpath for saver in savers if getattr(saver, "dirpath", None)}
        for folder in sorted(named):
            # Other places are refused where they are written.
            if "://" not in folder:
                self._held.append(_lock(Path(folder)))

    def _release(self) -> None:
        while self._held:
            os.close(self._held.pop())

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Release the folders."""
        self._release()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Release the folders; after SIGTERM the end of the process does, when it has saved."""
        if not isinstance(exception, SIGTERMException):
            self._release()


def _lock(folder: Path) -> int:
    """Return a descriptor that holds the lock of a folder until it is closed.

    Raises:
        CheckpointError: if another process holds it, or the folder cannot be written.
    """
    import fcntl

    # Beside it: Lightning warns of folders that hold something.
    path = folder.with_name(f".{folder.name}.lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: checkpoints cannot be written there ({error}). Give access, or set "
            "trainer.default_root_dir to another folder."
        ) from error
    try:
        # Not flock: a worker that the process has forked would hold that lock after it.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        holder = os.read(file, 1000).decode(errors="replace").strip()
        os.close(file)
        raise CheckpointError(
            f"{folder}: another fit writes its checkpoints there ({holder}). Wait for its end, or "
            "set trainer.default_root_dir to another folder."
        ) from error
    except OSError as error:
        rank_zero_warn(f"{folder} cannot be locked ({error}): see that no other fit writes there.")
        return file
    os.truncate(file, 0)
    os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return file
