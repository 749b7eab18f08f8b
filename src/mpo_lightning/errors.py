"""The base of every error that a user can mend."""

__all__ = ["UserError"]


class UserError(Exception):
    """Something that the user gave cannot be used; the message says what to do.

    The command line shows the message alone; a program sees an exception like any other.
    """
