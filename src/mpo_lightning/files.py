"""Files that others see whole or not at all."""

import os
import uuid
from pathlib import Path

__all__ = ["write_whole"]


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
