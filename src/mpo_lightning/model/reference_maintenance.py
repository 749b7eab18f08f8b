"""Maintenance of reference caches: list them, check them, remove them (``mpo-lightning cache``)."""

import json
import re
from pathlib import Path
from typing import NamedTuple

from mpo_lightning.model.reference_cache import (
    DESCRIPTION,
    FORMAT,
    SHARDS,
    ReferenceCache,
    ReferenceCacheError,
    clear_command,
    identity_digest,
    read_identity,
)

__all__ = ["CacheInfo", "clear", "inspect"]

# Names in a cache's folder; killed writers leave files whose names begin with a dot.
OWN_FOLDER = re.compile(r"[0-9a-f]{16}")
OWN_FILE = re.compile(r"cache\.json|responses-[0-9a-f]{32}\.parquet|\.[0-9a-f]{32}\.partial")


class CacheInfo(NamedTuple):
    """State of one folder below the root.

    Attributes:
        folder: the cache's folder.
        responses: number of values; None where they cannot be read.
        shards: number of shard files.
        bytes: size of all files together.
        identity: what the values depend on; empty where it cannot be read.
        problem: error with which the cache is refused; None for a sound one.
    """

    folder: Path
    responses: int | None
    shards: int
    bytes: int
    identity: dict[str, str]
    problem: str | None


def _folders(root: str | Path) -> list[Path]:
    root = Path(root).expanduser()
    return sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []


def inspect(root: str | Path) -> list[CacheInfo]:
    """Read every folder below the root in full and report its state."""
    found = []
    for folder in _folders(root):
        responses, problem, identity = None, None, dict[str, str]()
        try:
            identity = read_identity(folder)
            name = identity_digest(identity)[:16]
            if folder.name != name:
                raise ReferenceCacheError(
                    f"{folder / DESCRIPTION}: is of another reference, whose cache is named "
                    f"{name}. Rename the folder or remove it: {clear_command(folder)}"
                )
            responses = len(ReferenceCache(folder.parent, identity))
        except ReferenceCacheError as error:
            problem = str(error)
        shards = len(list(folder.glob(SHARDS)))
        size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
        found.append(CacheInfo(folder, responses, shards, size, identity, problem))
    return found


def _require_cache(folder: Path) -> None:
    """Check that a folder holds a cache, whole or damaged, and nothing else.

    Raises:
        ReferenceCacheError: if it holds anything else.
    """
    files = list(folder.iterdir())
    foreign = [p.name for p in files if not OWN_FILE.fullmatch(p.name) or not p.is_file()]
    try:
        content = json.loads((folder / DESCRIPTION).read_bytes())
        described = isinstance(content, dict) and content.get("format") == FORMAT
    except (OSError, ValueError):
        # Damaged or never written: the folder's name has to do.
        described = OWN_FOLDER.fullmatch(folder.name) is not None
    if foreign or not described:
        found = f"holds {', '.join(sorted(foreign))}" if foreign else "is not described as one"
        raise ReferenceCacheError(
            f"{folder}: not a reference cache: it {found}. Nothing was removed. Name the cache to "
            "be cleared, or move this folder away."
        )


def clear(root: str | Path, name: str | None = None) -> list[Path]:
    """Remove one cache, or all below the root.

    Args:
        root: the folder of all caches.
        name: name of one cache's folder. Defaults to all of them.

    Returns:
        The folders removed.

    Raises:
        ReferenceCacheError: naming a folder that is not a cache; nothing is removed then.
    """
    folders = _folders(root)
    if name is not None:
        names = [folder.name for folder in folders]
        if name not in names:
            raise ReferenceCacheError(
                f"{root}: no cache named {name}; found {', '.join(names) or 'none'}."
            )
        folders = [folders[names.index(name)]]
    for folder in folders:
        _require_cache(folder)
    for folder in folders:
        # cache.json last: a new process would refuse shards without it.
        for path in sorted(folder.iterdir(), key=lambda path: path.name == DESCRIPTION):
            path.unlink(missing_ok=True)
        folder.rmdir()
    return folders
