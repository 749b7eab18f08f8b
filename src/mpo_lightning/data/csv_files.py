"""CSV and TSV files: every cell is a text, and an empty one is null."""

import csv
from array import array
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

from mpo_lightning.data.groups import DataError
from mpo_lightning.data.row_source import RawRow, RowSource, SameFiles

__all__ = ["CsvFile"]

# The longest cell, in characters; the csv module's own limit is 2 ** 17.
LONGEST_CELL = 2**31 - 1


class CsvFile(RowSource):
    """A file whose first record names the columns.

    Records may go over several lines, in quotes. A ``.csv`` file whose header has semicolons and no
    comma is separated by them, as spreadsheets write it in many languages; a ``.tsv`` file by tabs.
    What a cell holds (a number, a list in JSON) is not guessed here: "007" and "NA" stay texts.
    """

    in_cells = True

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self.name = name
        # Byte at which each row begins, and its line number.
        self.offsets, self.lines = array("q"), array("q")
        content = blake2b(digest_size=16)
        self._files = SameFiles(path)
        with self._files.reading(), path.open("rb") as file:
            header = file.readline()
            by_semicolon = b"," not in header and b";" in header
            self.separator = "\t" if path.suffix == ".tsv" else ";" if by_semicolon else ","
            file.seek(0)
            records = self._records(file, 1, content)
            self.columns = self._header(*next(records, (0, 1, [])))
            for offset, line, _ in records:
                self.offsets.append(offset)
                self.lines.append(line)
        self.digest = content.hexdigest()

    def _header(self, _: int, line: int, columns: list[str] | DataError) -> list[str]:
        if isinstance(columns, DataError):
            raise columns
        twice = sorted({column for column in columns if columns.count(column) > 1})
        if twice:
            raise DataError(
                f"{self.name}:{line}: found the columns {twice} twice; expected each once. "
                "Rename one of them."
            )
        return columns

    def __len__(self) -> int:
        return len(self.offsets)

    def rows(self, start: int, stop: int) -> Iterator[tuple[str, RawRow]]:
        """Yield the rows, named by the numbers of their first lines."""
        if start >= stop:
            return
        with self._files.reading(), self.path.open("rb") as file:
            file.seek(self.offsets[start])
            records = self._records(file, self.lines[start])
            for _, (_, line, cells) in zip(range(start, stop), records, strict=False):
                source = f"{self.name}:{line}"
                yield source, self._row(cells, source)

    def _row(self, cells: Sequence[str] | DataError, source: str) -> RawRow:
        if isinstance(cells, DataError):
            return cells
        if len(cells) != len(self.columns):
            return DataError(
                f"{source}: found {len(cells)} cells; expected {len(self.columns)}, one for each "
                "column of the header. Write a cell with separators, quotes or line breaks in "
                "quotes, and quotes inside it twice."
            )
        return {name: cell or None for name, cell in zip(self.columns, cells, strict=True)}

    def _records(
        self, file: BinaryIO, line: int, content: Any = None
    ) -> Iterator[tuple[int, int, list[str] | DataError]]:
        """Yield offset, line number and cells (or why they cannot be read) of the records.

        Args:
            file: the file, at the beginning of a record.
            line: number of the line that begins there.
            content: digest to be fed with what is read.
        """
        position = file.tell()

        def decoded() -> Iterator[str]:
            nonlocal position
            for raw in file:
                start = b"\xef\xbb\xbf" if position == 0 else b""
                position += len(raw)
                if content is not None:
                    content.update(raw)
                # Bytes that are no UTF-8 become surrogates, and an error of their record alone.
                yield raw.removeprefix(start).decode("utf-8", "surrogateescape")

        csv.field_size_limit(LONGEST_CELL)
        reader = csv.reader(decoded(), delimiter=self.separator, strict=True)
        while True:
            offset, number = position, line + reader.line_num
            source = f"{self.name}:{number}"
            try:
                cells: list[str] | DataError = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                cells = DataError(
                    f"{source}: cannot be read as CSV ({error}). A quote may be missing: a cell "
                    "in quotes ends with one, and has those inside it twice."
                )
            # Blank lines are ignored.
            if cells and cells != [""]:
                yield offset, number, _not_utf8(cells, source) or cells


def _not_utf8(cells: Sequence[str] | DataError, source: str) -> DataError | None:
    try:
        "".join([] if isinstance(cells, DataError) else cells).encode()
    except UnicodeEncodeError as error:
        byte = ord(error.object[error.start]) - 0xDC00
        return DataError(f"{source}: not UTF-8 (byte {byte:#04x}). Save the file as UTF-8.")
    return None
