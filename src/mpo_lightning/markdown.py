"""Markdown tables."""

from collections.abc import Iterable, Sequence

from mpo_lightning.printable import printable

__all__ = ["cell", "table"]


def cell(text: str) -> str:
    """Escape a text, control characters included, as a table's cell."""
    return printable(text).replace("|", "\\|").replace("\n", "<br>")


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table without its last line end; texts are escaped."""
    lines = [map(cell, titles), ["---"] * len(titles), *(map(cell, row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
