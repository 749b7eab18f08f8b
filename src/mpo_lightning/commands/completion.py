"""``mpo-lightning completion bash``: a script that completes commands, settings and values.

A command line that takes seconds to start cannot be asked at every key: the script knows all names.
"""

import textwrap
from argparse import SUPPRESS
from collections.abc import Iterator
from importlib import import_module
from string import Template
from typing import Any, Literal, get_args, get_origin

from mpo_lightning.commands.help import (
    OWN_OPTIONS,
    RUN,
    arguments_of,
    function_settings,
    run_settings,
)
from mpo_lightning.commands.names import COMMANDS
from mpo_lightning.commands.parser import SettingsParser
from mpo_lightning.commands.signatures import Setting, settings_of, subclasses

__all__ = ["main", "make_parser", "options_of", "script"]

SHELLS = ("bash",)
# Settings whose values are classes of the package, which have settings of their own.
CLASSES = {
    "model.loss": ("mpo_lightning.losses", "SetLoss"),
    "model.loss.partition": ("mpo_lightning.losses", "Partition"),
}
# An option, and the values that it may have if they can be told.
Options = dict[str, tuple[str, ...]]

SCRIPT = Template(
    """\
# Completion of mpo-lightning in bash, written by: mpo-lightning completion bash

_mpo_lightning() {
    local current=$${COMP_WORDS[COMP_CWORD]} previous=$${COMP_WORDS[COMP_CWORD-1]}
    local names= values= name rest IFS=$$' \\t\\n'
    COMPREPLY=()
    # To bash "=" is a word of its own.
    if [ "$$current" = "=" ]; then
        current=
    elif [ "$$previous" = "=" ]; then
        previous=$${COMP_WORDS[COMP_CWORD-2]}
    fi
    case "$${COMP_WORDS[1]} $${COMP_WORDS[2]-}" in
$options
    esac
    if [ "$$COMP_CWORD" -eq 1 ]; then
        values='$commands'
    elif [ "$$COMP_CWORD" -eq 2 ]; then
        case "$${COMP_WORDS[1]}" in
$parts
        esac
    fi
    case "$$current" in
        -*)
            # Names up to their next dot, as folders: all of them would fill the screen.
            for name in $$names; do
                case "$$name" in
                    "$$current"*.*)
                        rest=$${name#"$$current"}
                        case "$$rest" in
                            *.*)
                                COMPREPLY+=("$$current$${rest%%.*}.")
                                compopt -o nospace 2>/dev/null
                                ;;
                            *) COMPREPLY+=("$$name") ;;
                        esac
                        ;;
                    "$$current"*) COMPREPLY+=("$$name") ;;
                esac
            done
            ;;
        *)
            if [ -n "$$values" ]; then
                COMPREPLY=($$(compgen -W "$$values" -- "$$current"))
            else
                compopt -o filenames 2>/dev/null
                IFS=$$'\\n'
                COMPREPLY=($$(compgen -f -- "$$current"))
            fi
            ;;
    esac
}

complete -F _mpo_lightning mpo-lightning
"""
)


def make_parser() -> SettingsParser:
    """The parser of ``mpo-lightning completion``."""
    parser = SettingsParser(
        prog="mpo-lightning completion",
        description="Print a script that completes commands, settings and values; bash reads it "
        'with: eval "$(mpo-lightning completion bash)"',
    )
    parser.add_argument("shell", choices=list(SHELLS), help="whose script")
    return parser


def main(args: list[str]) -> None:
    """Run ``mpo-lightning completion``.

    Args:
        args: the arguments, the command's name first.
    """
    make_parser().parse_args(args[1:])
    print(script(), end="")


def script() -> str:
    """The script for bash."""
    parts: dict[str, list[str]] = {}
    cases = []
    for name, command in COMMANDS.items():
        for part, options in options_of(name, command.module):
            if part:
                parts.setdefault(name, []).append(part)
            cases.append(_case(f'"{name} {part}"' if part else f'"{name} "*', options))
    return SCRIPT.substitute(
        commands=" ".join(COMMANDS),
        options=textwrap.indent("\n".join(cases), " " * 8),
        parts=textwrap.indent(
            "\n".join(f"{name}) values='{' '.join(words)}' ;;" for name, words in parts.items()),
            " " * 12,
        ),
    )


def _case(pattern: str, options: Options) -> str:
    valued = [
        f"        {option}) values='{' '.join(values)}' ;;"
        for option, values in options.items()
        if values
    ]
    inner = ['    case "$previous" in', *valued, "    esac"] if valued else []
    return "\n".join([f"{pattern})", f"    names='{' '.join(options)}'", *inner, "    ;;"])


# --------------------------------------------------------------------- where options are known


def options_of(command: str, module: str) -> Iterator[tuple[str, Options]]:
    """The options of a command, or of each of its parts.

    Args:
        command: the command's name.
        module: the module that runs it.

    Yields:
        The part's name, empty if the command has none, and its options.
    """
    if module == RUN:
        own = {option.partition(" ")[0]: () for option in OWN_OPTIONS}
        yield "", {**own, **_of_settings(run_settings(command)), **_of_classes()}
        return
    settings = function_settings(command, module)
    if settings is not None:
        named = [each for each in settings if each.name not in arguments_of(module)]
        yield "", {"--config": (), **_of_settings(named)}
        return
    parser = import_module(module).make_parser()
    chosen = [a for a in parser._actions if a.choices and not a.option_strings]
    if not chosen:
        yield "", _of_parser(parser)
    for action in chosen:
        # Parts have parsers of their own, unless they are mere values of a first argument.
        parsers = getattr(action, "_name_parser_map", dict.fromkeys(action.choices, parser))
        yield from ((name, _of_parser(inner)) for name, inner in parsers.items())


def _of_settings(settings: list[Setting]) -> Options:
    return {f"--{setting.name}": setting.choices for setting in settings}


def _of_classes() -> Options:
    """Names of the classes that a setting may be, and the settings of all of them."""
    options: Options = {}
    for setting, (module, base) in CLASSES.items():
        classes = subclasses(module, base)
        own = _of_settings([each for found in classes.values() for each in settings_of(found)])
        options[f"--{setting}"] = options[f"--{setting}.help"] = tuple(classes)
        for name, values in own.items():
            options.setdefault(f"--{setting}.{name.removeprefix('--')}", values)
    return options


def _of_parser(parser: Any) -> Options:
    options: Options = {}
    for action in parser._actions:
        kind = getattr(action, "_typehint", None)
        values = get_args(kind) if get_origin(kind) is Literal else action.choices or ()
        for option in action.option_strings:
            # What is added to every parser and does nothing is not for show.
            if option.startswith("--") and action.help != SUPPRESS:
                options[option] = tuple(map(str, values))
    return options
