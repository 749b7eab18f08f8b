"""Texts from data and settings as a terminal, a report or a card may show them."""

import re

__all__ = ["printable", "without_secrets"]

# Control characters but tab and line feed, those that turn the direction of text or break lines
# unseen, and halves of characters.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Return a text with its control characters escaped, such as ``\x1b``.

    A terminal would obey them: change colours and titles, and write over what it shows.
    """
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


# User and password of an address; a password may hold what should be quoted. A port is none.
_OF_USER = re.compile(
    r"""(?<=://)(?:[^\s/?#@'"]+|[^\s/?#@'":]+:(?!\d+[/?#])[^\s'"]*)(?=@)""", re.IGNORECASE
)
_IN_QUERY = re.compile(
    r"""(?<=[?&])([\w.-]*(?:key|token|secret|passw|sig|auth)[\w.-]*=)[^\s&#'"]+?(?=[:.,;]?(?:[\s&#'"]|$))""",
    re.IGNORECASE,
)


def without_secrets(text: str) -> str:
    """Return a text with ``***`` for the users, passwords and keys in the addresses that it holds.

    What settings hold is repeated in messages, and in files that are shared.
    """
    return _IN_QUERY.sub(r"\1***", _OF_USER.sub("***", text)) if "://" in text else text
