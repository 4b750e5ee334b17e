"""Real processes that play the ranks of a group in tests: started once, told what to run, ended whatever happens."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from services.worker.communicator import Communicator, Kind, create, open_rendezvous
from shared.errors import GhostError

Part = Callable[..., Any]  # (communicator, *arguments) -> result; runs in a rank's process

_DEADLINE = 60.0
_CONTEXT = multiprocessing.get_context("forkserver")  # which has imported torch once for all ranks
_CONTEXT.set_forkserver_preload(["services.worker.communicator.torch_dist", "tests.conformance.test_communicator"])


@dataclass(frozen=True)
class Outcome:
    """What a rank's part came to: a result, or the name of a GhostError's class, and the seconds it took."""

    result: Any
    error: str | None
    seconds: float


class RankProcesses:
    """`size` processes. `play` runs a part on each of them, over a communicator of its own."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes = [_Child(rank) for rank in range(size)]

    def play(self, kind: Kind, part: Part, *arguments: Any, **options: Any) -> list[Outcome | None]:
        """Start the part everywhere and wait for it; see `start` and `Run.outcomes`."""
        return self.start(kind, part, *arguments, **options).outcomes()

    def start(
        self,
        kind: Kind,
        part: Part,
        *arguments: Any,
        slot_bytes: int = 1 << 16,
        timeout: float = 90.0,
        absent: tuple[int, ...] = (),
    ) -> "Run":
        """Start part(communicator, *arguments) on every rank but the absent ones."""
        handle = open_rendezvous(kind, self.size, slot_bytes=slot_bytes)
        for rank, child in enumerate(self._processes):
            if rank not in absent:
                child.send((kind, handle.address, rank, self.size, slot_bytes, timeout, part, arguments))
        return Run(self, handle, absent)

    def signal(self, rank: int, number: int) -> None:
        os.kill(self._processes[rank].pid, number)

    def revive(self, rank: int) -> None:
        """Kill the rank's process, if it lives, and put a new one in its place."""
        self._processes[rank].end()
        self._processes[rank] = _Child(rank)

    def receive(self, rank: int, deadline: float) -> Outcome:
        return self._processes[rank].receive(deadline)

    def close(self) -> None:
        for child in self._processes:
            child.end()


class Run:
    """A part that is running on the ranks."""

    def __init__(self, processes: RankProcesses, handle: Any, absent: tuple[int, ...]) -> None:
        self._processes = processes
        self._handle = handle
        self._absent = absent

    def outcomes(self, lost: tuple[int, ...] = ()) -> list[Outcome | None]:
        """What each rank's part came to; None for ranks that were absent or are known to be lost."""
        deadline = time.monotonic() + _DEADLINE
        try:
            return [
                None if rank in lost + self._absent else self._processes.receive(rank, deadline)
                for rank in range(self._processes.size)
            ]
        finally:
            self._handle.close()


class _Child:
    def __init__(self, rank: int) -> None:
        self._connection, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_play_parts, args=(theirs,), name=f"rank-{rank}", daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def send(self, message: Any) -> None:
        self._connection.send(message)

    def receive(self, deadline: float) -> Outcome:
        if not self._connection.poll(max(0.0, deadline - time.monotonic())):
            raise AssertionError(f"{self._process.name} hangs")
        outcome = self._connection.recv()
        assert isinstance(outcome, Outcome), outcome
        return outcome

    def end(self) -> None:
        self._process.kill()  # also where it is stopped
        self._process.join(10)
        assert self._process.exitcode == -signal.SIGKILL
        self._process.close()
        self._connection.close()


def _play_parts(connection: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            kind, address, rank, size, slot_bytes, timeout, part, arguments = connection.recv()
        except EOFError:
            return
        began = time.monotonic()
        communicator: Communicator | None = None
        try:
            communicator = create(kind, address, rank, size, slot_bytes=slot_bytes, timeout=timeout)
            outcome = Outcome(part(communicator, *arguments), None, time.monotonic() - began)
        except GhostError as error:
            outcome = Outcome(str(error), type(error).__name__, time.monotonic() - began)
        except BaseException as error:
            connection.send(f"rank {rank}: {error!r}")
            raise
        if communicator is not None:
            communicator.close()
        connection.send(outcome)
