"""The command line: finds the command that is meant, and tells errors that a user can mend.

Nothing heavy is imported before it is known which command is to run.
"""

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from mpo_lightning.commands.names import COMMANDS
from mpo_lightning.errors import UserError
from mpo_lightning.quiet import filter_known_warnings

__all__ = ["main"]


def _overview() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name.ljust(width)}{command.purpose}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: mpo-lightning COMMAND ...",
            "",
            "Multi-Preference Optimization: train a language model on groups of scored responses.",
            "",
            *lines,
            "",
            "mpo-lightning COMMAND --help says what a command takes.",
        ]
    )


def _show(text: str) -> None:
    """Print a page, or as much of it as its reader, such as ``head``, wants."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # What is still buffered would fail again when the process ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: arguments, those of the process if none.
    """
    given = list(sys.argv[1:] if args is None else args)
    if not given or given[0] in {"-h", "--help"}:
        _show(_overview())
        return
    if given[0] not in COMMANDS:
        sys.exit(f"error: {given[0]!r} is not a command of mpo-lightning.\n\n{_overview()}")
    command = COMMANDS[given[0]]
    if {"-h", "--help"} & set(given[1:]):
        from mpo_lightning.commands.help import page

        text = page(given[0], command.module, command.purpose)
        if text is not None:
            _show(text)
            return
    # A class_path may name a file of the user's, beside the configuration; an installed command
    # does not look there by itself.
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    filter_known_warnings()
    try:
        import_module(command.module).main(given)
    except UserError as error:
        sys.exit(f"error: {error}")
    except (RuntimeError, MemoryError) as error:
        from mpo_lightning.training.failures import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        sys.exit("\n".join([f"error: {error}", *getattr(error, "__notes__", [])]))
