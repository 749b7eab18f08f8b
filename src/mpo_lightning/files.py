"""Files and folders that others see whole or not at all; digests, cache folders, public names."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

from mpo_lightning.digests import AGAIN, RECORD, seal_of, write_sums
from mpo_lightning.errors import DamagedError

__all__ = [
    "adapter_folder",
    "cache_folder",
    "digest_of_files",
    "in_transformers",
    "json_line",
    "naming",
    "other_save",
    "public_name",
    "read_json",
    "to_disk",
    "whole_file",
    "whole_folder",
    "write_whole",
]


def to_disk(path: Path) -> None:
    """Flush a file to the disk: after a power cut a name must not stand for half its content."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


@contextmanager
def naming(path: Path, *, hidden: Path | None = None, remedy: str | None = None) -> Iterator[None]:
    """Have errors of the system name a path, if they name none, or one that the user did not give.

    A full disk is noticed when a file is written or closed, and such errors name no file.

    Args:
        path: the path.
        hidden: place of a file that is to become this path.
        remedy: what to do, as a note of the error.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and (
            error.filename is None or str(error.filename) == str(hidden)
        ):
            error.filename = str(path)
        if remedy is not None:
            error.add_note(remedy)
        raise


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a hidden place beside ``path`` to write a file at; it becomes ``path`` at the end.

    Several processes may write the same path at once: the last one's file stays.

    Raises:
        OSError: if it cannot be written; what was there before is untouched, as it is after any
            error inside the block.
    """
    partial = path.with_name(f".{uuid.uuid4().hex}.partial")
    with naming(path, hidden=partial):
        try:
            yield partial
            to_disk(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file's content as a `whole_file`."""
    with whole_file(path) as partial:
        partial.write_bytes(data)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield an empty hidden folder beside ``path`` to write into; it replaces ``path`` at the end.

    It gets a ``mpo-lightning.sha256``, see `digests.check_folder`.

    One process at a time may write a path: what a killed one has left beside it is removed.

    Raises:
        OSError: if it cannot be written; what was there before is untouched, as it is after any
            error inside the block.
    """
    partial, old = (path.with_name(f".{path.name}.{kind}") for kind in ("partial", "old"))
    try:
        with naming(path, hidden=partial):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            write_sums(partial)
            for file in partial.rglob("*"):
                if file.is_file():
                    to_disk(file)
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)
                path.rename(old)
            partial.rename(path)
            shutil.rmtree(old, ignore_errors=True)
    except Exception as error:
        # safetensors and tokenizers report a full disk and the like by exceptions of their own.
        if isinstance(error, OSError) or "(os error " not in str(error):
            raise
        raise OSError(str(error)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def in_transformers(name: str) -> tuple[str, dict[str, str]]:
    """Return what transformers' ``from_pretrained`` is given for a model's or tokenizer's name.

    Args:
        name: a hub id, a folder, a file in GGUF (``.gguf``), or a folder that holds one such file
            and no ``config.json``.

    Returns:
        the hub id or folder, and further arguments.
    """
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return str(path.resolve().parent), {"gguf_file": path.name}
    if path.is_dir() and not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return str(path.resolve()), {"gguf_file": files[0].name}
    return name, {}


def cache_folder(kind: str) -> Path:
    """Return the default folder for caches of one kind, "reference" or "tokens".

    It lies in the folder that the environment variable ``MPO_LIGHTNING_CACHE`` names, and defaults
    to ``mpo-lightning`` in the user's cache folder.
    """
    own = os.environ.get("MPO_LIGHTNING_CACHE")
    if own:
        return Path(own).expanduser() / kind
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "mpo-lightning" / kind


def json_line(row: Mapping[str, Any]) -> bytes:
    """Return a row as a line of JSON, in UTF-8."""
    # Parquet and datasets rows may hold dates and the like, which JSON has no form for.
    try:
        return (json.dumps(row, ensure_ascii=False, default=str) + "\n").encode()
    except UnicodeEncodeError:
        # A lone surrogate in a column that passes through: escaped, it stays what it was.
        return (json.dumps(row, default=str) + "\n").encode()


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        DamagedError: if it does not, or cannot be read.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(path, f"cannot be read as JSON ({error})", AGAIN) from error
    if not isinstance(content, dict):
        raise DamagedError(path, "is damaged: it holds no JSON object", AGAIN)
    return content


def adapter_folder(checkpoint: str | os.PathLike[str]) -> Path:
    """Return the adapter folder beside a checkpoint: ``last-adapter`` for ``last.ckpt``."""
    path = Path(checkpoint)
    return path.with_name(f"{path.stem}-adapter")


def other_save(folder: Path) -> str | None:
    """Say how an adapter's folder and the checkpoint beside it differ; None if they do not.

    A save replaces the one and then the other, and may have been killed in between.
    """
    checkpoint = folder.with_name(f"{folder.name.removesuffix('-adapter')}.ckpt")
    if not folder.name.endswith("-adapter") or not checkpoint.is_file():
        return None
    if not folder.is_dir():
        found = f"{folder} does not exist, but {checkpoint.name} beside it does"
    elif not (folder / RECORD).is_file():
        return None
    elif read_json(folder / RECORD).get("checkpoint") != seal_of(checkpoint):
        found = f"{folder} and {checkpoint.name} beside it are not of the same moment"
    else:
        return None
    return (
        f"{found}: a run was killed while it saved, or is saving now. Resuming from the checkpoint "
        "(--ckpt_path) writes both again."
    )


def digest_of_files(*paths: Path) -> str:
    """Return a digest of the content of files, one after the other."""
    content = blake2b(digest_size=16)
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                content.update(block)
    return content.hexdigest()


def public_name(source: str) -> str:
    """Return a file's or folder's name without its path; a split after a colon and hub ids stay."""
    path, colon, split = source.partition(":")
    return f"{Path(path).resolve().name}{colon}{split}" if Path(path).exists() else source
