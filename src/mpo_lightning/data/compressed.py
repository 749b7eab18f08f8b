"""Compressed files, unpacked beside the system's other temporary files while they are read."""

import gzip
import os
import shutil
import weakref
import zlib
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from mpo_lightning.data.groups import DataError
from mpo_lightning.data.row_source import RowSource, SameFiles

__all__ = ["COMPRESSED", "open_unpacked"]


def _open_zst(path: Path) -> Any:
    import pyarrow

    return pyarrow.input_stream(str(path), compression="zstd")


COMPRESSED: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".zst": _open_zst}


def open_unpacked(path: Path, open_file: Callable[[Path], RowSource], name: str) -> RowSource:
    """Open the rows of a compressed file.

    Any row can be read only where the file can be entered anywhere, so it is unpacked to the disk,
    a block at a time. The unpacked file is removed with the source, or when the process ends.

    Args:
        path: file whose last suffix is one of `COMPRESSED`.
        open_file: opens the unpacked file.
        name: name of the source.

    Raises:
        DataError: if it is damaged, or does not fit onto the disk.
    """
    folder = Path(mkdtemp(prefix="mpo-lightning-"))
    try:
        unpacked = folder / path.stem
        try:
            with (
                SameFiles(path).reading(),
                COMPRESSED[path.suffix](path) as packed,
                unpacked.open("wb") as file,
            ):
                shutil.copyfileobj(packed, file, 1 << 20)
        # What a damaged file raises depends on where it is damaged.
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"{name}: cannot be unpacked into {folder.parent} ({error}). Pack it again, or "
                "name a folder with room in TMPDIR."
            ) from error
        source = open_file(unpacked)
    except BaseException:
        shutil.rmtree(folder)
        raise
    weakref.finalize(source, _remove, folder, os.getpid())
    return source


def _remove(folder: Path, owner: int) -> None:
    # A process that was forked for a part of the work has the same finalizers.
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
