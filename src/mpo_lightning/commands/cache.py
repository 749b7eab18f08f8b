"""``mpo-lightning cache show|clear [ROOT]``: list or remove what runs keep on disk."""

import sys
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from mpo_lightning.commands.parser import SettingsParser
from mpo_lightning.data.prepare import cached_tokens, remove
from mpo_lightning.files import cache_folder
from mpo_lightning.model.reference_maintenance import clear, inspect
from mpo_lightning.printable import printable

__all__ = ["main"]

# Rows of a table, each a text for each column.
Rows = list[tuple[str, ...]]
CACHE_TITLES = ("name", "responses", "shards", "size", "dtype", "model", "state")
TOKEN_TITLES = ("name", "groups", "size", "source", "state")


def _cache_rows(root: Path) -> Rows:
    return [
        (
            cache.folder.name,
            "-" if cache.responses is None else f"{cache.responses:,}",
            f"{cache.shards:,}",
            f"{cache.bytes / 2**20:,.1f} MiB",
            cache.identity.get("dtype", "-"),
            cache.identity.get("model", "-"),
            cache.problem or "ok",
        )
        for cache in inspect(root)
    ]


def _token_rows(root: Path) -> Rows:
    return [
        (
            each.folder.name,
            "-" if each.groups is None else f"{each.groups:,}",
            f"{each.bytes / 2**20:,.1f} MiB",
            each.source or "-",
            each.problem or "ok",
        )
        for each in cached_tokens(root)
    ]


def _print_table(rows: Rows) -> None:
    shown = [[printable(cell).replace("\n", " ") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    for row in shown:
        print("  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip())


def _make_parser() -> SettingsParser:
    parsers = {}
    for name, purpose in {
        "show": "List the reference caches, and why any of them cannot be used.",
        "clear": "Remove the reference caches.",
    }.items():
        parsers[name] = SettingsParser(description=purpose)
        add = parsers[name].add_argument
        where = "folder of the caches. Defaults to the user's"
        add("root", nargs="?", type=str | None, default=None, help=where)
        add("--tokens", action="store_true", help="list or remove token ids of data sets instead")
    parsers["clear"].add_argument(
        "--name", type=str | None, default=None, help="remove only the cache of this name"
    )
    parser = SettingsParser(prog="mpo-lightning cache")
    commands = parser.add_subcommands(dest="action")
    for name, subparser in parsers.items():
        commands.add_subcommand(name, subparser)
    return parser


def main(args: list[str]) -> None:
    """Run ``mpo-lightning cache``.

    Args:
        args: arguments, beginning with the command's name.
    """
    chosen = _make_parser().parse_args(args[1:])
    given: Namespace = chosen[chosen.action]
    root = Path(given.root or cache_folder("tokens" if given.tokens else "reference")).expanduser()
    found: list[Any]
    if chosen.action == "clear":
        found = [e.folder for e in remove(root)] if given.tokens else clear(root, given.name)
        print(printable("".join(f"Removed {folder}\n" for folder in found)), end="")
    else:
        found = _token_rows(root) if given.tokens else _cache_rows(root)
        if found:
            _print_table([TOKEN_TITLES if given.tokens else CACHE_TITLES, *found])
        if any(state != "ok" for *_, state in found):
            sys.exit(1)
    if not found:
        print(printable(f"No {'token ids' if given.tokens else 'reference cache'} in {root}"))
