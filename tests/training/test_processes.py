"""When a process of a run dies or fails the others say so and end; when it is slow they wait.

`tests/kill_trials.py` is the long form: runs as users start them, killed at random times.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed

import mpo_lightning.training.module
from mpo_lightning import MPOModule, PreferenceDataModule
from mpo_lightning.training.processes import LAUNCHER
from tests import processes
from tests.conftest import example_rows, write_rows
from tests.runs import OVERLAYS, write_recipe

# Without torch and Lightning: what a process does is the argument, a line of Python.
MEMBER = """
import os, sys, time
from mpo_lightning.training.processes import join_run, watch_early
port, rank, what = sys.argv[1:]
run = join_run(port=int(port), node=0, local_rank=int(rank), rank=int(rank))
print("joined", flush=True)
exec(what)
print("done", flush=True)
"""
WAIT = "time.sleep(60)"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])


class Member:
    """A process of a run.

    Attributes:
        process: the process.
        output: file of what it says.
    """

    def __init__(self, output: Path, *arguments: str) -> None:
        self.output = output
        with output.open("wb") as file:
            command = [sys.executable, "-c", MEMBER, *arguments]
            self.process = subprocess.Popen(command, stdout=file, stderr=file)

    def said(self) -> str:
        return self.output.read_text(encoding="utf-8")

    def ends(self) -> int:
        """Its exit status; it ends by itself."""
        return self.process.wait(8)


@pytest.fixture
def members(tmp_path: Path) -> Iterator[Callable[..., list[Member]]]:
    """Starts processes of a run that do what is said, and waits until all know of each other."""
    started: list[Member] = []

    def start(*what: str) -> list[Member]:
        port = str(free_port())
        for rank, each in enumerate(what):
            started.append(Member(tmp_path / str(rank), port, str(rank), each))
        while not all("joined" in member.said() for member in started):
            time.sleep(0.05)
        return list(started)

    yield start
    for member in started:
        member.process.kill()
        member.process.wait()


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_all_end_when_one_is_killed(members: Callable[..., list[Member]], rank: int) -> None:
    # The first has a worker, which lives on for a while with all that it has inherited.
    here = members(f"os.fork() or (time.sleep(6), os._exit(0)); {WAIT}", WAIT, WAIT)
    time.sleep(0.5)
    dead = here.pop(rank).process
    dead.kill()
    begin = time.monotonic()
    for other in here:
        assert other.ends() == 1
        assert f"error: rank {rank} (process {dead.pid}) of this run has died" in other.said()
    assert time.monotonic() - begin < 3


def test_all_end_when_one_fails(members: Callable[..., list[Member]]) -> None:
    """The error of communication that follows from it is not told."""
    fails = f"run.fail(ValueError('a bad' + chr(0x1F600) * 9000 + chr(10) + 'layer')); {WAIT}"
    _, *others = members(fails, WAIT, "time.sleep(0.3); run.fail(RuntimeError('closed by peer'))")
    for other in others:
        assert other.ends() == 1
        assert "rank 0" in other.said()
        assert "of this run failed (ValueError: a bad\U0001f600" in other.said()
        assert "layer" not in other.said()


def test_failure_of_all_is_left_to_each(members: Callable[..., list[Member]]) -> None:
    """A process that goes on after a failure may begin another run, in which it is watched."""
    fails = "run.fail(ValueError('a bad row'))"
    again = f"{fails}; time.sleep(2); run.begin(0); print('again', flush=True)"
    first, second, third = members(
        f"{again}; {WAIT}", f"{again}; time.sleep(1); os._exit(3)", f"{fails}; time.sleep(4)"
    )
    assert second.ends() == 3
    assert first.ends() == 1
    assert "again" in first.said()
    assert f"(process {second.process.pid}) of this run has died" in first.said()
    assert third.ends() == 0
    assert third.said() == "joined\ndone\n"


def test_slow_stopped_and_finished_processes_end_no_run(
    members: Callable[..., list[Member]],
) -> None:
    here = members("time.sleep(4); run.leave()", "time.sleep(3); run.leave()", "run.leave()")
    here[1].process.send_signal(signal.SIGSTOP)
    time.sleep(2)
    here[1].process.send_signal(signal.SIGCONT)
    for member in here:
        assert member.ends() == 0
        assert member.said() == "joined\ndone\n"


def test_process_whose_launcher_died_before_it_began_ends() -> None:
    """The command, as Lightning starts it again: it ends before it has imported much."""
    with subprocess.Popen([sys.executable, "-c", ""]) as launcher:
        pass
    environment = {"LOCAL_RANK": "1", "MASTER_PORT": str(free_port()), LAUNCHER: str(launcher.pid)}
    result = subprocess.run(
        [sys.executable, "-m", "mpo_lightning", "fit", "--config", "none.yaml"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert result.returncode == 1
    assert f"rank 0 (process {launcher.pid}) of this run has died" in result.stderr
    assert "none.yaml" not in result.stderr


# ------------------------------------------------------------------------------------ strategies

# Of a run on the command line: what a process comes to, in order.
STAGES: dict[str, tuple[Any, str]] = {
    "start": (torch.distributed, "init_process_group"),
    "data": (PreferenceDataModule, "setup"),
    "model": (mpo_lightning.training.module, "build_policy"),
    "reference": (mpo_lightning.training.module, "fill"),
    "training": (MPOModule, "optimizer_step"),
}


def run_to(stage: str, victim: int, how: str, *args: str) -> None:
    """``python -m mpo_lightning ARGS`` in which one rank is killed or fails at a stage."""
    if int(os.environ["RANK"]) == victim:

        def end(*_: Any, **__: Any) -> None:
            # Whom a process never met it cannot miss: whoever started both does.
            time.sleep(2 if stage == "start" else 0)
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("a bad layer")

        setattr(*STAGES[stage], end)
    processes.command_line(*args)


@pytest.fixture(scope="module")
def endless(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without end, whose reference is computed first."""
    folder = tmp_path_factory.mktemp("endless")
    return write_recipe(
        folder,
        base,
        write_rows(folder / "groups.jsonl", example_rows(6)),
        trainer={"max_epochs": 100_000, "default_root_dir": str(folder), "logger": False},
        model={"reference": "cached"},
    )


@pytest.mark.parametrize(
    "case",
    [
        "ddp rank 0 killed at start",
        "ddp rank 1 killed at start",
        "fsdp2 rank 1 failed at data",
        "ddp rank 0 killed at model",
        "ddp rank 1 killed at reference",
        "fsdp2 rank 1 failed at model",
        "fsdp2 rank 0 failed at reference",
        "fsdp2 rank 0 killed at training",
        "fsdp2 rank 1 killed at training",
    ],
)
def test_run_ends_with_the_first_process_that_does(
    endless: Path, tmp_path: Path, case: str
) -> None:
    strategy, _, rank, how, _, stage = case.split()
    victim = int(rank)
    arguments = [stage, victim, how, "fit", "--config", str(endless), *OVERLAYS[strategy]]
    arguments += [f"--model.reference_cache={tmp_path}"]
    started = processes.Started(run_to, arguments, processes=2)
    first, other = started.processes[victim], started.processes[1 - victim]
    first.join(60)
    assert first.exitcode == (-signal.SIGKILL if how == "killed" else 1)
    begin = time.monotonic()
    other.join(10)
    lived = time.monotonic() - begin
    other.kill()
    said = started.finish().stderr
    assert lived < 8, said
    assert other.exitcode == 1
    what = "has died" if how == "killed" else "failed (ValueError: a bad layer)"
    assert f"rank {victim} (process {first.pid}) of this run {what}" in said
    assert f"here rank {1 - victim} (process {other.pid})" in said


def fit_in_own_folder(*args: str) -> None:
    """``python -m mpo_lightning ARGS`` in a folder that each rank has to itself."""
    os.chdir(os.environ["RANK"])
    processes.command_line(*args)


def test_ranks_that_read_other_rows_are_refused(endless: Path, tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        write_rows(tmp_path / str(rank) / "groups.jsonl", example_rows(6, seed=rank))
    arguments = ["fit", "--config", str(endless), *OVERLAYS["ddp"], "--data.train=groups.jsonl"]
    result = processes.run(fit_in_own_folder, arguments, processes=2, cwd=tmp_path)
    assert result.returncode == 1
    assert "error: groups.jsonl: holds other rows than rank 0 has read, as rank 1" in result.stderr
    assert "rank 1" in result.stderr.partition("of this run failed (DataError: ")[0]
    assert "Traceback" not in result.stderr
