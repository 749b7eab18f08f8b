"""What is wrong with settings, said in one line: which, what was given, what may be, and where.

jsonargparse knows all of it, and tells it in many lines, behind the usage of every option.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from importlib import import_module
from inspect import isabstract, isclass, signature
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml  # type: ignore[import-untyped]
from jsonargparse import ArgumentParser

__all__ = ["SettingsParser", "check_environment"]

# As jsonargparse writes them.
KEY = re.compile(r'Parser key "([^"]+)"')
CLASS = re.compile(r"class_path[ =]'([\w.]+)'")
OPTION = re.compile(r"[Oo]ption '([^']+)'")
VALUE = re.compile(r"(?:(?:Got|Given) value|Expected a dot import path string): (.+?)\.?$", re.M)
UNRECOGNIZED = "unrecognized arguments: "
NO_SUBTYPE = "Does not validate against any of the Union subtypes"
NOT_YAML = "Problems parsing config"

WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    NoneType: "null",
    list: "a list",
    dict: "a mapping",
}
MANY = 16


class SettingsParser(ArgumentParser):
    """A parser that says in one line what is wrong, and ends with status 2."""

    _given: Sequence[str] = ()
    # As they are named, and where they lie: jsonargparse changes the current folder at times.
    _files: dict[str, Path] = {}  # noqa: RUF012 (replaced, never changed)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None, **settings: Any
    ) -> Any:
        """Note what is given, to find what is wrong in it."""
        self._given = sys.argv[1:] if args is None else args
        self._files = {name: Path(name).absolute() for name in _config_files(self._given)}
        return super().parse_args(args, namespace, **settings)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong, and end."""
        if not self.exit_on_error or "JSONARGPARSE_DEBUG" in os.environ:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        sys.stderr.write(f"error: {_explain(message, parser)}\n")
        self.exit(2)
        raise AssertionError("exit returned")


def _explain(message: str, parser: ArgumentParser) -> str:
    if message.startswith(UNRECOGNIZED):
        return _about_unrecognized(message.removeprefix(UNRECOGNIZED), parser)
    if message.startswith(NOT_YAML):
        return _about_yaml(parser) or _in_one_line(message)
    keys, option = KEY.findall(message), OPTION.search(message)
    owners = [named for path in CLASS.findall(message) if (named := _named_class(path))]
    if option is not None:
        return _about_unknown([*keys, option[1]], owners[-1] if owners else None, parser)
    value = VALUE.search(message)
    if keys and value is not None:
        kind = _kind(keys, owners, parser)
        if kind is not None:
            return _about_value(".".join(keys), value[1], kind, parser)
    if message.startswith(NO_SUBTYPE):
        # Of all the types that it might have been, one was meant, and its class says what is wrong.
        found = [line.strip(" -") for line in message.splitlines() if line.startswith("  - ")]
        own = [text for text in found if not text.startswith(("Expected ", "Type "))]
        return own[0] if own else _in_one_line(message)
    return _in_one_line(message) if keys else message


def _in_one_line(message: str) -> str:
    return " ".join(KEY.sub(r"\1", message).split())


# ------------------------------------------------------------------------------ names


def _names(parser: ArgumentParser) -> list[str]:
    """Names of all settings of a parser."""
    options = [o for action in parser._actions for o in action.option_strings]
    # Nested help and additions to lists are no settings of their own.
    return [
        option.removeprefix("--")
        for option in options
        if option.startswith("--") and not option.endswith((".help", "+", "print_shtab"))
    ]


def _about_unrecognized(text: str, parser: ArgumentParser) -> str:
    unknown = [word for word in text.split() if word.startswith("-")]
    if not unknown:
        return f"{text} belongs to no option. Options begin with --."
    return " ".join(
        _about_unknown([word.partition("=")[0].lstrip("-")], None, parser, option=True)
        for word in unknown
    )


def _about_unknown(
    keys: Sequence[str], owner: type | None, parser: ArgumentParser, *, option: bool = False
) -> str:
    name, start = ".".join(keys), "--" if option else ""
    if owner is None:
        known, of = _names(parser), parser.prog.replace(" [options]", "")
    else:
        prefix = ".".join(keys[:-1])
        known = [f"{prefix}.{each}" for each in _parameters(owner)]
        of = owner.__name__
    text = f"{start}{name} is not a setting of {of}{_where(name, parser)}."
    place, beside = _beside(name, known)
    if place == name.rpartition(".")[0]:
        near = get_close_matches(name.rpartition(".")[2], beside, 1)
        near = [f"{place}.{each}".lstrip(".") for each in near]
    else:
        near = get_close_matches(name, known, 1, 0.75)
    if near:
        return f"{text} Did you mean {start}{near[0]}?"
    of_place = f"In {place} there are" if place else "There are"
    return f"{text} {of_place}: {_listed(beside, 'and')}."


def _beside(name: str, known: Sequence[str]) -> tuple[str, list[str]]:
    """The innermost place above an unknown name that there is, and the names in it."""
    place = name
    while True:
        place = place.rpartition(".")[0]
        start = f"{place}." if place else ""
        inside = [
            each.removeprefix(start).split(".")[0] for each in known if each.startswith(start)
        ]
        if inside or not place:
            return place, list(dict.fromkeys(inside))


def _listed(words: Sequence[str], last: str) -> str:
    if len(words) > MANY:
        words = [*words[: MANY - 1], "others"]
    return f" {last} ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


# ----------------------------------------------------------------------------- values


def _about_value(name: str, value: str, kind: Any, parser: ArgumentParser) -> str:
    words = list(dict.fromkeys(_allowed(kind)))
    text = f"{name} must be {_listed(words, 'or')}, got {value}{_where(name, parser)}."
    near = get_close_matches(value, words, 1)
    return f"{text} Did you mean {near[0]}?" if near else text


def _allowed(kind: Any) -> Iterator[str]:
    """What may be given for a type, in words."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        yield from map(str, args)
    elif origin in {Union, UnionType}:
        for each in args:
            yield from _allowed(each)
    elif origin is Callable or getattr(origin, "__name__", "") == "Callable":
        yield from _allowed(args[-1])
    elif (plain := origin or kind) in WORDS:
        yield WORDS[plain]
    elif isclass(kind):
        yield from sorted(_subclasses(kind), key=str.lower) or [kind.__name__]
    else:
        yield str(kind)


def _subclasses(kind: type) -> set[str]:
    names: set[str] = set()
    if not isabstract(kind) and not kind.__name__.startswith("_"):
        names.add(kind.__name__)
    inheriting: list[type] = kind.__subclasses__()
    for below in inheriting:
        names |= _subclasses(below)
    return names


def _kind(keys: Sequence[str], owners: Sequence[type], parser: ArgumentParser) -> Any:
    """The type of a setting, of the parser or of the class that it belongs to."""
    if len(keys) > 1 and owners:
        return _parameters(owners[-1]).get(keys[-1])
    for action in parser._actions:
        if f"--{keys[-1]}" in action.option_strings or action.dest == keys[-1]:
            return getattr(action, "_typehint", action.type)
    return None


def _named_class(path: str) -> type | None:
    module, _, name = path.rpartition(".")
    found = getattr(import_module(module), name, None) if module else None
    return found if isclass(found) else None


def _parameters(owner: type) -> dict[str, Any]:
    """Name and type of what a class is made from."""
    hints = get_type_hints(owner.__init__)  # type: ignore[misc]
    return {
        name: hints.get(name)
        for name in signature(owner).parameters
        if name not in {"self", "params"}
    }


# ------------------------------------------------------------------------------ places


def check_environment(parser: ArgumentParser) -> None:
    """Refuse a variable that would be of a parser, had it such a setting; jsonargparse ignores it.

    Args:
        parser: a parser that reads the environment.
    """
    known = {_variable(parser, name): name for name in _names(parser)}
    start = _variable(parser, "")[:-1]
    for variable in sorted(os.environ):
        if variable.startswith(start) and variable not in known:
            near = get_close_matches(variable, known, 1, 0.75)
            hint = f" Did you mean {near[0]}?" if near else ""
            parser.error(f"{variable} is set in the environment, but stands for no setting.{hint}")


def _variable(parser: ArgumentParser, name: str) -> str:
    """The environment's variable of a setting, as jsonargparse names it."""
    return f"{parser.env_prefix}_{name}".replace(".", "__").upper()


def _config_files(given: Sequence[str]) -> list[str]:
    files = [value for word, value in pairwise(given) if word in {"-c", "--config"}]
    return files + [word.partition("=")[2] for word in given if word.startswith("--config=")]


def _where(name: str, parser: ArgumentParser) -> str:
    """The file or variable in which a setting stands, unless it is an option."""
    given = getattr(parser, "_given", ())
    if any(word.partition("=")[0].replace(".init_args", "") == f"--{name}" for word in given):
        return ""
    for file, path in _files_of(parser):
        if _holds(yaml.safe_load(path.read_text(encoding="utf-8")), name.split(".")):
            return f" (in {file})"
    variable = _variable(parser, name)
    return f" (in {variable})" if variable in os.environ else ""


def _files_of(parser: ArgumentParser) -> list[tuple[str, Path]]:
    """The configuration files that were given and are there."""
    files: dict[str, Path] = getattr(parser, "_files", {})
    return [(name, path) for name, path in files.items() if path.is_file()]


def _holds(settings: Any, keys: Sequence[str]) -> bool:
    if not keys:
        return True
    if not isinstance(settings, dict):
        return False
    inner = settings if keys[0] in settings else settings.get("init_args")
    return isinstance(inner, dict) and keys[0] in inner and _holds(inner[keys[0]], keys[1:])


def _about_yaml(parser: ArgumentParser) -> str | None:
    for file, path in _files_of(parser):
        try:
            yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
            return f"{file}{place}: not YAML: {error.problem}."
    return None
