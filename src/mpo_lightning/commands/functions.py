"""``mpo-lightning sample|score|compare``: commands whose settings are a function's parameters."""

from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any, get_type_hints

from mpo_lightning.commands.names import COMMANDS
from mpo_lightning.commands.parser import SettingsParser

__all__ = ["main"]


def main(args: list[str]) -> None:
    """Call the function that a command is named after.

    Args:
        args: arguments, beginning with the command's name.
    """
    name, *given = args
    function = _function(name)
    parser = SettingsParser(prog=f"mpo-lightning {name}", description=COMMANDS[name].purpose)
    parser.add_argument("--config", action="config", help="a YAML file of these settings")
    parser.add_function_arguments(function)
    values = parser.parse_args(given).as_dict()
    del values["config"]
    for parameter, kind in get_type_hints(function).items():
        if isinstance(kind, type) and is_dataclass(kind):
            values[parameter] = kind(**values[parameter])
    function(**values)


def _function(name: str) -> Callable[..., Any]:
    if name == "sample":
        from mpo_lightning.rollouts.sample import sample

        return sample
    if name == "score":
        from mpo_lightning.rollouts.score import score

        return score
    from mpo_lightning.evaluation.compare import compare

    return compare
