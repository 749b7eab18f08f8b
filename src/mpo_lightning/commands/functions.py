"""``mpo-lightning sample|score|compare|export``: commands that call a function of that name."""

from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any, get_type_hints

from mpo_lightning.commands.names import COMMANDS
from mpo_lightning.commands.parser import SettingsParser

__all__ = ["main"]

# Parameters of `export` that are options without a value.
FLAGS = {
    "merged": "write the whole model, merged in float32, instead of the adapter",
    "force": "overwrite another export",
    "trust_remote_code": "let a hub model run its own code",
}


def main(args: list[str]) -> None:
    """Call the function that a command is named after.

    Args:
        args: arguments, beginning with the command's name.
    """
    name, *given = args
    function = _function(name)
    parser = SettingsParser(prog=f"mpo-lightning {name}", description=COMMANDS[name].purpose)
    parser.add_argument("--config", action="config", help="a YAML file of these settings")
    added: set[str | int] = set()
    if name == "export":
        added = {"checkpoint", *FLAGS}
        parser.add_argument(
            "checkpoint",
            nargs="?",
            type=str,
            default="last",
            help="a .ckpt file, an adapter folder, or last, the last checkpoint of the run",
        )
        for flag, purpose in FLAGS.items():
            parser.add_argument(f"--{flag}", action="store_true", help=purpose)
    parser.add_function_arguments(function, skip=added)
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
    if name == "compare":
        from mpo_lightning.evaluation.compare import compare

        return compare
    from mpo_lightning.export.export import export

    return export
