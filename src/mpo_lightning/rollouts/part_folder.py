"""A folder of parts: output that is written piece by piece, resumed, and shared by processes.

Part i holds what became of the i-th so many input rows. A part is there whole or not at all, and
its content depends on the settings and those rows alone: neither on where an earlier run was cut
nor on how many processes work.
"""

import json
import math
import os
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpo_lightning.errors import RolloutError
from mpo_lightning.files import json_line, write_whole

__all__ = ["PartFolder", "Tally", "Workers"]

VERSION = 1
SETTINGS = "settings.json"
SHOWN_EXAMPLES = 3


@dataclass
class Tally:
    """What became of input rows: nothing is dropped or changed without being counted here.

    Attributes:
        read: rows read.
        written: rows written.
        responses: responses in the rows written.
        dropped: rows that were not written, by reason.
        noted: responses dropped, and oddities that were kept, by reason.
        examples: the first rows of each reason.
    """

    read: int = 0
    written: int = 0
    responses: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    noted: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def drop(self, reason: str, source: str) -> None:
        """Count a row that is not written."""
        self.dropped[reason] += 1
        self._example(reason, source)

    def note(self, reason: str, source: str, count: int = 1) -> None:
        """Count what was left out of a row, or is odd about it."""
        if count:
            self.noted[reason] += count
            self._example(reason, source)

    def _example(self, reason: str, source: str) -> None:
        examples = self.examples.setdefault(reason, [])
        if len(examples) < SHOWN_EXAMPLES and source not in examples:
            examples.append(source)

    def add(self, other: "Tally") -> None:
        """Count another part's rows, too."""
        self.read += other.read
        self.written += other.written
        self.responses += other.responses
        self.dropped.update(other.dropped)
        self.noted.update(other.noted)
        for reason, sources in other.examples.items():
            for source in sources:
                self._example(reason, source)

    def to_json(self) -> dict[str, Any]:
        """As JSON writes it."""
        return {
            "read": self.read,
            "written": self.written,
            "responses": self.responses,
            "dropped": dict(self.dropped),
            "noted": dict(self.noted),
            "examples": self.examples,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Tally":
        """From what `to_json` gave."""
        counters = {name: Counter(content[name]) for name in ("dropped", "noted")}
        return cls(**{**content, **counters})

    def __str__(self) -> str:
        """The report as text."""
        mean = self.responses / self.written if self.written else 0.0
        lines = [f"{self.written} of {self.read} rows written, {mean:.1f} responses each"]
        for what, counts in (("rows dropped", self.dropped), ("noted", self.noted)):
            for reason, count in counts.items():
                where = ", ".join(self.examples[reason])
                lines.append(f"  {what}: {count} {reason} (first: {where})")
        return "\n".join(lines)


@dataclass(frozen=True)
class Workers:
    """The processes that share the work, as torchrun numbers them.

    Attributes:
        rank: this one's number.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def from_environment(cls) -> "Workers":
        """By RANK and WORLD_SIZE, which torchrun sets; one process without them."""
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


class PartFolder:
    """The folder ``out``: ``settings.json``, and for each part its rows and its report.

    Args:
        folder: where; it is made if it is not there.
        kind: the command that writes it.
        settings: everything that the rows depend on; a folder with others is refused.
        rows: number of input rows.
        rows_per_part: input rows of one part.

    Raises:
        RolloutError: if the folder holds other settings or foreign files, or cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        kind: str,
        settings: Mapping[str, Any],
        *,
        rows: int,
        rows_per_part: int,
    ) -> None:
        if rows_per_part < 1:
            raise RolloutError(f"rows_per_part must be at least 1, got {rows_per_part}.")
        self.folder = Path(folder)
        self.rows = rows
        self.rows_per_part = rows_per_part
        self.settings = {**settings, "rows": rows, "rows_per_part": rows_per_part}
        self._open(kind)

    def __len__(self) -> int:
        """Number of parts."""
        return math.ceil(self.rows / self.rows_per_part)

    def span(self, part: int) -> tuple[int, int]:
        """First row of a part, and the one after its last."""
        start = part * self.rows_per_part
        return start, min(start + self.rows_per_part, self.rows)

    def path(self, part: int) -> Path:
        """The file of a part's rows."""
        return self.folder / f"part-{part:05d}.jsonl"

    def _report(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}.report.json"

    def missing(self, workers: Workers | None = None) -> list[int]:
        """Parts that are not there yet; of one process's share if it is named."""
        workers = workers or Workers()
        mine = range(workers.rank, len(self), workers.count)
        return [part for part in mine if not self.path(part).exists()]

    def write(self, part: int, rows: Sequence[Mapping[str, Any]], tally: Tally) -> None:
        """Write a part.

        Raises:
            RolloutError: if it cannot be written.
        """
        # The rows are what makes a part complete, so they come last.
        self._write(self._report(part), json_line(tally.to_json()))
        self._write(self.path(part), b"".join(map(json_line, rows)))

    def tally(self) -> Tally:
        """The report over all parts that are there.

        Raises:
            RolloutError: if a part's report is missing or damaged.
        """
        total = Tally()
        for part in range(len(self)):
            if not self.path(part).exists():
                continue
            try:
                total.add(Tally.from_json(json.loads(self._report(part).read_bytes())))
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise RolloutError(
                    f"{self._report(part)}: cannot be read ({error}). Remove {self.path(part)}, "
                    "and the part is made again."
                ) from error
        return total

    def summary(self, workers: Workers) -> str:
        """What this process says at its end."""
        missing = len(self.missing())
        state = f"{len(self) - missing} of {len(self)} parts of {self.folder} are there"
        if not missing:
            for left_over in self._partial_files():
                left_over.unlink(missing_ok=True)
            state = f"{self.folder} is complete: {len(self)} parts"
        elif workers.count > 1:
            state += "; the other processes are at work"
        return f"{state}; {self.tally()}"

    # ----------------------------------------------------------------------------- settings

    def _open(self, kind: str) -> None:
        # As JSON gives it back: tuples as lists.
        content = {"format": f"mpo-lightning {kind}", "version": VERSION, "settings": self.settings}
        wanted = json.loads(json.dumps(content))
        path = self.folder / SETTINGS
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            foreign = sorted(p.name for p in self.folder.iterdir() if not p.name.startswith("."))
            if not foreign:
                self._write_first(path, (json.dumps(wanted, indent=2) + "\n").encode())
            found = json.loads(path.read_bytes())
        except FileNotFoundError as error:
            raise RolloutError(
                f"{self.folder}: holds other files ({', '.join(foreign[:3])}) and no {SETTINGS}, "
                "so it is no output of this command. Name another folder."
            ) from error
        except (OSError, ValueError) as error:
            raise RolloutError(
                f"{self.folder}: cannot be used for output: {error}. Name another folder, or "
                "remove this one."
            ) from error
        if found == wanted:
            return
        differing = _differences(found, wanted)
        raise RolloutError(
            f"{path}: this folder was begun with other settings: {'; '.join(differing)}. Name "
            "another folder, or use the settings that it was begun with."
        )

    def _write_first(self, path: Path, data: bytes) -> None:
        """Write a file unless another process was first."""
        partial = path.with_name(f".{uuid.uuid4().hex}.partial")
        partial.write_bytes(data)
        try:
            os.link(partial, path)
        except FileExistsError:
            pass
        finally:
            partial.unlink()

    # -------------------------------------------------------------------------------- files

    def _partial_files(self) -> Iterator[Path]:
        """What killed processes left."""
        yield from self.folder.glob(".*.partial")

    def _write(self, path: Path, data: bytes) -> None:
        """Write a file that others see whole or not at all."""
        try:
            write_whole(path, data)
        except OSError as error:
            raise RolloutError(
                f"{path}: cannot be written: {error}. Make room or give access, and start the same "
                "command again: it goes on from the last part."
            ) from error


def _differences(found: object, wanted: object, name: str = "") -> list[str]:
    """Which settings differ, and how."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        lines = []
        for key in dict.fromkeys([*wanted, *found]):
            path = f"{name}.{key}".removeprefix(".settings").removeprefix(".")
            if found.get(key) != wanted.get(key):
                lines += _differences(found.get(key), wanted.get(key), path)
        return lines
    return [f"{name} was {found!r}, is {wanted!r}"]
