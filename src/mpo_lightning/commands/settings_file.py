"""YAML of settings, in which no key comes twice: the first value would be lost.

Nothing in it contains itself or grows without bound.
"""

from collections.abc import Iterator
from typing import Any

import yaml  # type: ignore[import-untyped]
from jsonargparse import get_loader, set_loader

__all__ = ["YAML", "UnusableError", "load_settings", "refused"]

# Name by which parsers know this form.
YAML = "yaml_without_repeated_keys"
MERGE = "tag:yaml.org,2002:merge"
# Values that settings may hold, those of an anchor counted wherever it is named.
MOST_VALUES = 1_000_000

_load = get_loader("yaml")


class UnusableError(yaml.YAMLError):  # type: ignore[misc]
    """YAML that cannot be used as settings; the message names the line."""


# Texts that were refused. jsonargparse may go on with the text itself as the value.
refused: dict[str, UnusableError] = {}


def load_settings(text: str) -> Any:
    """Return what a text in YAML (or JSON) says.

    Raises:
        UnusableError: if a key comes twice, if something contains itself, or if a value cannot be
            read. Keys that a merge (``<<``) brings are not repeated: those beside it take their
            place.
        YAMLError: if it is not YAML.
    """
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        _count(node, {}, frozenset())
        for message in _repeated(node, "", set()):
            raise UnusableError(message)
        return _load(text)
    except (UnusableError, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, RecursionError):
            error = UnusableError("values are nested too deeply")
        elif not isinstance(error, UnusableError):
            # A number of thousands of digits, a date that does not exist.
            error = UnusableError(f"a value cannot be read: {str(error).partition(';')[0]}")
        refused[text] = error
        raise error from None


def _count(node: Any, known: dict[int, int], around: frozenset[int]) -> int:
    """Return the number of values of a node of YAML.

    Args:
        node: the node.
        known: numbers of nodes that were counted, by identity.
        around: identities of the nodes that it is in.

    Raises:
        UnusableError: if a node contains itself, or the values are too many.
    """
    if not isinstance(node, yaml.CollectionNode):
        return 1
    line = node.start_mark.line + 1
    if id(node) in around:
        raise UnusableError(f"what begins in line {line} contains itself")
    if id(node) not in known:
        inside = around | {id(node)}
        mapping = isinstance(node, yaml.MappingNode)
        entries = [each for pair in node.value for each in pair] if mapping else node.value
        known[id(node)] = 1 + sum(_count(entry, known, inside) for entry in entries)
    if known[id(node)] > MOST_VALUES:
        raise UnusableError(f"what begins in line {line} holds more than {MOST_VALUES:,} values")
    return known[id(node)]


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
