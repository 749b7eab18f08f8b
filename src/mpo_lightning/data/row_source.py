"""Sources of rows: the base class, and sources that are made of others or of values in memory."""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from mpo_lightning.data.groups import DataError

__all__ = ["Parts", "RawRow", "RowSource", "SameFiles", "Values", "digest_of"]

# A row as it was read; in the place of a row that cannot be read, the DataError that says so.
RawRow = object


class SameFiles:
    """Files that are read more than once, and must not change between.

    Rows that were found, and the digest by which tokens are kept, would be those of other content.

    Args:
        paths: the files.
    """

    def __init__(self, *paths: Path) -> None:
        self._states = {path: _state(path) for path in paths}

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Read files inside the block; whatever it raises, a change is told in its place.

        Raises:
            DataError: naming the file that has changed since it was first read.
        """
        self._check()
        try:
            yield
        except Exception:
            self._check()
            raise
        self._check()

    def _check(self) -> None:
        for path, state in self._states.items():
            if _state(path) != state:
                raise DataError(
                    f"{path}: has changed while it was read. Start again when nothing writes to "
                    "it any more, or read a copy."
                )


def _state(path: Path) -> tuple[int, int] | None:
    """Return what changes with a file's content; None if it is not there."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_size, found.st_mtime_ns


class RowSource(ABC):
    """The rows of one data set, in order.

    Attributes:
        name: the name that the user gave; rows are named ``name:number``.
        digest: digest of the content.
        in_cells: whether all values are texts, so that lists among them are written as such.
    """

    name: str
    digest: str
    in_cells: bool = False

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows."""

    @abstractmethod
    def rows(self, start: int, stop: int) -> Iterator[tuple[str, RawRow]]:
        """Yield ``("file:row", row)`` for the rows from start to stop, both counted from 0."""

    def first_objects(self, count: int = 100) -> list[tuple[str, Mapping[Any, object]]]:
        """Return the first rows that are objects, by which a format is recognised."""
        rows = self.rows(0, len(self))
        return list(islice(((name, row) for name, row in rows if isinstance(row, Mapping)), count))

    def __getitem__(self, index: int) -> tuple[str, RawRow]:
        """Return one row."""
        return next(self.rows(index, index + 1))


class Parts(RowSource):
    """Several sources as one."""

    def __init__(self, name: str, parts: Sequence[RowSource]) -> None:
        self.name = name
        self.parts = parts
        self.ends = list(accumulate(map(len, parts)))
        self.digest = digest_of(*(part.digest for part in parts))
        self.in_cells = all(part.in_cells for part in parts)

    def __len__(self) -> int:
        return self.ends[-1]

    def rows(self, start: int, stop: int) -> Iterator[tuple[str, RawRow]]:
        """Yield the rows, each named by its own file."""
        for number in range(bisect_right(self.ends, start), len(self.parts)):
            part, end = self.parts[number], self.ends[number]
            first = end - len(part)
            if first >= stop:
                return
            yield from part.rows(max(start - first, 0), min(stop - first, len(part)))


class Values(RowSource):
    """Rows that are all in memory."""

    def __init__(self, values: Any, name: str, digest: str) -> None:
        self.values = values
        self.name = name
        self.digest = digest

    def __len__(self) -> int:
        return len(self.values)

    def rows(self, start: int, stop: int) -> Iterator[tuple[str, RawRow]]:
        """Yield the rows, counted from 1."""
        for number, row in enumerate(self.values[start:stop], start=start + 1):
            yield f"{self.name}:{number}", row


def digest_of(*parts: str) -> str:
    """Return a digest of texts."""
    return blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()
