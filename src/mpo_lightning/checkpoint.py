"""Checkpoints with an adapter folder beside each."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from torch import Tensor

__all__ = ["AdapterCheckpointIO", "adapter_folder"]

WriteAdapter = Callable[[Path, dict[str, Tensor]], None]


def adapter_folder(checkpoint: str | os.PathLike[str]) -> Path:
    """The adapter folder beside a checkpoint: ``last.ckpt`` has ``last-adapter``."""
    path = Path(checkpoint)
    return path.with_name(f"{path.stem}-adapter")


class AdapterCheckpointIO(CheckpointIO):
    """Writes and removes an adapter folder with every checkpoint, through whatever asked for it.

    The adapter is taken from the checkpoint itself, so that sharded weights are gathered once and
    the two can never differ. The folder is complete before the checkpoint appears.

    Args:
        inner: what reads and writes the checkpoint file.
        write_adapter: writes the weights of a checkpoint's state dict as an adapter folder.
    """

    def __init__(self, inner: CheckpointIO, write_adapter: WriteAdapter) -> None:
        self.inner = inner
        self.write_adapter = write_adapter

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write the adapter folder and then the checkpoint."""
        folder = adapter_folder(path)
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        self.write_adapter(partial, checkpoint["state_dict"])
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        self.inner.save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint."""
        return self.inner.load_checkpoint(path, *args, **kwargs)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint and then its adapter folder."""
        self.inner.remove_checkpoint(path)
        shutil.rmtree(adapter_folder(path), ignore_errors=True)
