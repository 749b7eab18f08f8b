"""Processes of a run end together: if one dies or fails, the others say so and end, too.

A thread of each process holds a connection to the first process of its machine. The kernel closes
a connection when its process ends, however it ends, and keeps it while a process is only slow or
stopped. So death is noticed within a second, in every state of the main thread, and slowness never
ends a run. Nothing stays behind: the address is a name in Linux's abstract namespace, which no file
stands for. Other systems have no such names, and nothing is watched there.

Nothing heavy is imported here: a process that Lightning has started watches before its imports.
"""

import atexit
import json
import os
import select
import socket
import struct
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from mpo_lightning.printable import printable

__all__ = ["RunProcesses", "join_run", "watch_early"]

# Variable with the id of a process that may start others by Lightning's launcher, for these.
LAUNCHER = "_MPO_LIGHTNING_LAUNCHER"
# Seconds between two looks at what sends no message.
POLL = 0.2
# Seconds that a failure is kept back: where another process has died, this comes out first.
HOLD = 0.5
# Seconds that a process has to fail by itself, as all do whose data or settings are wrong.
GRACE = 1.0
# Bytes; an escaped character takes up to 12 of them.
LONGEST_MESSAGE = 1 << 16

_State = dict[str, Any]


class RunProcesses:
    """The processes of a run on this machine, as one of them sees them.

    Args:
        address: name that they have in common, and no other run on this machine.
        rank: rank of this process in the run.
        is_first: whether the others connect to this process.
        launcher: id of the process that has started this one and is the first; 0 if unknown.
    """

    def __init__(self, address: str, rank: int, *, is_first: bool, launcher: int = 0) -> None:
        self.address = address
        self._is_first = is_first
        # Runs of a process are counted: each command of a trainer is one. `left` is the number of
        # those that it has ended, or failed in, and `failure` tells how the last of them failed.
        self._run = 1
        self._me = _unheard(rank, os.getpid())
        self._others: dict[socket.socket, _State] = {}
        self._gone: list[_State] = []
        # When the failure of another process was first seen.
        self._failed_at: float | None = None
        self._lock = threading.RLock()
        self._launcher = launcher
        self._listener: socket.socket | None = None
        threading.Thread(target=self._watch, name="run-processes", daemon=True).start()

    # ------------------------------------------------------------------- for the main thread

    def begin(self, rank: int) -> None:
        """Begin a run, or go on with the first, which begins with this object."""
        with self._lock:
            if self._me["left"] == self._run:
                self._run += 1
                self._failed_at = None
            self._tell(rank=rank)
            self._judge()

    def leave(self) -> None:
        """Leave a run that has ended well: this process may end now."""
        with self._lock:
            self._tell(left=self._run)

    def leave_at_exit(self) -> None:
        """Leave the run when the process ends, after what it still does with the others."""
        atexit.register(self.leave)

    def fail(self, error: BaseException) -> None:
        """Tell the others of a failure.

        Communication with a process that has died fails as well. Then the watch ends this process,
        so that the death is told and not what follows from it.
        """
        time.sleep(HOLD)
        text = (str(error).splitlines() or [""])[0]
        with self._lock:
            kind = type(error).__name__
            for other in self._failed():
                if not other["failure"].startswith(kind):
                    self._end(_failure(other))
            self._tell(left=self._run, failure=f"{kind}: {text}"[: LONGEST_MESSAGE // 16])

    # ------------------------------------------------------------------------------ messages

    def _tell(self, **changes: Any) -> None:
        self._me.update(changes)
        message = json.dumps(self._me).encode()
        for connection in self._others:
            _send(connection, message)

    def _failed(self) -> list[_State]:
        """Return the states of other processes that have failed in this run."""
        seen = [*self._others.values(), *self._gone]
        return [each for each in seen if each["left"] == self._run and each["failure"]]

    def _end(self, what: str) -> NoReturn:
        """End this process at once, wherever its main thread is, and tell the others why."""
        for connection in self._others:
            _send(connection, json.dumps({"end": what}).encode())
        rank = self._me["rank"]
        line = f"error: {what} The others end with it, here rank {rank} (process {os.getpid()})."
        # The main thread may hold the lock of sys.stderr, and a progress bar stand in the line.
        os.write(2, f"\n{printable(line)}\n".encode())
        os._exit(1)

    # ---------------------------------------------------------------------------- the thread

    def _watch(self) -> None:
        if self._is_first:
            self._listen()
        else:
            self._connect()
        while self._others or self._listener is not None:
            watched = [*self._others, *([self._listener] if self._listener else [])]
            poll = select.poll()
            for each in watched:
                poll.register(each, select.POLLIN)
            ready = {number for number, _ in poll.poll(POLL * 1000)}
            with self._lock:
                for each in watched:
                    if each.fileno() in ready:
                        self._read(each)
                self._judge()

    def _listen(self) -> None:
        listener = _socket()
        while True:
            try:
                listener.bind(self.address)
                break
            # A process of an earlier run is about to end.
            except OSError:
                time.sleep(POLL)
        listener.listen(1024)
        self._listener = listener

    def _connect(self) -> None:
        while True:
            connection = _socket()
            try:
                connection.connect(self.address)
            except OSError:
                connection.close()
                if self._launcher and _has_ended(self._launcher):
                    self._end(_death(_unheard(0, self._launcher)))
                time.sleep(POLL)
                continue
            process, user = _owner(connection)
            if user != os.getuid():
                raise PermissionError(f"{self.address[1:]} is held by user {user}")
            with self._lock:
                self._others[connection] = _unheard(0, process)
                self._tell()
            return

    def _read(self, ready: socket.socket) -> None:
        if ready is self._listener:
            connection, _ = ready.accept()
            process, user = _owner(connection)
            if user != os.getuid():
                connection.close()
                return
            self._others[connection] = _unheard("?", process)
            _send(connection, json.dumps(self._me).encode())
            return
        try:
            message = ready.recv(LONGEST_MESSAGE)
        except OSError:
            message = b""
        if not message:
            self._gone.append(self._others.pop(ready))
            ready.close()
            return
        state = json.loads(message)
        if "end" in state:
            # The first process tells it to all.
            if self._me["left"] < self._run:
                self._end(state["end"])
        else:
            self._others[ready] = state

    def _judge(self) -> None:
        """End this process if another one has died, or failed and this one does not."""
        if self._me["left"] == self._run:
            return
        for other in self._gone:
            if other["left"] < self._run:
                self._end(_death(other))
        for other in self._failed():
            self._failed_at = self._failed_at or time.monotonic()
            if time.monotonic() - self._failed_at > GRACE:
                self._end(_failure(other))

    def close_in_child(self) -> None:
        """Close the connections in a forked process, which would hold them open."""
        for each in [*self._others, *([self._listener] if self._listener else [])]:
            each.close()


def _unheard(rank: int | str, process: int) -> _State:
    """Return the state of a process that has not told it yet."""
    return {"rank": rank, "pid": process, "left": 0, "failure": ""}


def _death(other: _State) -> str:
    return (
        f"rank {other['rank']} (process {other['pid']}) of this run has died: it was killed, or "
        "has said why it failed."
    )


def _failure(other: _State) -> str:
    return f"rank {other['rank']} (process {other['pid']}) of this run failed ({other['failure']})."


def _socket() -> socket.socket:
    # Messages of this kind of connection arrive whole.
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _send(connection: socket.socket, message: bytes) -> None:
    # Whoever has ended is noticed when its connection is read.
    with suppress(OSError):
        connection.send(message, socket.MSG_DONTWAIT)


def _owner(connection: socket.socket) -> tuple[int, int]:
    """Return process and user at the other end."""
    size = struct.calcsize("3i")
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    process, user, _ = struct.unpack("3i", credentials)
    return process, user


def _has_ended(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_bytes().rpartition(b") ")[2][:1]
    except (FileNotFoundError, ProcessLookupError):
        return True
    # It has ended, and whoever started it has not asked how.
    return state in (b"Z", b"X")


# ------------------------------------------------------------------------------- of this process

# By address; one, unless this process runs with others after those.
_watched: dict[str, RunProcesses] = {}


def watch_early() -> None:
    """Begin to watch in a process that Lightning has started, or note that this one may start some.

    Call it as early as possible.
    """
    if "LOCAL_RANK" not in os.environ:
        os.environ[LAUNCHER] = str(os.getpid())
        return
    launcher, rank = int(os.environ.get(LAUNCHER, "0")), int(os.environ["LOCAL_RANK"])
    if sys.platform == "linux" and launcher and rank and "MASTER_PORT" in os.environ:
        node = int(os.environ.get("NODE_RANK", "0"))
        _watch_at(int(os.environ["MASTER_PORT"]), node, rank, is_first=False, launcher=launcher)


def join_run(*, port: int, node: int, local_rank: int, rank: int) -> RunProcesses | None:
    """Begin a run together with the other processes on this machine.

    Args:
        port: port of the run's first process (``MASTER_PORT``).
        node: rank of this machine.
        local_rank: rank of this process on its machine.
        rank: rank of this process in the run.

    Returns:
        the processes; None where they cannot be watched.
    """
    # Not for what this process starts in other ways.
    os.environ.pop(LAUNCHER, None)
    if sys.platform != "linux":
        return None
    watched = _watch_at(port, node, rank, is_first=local_rank == 0)
    watched.begin(rank)
    return watched


def _watch_at(
    port: int, node: int, rank: int, *, is_first: bool, launcher: int = 0
) -> RunProcesses:
    address = f"\0mpo-lightning-{port}-{node}"
    if address not in _watched:
        _watched[address] = RunProcesses(address, rank, is_first=is_first, launcher=launcher)
    return _watched[address]


def _after_fork() -> None:
    for each in _watched.values():
        each.close_in_child()
    _watched.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
