"""Digests that are kept with what is written and checked when it is read.

A folder that is written whole holds ``mpo-lightning.sha256``, which ``sha256sum -c`` reads as well.
A file that is copied and renamed by itself, a checkpoint, ends with the digest of all that is
before: its *seal*. What comes from elsewhere has neither, and is not checked here.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mpo_lightning.errors import DamagedError

__all__ = [
    "AGAIN",
    "EXPORT",
    "RECORD",
    "SUMS",
    "SUMS_OF",
    "check_folder",
    "check_seal",
    "check_sums",
    "file_digest",
    "seal",
    "seal_of",
    "sums",
    "write_sums",
]

SUMS = "mpo-lightning.sha256"
# Suffix of the file of digests of a single file, in the place of its own.
SUMS_OF = ".sha256"
# Record of a training run in an adapter's folder, and what an exported folder says that it is.
RECORD = "training.json"
EXPORT = "export.json"
# Files that their owner is to change, and those that are read and must be listed.
OPEN = frozenset({"README.md"})
READ = frozenset({".arrow", ".jinja", ".json", ".safetensors"})
# Large files, which are read only where they are used.
LARGE = frozenset({".arrow", ".safetensors"})
LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
MARK = b"sha256:"
SEAL_SIZE = len(MARK) + 64
# What a ZIP archive (torch.save writes one) ends with: the length of its comment.
ARCHIVE_END, ARCHIVE_END_SIZE = b"PK\x05\x06", 22
BLOCK = 1 << 22
AGAIN = "Copy or write it again."


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------- folders


def sums(digests: Mapping[str, str]) -> bytes:
    """Return the content of a file of digests, each with the name of its file."""
    return "".join(f"{digest}  {name}\n" for name, digest in digests.items()).encode()


def write_sums(folder: Path) -> None:
    """Write ``mpo-lightning.sha256`` for the files of a folder and of those in it."""
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    names = sorted(found.keys() - {SUMS, *OPEN})
    with ThreadPoolExecutor() as pool:
        digests = pool.map(file_digest, [found[name] for name in names])
        (folder / SUMS).write_bytes(sums(dict(zip(names, digests, strict=True))))


def check_sums(path: Path, *, large: bool = True, remedy: str = AGAIN) -> set[str]:
    """Check the files that a file of digests lists, all beside or below it.

    Args:
        path: the file of digests.
        large: whether to read large files, too; otherwise they only have to be there.
        remedy: what to do about a damaged file.

    Returns:
        The names in it.

    Raises:
        DamagedError: naming a file that is missing, unreadable or another than was written.
    """
    try:
        *lines, end = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedError(path, f"cannot be read ({error})", remedy) from error
    digests = {}
    for number, line in enumerate([*lines, end] if end else lines, start=1):
        found = LINE.fullmatch(line)
        if found is None or number > len(lines):
            raise DamagedError(path, f"is damaged in line {number}", remedy)
        digests[found[2].removeprefix("./")] = found[1]
    for name in digests:
        if not (path.parent / name).is_file():
            raise DamagedError(path.parent / name, f"is missing; {path.name} lists it", remedy)
    names = [name for name in digests if large or Path(name).suffix not in LARGE]
    with ThreadPoolExecutor() as pool:
        now = pool.map(file_digest, [path.parent / name for name in names])
        try:
            for name, digest in zip(names, now, strict=True):
                if digest != digests[name]:
                    why = f"is damaged or of elsewhere: its SHA-256 is not that in {path.name}"
                    raise DamagedError(path.parent / name, why, remedy)
        except OSError as error:
            raise DamagedError(path.parent, f"cannot be read ({error})", remedy) from error
    return set(digests)


def check_folder(
    folder: Path,
    *,
    large: bool = True,
    required: Iterable[str] | None = (RECORD, EXPORT),
    remedy: str = AGAIN,
) -> None:
    """Check the files of a folder against its digests; without them it is from elsewhere.

    Args:
        folder: the folder; nothing is done if it is none.
        large: whether to read large files, too; otherwise they only have to be there.
        required: a folder with one of these files was written with digests, and must have them;
            None: any folder.
        remedy: what to do about a damaged file.

    Raises:
        DamagedError: naming a file that is missing, unreadable, another than was written, or not
            listed although it would be read.
    """
    path = folder / SUMS
    if not path.is_file():
        if required is None or any((folder / name).is_file() for name in required):
            raise DamagedError(path, "is missing, which is written with the other files", remedy)
        return
    listed = check_sums(path, large=large, remedy=remedy)
    here = {each.name for each in folder.iterdir() if each.suffix in READ}
    for name in sorted(here - listed):
        raise DamagedError(folder / name, f"is not of this folder: {SUMS} does not list it", remedy)


# ---------------------------------------------------------------------------------------- seals


def seal(path: Path) -> str:
    """Write the digest of a file at its end, as the comment of an archive, and return it."""
    with path.open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - ARCHIVE_END_SIZE))
        end = file.read()
        if end.startswith(ARCHIVE_END) and end.endswith(b"\0\0"):
            file.seek(-2, 2)
            file.write(SEAL_SIZE.to_bytes(2, "little"))
    digest = file_digest(path)
    with path.open("ab") as file:
        file.write(MARK + digest.encode())
    return digest


def seal_of(path: Path) -> str | None:
    """Return the digest at a file's end, which may be another than its content's; None without."""
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - SEAL_SIZE))
        found = re.fullmatch(MARK + rb"([0-9a-f]{64})", file.read())
    return found[1].decode() if found else None


def check_seal(path: Path, *, remedy: str) -> None:
    """Check a file against the digest at its end.

    Raises:
        DamagedError: if the file cannot be read, has none, or another content than was written.
    """
    content = hashlib.sha256()
    try:
        expected = seal_of(path)
        with path.open("rb") as file:
            left = file.seek(0, 2) - SEAL_SIZE
            file.seek(0)
            while left > 0 and (block := file.read(min(left, BLOCK))):
                content.update(block)
                left -= len(block)
    except OSError as error:
        raise DamagedError(path, f"cannot be read ({error.strerror or error})", remedy) from error
    if expected is None:
        why = "does not end with its digest: it is cut, damaged, or not of this package"
        raise DamagedError(path, why, remedy)
    if content.hexdigest() != expected:
        why = "is damaged: its content is not what was written (by the SHA-256 at its end)"
        raise DamagedError(path, why, remedy)
