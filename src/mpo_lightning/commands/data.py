"""``mpo-lightning data check|convert|split FILE...``: check and prepare data before training."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpo_lightning.batch import TokenGroup
from mpo_lightning.commands.parser import SettingsParser
from mpo_lightning.data.check.report import CheckReport
from mpo_lightning.data.check.run import check
from mpo_lightning.data.check.view import draw_picture, format_report, format_warnings
from mpo_lightning.data.convert import convert
from mpo_lightning.data.groups import DataError
from mpo_lightning.data.reading import Sources
from mpo_lightning.data.rendering import RenderingRules
from mpo_lightning.data.report import DataReport
from mpo_lightning.data.show import show_groups
from mpo_lightning.data.split import Format, split
from mpo_lightning.data.tokens import GroupTokenizer, load_tokenizer
from mpo_lightning.losses import AboveMean
from mpo_lightning.printable import printable

__all__ = ["main"]


# Parameters of `check`, `convert` and `split` that are no settings, or are named otherwise here.
OTHERS: set[str | int] = {"files", "schema", "columns", "default_split", "transform", "tokenizer"}
OTHERS |= {"sources", "fractions", "file_format", "force"}


def _parser(purpose: str, function: Callable[..., Any]) -> SettingsParser:
    """Return a parser of files, how they are read, and a function's parameters."""
    parser = SettingsParser(description=purpose)
    parser.add_argument(
        "files",
        nargs="+",
        type=str,
        help="a .jsonl, .json, .csv, .tsv or .parquet file, a folder of them or of datasets' "
        "save_to_disk, or a hub id",
    )
    parser.add_class_arguments(Sources, skip={"files", "default_split"}, instantiate=False)
    parser.add_argument(
        "--split",
        type=str | None,
        help="split of a source of several splits that is given without :SPLIT (default: train; a "
        "folder of splits needs one)",
    )
    parser.add_function_arguments(function, skip=OTHERS)
    return parser


def _make_parser() -> SettingsParser:
    checker = _parser("Report the contents of files of scored groups, with warnings.", check)
    add = checker.add_argument
    add("--trust_remote_code", action="store_true", help="let a hub tokenizer run its own code")
    add("--show", type=int, default=0, help="number of first groups to show as training sees them")
    for name, purpose in (
        ("--tokenizer", "folder or hub id; with one, tokens are counted"),
        ("--json", "file to write all numbers to"),
        ("--picture", "file of a figure, such as check.png (needs matplotlib)"),
    ):
        add(name, type=str | None, default=None, help=purpose)
    add("--strict", action="store_true", help="fail on warnings, too")
    converter = _parser("Write scored groups of any known format in canonical form.", convert)
    splitter = _parser("Divide scored groups by prompt, each prompt on one side only.", split)
    splitter.add_argument(
        "--fractions",
        type=dict[str, float],
        default={"train": 0.9, "val": 0.05, "test": 0.05},
        help="names and shares of the parts; the shares sum to 1",
    )
    splitter.add_argument("--format", type=Format, default="jsonl", help="file format")
    for each in (converter, splitter):
        each.add_argument("--force", action="store_true", help="overwrite existing output")
    parser = SettingsParser(prog="mpo-lightning data")
    commands = parser.add_subcommands(dest="action")
    commands.add_subcommand("check", checker)
    commands.add_subcommand("convert", converter)
    commands.add_subcommand("split", splitter)
    return parser


def _print_check(report: CheckReport) -> None:
    from rich.console import Console

    # Without colours where the output is no terminal; lines are never cut to a width.
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    console.print(format_report(report))
    warnings = format_warnings(report)
    counted = f"{len(warnings)} warning{'s' * (len(warnings) > 1)}" if warnings else "No warnings"
    console.print(f"\n{counted}", style="bold")
    for text in warnings:
        name, _, rest = text.partition(":")
        console.print(name, style="bold yellow", end=":")
        console.print(rest)


def _check(
    sources: Sources,
    *,
    tokenizer: str | None,
    trust_remote_code: bool,
    show: int,
    json: str | None,
    picture: str | None,
    strict: bool,
    **settings: Any,
) -> None:
    loaded: Any = None
    if tokenizer is not None:
        loaded = load_tokenizer(tokenizer, trust_remote_code=trust_remote_code)
    if show:
        if loaded is None:
            raise DataError("--show shows tokens: name a tokenizer, too (--tokenizer).")
        _show(sources, show, loaded, settings)
    report = check(**vars(sources), tokenizer=loaded, **settings)
    _print_check(report)
    if json is not None:
        try:
            Path(json).expanduser().write_text(report.to_json(indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise DataError(f"{json}: cannot be written ({error}).") from error
    if picture is not None:
        draw_picture(report, Path(picture).expanduser())
    failed = report.total.read.failed + (report.trusted.read.failed if report.trusted else 0)
    if failed or not report.total.read.kept or (strict and report.warnings):
        sys.exit(1)


def _show(sources: Sources, count: int, tokenizer: Any, settings: dict[str, Any]) -> None:
    """Show the first groups that can be used, as many as wanted."""
    rules = {name: settings[name] for name in ("max_length", "prompt_format", "boundary")}
    tokenize = GroupTokenizer(
        tokenizer,
        over_long="cut",
        rendering=RenderingRules.counting(),
        template_arguments=settings["chat_template_kwargs"] or {},
        **rules,
    )
    groups: list[TokenGroup] = []
    for name in sources.files:
        for result in sources.results(name):
            if len(groups) == count:
                break
            # The check reports the others.
            if result.group is not None:
                tokens = tokenize(result.group, DataReport(name))
                if tokens is not None:
                    groups.append(tokens)
    show_groups(groups, tokenizer, settings["partition"] or AboveMean())


def _details(report: DataReport) -> str:
    return "\n".join([str(report), *(f"  {line}" for line in report.failures())])


def _convert(sources: Sources, *, out: str, **settings: Any) -> None:
    reports = convert(sources, out, **settings)
    wrote = f"Wrote {sum(report.kept for report in reports):,} groups to {out}"
    print(printable("\n".join([*map(_details, reports), wrote])))


def _split(sources: Sources, *, format: Format, **settings: Any) -> None:
    result = split(sources, file_format=format, **settings)
    print(printable("\n".join([*map(_details, result.reports), str(result)])))


def main(args: list[str]) -> None:
    """Run ``mpo-lightning data``.

    Args:
        args: arguments, beginning with the command's name.
    """
    parser = _make_parser()
    parsed = parser.parse_args(args[1:])
    chosen = parser.instantiate(parsed)[parsed.action].as_dict()
    sources = Sources(
        files=chosen.pop("files"),
        schema=chosen.pop("schema"),
        columns=chosen.pop("columns"),
        default_split=chosen.pop("split"),
    )
    actions: dict[str, Callable[..., None]]
    actions = {"check": _check, "convert": _convert, "split": _split}
    actions[parsed.action](sources, **chosen)
