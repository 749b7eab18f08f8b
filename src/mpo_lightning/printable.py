"""Texts from data and settings as a terminal, a report or a card may show them."""

import re

__all__ = ["printable"]

# Control characters but tab and line feed, those that turn the direction of text or break lines
# unseen, and halves of characters.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Return a text with its control characters escaped, such as ``\x1b``.

    A terminal would obey them: change colours and titles, and write over what it shows.
    """
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
