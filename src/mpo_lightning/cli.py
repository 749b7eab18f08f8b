"""The command line: finds the command that is meant, and tells errors that a user can mend.

Nothing heavy is imported before it is known which command is to run.
"""

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from mpo_lightning.commands.noise import be_calm
from mpo_lightning.errors import UserError

__all__ = ["COMMANDS", "main"]


class Command(NamedTuple):
    """A command: the module whose ``main(args)`` runs it, and what it is for, in a line."""

    module: str
    purpose: str


RUN = "mpo_lightning.commands.run"
COMMANDS = {
    "fit": Command(RUN, "Train on groups of scored responses."),
    "validate": Command(RUN, "Measure a checkpoint on the validation data."),
    "test": Command(RUN, "Measure a checkpoint on the test data."),
    "predict": Command(RUN, "Measure every response of scored groups, or answer prompts."),
    "sample": Command("mpo_lightning.commands.sample", "Sample n responses to each prompt."),
    "score": Command("mpo_lightning.commands.score", "Score responses; the output is for fit."),
    "compare": Command(
        "mpo_lightning.commands.compare",
        "Score two models' answers: win rates, also at equal length.",
    ),
    "export": Command(
        "mpo_lightning.commands.export", "Write a checkpoint as an adapter or a merged model."
    ),
    "cache": Command(
        "mpo_lightning.commands.cache", "List or remove what is kept on disk for later runs."
    ),
    "data": Command("mpo_lightning.commands.data", "Check, convert or split scored groups."),
    "study": Command("mpo_lightning.commands.study", "Check the paper's claims."),
    "completion": Command(
        "mpo_lightning.commands.completion", "Print a script that completes all this in bash."
    ),
}


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
    be_calm()
    try:
        import_module(command.module).main(given)
    except UserError as error:
        sys.exit(f"error: {error}")
    except (RuntimeError, MemoryError) as error:
        from mpo_lightning.faults import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        sys.exit("\n".join([f"error: {error}", *getattr(error, "__notes__", [])]))
