"""MkDocs hook: formulas become MathML, which browsers draw without a script or the network."""

import html
import re

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.pages import Page

__all__ = ["on_post_page"]

# What pymdownx.arithmatex marks on pages, and the delimiters that notebooks keep.
ON_PAGES = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">(?:\\\(|\\\[)(?P<latex>.*?)(?:\\\)|\\\])</(?P=tag)>',
    flags=re.DOTALL,
)
NOTEBOOK_CELL = re.compile(r'<div class="[^"]*jp-RenderedMarkdown.*?</div>', flags=re.DOTALL)
IN_CELLS = re.compile(r"(?P<tag>\$\$?)(?P<latex>[^$<>]+)(?P=tag)")
COMMAND = re.compile(r"\\\w+")
ATTRIBUTES = re.compile(r'"[^"]*"')
TAG = re.compile(r"\\tag\{(.*?)\}")


def mathml(latex: str, *, block: bool) -> str:
    """Return a formula as MathML; the number of an equation stands behind it."""
    numbers = TAG.findall(latex)
    drawn = convert(TAG.sub("", latex), display="block" if block else "inline")
    # A command that it does not know is left as it is.
    if left := COMMAND.findall(ATTRIBUTES.sub("", drawn)):
        raise PluginError(f"Formula {latex!r}: {', '.join(left)} cannot be drawn as MathML.")
    number = f'<span class="number">({numbers[0]})</span>' if numbers else ""
    return f'<div class="formula">{drawn}{number}</div>' if block else drawn


def _replaced(found: re.Match[str]) -> str:
    block = found["tag"] in ("div", "$$")
    return mathml(html.unescape(found["latex"]).strip(), block=block)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Replace the formulas of a page."""
    if page.file.src_uri.endswith(".ipynb"):
        return NOTEBOOK_CELL.sub(lambda cell: IN_CELLS.sub(_replaced, cell[0]), output)
    return ON_PAGES.sub(_replaced, output)
