"""Errors that a user can mend."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mpo_lightning.printable import printable, without_secrets

__all__ = [
    "CheckpointError",
    "DamagedError",
    "ResumeError",
    "RolloutError",
    "UserError",
    "fields_below",
    "of_the_disk",
    "require_same",
]


class UserError(Exception):
    """Base of errors in what a user gave; the message says what to do.

    The command line shows the message alone; a program sees an exception like any other.

    Args:
        message: what cannot be used, and what to do.
        field: the setting at fault, by the name that the code that raises knows it by, such as
            ``quantization``; it begins the text. `fields_below` completes it.
    """

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field

    def __str__(self) -> str:
        """Return the message, printable, after the setting at fault if it is known."""
        message = without_secrets(printable(super().__str__()))
        return message if self.field is None else f"{self.field}: {message}"


@contextmanager
def fields_below(prefix: str) -> Iterator[None]:
    """Name the settings at fault as the user does: errors' fields get a prefix and a dot.

    Code that loads a model knows its setting as ``base``; in a configuration it is
    ``model.policy.base``, or ``model.base``, and only the caller knows which.
    """
    try:
        yield
    except UserError as error:
        if error.field is not None:
            error.field = f"{prefix}.{error.field}"
        raise


# What users can mend themselves, by the number of an error of the system.
_DISK = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "Make room there"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "Give access to it"),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "Remove the file that is in a folder's place"),
    **dict.fromkeys((errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP), "Mend it"),
    errno.EIO: "Look after the disk",
}
_OF_OUTPUT = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EPIPE}


def of_the_disk(error: OSError) -> str | None:
    """Return what to tell a user of a full, read-only or wrong place; None for other errors."""
    if error.filename is None and error.errno in _OF_OUTPUT:
        # Files are named where they are written.
        return f"the command's output cannot be written: {error.strerror}."
    if error.errno not in _DISK or error.filename is None:
        return None
    told = f"{error.filename}: {error.strerror}. {_DISK[error.errno]}, or name another place."
    return printable(" ".join([told, *getattr(error, "__notes__", [])]))


class RolloutError(UserError, ValueError):
    """Responses or scores that cannot be made as asked; the message says what to do."""


class ResumeError(UserError, ValueError):
    """A checkpoint that this run must not resume from; the message says what differs."""


class DamagedError(UserError, ValueError):
    """A file that is not what was written.

    Args:
        path: the file.
        found: what is wrong with it, the rest of the sentence.
        remedy: what to do.
    """

    def __init__(self, path: Path, found: str, remedy: str) -> None:
        super().__init__(f"{path} {found}. {remedy}")


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that could not be written; the message says why and what still stands."""


def require_same(what: str, found: dict[str, Any], expected: dict[str, Any], remedy: str) -> None:
    """Refuse to resume from a checkpoint that was written with something else.

    Args:
        what: name of the thing compared, for the message.
        found: its entries in the checkpoint.
        expected: its entries in this run.
        remedy: advice, the end of the message.

    Raises:
        ResumeError: naming the first entry that differs.
    """
    for name, value in expected.items():
        if found.get(name) != value:
            raise ResumeError(
                f"The checkpoint was written with another {what}: its {name} is "
                f"{_short(found.get(name))}, but here {_short(value)}. {remedy}"
            )


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}..." if isinstance(value, str) and len(text) > 40 else text
