"""Texts that a terminal shows and does not obey."""

import pytest

from mpo_lightning.errors import UserError
from mpo_lightning.markdown import cell
from mpo_lightning.printable import printable, without_secrets


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;title\x07\x1b[31mred", r"\x1b]0;title\x07\x1b[31mred"),
        ("over\rwritten\x08", r"over\rwritten\x08"),
        ("\x9b31m", r"\x9b31m"),
        ("a\u202eb\u2066c", r"a\u202eb\u2066c"),
        ("half \ud800", r"half \ud800"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("é 日本語\u3000👩\u200d🔬", "é 日本語\u3000👩\u200d🔬"),
    ],
    ids=["escape", "return", "c1", "direction", "surrogate", "white space", "letters"],
)
def test_control_characters_are_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert str(UserError(text)) == shown
    assert cell(text) == shown.replace("\n", "<br>")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at http://user:word@host:80/v1?a=b.", "at http://***@host:80/v1?a=b."),
        ("https://token@host: no", "https://***@host: no"),
        ("url: 'https://user:w/r@d#?@host'", "url: 'https://***@host'"),
        ("http://h/?q=1&api_key=word: no", "http://h/?q=1&api_key=***: no"),
        ("http://h/?access-token=a=b#c", "http://h/?access-token=***#c"),
        ("http://host:8000/a@b and me@host", "http://host:8000/a@b and me@host"),
        ("org/name@main, https://host/?split=key", "org/name@main, https://host/?split=key"),
    ],
)
def test_secrets_in_addresses(text: str, shown: str) -> None:
    assert without_secrets(text) == shown
