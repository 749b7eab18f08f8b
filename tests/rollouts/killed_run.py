"""The command line in a process that is gone (SIGKILL) in the middle of writing a part."""

import os
import signal
from typing import Any

from mpo_lightning import files
from mpo_lightning.cli import main


class Dying:
    """The module ``os``, but for one call."""

    def __init__(self, write: int) -> None:
        self.left = write

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def fsync(self, file: int) -> None:
        """Half of the file is on disk, and it has not its name yet."""
        self.left -= 1
        if self.left == 0:
            os.truncate(file, os.fstat(file).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        os.fsync(file)


def killed_run(write: int, args: list[str]) -> None:
    """The ``write``-th file, counted from 1, is half written."""
    files.os = Dying(write)  # type: ignore[assignment]
    main(args)
