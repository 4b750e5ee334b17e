"""The worker processes of an engine core: started, told, listened to, and ended."""

import logging
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import psutil
from vllm.config import VllmConfig
from vllm.utils.ompmultiprocessing import OMPProcessManager

from services.vllm import messages, process

log = logging.getLogger("vllm.ghostserve")

LOOK_S = 0.1
"""How often it is looked whether a process was stopped."""


class Member:
    """One worker process, as the engine core sees it."""

    def __init__(self, name: str, running: BaseProcess, connection: Connection, place: int | None = None):
        """`place`: the GPU that it uses."""
        self.name = name
        self.place = place
        self.device_failed = ""
        """Why its device can't be used any more, where that is why it has ended."""
        self.process = running
        self.connection = connection
        self._sending = threading.Lock()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid or 0

    def tell(self, message: messages.Message) -> None:
        """Send. If it is gone nothing happens: its end is heard by whoever listens."""
        with self._sending:
            try:
                messages.send(self.connection, message)
            except OSError:
                log.debug("%s is gone", self.name)

    def kill(self) -> None:
        """End it at once. That it is gone is told as if it had died by itself."""
        if self.process.is_alive():
            with suppress(ProcessLookupError):  # it has ended since, or nobody has been told yet
                os.kill(self.pid, signal.SIGKILL)


class Crew:
    """All worker processes. What they say, and that they are gone, is told on a thread of the crew's.

    One that stays stopped (SIGSTOP) for `stop_grace_s` is killed, as our supervisor does: the others wait for it in a
    collective. 0: it may stay.
    """

    def __init__(
        self,
        config: VllmConfig,
        heard: Callable[[Member, messages.Message], None],
        gone: Callable[[Member], None],
        stop_grace_s: float,
    ):
        self._config = config
        self._stopped: Counter[Member] = Counter()  # looks in a row: a time would count our own stop against them
        self._patience = max(1, round(stop_grace_s / LOOK_S)) if stop_grace_s else 0
        self._heard = heard
        self._gone = gone
        # Forked from a process that has imported everything: 2 s instead of 10, and that memory is shared.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["services.vllm.imports"])
        self._lock = self._context.Lock()
        self._omp = OMPProcessManager(config)
        self._members: dict[Connection, Member] = {}
        self._count = 0
        self._changed, self._change = multiprocessing.Pipe(duplex=False)
        self._guard = threading.Lock()
        self._closed = False
        threading.Thread(target=self._listen, name="crew", daemon=True).start()

    def start(self, rank: int | None = None, place: int | None = None) -> Member:
        """Start a process, bound to the cores of `rank` if it is known which it will be, and to the GPU `place`."""
        with self._guard:
            name = f"Worker_{self._count}"
            self._count += 1
        ours, theirs = self._context.Pipe()
        arguments = (pickle.dumps(self._config), self._lock, theirs, name, place)
        running = self._context.Process(target=process.main, args=arguments, name=name, daemon=True)
        with self._omp.configure_omp_envs(rank=rank or 0, local_rank=rank or 0):
            running.start()
        theirs.close()
        member = Member(name, running, ours, place)
        with self._guard:
            self._members[ours] = member
        self._change.send_bytes(b"\0")
        return member

    def close(self) -> list[BaseProcess]:
        """Let go of all processes, which end when they notice. Returns them."""
        with self._guard:
            self._closed = True
            members = list(self._members.values())
            self._members.clear()
        self._change.send_bytes(b"\0")
        for member in members:
            member.connection.close()
        return [member.process for member in members]

    def _listen(self) -> None:
        timeout = LOOK_S if self._patience else None
        looked = 0.0
        while True:
            with self._guard:
                if self._closed:
                    return
                connections = list(self._members)
            for ready in multiprocessing.connection.wait([self._changed, *connections], timeout):
                if ready is self._changed:
                    self._changed.recv_bytes()
                elif isinstance(ready, Connection):
                    self._hear(ready)
            if self._patience and time.monotonic() - looked >= LOOK_S:
                looked = time.monotonic()
                self._look()

    def _look(self) -> None:
        """Kill what stays stopped."""
        for member in list(self._members.values()):
            if not _is_stopped(member.pid):
                del self._stopped[member]
                continue
            self._stopped[member] += 1
            if self._stopped[member] == self._patience:
                log.warning("%s (pid %d) stays stopped: it is killed", member.name, member.pid)
                member.kill()

    def _hear(self, connection: Connection) -> None:
        member = self._members.get(connection)
        if member is None:
            return
        try:
            message = messages.receive(connection)
        except (EOFError, OSError):
            with self._guard:
                closed = self._members.pop(connection, None) is None
            if not closed:
                connection.close()
                member.process.join(timeout=1.0)
                del self._stopped[member]
                self._gone(member)
            return
        self._heard(member, message)


def _is_stopped(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    except psutil.NoSuchProcess:
        return False
