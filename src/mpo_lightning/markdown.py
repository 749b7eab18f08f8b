"""Tables as Markdown."""

from collections.abc import Iterable, Sequence

__all__ = ["table"]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "<br>")


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """One line a row, without the last line end; a cell stays one whatever is in it."""
    lines = [map(_cell, titles), ["---"] * len(titles), *(map(_cell, row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
