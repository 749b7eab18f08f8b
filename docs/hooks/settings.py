"""Tables of settings, and the commands' help, made from the settings that the package keeps."""

import re
from collections.abc import Callable, Iterable
from unittest.mock import patch

from mpo_lightning.commands.help import page_of
from mpo_lightning.commands.help_data import Page, Setting, parts_of, read_pages
from mpo_lightning.commands.names import COMMANDS, RUN

__all__ = ["GENERATED"]


def _cell(text: str) -> str:
    """Return text as a cell of a table: one line, no bars, no markup of reStructuredText."""
    text = re.sub(r":\w+:`~?([^`]*)`", r"`\1`", text).replace("``", "`")
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _table(settings: Iterable[Setting]) -> str:
    lines = ["| setting | values | default | meaning |", "| --- | --- | --- | --- |"]
    for setting in settings:
        values = " or ".join(filter(None, [", ".join(setting.choices), *setting.kinds]))
        default = "none" if setting.default is None else f"`{setting.default}`"
        cells = [values, "required" if setting.required else default, setting.purpose]
        lines.append(f"| `{setting.name}` | {' | '.join(map(_cell, cells))} |")
    return "\n".join(lines)


def settings(name: str) -> str:
    """Return the table of a setting of fit, or of all those of a group such as ``model.policy``."""
    found = read_pages()["fit"].settings.values()
    return _table(each for each in found if f"{each.name}.".startswith(f"{name}."))


def _class(name: str, page: Page) -> str:
    table = _table(page.settings.values()) if page.settings else "No settings."
    return f"### {name}\n\n{page.purpose}\n\n{table}"


def classes(base: str) -> str:
    """Return a table of settings for each subclass of a base, such as ``SetLoss``."""
    return "\n\n".join(_class(name, page) for name, page in parts_of(base).items())


def commands(_: str) -> str:
    """Return the help of every command but the four of LightningCLI, as a terminal shows it."""
    parts = []
    for name, command in COMMANDS.items():
        if command.module == RUN:
            continue
        parts.append(f"## {name}\n\n{command.purpose}")
        for part in parts_of(name) or [""]:
            heading = f"### {name} {part}\n\n" if part else ""
            with patch.dict("os.environ", COLUMNS="100"):
                parts.append(f"{heading}~~~text\n{page_of(name, part)}\n~~~")
    return "\n\n".join(parts)


def overview(_: str) -> str:
    """Return a table of all commands and their purposes."""
    rows = [f"| `{name}` | {_cell(command.purpose)} |" for name, command in COMMANDS.items()]
    return "\n".join(["| command | purpose |", "| --- | --- |", *rows])


GENERATED: dict[str, Callable[[str], str]] = {
    "classes": classes,
    "commands": commands,
    "overview": overview,
    "settings": settings,
}
