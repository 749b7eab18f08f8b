"""Folders that are there whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mpo_lightning.export.trained_adapter import ExportError

__all__ = ["DESCRIPTION", "check_out", "whole_folder"]

DESCRIPTION = "export.json"


def check_out(out: Path, description: Mapping[str, Any], *, force: bool) -> bool:
    """Whether the folder holds what is described already; False where it may be written.

    Args:
        out: the folder.
        description: of what is to be written there.
        force: whether another export may be overwritten.

    Raises:
        ExportError: if there is something that must not be overwritten.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = json.loads((out / DESCRIPTION).read_bytes())
    except (OSError, ValueError):
        raise ExportError(
            f"out: {out} exists and is no export. Name another folder, or remove it."
        ) from None
    if found == description:
        return True
    if force:
        return False
    differing = [name for name in description if found.get(name) != description[name]]
    raise ExportError(
        f"out: {out} holds another export: {', '.join(differing)} differ. Name another folder, or "
        "overwrite it with --force."
    )


@contextmanager
def whole_folder(out: Path, description: Mapping[str, Any]) -> Iterator[Path]:
    """A folder to write into, which takes the place of ``out`` at the end.

    Until then it has a name that nothing looks for; what a killed process has left under that name
    is removed by the next one.

    Raises:
        ExportError: if it cannot be written; what was there before is untouched.
    """
    partial, old = (out.with_name(f".{out.name}.{kind}") for kind in ("partial", "old"))
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        (partial / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
        for file in partial.iterdir():
            with file.open("rb") as opened:
                # After a power cut a name must not stand for half its content.
                os.fsync(opened.fileno())
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
            out.rename(old)
        partial.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    except Exception as error:
        # safetensors and tokenizers tell what the system said by other exceptions.
        if not isinstance(error, OSError) and "(os error " not in str(error):
            raise
        raise ExportError(f"out: {out} cannot be written: {error}") from error
    finally:
        # Gone already after the rename.
        shutil.rmtree(partial, ignore_errors=True)
