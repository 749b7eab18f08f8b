"""Argument parser whose errors take one line: setting, value given, values allowed, and file.

jsonargparse's own errors take many lines, behind the usage of every option.
"""

import math
import os
import re
import sys
from argparse import ArgumentError, _HelpAction
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import chdir
from datetime import timedelta
from difflib import get_close_matches
from inspect import isabstract
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

import yaml  # type: ignore[import-untyped]
from jsonargparse import ArgumentParser, Namespace
from jsonargparse._actions import _ActionConfigLoad
from jsonargparse._common import lenient_check, parser_context

from mpo_lightning.commands.named_classes import make_classes_only
from mpo_lightning.commands.replaced_classes import TOLD, start_from_defaults
from mpo_lightning.commands.settings_file import YAML, UnusableError, load_settings, refused
from mpo_lightning.printable import printable, without_secrets

__all__ = ["WORDS", "SettingsParser", "alternatives", "check_environment"]

# Parts of jsonargparse's messages: names of settings and classes, and what was given.
KEY = re.compile(r'Parser key "([^"]+)"')
CLASS = re.compile(r"class_path[ =]'(?:\w+\.)*(\w+)'")
OPTION = re.compile(r"(?:Group '([^']+)' .*)?[Oo]ption '([^']+)'")
VALUE = re.compile(r"(?:Got value|Expected a dot import path string): (.+)$", re.DOTALL)
DENIED = re.compile(r"Importing '(.+?)' is not allowed, denied by the '(.+?)' entry")
SEVERAL = re.compile(r"Multiple subclasses with name (\w+)\. .*: (.+)\.")
UNRECOGNIZED = "unrecognized arguments: "
NO_SUBTYPE = "Does not validate against any of the Union subtypes"
OF_PYTHON = re.compile(r"object has no attribute '|unhashable type: '")
NO_MAPPING = ("Unexpected config", "Key must be a string")
OTHER_FILE = re.compile(r"sub-config file (.+?): ")

WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    Path: "a path",
    timedelta: "a duration",
    NoneType: "null",
    **dict.fromkeys((list, tuple, Sequence, Iterable), "a list"),
    **dict.fromkeys((dict, Mapping), "a mapping"),
}
SUFFIXES = (".yaml", ".yml")
# Whole numbers must be smaller: torch and Lightning count in 64 bits.
LARGEST = 1 << 63
# Names listed in a message at most.
MANY = 16


class SettingsParser(ArgumentParser):
    """Parser that reports an error in one line and exits with status 2."""

    args: list[str] = []  # noqa: RUF012 (replaced, never changed)
    # The current folder; while jsonargparse reads a file it is the file's.
    _folder = Path()

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{"parser_mode": YAML, **settings})

    def parse_args(self, *args: Any, **settings: Any) -> Any:
        """Parse arguments."""
        if not (hasattr(self, "parent_parser") or getattr(self, "_inner_parser", False)):
            TOLD.clear()
            SettingsParser._folder = Path.cwd()
        try:
            return super().parse_args(*args, **settings)
        except UnicodeDecodeError as error:
            self.error(str(error), error)

    def dump(self, *args: Any, **settings: Any) -> str:
        """Return settings as text, as ``--print_config`` shows and a run saves them."""
        if "skip_none" in settings:
            # Lightning's name for it, of which jsonargparse warns whoever is the caller.
            settings["skip_unset"] = settings.pop("skip_none")
        return without_secrets(str(super().dump(*args, **settings)))

    def _apply_actions(self, *args: Any, **more: Any) -> Any:
        """Check the values of a file or mapping; paths in it are relative to the current folder."""
        with chdir(self._folder):
            return super()._apply_actions(*args, **more)

    def _check_value_key(self, action: Any, value: Any, key: str, *args: Any, **more: Any) -> Any:
        """Check one value of a file or a mapping.

        jsonargparse takes null for a setting that nobody gave, and lets it pass for any type.

        Raises:
            TypeError: if the value does not fit.
        """
        if action.nargs == 0 and not isinstance(value, bool):
            given = "null" if value is None else value
            raise TypeError(f'Parser key "{key}": must be true or false, got {given}.')
        if value is None and isinstance(action, _ActionConfigLoad):
            raise TypeError(f'Parser key "{key}": null in the place of its settings. Leave it out.')
        lenient = lenient_check.get() and (value is not None or action.default is None)
        with parser_context(lenient_check=lenient):
            found = super()._check_value_key(action, value, key, *args, **more)
        for name, number in _endless_numbers(found, key):
            raise TypeError(f'Parser key "{name}": must be finite, got {number}.')
        return found

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Report an error and exit; the parser of a class's settings raises it instead.

        Raises:
            ArgumentError: with the parser as attribute, in a parser of a class's settings.
        """
        if not self.exit_on_error or "JSONARGPARSE_DEBUG" in os.environ:
            failure = ArgumentError(None, message)
            failure.parser = self  # type: ignore[attr-defined]
            raise failure from ex
        parser = self
        if self._subcommands_action is not None and self.args:
            parser = self._subcommands_action._name_parser_map.get(self.args[0], self)
        told = without_secrets(printable(_in_one_line(_explain(message, ex, parser))))
        sys.stderr.write(f"error: {told}\n")
        self.exit(2)
        raise AssertionError("exit returned")


def _endless_numbers(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """Yield the settings below a name that are no number, infinite or too large, as texts."""
    entries = vars(value) if isinstance(value, Namespace) else value
    if isinstance(entries, list | tuple):
        for entry in entries:
            yield from _endless_numbers(entry, name)
    elif isinstance(entries, dict):
        for key, entry in entries.items():
            yield from _endless_numbers(entry, name if key == "init_args" else f"{name}.{key}")
    elif isinstance(value, float) and not math.isfinite(value):
        yield name, str(value)
    elif isinstance(value, int) and abs(value) >= LARGEST:
        yield name, f"a whole number of {value.bit_length()} bits"


start_from_defaults(SettingsParser)
make_classes_only(SettingsParser)


def _explain(message: str, error: BaseException | None, parser: SettingsParser) -> str:
    if message.startswith(UNRECOGNIZED):
        return _about_unrecognized(message.removeprefix(UNRECOGNIZED), parser)
    causes = list(_causes(error))
    about_yaml = _about_yaml(message, causes, parser)
    if about_yaml is not None:
        return about_yaml
    reason = str(causes[-1]) if causes else message
    if denied := DENIED.search(reason):
        reason = f"{denied[1]} is not allowed in settings: {denied[2]} can run any code."
    if several := SEVERAL.search(message):
        reason = f"several classes are called {several[1]}. Name one: {several[2]}."
    # A setting of a class within a class: one name for each level, and a parser for each class.
    keys = [key[1] for each in causes if type(each) is TypeError and (key := KEY.match(str(each)))]
    # In a group's own file the names have the group's before them.
    keys = [key for key, after in pairwise([*keys, ""]) if not after.startswith(f"{key}.")]
    owners = [owner for each in causes if (owner := getattr(each, "parser", None))]
    owner = owners[-1] if owners else parser
    option, value = OPTION.search(reason), VALUE.search(reason)
    if option is not None and isinstance(causes[-1], KeyError):
        names = _names(owner)
        of = parser.prog.replace(" [options]", "")
        if owners:
            names = [".".join([*keys, name]) for name in names]
            of = (CLASS.findall(message) or [of])[-1]
        name = ".".join(filter(None, [*keys, *option.groups()]))
        return _about_unknown(name, names, of, parser)
    action = next((each for each in owner._actions if keys and each.dest == keys[-1]), None)
    if action is not None and value is not None:
        kind = getattr(action, "_typehint", action.type)
        return _about_value(".".join(keys), value[1], kind, parser)
    # What jsonargparse takes for settings of a class without looking at it.
    if keys and OF_PYTHON.search(reason):
        expected = "a class: its name, or class_path (a text) with init_args (a mapping)"
        message = f"{'.'.join(keys)} must be {expected}{_where('.'.join(keys), parser)}."
    elif keys:
        message = f"{'.'.join(keys)}: {KEY.sub('', reason).lstrip(': ')}"
    # One of the classes that may stand in a place has refused its settings.
    return reason if message.startswith(NO_SUBTYPE) else message


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what caused it, to the first cause."""
    while error is not None:
        yield error
        error = error.__cause__


def _in_one_line(message: str) -> str:
    return " ".join(message.split())


# ------------------------------------------------------------------------------ names


def _names(parser: ArgumentParser) -> list[str]:
    """Return the names of all settings of a parser."""
    return [
        option.removeprefix("--")
        for action in parser._actions
        for option in action.option_strings
        # Help, and additions to lists, are no settings of their own.
        if option.startswith("--")
        and not isinstance(action, _HelpAction)
        and not option.endswith((".help", "+", "print_shtab"))
    ]


def _about_unrecognized(text: str, parser: SettingsParser) -> str:
    unknown = [word for word in text.split() if word.startswith("-")]
    if not unknown:
        return f"{text} belongs to no option. Options begin with --."
    known = [f"--{name}" for name in _names(parser)]
    of = parser.prog.replace(" [options]", "")
    return " ".join(_about_unknown(word.partition("=")[0], known, of, parser) for word in unknown)


def _about_unknown(name: str, known: Sequence[str], of: str, parser: SettingsParser) -> str:
    text = f"{name} is not a setting of {of}{_where(name, parser)}."
    place, beside = _beside(name, known)
    if place == name.rpartition(".")[0]:
        near = get_close_matches(name.rpartition(".")[2], beside, 1)
        near = [f"{place}.{each}".lstrip(".") for each in near]
    else:
        near = get_close_matches(name, known, 1, 0.75)
    if near:
        return f"{text} Did you mean {near[0]}?"
    of_place = f"In {place.lstrip('-')} there are" if place else "There are"
    return f"{text} {of_place}: {_listed(beside, 'and')}."


def _beside(name: str, known: Sequence[str]) -> tuple[str, list[str]]:
    """Return the innermost group above an unknown name that exists, and the names in it."""
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


def alternatives(kind: Any) -> Iterator[str | type]:
    """Yield what a type hint allows: values as text, and classes.

    Args:
        kind: a type hint; a union and a callable's result are taken apart.
    """
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        yield from map(str, args)
    elif kind is bool:
        yield from ("true", "false")
    elif origin in {Union, UnionType}:
        for each in args:
            yield from alternatives(each)
    elif origin is Callable:
        yield from alternatives(args[-1])
    else:
        yield origin or kind


def _about_value(name: str, value: str, kind: Any, parser: SettingsParser) -> str:
    words: list[str] = []
    for each in alternatives(kind):
        if isinstance(each, str):
            words.append(each)
        else:
            words += [WORDS[each]] if each in WORDS else sorted(_subclasses(each), key=str.lower)
    words = list(dict.fromkeys(words))
    # The first line: jsonargparse explains further how a class is named.
    value = value.partition("\n")[0]
    given = "null" if value == "None" else value
    text = f"{name} must be {_listed(words, 'or')}, got {given}{_where(name, parser)}."
    near = get_close_matches(value, words, 1)
    return f"{text} Did you mean {near[0]}?" if near else text


def _subclasses(kind: type) -> set[str]:
    """Return the names of a class and those derived from it that settings may name.

    Abstract and private ones are left out, those that no module has, and what only the studies
    compare with.
    """
    names = set().union(*map(_subclasses, kind.__subclasses__()))
    hidden = (
        kind.__name__.startswith("_")
        or kind.__module__.startswith("mpo_lightning.studies")
        or getattr(sys.modules.get(kind.__module__), kind.__name__, None) is not kind
    )
    return names if isabstract(kind) or hidden else {kind.__name__, *names}


# ------------------------------------------------------------------------------ places


def check_environment(parser: ArgumentParser) -> None:
    """Refuse an environment variable that stands for no setting, which jsonargparse ignores.

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
    """Return the environment variable of a setting, as jsonargparse names it."""
    return f"{parser.env_prefix}_{name}".replace(".", "__").upper()


def _files_of(parser: SettingsParser) -> dict[str, bytes]:
    """Return name and content of the YAML files among a parser's arguments and variables."""
    words = parser.args
    names = [value for word, value in pairwise(words) if word in {"-c", "--config"}]
    names += [word.partition("=")[2] for word in words if word.startswith("--config=")]
    # Other settings may be read from a file, too.
    names += [name for word in words if (name := word.rpartition("=")[2]).endswith(SUFFIXES)]
    names.append(os.environ.get(_variable(parser, "config"), ""))
    paths = {name: parser._folder / Path(name).expanduser() for name in names if name}
    return {name: path.read_bytes() for name, path in paths.items() if path.is_file()}


def _where(name: str, parser: SettingsParser) -> str:
    """Return the file or variable that holds a setting, in parentheses; empty for an option."""
    options = [word.partition("=")[0] for word in parser.args]
    if f"--{name}" in [option.replace(".init_args", "") for option in options]:
        return ""
    for file, text in _files_of(parser).items():
        if _holds(yaml.safe_load(text), name.split(".")):
            return f" (in {file})"
    variable = _variable(parser, name)
    return f" (in {variable})" if variable in os.environ else ""


def _holds(settings: Any, keys: Sequence[str]) -> bool:
    """Return whether a file's settings contain a name; ``init_args`` is not part of names."""
    for key in keys:
        if isinstance(settings, dict) and key not in settings:
            settings = settings.get("init_args")
        if not isinstance(settings, dict) or key not in settings:
            return False
        settings = settings[key]
    return True


def _no_settings(found: Any) -> str:
    """Return why a file's content is no mapping with names as keys; an empty text if it is one."""
    if isinstance(found, dict):
        odd = next((f"{key}" for key in found if not isinstance(key, str)), None)
        faults = map(_no_settings, (each for each in found.values() if isinstance(each, dict)))
        return next(filter(None, faults), "") if odd is None else f"the key {odd} is no name"
    return "found no settings; expected a mapping of them"


def _about_yaml(
    message: str, causes: Sequence[BaseException], parser: SettingsParser
) -> str | None:
    """Return what is wrong with the YAML of a file, or of a value, if that is the reason."""
    for file, text in _files_of(parser).items():
        try:
            found = load_settings(text.decode())
            if message.startswith(NO_MAPPING) and (fault := _no_settings(found)):
                raise UnusableError(fault)
        except UnicodeDecodeError as error:
            return f"{file}: not UTF-8: {error.reason} at byte {error.start}."
        except UnusableError as error:
            return f"{file}: {error}."
        except yaml.reader.ReaderError as error:
            return f"{file}: not YAML: {error.reason} at character {error.position}."
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
            return f"{file}{place}: not YAML: {error.problem}."
    # A value of this kind is taken for another kind of value at first, and refused as such.
    said = "\n".join([message, *map(str, causes)]).lower()
    for value, fault in refused.items():
        # Of a file the message says no more than what its reader said.
        if value.lower() in said or str(fault).lower() in said:
            found = OTHER_FILE.search(said)
            return f"{found[1]}: {fault}." if found else f"{fault}."
    return None
