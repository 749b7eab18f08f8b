"""MkDocs hooks: files from outside docs/, links to them, generated parts.

Pages can be read in the repository as well, where links are relative to the page's file. Links out
of docs/ are rewritten to pages of the site: notebooks, the change log, benchmarks and sources.
Sources become pages when something links to them.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

from settings import GENERATED

ROOT = Path(__file__).parent.parent.parent
# Pages and pictures outside docs/; their paths on the site are those in the repository.
OUTSIDE = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "benchmarks/README.md",
    "benchmarks/results/*.md",
    "benchmarks/results/*.png",
    "benchmarks/results/*.json",
    "benchmarks/results/*/*.md",
    "benchmarks/results/*/*.png",
    "benchmarks/results/*/*.json",
    "notebooks/*.ipynb",
)
LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)#\s]+)((?:#[^)\s]*)?)(?=\))")
NOTEBOOK_LINK = re.compile(r'href="(?!\w+:)([^"#]+\.(?:md|ipynb|py|yaml))((?:#[^"]*)?)"')
FENCE = re.compile(r"^ *(```|~~~)")
MARKER = re.compile(r"^<!-- generated: ([\w .-]+) -->$", flags=re.MULTILINE)
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml"}


def outside() -> dict[str, Path]:
    """Return the files outside docs/ that are always on the site, by their path below the root."""
    found = [path for pattern in OUTSIDE for path in sorted(ROOT.glob(pattern))]
    return {path.relative_to(ROOT).as_posix(): path for path in found}


def place_in_repository(uri: str) -> str:
    """Return the path of a page's source, relative to the repository's root."""
    return uri if uri in outside() else f"docs/{uri}"


def links(text: str) -> list[tuple[str, str]]:
    """Return target and anchor of a page's relative links, without those in fenced blocks."""
    return [link for line in prose(text) for link in LINK.findall(line)]


def prose(text: str) -> list[str]:
    """Return the lines of a page outside of fenced blocks."""
    fenced, found = False, []
    for line in text.splitlines():
        if FENCE.match(line):
            fenced = not fenced
        elif not fenced:
            found.append(line)
    return found


def target_of(place: str, link: str) -> str:
    """Return the target of a link, relative to the repository's root."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(place), link))


def _source_page(target: str) -> str:
    """Return a source file, or the list of a folder's files, as a page."""
    path = ROOT / target
    if path.is_dir():
        names = sorted(child.name for child in path.iterdir() if child.suffix in LANGUAGES)
        listed = "\n".join(f"- [`{name}`]({name}.md)" for name in names)
        return f"# {target}\n\n{listed}\n"
    language = LANGUAGES.get(path.suffix, "text")
    text = path.read_text(encoding="utf-8").rstrip()
    return f"# {target}\n\n~~~{language}\n{text}\n~~~\n"


def _source_uri(target: str) -> str:
    """Return the path of a source's page on the site."""
    return f"code/{target}/index.md" if (ROOT / target).is_dir() else f"code/{target}.md"


def _sources(pages: list[tuple[str, str]]) -> set[str]:
    """Return the files and folders outside docs/ that pages link to and that are not pages."""
    found: set[str] = set()
    for place, text in pages:
        for link, _ in links(text):
            target = target_of(place, link)
            if target.startswith("docs/") or target in outside() or target.startswith(".."):
                continue
            if (ROOT / target).exists():
                found.add(target)
            if (ROOT / target).is_dir():
                children = (ROOT / target).iterdir()
                found |= {f"{target}/{child.name}" for child in children if child.suffix == ".py"}
    return found


def _uri(target: str) -> str:
    """Return the path on the site of a path in the repository."""
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    return target if target in outside() else _source_uri(target)


@event_priority(100)  # before mkdocs-jupyter takes the notebooks
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside docs/, and those of linked sources."""
    for uri in outside():
        files.append(File(uri, str(ROOT), config.site_dir, config.use_directory_urls))
    pages = [
        (place_in_repository(file.src_uri), file.content_string)
        for file in files
        if file.src_uri.endswith(".md")
    ]
    for target in sorted(_sources(pages)):
        page = File.generated(
            config,
            _source_uri(target),
            content=_source_page(target),
            inclusion=InclusionLevel.NOT_IN_NAV,
        )
        files.append(page)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links to pages of the site, and insert generated parts."""
    place = place_in_repository(page.file.src_uri)

    def led(match: re.Match[str]) -> str:
        link, anchor = match.groups()
        here = posixpath.dirname(page.file.src_uri)
        return posixpath.relpath(_uri(target_of(place, link)), here or ".") + anchor

    def generated(match: re.Match[str]) -> str:
        name, _, argument = match[1].partition(" ")
        if name not in GENERATED:
            raise PluginError(f"{page.file.src_uri}: nothing generates {match[1]!r}")
        return GENERATED[name](argument)

    if page.file.src_uri.startswith("code/") or not page.file.src_uri.endswith(".md"):
        return markdown
    markdown = MARKER.sub(generated, markdown)
    fenced, lines = False, []
    for line in markdown.split("\n"):
        if FENCE.match(line):
            fenced = not fenced
        lines.append(line if fenced else LINK.sub(led, line))
    return "\n".join(lines)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links of notebooks, which MkDocs leaves alone, to pages of the site."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html

    def led(match: re.Match[str]) -> str:
        target = _uri(target_of(page.file.src_uri, match[1]))
        file = files.get_file_from_path(target)
        if file is None:
            raise PluginError(f"{page.file.src_uri}: {match[1]} is not on the site")
        return f'href="{file.url_relative_to(page.file)}{match[2]}"'

    return NOTEBOOK_LINK.sub(led, html)
