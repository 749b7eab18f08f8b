"""Command line of the show case: `python -m mpo_lightning.showcase prompts|model|report`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mpo_lightning.errors import UserError
from mpo_lightning.showcase.prompts import SPLITS, write_prompts


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mpo_lightning.showcase",
        description="A real model on instructions whose constraints a program can verify.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    prompts = commands.add_parser("prompts", help="compose the prompts of each split")
    prompts.add_argument("--out", type=Path, required=True, help="folder of the files")
    prompts.add_argument("--seed", type=int, default=0)
    for split, (count, _) in SPLITS.items():
        number = f"number of prompts, from its first; {count} if not set"
        prompts.add_argument(f"--{split}", type=int, default=count, help=number)
    model = commands.add_parser("model", help="write SmolLM2-135M-Instruct in float32")
    model.add_argument("--out", type=Path, required=True, help="folder of the model")
    report = commands.add_parser("report", help="print and draw before and after")
    report.add_argument("--run", type=Path, required=True, help="folder of the run")
    return parser


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: Arguments. Defaults to those of the process.
    """
    options = _parser().parse_args(args)
    try:
        if options.command == "prompts":
            sizes = {split: getattr(options, split.replace("-", "_")) for split in SPLITS}
            write_prompts(options.out, options.seed, sizes)
        elif options.command == "model":
            from mpo_lightning.showcase.model import write_model

            write_model(options.out)
        else:
            from mpo_lightning.showcase.report import report

            report(options.run)
    except (UserError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
