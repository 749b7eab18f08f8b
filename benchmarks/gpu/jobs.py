"""Functions in processes of their own: what breaks or hangs there is a result, and nothing else.

Such a process is ``python -m benchmarks.gpu.jobs JOB.json``, or forked.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Notes", "Outcome", "Runner", "Task", "fit", "look", "perform"]

ROOT = Path(__file__).parent.parent.parent
Row = dict[str, Any]


class Notes:
    """Rows of results in a file, one JSON object a line: a process that dies leaves what it had.

    Args:
        path: the file, which rows are added to.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, **row: Any) -> None:
        """Add a row."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    @contextmanager
    def attempt(self, **case: Any) -> Iterator[None]:
        """Make a row with the traceback of what is raised inside, and go on after it.

        Args:
            case: what names the case.
        """
        try:
            yield
        except Exception:
            self.add(**case, error=traceback.format_exc())


class Outcome(NamedTuple):
    """What a process left.

    Attributes:
        code: its exit status, negative for a signal; None if its time was up.
        rows: its results.
        log: the end of what it printed.
    """

    code: int | None
    rows: list[Row]
    log: str

    def complaint(self) -> str | None:
        """Return what the process itself went wrong with, besides the cases that it noted."""
        if self.code == 0:
            return None
        how = "its time was up" if self.code is None else f"exit status {self.code}"
        return f"The process ended early: {how}.\n{self.log}"


class Runner:
    """Starts processes, and waits for them.

    Args:
        folder: where their files go.
        fork: fork processes off this one, which has the libraries loaded and has computed nothing.
            Never with CUDA, which does not survive it; there Python starts anew.
        deadline: when all must have ended, `time.monotonic`.
    """

    def __init__(self, folder: Path, *, fork: bool, deadline: float) -> None:
        self.folder = folder
        self.deadline = deadline
        self._fork = fork
        self._count = 0
        self._lock = threading.Lock()

    def run(self, function: str, settings: Row, seconds: float) -> Outcome:
        """Call a function in a process of its own.

        Args:
            function: "module:name"; called with the settings and `Notes`.
            settings: what JSON can hold.
            seconds: the time it may take.
        """
        with self._lock:
            self._count += 1
            folder = self.folder / f"job{self._count}"
        folder.mkdir(parents=True)
        job, rows, log = folder / "job.json", folder / "rows.jsonl", folder / "log.txt"
        text = json.dumps({"function": function, "settings": settings, "rows": str(rows)})
        job.write_text(text, encoding="utf-8")
        rows.touch()
        process = _Forked(job, log) if self._fork else _fresh(job, log)
        try:
            code = process.wait(max(1.0, min(seconds, self.deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            code = None
            # With the processes that it has started.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        found = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
        tail = log.read_text(encoding="utf-8", errors="replace")[-3000:]
        return Outcome(code, found, tail)


Task = Callable[[Runner], list[Row]]


def _fresh(job: Path, log: Path) -> "subprocess.Popen[bytes]":
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu.jobs", str(job)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            # Unbuffered: what it printed last is to stand last.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )


class _Forked:
    """A forked process, with as much of `subprocess.Popen` as is needed here."""

    def __init__(self, job: Path, log: Path) -> None:
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            os.setsid()
            file = os.open(log, os.O_WRONLY | os.O_CREAT)
            os.dup2(file, 1)
            os.dup2(file, 2)
            code = perform(job)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def wait(self, seconds: float = float("inf")) -> int:
        """Wait for its end, and return its exit status."""
        until = time.monotonic() + seconds
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("", seconds)
            time.sleep(0.02)


def perform(path: Path) -> int:
    """Do the job of a file, and return the exit status."""
    job = json.loads(path.read_text(encoding="utf-8"))
    module, _, name = job["function"].partition(":")
    try:
        getattr(import_module(module), name)(job["settings"], Notes(Path(job["rows"])))
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def look(settings: Row, notes: Notes) -> None:
    """Note the device, and the versions of what is used."""
    import torch

    from benchmarks.compute import machine

    found = machine()
    for name in ("bitsandbytes", "triton"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    if settings["device"] == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["device"] = properties.name
        found["device memory"] = f"{properties.total_memory / 2**30:.0f} GiB"
        found["compute capability"] = f"{properties.major}.{properties.minor}"
        found["CUDA"] = str(torch.version.cuda)
    else:
        found["device"] = found["processor"]
    notes.add(**found)


def fit(settings: Row, notes: Notes) -> None:
    """Run ``mpo-lightning fit`` with the arguments in the settings."""
    from mpo_lightning.cli import main

    main(["fit", *settings["arguments"]])


if __name__ == "__main__":
    sys.exit(perform(Path(sys.argv[1])))
