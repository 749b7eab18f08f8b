"""Write the package's ``help.jsonl`` from the parsers that the commands build.

Run by ``make format``; a test compares the file with the parsers.
"""

import json
import re
from argparse import SUPPRESS, Action
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from inspect import isabstract
from typing import Any
from unittest.mock import patch

from jsonargparse import ArgumentParser, Namespace, capture_parser

from mpo_lightning.commands.help_data import FILE, Page, Setting
from mpo_lightning.commands.names import COMMANDS, RUN
from mpo_lightning.commands.parser import WORDS, alternatives

__all__ = ["RUN_COMMANDS", "collected", "command_parser"]

RUN_COMMANDS = tuple(name for name, command in COMMANDS.items() if command.module == RUN)
USAGE = {"?": "[{}]", "+": "{} ..."}


@cache
def command_parser(name: str) -> ArgumentParser:
    """Return the parser that a command builds."""
    # LightningCLI compares its arguments with those of the process.
    with patch("sys.argv", ["mpo-lightning", name]):
        return capture_parser(lambda: import_module(COMMANDS[name].module).main([name]))


def collected() -> str:
    """Return what ``help.jsonl`` has to hold: a line for each page and for each setting."""
    pages: dict[str, Page] = {}
    classes: dict[str, type] = {}
    for name in COMMANDS:
        parser = command_parser(name)
        subcommands = parser._subcommands_action
        parts = {} if subcommands is None else dict(subcommands._name_parser_map)
        if name in RUN_COMMANDS:
            pages[name] = _page(parts[name], COMMANDS[name].purpose, classes)
        elif parts:
            for part, inner in parts.items():
                pages[f"{name} {part}"] = _page(inner, inner.description or "", classes)
        else:
            pages[name] = _page(parser, parser.description or "", classes)
    # Settings of classes name further classes.
    done: set[str] = set()
    while set(classes) - done:
        base = min(set(classes) - done)
        done.add(base)
        for made in _subclasses(classes[base]):
            parser = ArgumentParser()
            parser.add_class_arguments(made)
            purpose = " ".join((made.__doc__ or "").split("\n\n")[0].split())
            pages[f"{base} {made.__name__}"] = _page(parser, purpose, classes)
    return "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in _lines(pages))


def _lines(pages: dict[str, Page]) -> Iterator[dict[str, Any]]:
    first = pages[RUN_COMMANDS[0]]
    for name, page in pages.items():
        like = name in RUN_COMMANDS[1:]
        inherited = first.settings if like else {}
        settings = [s for s in page.settings.values() if inherited.get(s.name) != s]
        head: dict[str, Any] = {"page": name, "purpose": page.purpose}
        if like:
            assert not inherited.keys() - page.settings.keys(), name
            yield {**head, "like": RUN_COMMANDS[0]}
        else:
            yield head | {k: v for k in ("groups", "file") if (v := getattr(page, k))}
        for setting in settings:
            yield {key: value for key, value in setting._asdict().items() if value or key == "name"}


def _page(parser: ArgumentParser, purpose: str, classes: dict[str, type]) -> Page:
    settings = [_setting(action, classes) for action in parser._actions if _is_setting(action)]
    used = {setting.group for setting in settings}
    titles = {k: group.title or "" for k, group in (parser.groups or {}).items() if k in used}
    return Page(
        purpose,
        {setting.name: setting for setting in settings},
        titles,
        any(action.dest == "config" for action in parser._actions),
    )


def _is_setting(action: Action) -> bool:
    # Options for help and whole groups have no default; a linked setting cannot be given.
    return action.default != SUPPRESS and action.dest != "config"


def _setting(action: Action, classes: dict[str, type]) -> Setting:
    flag = action.nargs == 0
    kind = getattr(action, "_typehint", None) or action.type or str
    choices, kinds, base = [str(choice) for choice in action.choices or ()], [], ""
    for each in () if flag or choices else alternatives(kind):
        if isinstance(each, str):
            choices.append(each)
            continue
        if each.__module__.startswith("mpo_lightning."):
            base = each.__name__
            classes[base] = each
            choices += [made.__name__ for made in _subclasses(each)]
        kinds.append(WORDS.get(each, "a class"))
    placed = not action.option_strings
    return Setting(
        name=action.dest,
        purpose=" ".join((action.help or "").split()),
        default=None if flag else _in_yaml(action.default),
        choices=tuple(dict.fromkeys(choices)),
        kinds=tuple(dict.fromkeys(kinds)),
        base=base,
        required=action.required,
        usage=USAGE.get(str(action.nargs), "{}").format(action.dest.upper()) if placed else "",
        flag=flag,
    )


def _subclasses(base: type) -> list[type]:
    """Return the classes of the package that may stand where a base is asked for, by name."""
    found, waiting = set(), [base]
    while waiting:
        made = waiting.pop()
        waiting += made.__subclasses__()
        # What the studies compare with is not for settings.
        ours = re.match(r"mpo_lightning\.(?!studies\b)", made.__module__)
        if ours and not isabstract(made) and not made.__name__.startswith("_"):
            found.add(made)
    return sorted(found, key=lambda made: made.__name__.lower())


def _in_yaml(value: Any) -> str | None:
    if isinstance(value, Namespace):
        value = value.as_dict()
    if isinstance(value, dict) and "class_path" in value:
        inside = ", ".join(f"{k}={v}" for k, v in value.get("init_args", {}).items())
        return f"{value['class_path'].rpartition('.')[2]}({inside})"
    if isinstance(value, bool):
        return str(value).lower()
    return None if value is None else str(list(value) if isinstance(value, tuple) else value)


if __name__ == "__main__":
    FILE.write_text(collected(), encoding="utf-8")
