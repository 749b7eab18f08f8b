"""Command line of the show case: `python -m mpo_lightning.showcase prompts|model|report`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mpo_lightning.errors import UserError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mpo_lightning.showcase",
        description="A real model on instructions whose constraints a program can verify.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    prompts = commands.add_parser("prompts", help="compose the prompts of each split")
    prompts.add_argument("--out", type=Path, required=True, help="folder of the files")
    prompts.add_argument("--seed", type=int, default=0)
    share = "part of each split that is written, its first prompts"
    prompts.add_argument("--share", type=float, default=1.0, help=share)
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
            from mpo_lightning.showcase.prompts import write_prompts

            write_prompts(options.out, options.seed, options.share)
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
