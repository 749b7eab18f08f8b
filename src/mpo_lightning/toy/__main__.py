"""Command line of the toy world: `python -m mpo_lightning.toy build|report`."""

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
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
    build.add_argument("--seed", type=int, default=0)
    report = commands.add_parser("report", help="compare an adapter with its base")
    report.add_argument("--world", type=Path, required=True, help="folder of the world")
    report.add_argument("--adapter", type=Path, required=True, help="folder of the PEFT adapter")
    report.add_argument("--out", type=Path, required=True, help="folder of the report")
    report.add_argument("--metrics", type=Path, help="metrics.csv of Lightning's CSVLogger")
    report.add_argument("--seed", type=int, default=0)
    return parser


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: Arguments; by default those of the process.
    """
    parser = _parser()
    options = parser.parse_args(args)
    if options.command == "build":
        from mpo_lightning.toy.world import build

        try:
            build(options.out, options.seed)
        except FileExistsError as error:
            parser.exit(2, f"{error}\n")
        return

    from mpo_lightning.toy.report import evaluate, read_curves, write_report

    # What can be told at once is told before minutes of sampling.
    if find_spec("matplotlib") is None:
        parser.exit(2, "the picture needs matplotlib: pip install 'mpo-lightning[plots]'\n")
    if options.metrics is not None:
        try:
            read_curves(options.metrics)
        except (FileNotFoundError, ValueError) as error:
            parser.exit(2, f"{error}\n")
    try:
        report = evaluate(options.world, options.adapter, seed=options.seed)
    except FileNotFoundError as error:
        parser.exit(2, f"{error}\n")
    write_report(report, options.out, options.metrics)


if __name__ == "__main__":
    main()
