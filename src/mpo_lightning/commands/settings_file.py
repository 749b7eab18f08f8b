"""YAML of settings, in which no key may come twice: the first value would be lost."""

from collections.abc import Iterator
from typing import Any

import yaml  # type: ignore[import-untyped]
from jsonargparse import get_loader, set_loader

__all__ = ["YAML", "RepeatedKeyError", "load_settings", "refused"]

# Name by which parsers know this form.
YAML = "yaml_without_repeated_keys"
MERGE = "tag:yaml.org,2002:merge"

_load = get_loader("yaml")


class RepeatedKeyError(yaml.YAMLError):  # type: ignore[misc]
    """A key that comes twice in one mapping; the message names both lines."""


# Texts in which a key came twice. jsonargparse may go on with the text itself as the value.
refused: dict[str, RepeatedKeyError] = {}


def load_settings(text: str) -> Any:
    """Return what a text in YAML (or JSON) says.

    Raises:
        RepeatedKeyError: if a key comes twice. Keys that a merge (``<<``) brings are not repeated:
            those beside it take their place.
        YAMLError: if it is not YAML.
    """
    if ":" in text:
        for message in _repeated(yaml.compose(text, yaml.SafeLoader), "", set()):
            refused[text] = RepeatedKeyError(message)
            raise refused[text]
    return _load(text)


def _repeated(node: Any, place: str, seen: set[int]) -> Iterator[str]:
    """Yield a message for each repeated key below a node of YAML."""
    # An anchor's content is one node, however often it is named.
    if id(node) in seen or not isinstance(node, yaml.CollectionNode):
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for number, entry in enumerate(node.value):
            yield from _repeated(entry, f"{place}[{number}]", seen)
        return
    lines: dict[tuple[str, str], int] = {}
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        inside = f"{place}.{name}".lstrip(".")
        first = lines.get((key.tag, name))
        if first is None:
            lines[key.tag, name] = line
        elif key.tag != MERGE:
            where = f"in line {line}" if first == line else f"in lines {first} and {line}"
            yield f"{inside} comes twice, {where}. Keep one of them"
        yield from _repeated(value, inside, seen)


set_loader(YAML, load_settings, (yaml.YAMLError,))
