"""Files of a folder that ``sample`` or ``score`` writes: their names, and whether all are whole."""

import json
from collections.abc import Sequence
from pathlib import Path

from mpo_lightning.data.groups import DataError
from mpo_lightning.digests import SUMS_OF, check_sums
from mpo_lightning.errors import DamagedError

__all__ = ["SETTINGS", "check_parts", "check_rows", "is_of_parts", "part_name"]

SETTINGS = "settings.json"
REMEDY = "Remove the files of this part, and run the command that wrote the folder again."


def part_name(part: int) -> str:
    """Return what the names of a part's files begin with."""
    return f"part-{part:05d}"


def is_of_parts(folder: Path) -> bool:
    """Whether a folder is, or was once, one that ``sample`` or ``score`` writes."""
    try:
        found = json.loads((folder / SETTINGS).read_bytes())
    except (OSError, ValueError, RecursionError):
        found = None
    ours = isinstance(found, dict) and str(found.get("format")).startswith("mpo-lightning ")
    return ours or any(folder.glob(f"part-*{SUMS_OF}"))


def check_parts(folder: Path, rows: Sequence[Path]) -> None:
    """Check that all parts of a folder are there, and as they were written.

    Args:
        folder: the folder.
        rows: all files of rows in it.

    Raises:
        DamagedError: naming a file that is not what was written.
        DataError: if the folder is unfinished.
    """
    for path in rows:
        check_rows(path)
    settings = folder / SETTINGS
    try:
        found = json.loads(settings.read_bytes())["settings"]
        parts = range(-(-found["rows"] // found["rows_per_part"]))
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError) as error:
        raise DamagedError(settings, f"cannot be read ({error!r})", "Write it anew.") from error
    expected = [folder / f"{part_name(part)}.jsonl" for part in parts]
    for path in rows:
        if path not in expected:
            raise DamagedError(path, f"is none of the {len(parts)} parts of {settings}", REMEDY)
    missing = [path.name for path in expected if path not in rows]
    if missing:
        raise DataError(
            f"{folder} is unfinished: {len(parts) - len(missing)} of {len(parts)} parts are there; "
            f"the first that is not is {missing[0]}. Run the command that writes it again, or read "
            f"those that are there as {folder}/part-*.jsonl."
        )


def check_rows(path: Path) -> None:
    """Check the rows of a part, its report and the settings against the digests of the part.

    Raises:
        DamagedError: naming a file that is missing, or not what was written.
    """
    if path.name not in check_sums(path.with_suffix(SUMS_OF), remedy=REMEDY):
        raise DamagedError(path, "is not what its digests are of", REMEDY)
