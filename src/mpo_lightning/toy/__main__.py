"""Command line of the toy world: `python -m mpo_lightning.toy build|report`."""

import argparse
from collections.abc import Sequence
from pathlib import Path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mpo_lightning.toy", description="The offline world of the quick start."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser(
        "build", help="make the tokenizer, the base model and the scored groups"
    )
    build.add_argument("--out", type=Path, required=True, help="folder of the world")
    report = commands.add_parser("report", help="print the quick start's table, draw the curves")
    report.add_argument("--run", type=Path, required=True, help="folder of the run")
    for command in (build, report):
        command.add_argument("--seed", type=int, default=0)
    return parser


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: Arguments. Defaults to those of the process.
    """
    parser = _parser()
    options = parser.parse_args(args)
    try:
        if options.command == "build":
            from mpo_lightning.toy.world import build

            build(options.out, options.seed)
        else:
            from mpo_lightning.toy.report import report

            report(options.run, options.seed)
    except (FileExistsError, FileNotFoundError) as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
