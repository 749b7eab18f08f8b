"""``mpo-lightning cache show|clear [ROOT]``: list or remove what runs keep on disk."""

import sys
from pathlib import Path

from jsonargparse import Namespace

from mpo_lightning.commands.parser import SettingsParser
from mpo_lightning.data.prepare import cached_tokens, remove
from mpo_lightning.files import cache_folder
from mpo_lightning.model.reference_maintenance import clear, inspect

__all__ = ["main"]


def _show_caches(root: str) -> None:
    titles = ("name", "responses", "shards", "size", "dtype", "model", "state")
    rows = [
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
    if not rows:
        print(f"No reference cache in {root}")
        return
    _print_table([titles, *rows])
    if any(row[-1] != "ok" for row in rows):
        sys.exit(1)


def _print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip())


def _tokens(action: str, root: Path) -> None:
    found = cached_tokens(root) if action == "show" else remove(root)
    if not found:
        print(f"No token ids in {root}")
        return
    if action == "clear":
        for each in found:
            print(f"Removed {each.folder}")
        return
    rows = [
        (each.folder.name, f"{each.groups:,}", f"{each.bytes / 2**20:,.1f} MiB", each.source)
        for each in found
    ]
    _print_table([("name", "groups", "size", "source"), *rows])


def _make_parser() -> SettingsParser:
    parsers = {}
    for name, purpose in {
        "show": "List the reference caches, and why any of them cannot be used.",
        "clear": "Remove the reference caches.",
    }.items():
        parsers[name] = SettingsParser(description=purpose)
        parsers[name].add_argument(
            "root",
            nargs="?",
            type=str | None,
            help="folder of the caches. Defaults to the user's",
        )
        parsers[name].add_argument(
            "--tokens",
            action="store_true",
            help="list or remove token ids of data sets instead",
        )
    parsers["clear"].add_argument("--name", type=str, help="remove only the cache of this name")
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
    of_action: Namespace = chosen[chosen.action]
    if of_action.tokens:
        _tokens(chosen.action, Path(of_action.root or cache_folder("tokens")))
        return
    root = of_action.root or str(cache_folder("reference"))
    if chosen.action == "show":
        _show_caches(root)
        return
    removed = clear(root, of_action.name)
    for folder in removed:
        print(f"Removed {folder}")
    if not removed:
        print(f"No reference cache in {root}")
