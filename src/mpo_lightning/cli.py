"""Entry point of the command line: runs a command, and reports user errors without a stack trace.

Nothing heavy is imported before the command is known.
"""

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from mpo_lightning.commands.names import COMMANDS
from mpo_lightning.errors import UserError, of_the_disk
from mpo_lightning.quiet import filter_known_warnings
from mpo_lightning.training.processes import watch_early

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
            "mpo-lightning COMMAND --help lists a command's settings.",
        ]
    )


def _show(text: str) -> None:
    """Print a page; a reader such as ``head`` may close the pipe early."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _give_up_output()


def _give_up_output() -> None:
    """Drop what standard output cannot take: it would fail again when the process ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: arguments. Defaults to those of the process.
    """
    given = list(sys.argv[1:] if args is None else args)
    if not given or given[0] in {"-h", "--help"}:
        _show(_overview())
        return
    if given[0] not in COMMANDS:
        sys.exit(f"error: {given[0]!r} is not a command of mpo-lightning.\n\n{_overview()}")
    command = COMMANDS[given[0]]
    if {"-h", "--help"} & set(given[1:]):
        from mpo_lightning.commands.help import page_of

        _show(page_of(*given[:2]))
        return
    watch_early()
    # A class_path may name a file beside the user's configuration; an installed script does not
    # have the current folder on its path.
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    filter_known_warnings()
    try:
        import_module(command.module).main(given)
        sys.stdout.flush()
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        told = of_the_disk(error)
        if told is None:
            raise
        if error.filename is None:
            _give_up_output()
        sys.exit(f"error: {told}")
    except (RuntimeError, MemoryError) as error:
        from mpo_lightning.training.failures import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        sys.exit("\n".join([f"error: {error}", *getattr(error, "__notes__", [])]))
