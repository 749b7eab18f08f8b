"""``mpo-lightning data check|convert|split FILE...``: check and prepare data before training."""

import sys
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from mpo_lightning.batch import TokenGroup
from mpo_lightning.commands.parser import SettingsParser
from mpo_lightning.data.check.report import CheckReport
from mpo_lightning.data.check.run import check
from mpo_lightning.data.check.view import draw_picture, format_report, format_warnings
from mpo_lightning.data.convert import convert
from mpo_lightning.data.groups import DataError
from mpo_lightning.data.reading import BadRows, Sources
from mpo_lightning.data.report import DataReport
from mpo_lightning.data.schemas.base import Schema
from mpo_lightning.data.show import show_groups
from mpo_lightning.data.split import Format, split
from mpo_lightning.data.tokens import Boundary, GroupTokenizer, PromptFormat, load_tokenizer
from mpo_lightning.losses import AboveMean, Partition
from mpo_lightning.losses.scores import AlphaUnit

__all__ = ["main"]


def _parser(purpose: str) -> SettingsParser:
    parser = SettingsParser(description=purpose)
    parser.add_argument(
        "files",
        nargs="+",
        type=str,
        help="a .jsonl, .json or .parquet file, a folder of them or of datasets' save_to_disk, or "
        "a hub id",
    )
    parser.add_argument(
        "--schema",
        type=Schema | None,
        help="format of the rows. Defaults to the one that the first row's columns show",
    )
    parser.add_argument(
        "--columns",
        type=dict[str, str] | None,
        help='columns to read under another name, as {"name in the file": "name to read it as"}',
    )
    parser.add_argument(
        "--split",
        type=str,
        default="train",
        help="split of a hub id or saved DatasetDict that is given without :SPLIT",
    )
    return parser


def _check_parser() -> SettingsParser:
    parser = _parser("Report the contents of files of scored groups, with warnings.")
    add = parser.add_argument
    add(
        "--tokenizer",
        type=str | None,
        help="folder or hub id; with one, tokens are counted",
    )
    add("--trust_remote_code", action="store_true", help="let a hub tokenizer run its own code")
    add("--max_length", type=int, default=2048, help="limit on prompt + response, in tokens")
    add("--prompt_format", type=PromptFormat, default="auto", help="as in data.prompt_format")
    add("--boundary", type=Boundary, default="strict", help="as in data.boundary")
    add("--show", type=int, default=0, help="number of first groups to show as training sees them")
    add(
        "--partition",
        type=Partition | None,
        help="rule for the chosen and rejected set, as in model.loss. Defaults to AboveMean",
    )
    add("--alpha", type=float, default=0.0, help="strength of the deviation weights, as in W-MPO")
    add("--power", type=float, default=1.0, help="exponent of the deviation")
    add(
        "--alpha_unit",
        type=AlphaUnit,
        default="score",
        help="unit of alpha",
    )
    add(
        "--by",
        type=list[str],
        default=["models", "source"],
        help="columns with a text for each response or row, by whose values the report is divided",
    )
    add("--json", type=str | None, help="file to write all numbers to")
    add("--picture", type=str | None, help="file of a figure, such as check.png (needs matplotlib)")
    add("--strict", action="store_true", help="fail on warnings, too")
    return parser


def _writing_parser(purpose: str) -> SettingsParser:
    parser = _parser(purpose)
    parser.add_argument("--force", action="store_true", help="overwrite existing output")
    parser.add_argument(
        "--bad_rows",
        type=BadRows,
        default="error",
        help="rows that cannot be used: fail (error) or leave them out (drop)",
    )
    return parser


def _sources(chosen: Namespace) -> Sources:
    return Sources(
        files=chosen.files,
        schema=chosen.schema,
        columns=chosen.columns,
        default_split=chosen.split,
    )


def _print_check(report: CheckReport) -> None:
    from rich.console import Console

    # Without colours where the output is no terminal; lines are never cut to a width.
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    console.print(format_report(report))
    warnings = format_warnings(report)
    console.print(f"\n{len(warnings)} warnings" if warnings else "\nNo warnings", style="bold")
    for text in warnings:
        name, _, rest = text.partition(":")
        console.print(name, style="bold yellow", end=":")
        console.print(rest)


def _check(chosen: Namespace) -> None:
    tokenizer: Any = None
    if chosen.tokenizer is not None:
        tokenizer = load_tokenizer(chosen.tokenizer, trust_remote_code=chosen.trust_remote_code)
    if chosen.show:
        if tokenizer is None:
            raise DataError("--show shows tokens: name a tokenizer, too (--tokenizer).")
        _show(chosen, tokenizer)
    report = check(
        chosen.files,
        schema=chosen.schema,
        columns=chosen.columns,
        default_split=chosen.split,
        tokenizer=tokenizer,
        max_length=chosen.max_length,
        prompt_format=chosen.prompt_format,
        boundary=chosen.boundary,
        partition=chosen.partition,
        alpha=chosen.alpha,
        power=chosen.power,
        alpha_unit=chosen.alpha_unit,
        by=chosen.by,
    )
    _print_check(report)
    if chosen.json is not None:
        try:
            Path(chosen.json).write_text(report.to_json(indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise DataError(f"{chosen.json}: cannot be written ({error}).") from error
    if chosen.picture is not None:
        draw_picture(report, chosen.picture)
    failed = report.total.read.failed
    if failed or not report.total.read.kept or (chosen.strict and report.warnings):
        sys.exit(1)


def _show(chosen: Namespace, tokenizer: Any) -> None:
    """Show the first groups that can be used, as many as wanted."""
    tokenize = GroupTokenizer(
        tokenizer,
        max_length=chosen.max_length,
        over_long="cut",
        prompt_format=chosen.prompt_format,
        boundary=chosen.boundary,
    )
    groups: list[TokenGroup] = []
    for name in chosen.files:
        for result in _sources(chosen).results(name):
            if len(groups) == chosen.show:
                break
            # The check reports the others.
            if result.group is not None:
                tokens = tokenize(result.group, DataReport(name))
                if tokens is not None:
                    groups.append(tokens)
    show_groups(groups, tokenizer, chosen.partition or AboveMean())


def _details(report: DataReport) -> str:
    return "\n".join([str(report), *(f"  {line}" for line in report.failures())])


def _convert(chosen: Namespace) -> None:
    reports = convert(_sources(chosen), chosen.out, bad_rows=chosen.bad_rows, force=chosen.force)
    print("\n".join(map(_details, reports)))
    print(f"Wrote {sum(report.kept for report in reports):,} groups to {chosen.out}")


def _split(chosen: Namespace) -> None:
    result = split(
        _sources(chosen),
        chosen.out,
        chosen.fractions,
        seed=chosen.seed,
        file_format=chosen.format,
        bad_rows=chosen.bad_rows,
        force=chosen.force,
    )
    print("\n".join([*map(_details, result.reports), str(result)]))


def _make_parser() -> SettingsParser:
    converter = _writing_parser("Write scored groups of any known format in canonical form.")
    converter.add_argument("--out", type=str, required=True, help="a .jsonl or .parquet file")
    splitter = _writing_parser("Divide scored groups by prompt, each prompt on one side only.")
    splitter.add_argument("--out", type=str, required=True, help="folder of the parts")
    splitter.add_argument(
        "--fractions",
        type=dict[str, float],
        default={"train": 0.9, "val": 0.05, "test": 0.05},
        help="names and shares of the parts; the shares sum to 1",
    )
    splitter.add_argument("--seed", type=int, default=0, help="seed of the division")
    splitter.add_argument("--format", type=Format, default="jsonl", help="file format")
    parsers = {"check": _check_parser(), "convert": converter, "split": splitter}
    parser = SettingsParser(prog="mpo-lightning data")
    commands = parser.add_subcommands(dest="action")
    for name, subparser in parsers.items():
        commands.add_subcommand(name, subparser)
    return parser


def main(args: list[str]) -> None:
    """Run ``mpo-lightning data``.

    Args:
        args: arguments, beginning with the command's name.
    """
    parser = _make_parser()
    parsed = parser.parse_args(args[1:])
    chosen = parser.instantiate(parsed)[parsed.action]
    {"check": _check, "convert": _convert, "split": _split}[parsed.action](chosen)
