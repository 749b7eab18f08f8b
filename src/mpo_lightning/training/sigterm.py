"""SIGTERM: end a run on all processes at the same step.

Lightning's own handler communicates between processes inside the signal handler. If the signal
arrives between two messages of training, the processes wait for one another forever (seen with
lightning 2.6.6 on two processes, in three of eight trials). This handler only records the signal,
and the processes agree on it between two batches.
"""

import signal
import threading
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

__all__ = ["SigtermHandler"]


class SigtermHandler:
    """Ends a run after SIGTERM by Lightning's own exception for it, a `SystemExit`."""

    def __init__(self) -> None:
        self._received = False

    def install(self) -> None:
        """Handle the signal; Lightning restores its own handler at the end of the run."""
        self._received = False
        # Python allows this in the main thread only.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, *_: Any) -> None:
        self._received = True

    def stop_together(self, trainer: Trainer) -> None:
        """Stop if any process received the signal; all processes must call this at the same step.

        Raises:
            SIGTERMException: on all processes.
        """
        if trainer.strategy.reduce_boolean_decision(self._received, all=False):
            raise SIGTERMException

    def stop_alone(self) -> None:
        """Stop if this process received the signal, when there is nothing to save.

        Raises:
            SIGTERMException: on this process.
        """
        if self._received:
            raise SIGTERMException
