"""Folder of parts: output that is written in parts, can be resumed, and is shared by processes.

Part i holds the output for input rows i * rows_per_part to (i + 1) * rows_per_part - 1. A part is
complete or missing. Its content depends only on the settings and those rows, not on where an
earlier run ended or on the number of processes.
"""

import json
import math
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm  # type: ignore[import-untyped]

from mpo_lightning.data.part_files import SETTINGS, check_rows, part_name
from mpo_lightning.data.report import DataReport
from mpo_lightning.digests import SUMS_OF, file_digest, sums
from mpo_lightning.errors import RolloutError
from mpo_lightning.files import json_line, write_whole
from mpo_lightning.printable import printable

__all__ = ["ROWS_WRITTEN", "PartFolder", "Workers"]

VERSION = 1
# Titles of a report on rows, for `DataReport.summary`.
ROWS_WRITTEN = ("rows written", "rows dropped", "noted")


@dataclass(frozen=True)
class Workers:
    """Processes that share the work, as torchrun numbers them.

    Attributes:
        rank: number of this process.
        count: number of processes.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def from_environment(cls) -> "Workers":
        """Read RANK and WORLD_SIZE, which torchrun sets; without them there is one process."""
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


class PartFolder:
    """Output folder: ``settings.json``, and for each part its rows, its report and their digests.

    Args:
        folder: path of the folder, created if missing.
        kind: name of the command that writes it.
        settings: everything that the rows depend on; a folder with other settings is refused. Its
            own ``date`` holds, if it was begun before and chat templates write it.
        rows: number of input rows.
        rows_per_part: number of input rows of one part.

    Raises:
        DamagedError: if a part that is there is not what was written.
        RolloutError: if the folder has other settings or foreign files, or cannot be written.
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
        self.folder = Path(folder).expanduser()
        self.rows = rows
        self.rows_per_part = rows_per_part
        self.settings = {**settings, "rows": rows, "rows_per_part": rows_per_part}
        self._open(kind)
        # Damaged parts are told before anything is computed.
        self.report()

    def __len__(self) -> int:
        """Number of parts."""
        return math.ceil(self.rows / self.rows_per_part)

    def span(self, part: int) -> tuple[int, int]:
        """Return the first input row of a part, and the one after its last."""
        start = part * self.rows_per_part
        return start, min(start + self.rows_per_part, self.rows)

    def path(self, part: int) -> Path:
        """Return the path of a part's rows."""
        return self.folder / f"{part_name(part)}.jsonl"

    def _report_path(self, part: int) -> Path:
        return self.folder / f"{part_name(part)}.report.json"

    def missing(self, workers: Workers | None = None) -> list[int]:
        """List the parts that are missing. Defaults to those of all processes."""
        workers = workers or Workers()
        mine = range(workers.rank, len(self), workers.count)
        return [part for part in mine if not self.path(part).exists()]

    def fill(
        self,
        make: Callable[[int, int, DataReport, Callable[[int], None]], Sequence[Mapping[str, Any]]],
        *,
        title: str,
        unit: str,
        progress: bool,
    ) -> None:
        """Write the missing parts of this process, and print a summary.

        Args:
            make: called as ``make(start, stop, report, done)``, it returns the output for input
                rows start to stop - 1, counts dropped rows in the report, and calls ``done`` with
                the number of newly finished input rows.
            title: title of the progress bar.
            unit: name of an input row.
            progress: whether to show the bar.

        Raises:
            RolloutError: if a part cannot be written, or all of them hold no row.
        """
        workers = Workers.from_environment()
        missing = self.missing(workers)
        with tqdm(
            total=sum(stop - start for start, stop in map(self.span, missing)),
            desc=title,
            unit=unit,
            disable=not progress or workers.rank > 0,
        ) as bar:
            for part in missing:
                start, stop = self.span(part)
                report = DataReport(self.path(part).name, groups=stop - start)
                self.write(part, make(start, stop, report, bar.update), report)
        print(printable(self.summary(workers)))
        if not self.missing() and not (report := self.report()).kept:
            reasons = "; ".join(f"{count:,} {reason}" for reason, count in report.dropped.items())
            raise RolloutError(
                f"{self.folder}: no row was written ({unit}s: {reasons}). Change the settings or "
                "the input, and remove the folder."
            )

    def write(self, part: int, rows: Sequence[Mapping[str, Any]], report: DataReport) -> None:
        """Write a part.

        Raises:
            RolloutError: if it cannot be written.
        """
        # A part counts as complete when its rows exist, so they are written last.
        path = self.path(part)
        contents = {
            self._report_path(part): f"{report.to_json()}\n".encode(),
            path: b"".join(map(json_line, rows)),
        }
        digests = {each.name: sha256(content).hexdigest() for each, content in contents.items()}
        digests[SETTINGS] = file_digest(self.folder / SETTINGS)
        for file, content in {path.with_suffix(SUMS_OF): sums(digests), **contents}.items():
            self._write(file, content)

    def report(self) -> DataReport:
        """Return the report on all parts that exist.

        Raises:
            DamagedError: if a part is not what was written.
            RolloutError: if a part's report is missing or damaged.
        """
        total = DataReport(str(self.folder))
        for part in range(len(self)):
            if not self.path(part).exists():
                continue
            check_rows(self.path(part))
            try:
                total.add(DataReport.from_json(self._report_path(part).read_bytes()))
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise RolloutError(
                    f"{self._report_path(part)}: cannot be read ({error}). Remove "
                    f"{self.path(part)}, and the part is made again."
                ) from error
        return total

    def summary(self, workers: Workers) -> str:
        """Return the message that a process prints at its end."""
        missing = len(self.missing())
        state = f"{len(self) - missing} of {len(self)} parts of {self.folder} are there"
        if not missing:
            # Left by processes that were killed.
            for partial in self.folder.glob(".*.partial"):
                partial.unlink(missing_ok=True)
            state = f"{self.folder} is complete: {len(self)} parts"
        elif workers.count > 1:
            state += "; the other processes are at work"
        return f"{state}; {self.report().summary(*ROWS_WRITTEN)}"

    # ----------------------------------------------------------------------------- settings

    def _open(self, kind: str) -> None:
        # Tuples become lists, as when the file is read.
        content = {"format": f"mpo-lightning {kind}", "version": VERSION, "settings": self.settings}
        wanted = json.loads(json.dumps(content))
        path = self.folder / SETTINGS
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            foreign = sorted(p.name for p in self.folder.iterdir() if not p.name.startswith("."))
            if not foreign:
                self._write_first(path, (json.dumps(wanted, indent=2) + "\n").encode())
            found = json.loads(path.read_bytes())
            if self.settings.get("date") is not None:
                # Chat templates may write the date: a folder that is continued keeps its own.
                self.settings["date"] = wanted["settings"]["date"] = found["settings"]["date"]
        except FileNotFoundError as error:
            raise RolloutError(
                f"{self.folder}: holds other files ({', '.join(foreign[:3])}) and no {SETTINGS}, "
                "so it is no output of this command. Name another folder."
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RolloutError(
                f"{path}: cannot be used for output: {error}. Name another folder, or remove this "
                "one."
            ) from error
        if found == wanted:
            return
        differing = _differences(found, wanted)
        raise RolloutError(
            f"{path}: this folder was begun with other settings: {'; '.join(differing)}. Name "
            "another folder, or use the settings that it was begun with."
        )

    def _write_first(self, path: Path, data: bytes) -> None:
        """Write a file unless another process has written it."""
        partial = path.with_name(f".{uuid.uuid4().hex}.partial")
        partial.write_bytes(data)
        try:
            os.link(partial, path)
        except FileExistsError:
            pass
        finally:
            partial.unlink()

    # -------------------------------------------------------------------------------- files

    def _write(self, path: Path, data: bytes) -> None:
        """Write a whole file."""
        try:
            write_whole(path, data)
        except OSError as error:
            raise RolloutError(
                f"{path}: cannot be written: {error}. Make room or give access, and start the same "
                "command again: it continues after the last part."
            ) from error


def _differences(found: object, wanted: object, name: str = "") -> list[str]:
    """Describe the settings that differ."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        lines = []
        for key in dict.fromkeys([*wanted, *found]):
            path = f"{name}.{key}".removeprefix(".settings").removeprefix(".")
            if found.get(key) != wanted.get(key):
                lines += _differences(found.get(key), wanted.get(key), path)
        return lines
    return [f"{name} was {found!r}, is {wanted!r}"]
