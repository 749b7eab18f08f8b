"""Ending a run that is told to end (SIGTERM), on all processes at the same step.

Lightning's own handler sends a message between processes from inside the signal handler. Where it
comes between two messages of training the processes wait for one another forever (seen with
lightning 2.6.6 on two processes, in three of eight trials). Here the handler notes the signal, and
the processes speak about it between two batches.
"""

import signal
import threading
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

__all__ = ["Ending"]


class Ending:
    """Whether this process was told to end.

    Ends a run by Lightning's own exception for it, a `SystemExit`.
    """

    def __init__(self) -> None:
        self._told = False

    def listen(self) -> None:
        """Take over the signal; Lightning hands it back at the end of the run."""
        self._told = False
        # Python lets no other thread do so.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_: Any) -> None:
        self._told = True

    def end_together(self, trainer: Trainer) -> None:
        """End if any process was told to; all processes call this at the same step.

        Raises:
            SIGTERMException: on all processes.
        """
        if trainer.strategy.reduce_boolean_decision(self._told, all=False):
            raise SIGTERMException

    def end_alone(self) -> None:
        """End if this process was told to, where there is nothing to save.

        Raises:
            SIGTERMException: on this process.
        """
        if self._told:
            raise SIGTERMException
