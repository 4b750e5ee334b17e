"""What makes UCX move in an asyncio program: one UCX worker for each event loop, progressed only in that loop's thread.

No thread of UCXX runs, and nobody polls while nothing moves: the loop watches the worker's file descriptor, and arms it
whenever it has nothing more to do. So memory is touched only within `_turn` and `close_endpoint`.

Settings, by measurement (UCX 1.21 over loopback, two processes; 120 KiB buffers by 64 / 16 MiB buffers; GB/s). All but
the first block were taken on 2 cores that others kept busy, which moves figures by a third; tcp beside them in turns.
Each setting yields to a variable of the same name in the environment (UCX_...).

    TCP segments as UCX comes (8 KiB)                        0.36           one sender, one receiver, no protocol
    TCP_TX_SEG_SIZE = TCP_RX_SEG_SIZE = 256k                 1.51  chosen
    the same, 1m                                             1.41
    endpoints without error handling (shared memory)         1.77 / 3.9     not for us: such an endpoint can't be closed
                                                                            by force, and bytes could arrive too late
    whole protocol, tcp                                      1.4 to 1.7 / 1.4 to 1.9
    ucx, the loop sleeps at once when nothing moves          0.7 to 0.9 / 1.1 to 1.5
    ucx, it sleeps after 100 us                              0.95 / 1.6 to 2.2  chosen
    ucx, it sleeps after 500 us                              0.6 / 0.85     spinning takes the cores that the peer needs
    ucx, it never sleeps, on cores that were idle            2.2 / 3.0      beside tcp 1.35 / 1.6, and a core for ever

Over plain sockets this stays behind tcp (python -m tests.bench.transport): 0.7 to 0.8 of its speed for 120 KiB buffers
and 0.8 to 0.95 for 16 MiB, for 1.5 and 1.2 times the processor time. UCX gives no remote-memory lane to an endpoint
that handles errors (it could not take the keys back), so its rendezvous sends active messages, which the receiver
copies once more, and two more small messages travel for each buffer. Tried in turns with tcp, without gain: waiting for
UCX's descriptor outside of the loop, spinning 50 to 1,000 us, eager messages up to 512 KiB (and then what a slow reader
has not asked for piles up in its memory), segments of 64 KiB to 1 MiB, socket buffers of 256 KiB to 4 MiB, and shared
memory with UCX_POSIX_ERROR_HANDLING=y (no single-copy lane either). UCX is for RDMA and CUDA, where `auto` takes it.
"""

import asyncio
import contextlib
import importlib
import importlib.util
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

from shared.errors import ConfigError, GhostError, PeerLost

log = logging.getLogger(__name__)

WINDOW = 64  # pieces of one operation that UCX works on at a time
_SPIN_S = 100e-6  # without anything moving, before the loop goes to sleep
_CLOSE_NS, _CLOSE_ATTEMPTS = 10_000_000, 10  # bound of closing one endpoint by force
_SETTINGS = {"TCP_TX_SEG_SIZE": "256k", "TCP_RX_SEG_SIZE": "256k"}

_engines: "WeakKeyDictionary[asyncio.AbstractEventLoop, dict[bool, Engine]]" = WeakKeyDictionary()


def library() -> Any:
    """Return UCXX's low-level module. Raises ConfigError where it is not installed, or can't be loaded."""
    os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")
    try:
        return importlib.import_module("ucxx._lib.libucxx")
    except ImportError as error:
        raise ConfigError(f"transport ucx needs UCXX (pip install 'ghostserve[ucx]'): {error}") from error


def array(view: memoryview) -> Any:
    """Return a buffer as UCXX takes it; it holds the memory."""
    return importlib.import_module("ucxx._lib.arr").Array(view)


@lru_cache
def context(loopback: bool) -> Any:
    """Return the process's UCX context; one for loopback opens no port to other machines. Raises ConfigError."""
    lib = library()
    wanted = dict(_SETTINGS, NET_DEVICES="lo") if loopback else _SETTINGS
    config = {name: value for name, value in wanted.items() if f"UCX_{name}" not in os.environ}
    try:
        return lib.UCXContext(config, feature_flags=(lib.Feature.TAG, lib.Feature.WAKEUP))
    except lib.UCXError as error:
        raise ConfigError(f"UCX can't be used here: {error}") from error


class Operation:
    """Buffers that are sent or received one after the other, WINDOW pieces at a time."""

    def __init__(self, pieces: Iterator[memoryview], post: Callable[[memoryview], Any]):
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.moved = 0  # pieces
        self._pieces = pieces
        self._post = post
        self._requests: deque[Any] = deque()

    def advance(self) -> bool:
        """Take off what UCX has done, hand it more, and say whether this operation has ended."""
        if self.done.done():
            return True
        try:
            while True:
                while self._requests and self._requests[0].completed:
                    self._requests.popleft().check_error()
                    self.moved += 1
                piece = next(self._pieces, None) if len(self._requests) < WINDOW else None
                if piece is None:
                    break
                self._requests.append(self._post(piece))
        except Exception as error:  # every error of UCXX, and there are thirty kinds, means that this pipe is of no use
            self.fail(PeerLost(f"UCX: {type(error).__name__}: {error}"))
            return True
        if not self._requests:
            self.done.set_result(None)
        return self.done.done()

    def fail(self, error: GhostError) -> None:
        """End it with an error, unless it has ended."""
        if not self.done.done():
            self.done.set_exception(error)
            self.done.exception()  # seen, should nobody wait any more

    @property
    def idle(self) -> bool:
        """Whether UCX works on none of its buffers."""
        return all(request.completed for request in self._requests)


class Engine:
    """One UCX worker, progressed by its event loop. Held by every stream and listener that uses it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, loopback: bool):
        lib = library()
        self._key = loopback
        self._loop = loop
        self._worker = lib.UCXWorker(context(loopback))
        self._worker.init_blocking_progress_mode()
        self._lib = lib
        self._holders = 0
        self._operations: list[Operation] = []
        self._scheduled: asyncio.Handle | None = None
        self._moved = 0.0
        self.address = bytes(lib.UCXAddress.create_from_worker(self._worker).tobytes())
        loop.add_reader(self._worker.epoll_file_descriptor, self._readable)
        self._wake()

    @classmethod
    async def hold(cls, loopback: bool) -> "Engine":
        """Return the running loop's engine, which is there until release. Raises ConfigError."""
        loop = asyncio.get_running_loop()
        await asyncio.to_thread(context, loopback)  # a second for the first import, then nothing
        engines = _engines.setdefault(loop, {})
        if loopback not in engines:
            engines[loopback] = cls(loop, loopback)
        engines[loopback]._holders += 1
        return engines[loopback]

    def release(self) -> None:
        """A holder is done; the last one's release closes the worker."""
        self._holders -= 1
        if self._holders:
            return
        del _engines[self._loop][self._key]
        if self._scheduled is not None:
            self._scheduled.cancel()
        if not self._loop.is_closed():
            self._loop.remove_reader(self._worker.epoll_file_descriptor)
        del self._worker

    def connect(self, address: bytes) -> Any:
        """Return an endpoint to the worker of this address. Raises PeerLost."""
        try:
            there = self._lib.UCXAddress.create_from_buffer(address)
            return self._lib.UCXEndpoint.create_from_worker_address(self._worker, there, True)
        except Exception as error:
            raise PeerLost(f"UCX can't reach the peer: {error}") from error

    def tag(self, value: int) -> Any:
        """Return a tag as UCXX takes it."""
        return self._lib.UCXXTag(value)

    def start(self, operation: Operation) -> None:
        """Begin an operation; its future says how it ended."""
        if not operation.advance():
            self._operations.append(operation)
        self._wake()

    def close_endpoint(self, endpoint: Any, operations: list[Operation]) -> None:
        """Close by force. When it returns, UCX no longer touches the buffers of these operations."""
        with contextlib.suppress(Exception):  # a peer that is gone is the usual reason to close
            endpoint.close_blocking(_CLOSE_NS, _CLOSE_ATTEMPTS)
        for _ in range(1000):
            if all(operation.idle for operation in operations):
                return
            self._worker.progress()
        log.error("UCX did not let go of %d operations", sum(not operation.idle for operation in operations))

    def _wake(self) -> None:
        self._moved = self._loop.time()
        if self._scheduled is None:
            self._scheduled = self._loop.call_soon(self._turn)

    def _readable(self) -> None:
        """UCX's descriptor has news. It is readable until the next arm, so it says nothing to a loop that is awake."""
        if self._scheduled is None:
            self._wake()

    def _turn(self) -> None:
        """Let UCX work, tell who waits, and sleep when nothing has happened for a while."""
        self._scheduled = None
        moved = False
        for _ in range(WINDOW):
            if not self._worker.progress_once():
                break
            moved = True
        self._operations = [operation for operation in self._operations if not operation.advance()]
        now = self._loop.time()
        if moved:
            self._moved = now
        if now < self._moved + _SPIN_S or not self._worker.arm():
            self._scheduled = self._loop.call_soon(self._turn)


def is_installed() -> bool:
    """Say whether UCXX is there, without loading it."""
    return importlib.util.find_spec("ucxx") is not None
