"""Tables that stay tables, read back by another's parser."""

import xml.etree.ElementTree as ET

import markdown

from mpo_lightning.markdown import table


def test_cells_are_read_back_as_they_were() -> None:
    rows = [["a", "b|c"], ["", "two\nlines"], ["|", "x"]]
    html = markdown.markdown(table(["first", "second|"], rows), extensions=["tables"])
    found = ET.fromstring(html.replace("<br>", "<br/>"))
    assert ["".join(cell.itertext()) for cell in found.iter("th")] == ["first", "second|"]
    cells = [["\n".join(cell.itertext()) for cell in row] for row in found.iter("tr")][1:]
    assert cells == rows
