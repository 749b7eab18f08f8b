"""Errors that a user can mend."""

from typing import Any

__all__ = ["CheckpointError", "ResumeError", "RolloutError", "UserError", "require_same"]


class UserError(Exception):
    """Base of errors in what a user gave; the message says what to do.

    The command line shows the message alone; a program sees an exception like any other.
    """


class RolloutError(UserError, ValueError):
    """Responses or scores that cannot be made as asked; the message says what to do."""


class ResumeError(UserError, ValueError):
    """A checkpoint that this run must not resume from; the message says what differs."""


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
