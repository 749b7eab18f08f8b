"""Tasks are done once: again after a success, after an error, and in other processes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from mpo_lightning.studies.lab.runner import Runner


@dataclass(frozen=True, kw_only=True)
class Noting:
    """Adds a line to a file, and fails if it is told to."""

    number: int
    file: str
    fails: bool = False

    def __call__(self, worlds: Path) -> dict[str, Any]:
        if self.fails:
            raise RuntimeError("told to fail")
        with Path(self.file).open("a") as file:
            file.write(f"{self.number} {torch.get_num_threads()}\n")
        return {"square": self.number**2, "worlds": worlds.name}


@pytest.mark.parametrize("workers", [1, 2])
def test_tasks_are_done_once(tmp_path: Path, workers: int) -> None:
    notes = tmp_path / "notes"
    tasks = [Noting(number=n, file=str(notes)) for n in (1, 2, 3, 2)]
    with Runner(tmp_path / "out", workers=workers, show_progress=False) as runner:
        found = runner(tasks, "Tasks")
        assert [result["square"] for result in found] == [1, 4, 9, 4]
        assert found[0]["worlds"] == "worlds"
        assert runner.performed == 3
    # Each with a thread of its own.
    assert sorted(notes.read_text().splitlines()) == ["1 1", "2 1", "3 1"]
    with Runner(tmp_path / "out", workers=workers, show_progress=False) as runner:
        again = runner([*tasks, Noting(number=5, file=str(notes))], "Tasks")
        assert again == [*found, {"square": 25, "worlds": "worlds"}]
        assert runner.performed == 1


def test_what_was_done_before_an_error_is_kept(tmp_path: Path) -> None:
    notes = str(tmp_path / "notes")
    tasks = [Noting(number=1, file=notes), Noting(number=2, file=notes, fails=True)]
    threads = torch.get_num_threads()
    for _ in range(2):
        runner = Runner(tmp_path, workers=1, show_progress=False)
        with pytest.raises(RuntimeError, match="told to fail"), runner:
            runner(tasks, "Tasks")
    assert torch.get_num_threads() == threads
    assert (tmp_path / "notes").read_text().splitlines() == ["1 1"]


def test_what_is_left_of_a_killed_run_is_no_result(tmp_path: Path) -> None:
    task = Noting(number=1, file=str(tmp_path / "notes"))
    with Runner(tmp_path, workers=1, show_progress=False) as runner:
        runner([task], "Tasks")
        (place,) = (tmp_path / "runs").iterdir()
        # As a process that is killed while it writes leaves it.
        place.rename(place.with_suffix(".123"))
        place.with_suffix(".123").write_text('{"task"')
        assert runner([task], "Tasks")[0]["square"] == 1
        assert runner.performed == 2


def test_nothing_to_do_starts_no_process(tmp_path: Path) -> None:
    runner = Runner(tmp_path, workers=2, show_progress=False)
    with runner:
        assert runner([], "Nothing") == []
    assert runner.performed == 0
