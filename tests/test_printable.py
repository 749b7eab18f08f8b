"""Texts that a terminal shows and does not obey."""

import pytest

from mpo_lightning.errors import UserError
from mpo_lightning.markdown import cell
from mpo_lightning.printable import printable


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
