"""Folders whose files are splits, as ``data split`` and data sets on the hub lay them out."""

import re
from collections.abc import Sequence
from pathlib import Path

from mpo_lightning.data.groups import DataError

__all__ = ["files_of_split"]

# What a word in a file's name says of its use.
USES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation"),
    **dict.fromkeys(("test", "testing", "heldout"), "test"),
}
_SHARD = re.compile(r"-\d+-of-\d+$")


def files_of_split(
    files: Sequence[Path], folder: str, split: str, default: str | None
) -> list[Path]:
    """Return the files that hold one split; all of them, if they are not of several splits.

    Args:
        files: the files of rows of a folder.
        folder: name of the folder, for messages.
        split: split that was asked for by name; "" for none.
        default: use that the rows are wanted for, if it is known: "train", "validation", "test".

    Raises:
        DataError: if the files are of several splits, and none or more than one of them is wanted.
    """
    names = {file: _SHARD.sub("", file.name.partition(".")[0]) for file in files}
    uses = {file: _use(name) for file, name in names.items()}
    there = f"its files are {', '.join(file.name for file in files)}"
    if split:
        found = [file for file in files if names[file] == split]
        found = found or [file for file in files if uses[file] == USES.get(split, split)]
    elif len(set(uses.values()) - {None}) < 2:
        return list(files)
    else:
        wanted = USES.get(default or "", default)
        found = [file for file in files if wanted is not None and uses[file] == wanted]
    kinds = {(names[file], "".join(file.suffixes)) for file in found}
    if len(kinds) == 1 and (split or None not in uses.values()):
        return found
    why = (
        "it is not said which split is wanted"
        if not (split or default)
        else f"none is named as {split or default}"
        if not found
        else "they are of several splits, and some of none"
        if len(kinds) == 1
        else f"{len(kinds)} kinds of them are named as {split or default}"
    )
    raise DataError(
        f"{folder}: {there}; {why}. Rows for training and for testing must not be mixed: name the "
        f"file, such as {(found or files)[0]}, or the split after a colon, as in "
        f"{folder}:{names[(found or files)[0]]}."
    )


def _use(name: str) -> str | None:
    """Return the use that the first or last word of a name tells."""
    words = re.split(r"[-_.]", name.lower())
    return USES.get(words[0]) or USES.get(words[-1])
