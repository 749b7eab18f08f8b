"""Processes that have the libraries loaded when they start: a server forks them off.

What the command line runs in them is what ``python -m mpo_lightning`` runs. To import torch,
Lightning and transformers takes most of the time of a small run, and is done once for all of them.
"""

import importlib.util
import multiprocessing
import os
import resource
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

from lightning.fabric.utilities.rank_zero import rank_zero_only

# What a run imports by and by.
PRELOAD = [
    *("mpo_lightning.commands.run", "datasets", "peft", "tensorboard", "bitsandbytes"),
    *("torch.distributed.fsdp", "torch._dynamo", "transformers.models.llama.modeling_llama"),
]
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(PRELOAD)


def command_line(*args: str) -> None:
    """``python -m mpo_lightning ARGS``."""
    module = importlib.util.find_spec("mpo_lightning.__main__")
    assert module is not None
    sys.argv = [str(module.origin), *args]
    runpy.run_module("mpo_lightning", run_name="__main__", alter_sys=True)


class _Surroundings(NamedTuple):
    """What a process is started with besides its arguments."""

    output: str
    folder: str
    environment: dict[str, str]
    file_size: int | None


def _enter(function: Callable[..., Any], args: Sequence[Any], around: _Surroundings) -> None:
    """Make of a forked process what a new one is, and call the function."""
    missing = [name for name in PRELOAD if name not in sys.modules]
    assert not missing, f"the server has not imported {missing}"
    # DataLoader's workers are started as they are in any other process.
    multiprocessing.set_start_method(None, force=True)
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(f"{around.output}/{name}", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    os.chdir(around.folder)
    os.environ.clear()
    os.environ.update(around.environment)
    # Lightning has read this when it was imported.
    rank_zero_only.rank = int(around.environment.get("RANK", "0"))
    if around.file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (around.file_size, around.file_size))
    function(*args)


class Started:
    """Processes that run the same function and know of each other.

    Args:
        function: of a module that the processes can import.
        args: its arguments.
        processes: how many. Several are told of each other by the variables that Lightning sets
            for the processes which it starts itself, and torchrun for its own.
        per_node: how many of them believe to be on the same machine; all by default.
        cwd: the folder to run in, this process's by default.
        file_size: the most bytes that a file may come to have.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        args: Sequence[Any],
        *,
        processes: int = 1,
        per_node: int | None = None,
        cwd: Path | None = None,
        file_size: int | None = None,
    ) -> None:
        self._command = [function, *args]
        self._output = tempfile.TemporaryDirectory()
        environments = [dict(os.environ)]
        if processes > 1:
            with socket.socket() as free:
                free.bind(("localhost", 0))
                port = str(free.getsockname()[1])
            world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
            places = [divmod(rank, per_node or processes) for rank in range(processes)]
            environments = [
                {
                    **os.environ,
                    **world,
                    **{"RANK": str(rank), "NODE_RANK": str(node), "LOCAL_RANK": str(local)},
                }
                for rank, (node, local) in enumerate(places)
            ]
        folder = str((cwd or Path.cwd()).resolve())
        around = [_Surroundings(self._output.name, folder, one, file_size) for one in environments]
        self.processes = [
            _SERVER.Process(target=_enter, args=(function, args, one)) for one in around
        ]
        for process in self.processes:
            process.start()

    def finish(self, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Wait for all.

        When one fails, the others have 5 seconds to end by themselves, as with Lightning.

        Args:
            timeout: seconds after which they are killed.

        Returns:
            The first process's exit status, and the output of all.
        """
        deadline = time.monotonic() + timeout
        while running := [process for process in self.processes if process.exitcode is None]:
            wait([process.sentinel for process in running], deadline - time.monotonic())
            if any(process.exitcode for process in self.processes):
                deadline = min(deadline, time.monotonic() + 5)
            if time.monotonic() >= deadline:
                for process in running:
                    process.kill()
                    process.join()
        files = (Path(self._output.name) / name for name in ("out", "err"))
        texts = [file.read_text(encoding="utf-8") if file.exists() else "" for file in files]
        self._output.cleanup()
        status = self.processes[0].exitcode
        assert status is not None
        return subprocess.CompletedProcess(self._command, status, *texts)


def run(
    function: Callable[..., Any], args: Sequence[Any], **settings: Any
) -> subprocess.CompletedProcess[str]:
    """Start processes, see ``Started``, and wait for them."""
    return Started(function, args, **settings).finish()
