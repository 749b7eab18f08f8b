"""``mpo-lightning cache show|clear [ROOT]``: the caches of the reference."""

import sys

from jsonargparse import ArgumentParser

from mpo_lightning.reference import clear, default_root, inspect

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
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    for row in (titles, *rows):
        print("  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip())
    if any(row[-1] != "ok" for row in rows):
        sys.exit(1)


def main(args: list[str]) -> None:
    """Run ``mpo-lightning cache``.

    Args:
        args: the arguments, the command's name first.
    """
    parsers = {}
    for name, purpose in {
        "show": "List the reference caches, and say what is wrong with one that is refused.",
        "clear": "Remove the reference caches.",
    }.items():
        parsers[name] = ArgumentParser(description=purpose)
        parsers[name].add_argument(
            "root", nargs="?", type=str, default=str(default_root()), help="the caches' folder"
        )
    parsers["clear"].add_argument("--name", type=str, help="remove only the cache of this name")
    parser = ArgumentParser(prog="mpo-lightning cache")
    commands = parser.add_subcommands(dest="action")
    for name, subparser in parsers.items():
        commands.add_subcommand(name, subparser, help=subparser.description)
    chosen = parser.parse_args(args[1:])
    if chosen.action == "show":
        _show_caches(chosen.show.root)
        return
    removed = clear(chosen.clear.root, chosen.clear.name)
    for folder in removed:
        print(f"Removed {folder}")
    if not removed:
        print(f"No reference cache in {chosen.clear.root}")
