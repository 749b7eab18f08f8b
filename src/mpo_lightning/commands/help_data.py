"""Settings of all commands and classes, as ``help.jsonl`` keeps them.

The command line takes seconds to import what its parsers are made of; a page of help must not. The
file is written from these parsers by ``docs/hooks/collect_help.py`` (``make format``).
"""

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["FILE", "Page", "Setting", "parts_of", "read_pages"]

FILE = Path(__file__).with_name("help.jsonl")


class Setting(NamedTuple):
    """A setting of a command or class.

    Args:
        name: name, with dots between levels.
        purpose: the docstring's text.
        default: default in YAML, or None if it is null.
        choices: values of a setting that has few of them, and names of classes of this package.
        kinds: other values that may be given, in words.
        base: name of the class of this package whose subclasses may be given.
        required: whether it has to be given.
        usage: how it stands in the usage line, if it is given by its place and without its name.
        flag: whether it is an option without a value.
    """

    name: str
    purpose: str
    default: str | None = None
    choices: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    base: str = ""
    required: bool = False
    usage: str = ""
    flag: bool = False

    @property
    def group(self) -> str:
        """Name without its last part; empty at the top level."""
        return self.name.rpartition(".")[0]


class Page(NamedTuple):
    """Settings of a command, of a part of one (``data check``), or of a class (``SetLoss MPO``).

    Args:
        purpose: what the command or class does.
        settings: settings by name.
        groups: purpose of each group of settings by the group's name.
        file: whether settings can be read from a file (``--config``).
    """

    purpose: str
    settings: dict[str, Setting]
    groups: dict[str, str] = {}  # noqa: RUF012 (never changed)
    file: bool = False


@cache
def read_pages() -> dict[str, Page]:
    """Return all pages by name."""
    pages: dict[str, Page] = {}
    name = ""
    for line in FILE.read_text(encoding="utf-8").splitlines():
        entry: dict[str, Any] = json.loads(line)
        if "page" in entry:
            name = entry.pop("page")
            # fit, validate, test and predict differ in few settings.
            like = pages[entry.pop("like")] if "like" in entry else Page("", {})
            pages[name] = like._replace(**{"settings": dict(like.settings), **entry})
        else:
            lists = {key: tuple(value) for key, value in entry.items() if isinstance(value, list)}
            pages[name].settings[entry["name"]] = Setting(**(entry | lists))
    return pages


def parts_of(command: str) -> dict[str, Page]:
    """Return the pages of a command's parts (``check`` of ``data``) or of a class's subclasses.

    Args:
        command: name of a command, or of the base class.
    """
    found = {name.partition(" "): page for name, page in read_pages().items()}
    return {part: page for (first, _, part), page in found.items() if first == command and part}
