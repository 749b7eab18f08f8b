"""Division of scored groups by prompt, each prompt in one part only."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal

from mpo_lightning.batch import Prompt
from mpo_lightning.checks import check_arguments
from mpo_lightning.data.groups import DataError
from mpo_lightning.data.prompt_identity import prompt_key
from mpo_lightning.data.reading import BadRows, Sources, refuse_lost_rows
from mpo_lightning.data.report import DataReport
from mpo_lightning.data.writing import SUFFIXES, arrow_schema, check_target, open_writers

__all__ = ["SplitReport", "split", "uniform_hash"]

Format = Literal["jsonl", "parquet"]


@dataclass(frozen=True, kw_only=True)
class SplitReport:
    """Result of a division.

    Attributes:
        reports: report on the rows of each file.
        fractions: wanted share of each part.
        groups: number of groups of each part.
        files: file of each part.
    """

    reports: list[DataReport]
    fractions: dict[str, float]
    groups: dict[str, int]
    files: dict[str, Path]

    def __str__(self) -> str:
        """Return a line for each part."""
        whole = sum(self.groups.values())
        parts = [
            f"{self.files[name]}: {count:,} groups, {count / whole:.2%} (wanted "
            f"{self.fractions[name]:.2%})"
            for name, count in self.groups.items()
        ]
        return "\n".join(parts)


def uniform_hash(prompt: Prompt, seed: int = 0) -> float:
    """Return a number in [0, 1) that is uniform over prompts and the same for the same prompt.

    It depends only on the normalised prompt (see `prompt_key`) and the seed.
    """
    salt = seed.to_bytes(16, "little", signed=True)
    # A float holds 53 bits: with more, the number could be rounded to 1.
    return (int.from_bytes(prompt_key(prompt, salt=salt), "little") >> 11) / 2**53


def split(
    sources: Sources,
    out: str | Path,
    fractions: Mapping[str, float],
    *,
    seed: int = 0,
    file_format: Format = "jsonl",
    bad_rows: BadRows = "error",
    force: bool = False,
) -> SplitReport:
    """Divide the groups of all files by prompt, into one file per part.

    Groups with the same prompt (ignoring case, white space and compatibility forms of characters)
    go to the same part. The part depends only on the prompt, the seed and the fractions: adding
    rows moves no other prompt. The parts have approximately the wanted shares.

    Args:
        sources: files to read.
        out: folder of the parts, created if missing.
        fractions: names of the parts and their shares, which sum to 1.
        seed: seed of the division.
        file_format: "jsonl" or "parquet".
        bad_rows: "error" writes nothing if a row cannot be used; "drop" leaves such rows out.
        force: whether to overwrite existing files of the parts.

    Raises:
        DataError: if a setting cannot be used, rows are bad, a part gets no group, or the folder
            has files that must not be overwritten.
    """
    check_arguments(split, locals())
    _check_fractions(fractions)
    folder = Path(out).expanduser()
    files = {name: folder / f"{name}.{file_format}" for name in fractions}
    for path in files.values():
        check_target(path, force=force)
    _refuse_other_files(folder, set(files.values()))
    schema = arrow_schema(sources.groups([])) if file_format == "parquet" else None
    folder.mkdir(parents=True, exist_ok=True)
    ends = list(accumulate(fractions.values()))
    # The sum may have been rounded.
    ends[-1] = 1.0
    reports: list[DataReport] = []
    with open_writers(list(files.values()), schema) as writers:
        for group in sources.groups(reports):
            number = uniform_hash(group.prompt, seed)
            writers[next(i for i, end in enumerate(ends) if number < end)].write(group, reports[-1])
        refuse_lost_rows(reports, bad_rows)
        groups = {name: w.groups for name, w in zip(fractions, writers, strict=True)}
        empty = [name for name, count in groups.items() if not count]
        if empty:
            raise DataError(
                f"{', '.join(empty)}: gets none of {sum(groups.values())} groups; nothing was "
                "written. Give it a larger fraction, or use another seed."
            )
    return SplitReport(reports=reports, fractions=dict(fractions), groups=groups, files=files)


def _check_fractions(fractions: Mapping[str, float]) -> None:
    wrong = [name for name in fractions if not re.fullmatch(r"[\w-]+", name)]
    if wrong:
        raise DataError(f"fractions: {wrong} cannot name files. Use letters, digits, - and _.")
    positive = all(share > 0 for share in fractions.values())
    if not positive or abs(sum(fractions.values()) - 1) > 1e-9:
        raise DataError(
            f"fractions: found {dict(fractions)}; expected shares above 0 that sum to 1, such as "
            '{"train": 0.9, "val": 0.05, "test": 0.05}.'
        )


def _refuse_other_files(folder: Path, own: set[Path]) -> None:
    """Refuse a folder with other parts, which could share prompts with the new ones."""
    if folder.is_dir():
        others = sorted(
            path.name for path in folder.iterdir() if path.suffix in SUFFIXES and path not in own
        )
        if others:
            raise DataError(
                f"{folder}: holds other files of rows ({', '.join(others)}), which may share "
                "prompts with the new ones. Remove them, or name another folder."
            )
