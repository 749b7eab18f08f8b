"""Files that others see whole or not at all."""

import json
import os
import uuid
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

__all__ = ["RECORD", "cache_folder", "digest_of_file", "json_line", "public_name", "write_whole"]


def write_whole(path: Path, data: bytes) -> None:
    """Write a file under a name that nothing looks for, and give it its own when it is complete.

    Raises:
        OSError: if it cannot be written; what was there before is untouched.
    """
    partial = path.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def cache_folder(kind: str) -> Path:
    """The folder of the caches of one kind ("reference", "tokens") where none is named.

    ``MPO_LIGHTNING_CACHE`` says where it is; it lies in the user's cache folder otherwise.
    """
    own = os.environ.get("MPO_LIGHTNING_CACHE")
    if own:
        return Path(own) / kind
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "mpo-lightning" / kind


def json_line(row: Mapping[str, Any]) -> bytes:
    """A row as a line of JSON, in UTF-8."""
    # Parquet and datasets rows may hold dates and the like, which JSON has no form for.
    try:
        return (json.dumps(row, ensure_ascii=False, default=str) + "\n").encode()
    except UnicodeEncodeError:
        # Half a character in a column that passes through; escaped, it stays what it was.
        return (json.dumps(row, default=str) + "\n").encode()


def digest_of_file(path: Path) -> str:
    """Of a file's content."""
    content = blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            content.update(block)
    return content.hexdigest()


RECORD = "training.json"


def public_name(source: str) -> str:
    """A file or folder (and a split after a colon) without what is above it; a hub id as it is."""
    path, colon, split = source.partition(":")
    return f"{Path(path).resolve().name}{colon}{split}" if Path(path).exists() else source
