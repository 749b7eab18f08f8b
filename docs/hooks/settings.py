"""Tables of settings and the commands' own help, made from the parsers that the commands build.

So neither can go stale: what a page shows is what the installed package accepts.
"""

import os
import re
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin
from unittest.mock import patch

from jsonargparse import ArgumentParser, Namespace

from mpo_lightning.commands.names import COMMANDS

__all__ = ["GENERATED", "command_parser", "rows_of"]

RUN_COMMANDS = ("fit", "validate", "test", "predict")


class _Made(Exception):  # noqa: N818 (it carries, it does not complain)
    """Carries a command's parser out of the command, before anything is parsed."""


def _carry_out(parser: ArgumentParser, *_: object, **__: object) -> NoReturn:
    raise _Made(parser)


@cache
def command_parser(name: str) -> ArgumentParser:
    """The parser that a command builds, as it builds it."""
    # LightningCLI compares its arguments with those of the process.
    arguments = patch("sys.argv", ["mpo-lightning"])
    with arguments, patch.object(ArgumentParser, "parse_args", _carry_out):
        try:
            import_module(COMMANDS[name].module).main([name])
        except _Made as made:
            parser: ArgumentParser = made.args[0]
            return parser
    raise RuntimeError(f"mpo-lightning {name} parses no arguments.")


def parts_of(name: str) -> dict[str, ArgumentParser]:
    """A command's parsers: one for each of its own subcommands, or the one that it has."""
    parser = command_parser(name)
    action = parser._subcommands_action
    if action is None:
        return {name: parser}
    parts: dict[str, ArgumentParser] = dict(action._name_parser_map)
    if name in RUN_COMMANDS:
        return {name: parts[name]}
    return {f"{name} {part}": made for part, made in parts.items()}


def _type_text(hint: Any) -> str:
    if hint is None or hint is type(None):
        return "null"
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_type_text(argument) for argument in arguments))
    if origin in (list, dict):
        return f"{origin.__name__} of {', '.join(_type_text(argument) for argument in arguments)}"
    if origin is not None:
        return "a class"
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _default_text(value: Any) -> str:
    if isinstance(value, Namespace):
        value = value.as_dict()
    if isinstance(value, dict) and "class_path" in value:
        inside = ", ".join(f"{k}={v}" for k, v in value.get("init_args", {}).items())
        return f"`{value['class_path'].rpartition('.')[2]}({inside})`"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`"


def _cell(text: str) -> str:
    """Text as a cell of a table: one line, no bars, no markup of reStructuredText."""
    text = re.sub(r":\w+:`~?([^`]*)`", r"`\1`", text).replace("``", "`")
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def rows_of(parser: ArgumentParser, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Settings of a parser: name, type, default and meaning, in the order of the help."""
    for action in parser._actions:
        name, kind = action.dest, type(action).__name__
        shown = name == prefix or name.startswith(f"{prefix}.") or not prefix
        # Help options, and options that read a whole part from a file.
        if not shown or kind in ("_ActionHelpClassPath", "_ActionConfigLoad", "_HelpAction"):
            continue
        if name in ("help", "print_config", "config", "print_shtab"):
            continue
        hint = getattr(action, "_typehint", None) or action.type or type(action.default)
        default = "required" if action.required else _default_text(action.default)
        yield name, _type_text(hint), default, action.help or ""


def _table(rows: Iterator[tuple[str, str, str, str]], title: str = "setting") -> str:
    lines = [f"| {title} | values | default | meaning |", "| --- | --- | --- | --- |"]
    lines += [
        f"| `{name}` | {_cell(values)} | {_cell(default)} | {_cell(meaning)} |"
        for name, values, default, meaning in rows
    ]
    return "\n".join(lines)


def settings(prefix: str) -> str:
    """The table of all settings below a name, such as ``model.policy``."""
    parser = parts_of("predict" if prefix == "predictions" else "fit")
    return _table(rows_of(next(iter(parser.values())), prefix))


def _class_parser(made: type) -> ArgumentParser:
    parser = ArgumentParser()
    parser.add_class_arguments(made)
    return parser


def _concrete(base: Any) -> list[type]:
    found = [base] if not getattr(base, "__abstractmethods__", None) else []
    for child in base.__subclasses__():
        found += _concrete(child)
    ours = [c for c in found if c.__module__.startswith("mpo_lightning.") and c.__name__[0] != "_"]
    return list(dict.fromkeys(ours))


def classes(path: str) -> str:
    """A table of settings for each class that may stand where ``path`` is named."""
    module, _, name = path.rpartition(".")
    import_module("mpo_lightning.losses")
    import_module("mpo_lightning.data.schemas.detect")
    base = getattr(import_module(module), name)
    parts = []
    for made in _concrete(base):
        purpose = (made.__doc__ or "").strip().split("\n\n")[0]
        rows = list(rows_of(_class_parser(made)))
        table = f"\n\n{_table(iter(rows))}" if rows else "\n\nNo settings."
        parts.append(f"### {made.__name__}\n\n{' '.join(purpose.split())}{table}")
    return "\n\n".join(parts)


def _columns() -> Any:
    return patch.dict(os.environ, {"COLUMNS": "100"})


def commands(_: str) -> str:
    """The help of every command but the four of LightningCLI, as a terminal shows it."""
    parts = []
    for name, command in COMMANDS.items():
        if name in RUN_COMMANDS:
            continue
        parts.append(f"## {name}\n\n{command.purpose}")
        for title, parser in parts_of(name).items():
            with _columns():
                text = parser.format_help().rstrip()
            heading = "" if title == name else f"### {title}\n\n"
            parts.append(f"{heading}~~~text\n{text}\n~~~")
    return "\n\n".join(parts)


def overview(_: str) -> str:
    """Every command and its purpose."""
    rows = [f"| `{name}` | {_cell(command.purpose)} |" for name, command in COMMANDS.items()]
    return "\n".join(["| command | purpose |", "| --- | --- |", *rows])


GENERATED: dict[str, Callable[[str], str]] = {
    "classes": classes,
    "commands": commands,
    "overview": overview,
    "settings": settings,
}
