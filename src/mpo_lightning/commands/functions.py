"""Commands whose arguments are those of a function."""

from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any, get_type_hints

from mpo_lightning.commands.parser import SettingsParser

__all__ = ["call"]


def call(function: Callable[..., Any], args: list[str], purpose: str) -> None:
    """Call a function with arguments of the command line, or of a file that ``--config`` names.

    Args:
        function: what runs; its parameters and their docstring make the arguments.
        args: the arguments, the command's name first.
        purpose: what the command is for, in a line.
    """
    parser = SettingsParser(prog=f"mpo-lightning {args[0]}", description=purpose)
    parser.add_argument("--config", action="config", help="a YAML file of these settings")
    parser.add_function_arguments(function)
    values = parser.parse_args(args[1:]).as_dict()
    del values["config"]
    hints: dict[str, Any] = get_type_hints(function)
    for name, kind in hints.items():
        if isinstance(kind, type) and is_dataclass(kind):
            values[name] = kind(**values[name])
    function(**values)
