"""``mpo-lightning completion bash``: a script that completes commands, settings and values.

A command line that takes seconds to start cannot be asked at every key; the script holds all names.
"""

from pathlib import Path

from mpo_lightning.commands.help import RUN_OPTIONS
from mpo_lightning.commands.help_data import Page, parts_of, read_pages
from mpo_lightning.commands.names import COMMANDS, RUN
from mpo_lightning.commands.parser import SettingsParser

__all__ = ["main", "options_of", "script"]

# Stands for an argument without a name.
ARGUMENT = "-"


def main(args: list[str]) -> None:
    """Run ``mpo-lightning completion``.

    Args:
        args: arguments, beginning with the command's name.
    """
    parser = SettingsParser(
        prog="mpo-lightning completion",
        description=f"{COMMANDS['completion'].purpose}\n\n"
        'To use it in this shell: eval "$(mpo-lightning completion bash)"',
    )
    parser.add_argument("shell", choices=["bash"], help="shell to write the script for")
    parser.parse_args(args[1:])
    print(script(), end="")


def script() -> str:
    """Return the script for bash: a table of all options, and a function that looks them up."""
    options = {"mpo-lightning": {ARGUMENT: tuple(COMMANDS)}}
    for command in COMMANDS:
        parts = parts_of(command)
        options[command] = {ARGUMENT: tuple(parts)} if parts else options_of(command)
        options |= {f"{command}/{part}": options_of(f"{command} {part}") for part in parts}
    # Options that commands have in common, such as fit and validate, take one line.
    rows: dict[tuple[str, str], list[str]] = {}
    for command, found in options.items():
        for option, values in found.items():
            rows.setdefault((option, " ".join(values)), []).append(command)
    table = [f"{' '.join(commands)}|{name}|{values}" for (name, values), commands in rows.items()]
    functions = Path(__file__).with_name("completion.bash").read_text(encoding="utf-8")
    return "\n".join(["_mpo_lightning_settings='", *table, "'", functions])


def options_of(command: str) -> dict[str, tuple[str, ...]]:
    """Return the options of a command, each with its values as far as they can be listed.

    Args:
        command: name of the command, or of a part of one such as ``data check``.
    """
    page = read_pages()[command]
    own = ["--help", *(["--config", "--print_config"] if page.file else [])]
    if COMMANDS[command.split(maxsplit=1)[0]].module == RUN:
        own += [option.partition(" ")[0] for option in RUN_OPTIONS]
    return dict.fromkeys(own, ()) | _settings(page)


def _settings(page: Page, start: str = "--") -> dict[str, tuple[str, ...]]:
    """Return the settings of a page, and of the classes that may be chosen on it."""
    options: dict[str, tuple[str, ...]] = {}
    for setting in page.settings.values():
        name = ARGUMENT if setting.usage else start + setting.name
        options.setdefault(name, setting.choices)
        if setting.base:
            options[f"{name}.help"] = setting.choices
        for inner in parts_of(setting.base).values() if setting.base else ():
            options = _settings(inner, f"{name}.") | options
    return options
