"""Runner of tasks in several processes, which keeps results and performs no task twice."""

import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager
from hashlib import sha256
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

import torch
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from mpo_lightning.files import write_whole

__all__ = ["Runner", "Task", "result_of"]

# Raise it when a change of the code changes the results of tasks.
VERSION = 1


class Task(Protocol):
    """A piece of work: a frozen dataclass whose `repr` determines its result."""

    def __call__(self, worlds: Path, /) -> Any:
        """Perform the task; its result can be written as JSON.

        Args:
            worlds: folder of worlds, or whatever else tasks share.
        """


def _single_thread() -> None:
    # Models this small do not profit from more, and the other processes need the cores.
    torch.set_num_threads(1)


def _begin_worker() -> None:
    _single_thread()
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process with its parent: if that is killed, it would wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _perform(task: Task, folder: Path) -> Any:
    result = task(folder / "worlds")
    write_whole(_place(task, folder), json.dumps({"task": repr(task), "result": result}).encode())
    return result


def result_of(task: Task, worlds: Path) -> Any:
    """Return a task's result within another task; it is performed if none is kept.

    Args:
        task: the task.
        worlds: folder that the other task was given.
    """
    place = _place(task, worlds.parent)
    if not place.is_file():
        _perform(task, worlds.parent)
    return json.loads(place.read_text(encoding="utf-8"))["result"]


def _place(task: Task, folder: Path) -> Path:
    return folder / "runs" / f"{sha256(f'{VERSION} {task!r}'.encode()).hexdigest()[:24]}.json"


class Runner(AbstractContextManager["Runner"]):
    """Performs tasks, and keeps their results in a folder, where a later runner finds them.

    A context manager: leaving it ends its processes.

    Args:
        folder: folder of worlds and results.
        workers: number of processes, each with one thread; 1 works in this process.
        show_progress: draw progress bars.
    """

    def __init__(self, folder: Path, *, workers: int = 2, show_progress: bool = True) -> None:
        self.folder = folder
        self.workers = workers
        self.show_progress = show_progress
        self.performed = 0
        self._pool: ProcessPoolExecutor | None = None
        (folder / "runs").mkdir(parents=True, exist_ok=True)

    def __exit__(self, *_: object) -> None:
        """End the processes; tasks that have not begun are cancelled."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def __call__(self, tasks: Sequence[Task], description: str) -> list[Any]:
        """Return each task's result, read from its JSON file; a task that has one is not performed.

        Args:
            tasks: the tasks; equal ones are performed once.
            description: title of the progress bar.
        """
        places = [_place(task, self.folder) for task in tasks]
        missing = {p: t for p, t in zip(places, tasks, strict=True) if not p.is_file()}
        bar = tqdm(
            total=len(missing),
            desc=description,
            disable=not self.show_progress or not missing,
            dynamic_ncols=True,
        )
        with bar:
            if self.workers == 1:
                self._here(list(missing.values()), bar.update)
            elif missing:
                self._there(list(missing.values()), bar.update)
        self.performed += len(missing)
        return [json.loads(place.read_text(encoding="utf-8"))["result"] for place in places]

    def _here(self, tasks: Sequence[Task], done: Callable[[], object]) -> None:
        threads = torch.get_num_threads()
        _single_thread()
        try:
            for task in tasks:
                _perform(task, self.folder)
                done()
        finally:
            torch.set_num_threads(threads)

    def _there(self, tasks: Sequence[Task], done: Callable[[], object]) -> None:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self.workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_begin_worker,
            )
        futures: list[Future[Any]] = [self._pool.submit(_perform, t, self.folder) for t in tasks]
        for future in as_completed(futures):
            future.result()
            done()
