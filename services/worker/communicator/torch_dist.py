"""Communicators over torch.distributed: gloo between CPUs of several hosts, NCCL between GPUs.

The process groups are built directly over a TCPStore of rank 0, without a default group, so that those of an old epoch
can still be dying beside those of a new one.
"""

import contextlib
import json
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch._C import _distributed_c10d as c10d

from services.worker.communicator.base import Communicator, cut
from services.worker.device import CudaDevice, Device
from services.worker.memory import Memory, to_host
from shared.errors import CommunicatorAborted, CutOff, DeadlineExceeded, ProtocolError

log = logging.getLogger(__name__)

_ROUND_BYTES = 8 << 20  # all_to_all: how much one rank sends at a time
_LEAVING = 0.2  # seconds between a peer's leaving and an abort: others may still be in the last operation
_CONNECT = 10.0  # seconds for ranks that have met to connect; nothing can end that wait sooner
_LOOK = 0.01  # seconds between looks for ranks that have not come yet
_CUT = 5.0  # seconds without an acknowledgement after which a peer's host counts as cut off
_NCCL_CONNECT = 30.0  # the same for NCCL, which looks at links and devices first
_WATCH = 0.05  # seconds between looks at NCCL's operations
_ABORT = 5.0  # seconds that NCCL's abort is waited for
_LEAVE_US_ALONE = {  # PyTorch's own handling of errors ends the process, or aborts: both are done here
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_BLOCKING_WAIT": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_PROPAGATE_ERROR": "0",
}
_opening = threading.Lock()  # one device at a time, so that the listener it opens can be told
_Start = Callable[[], c10d.Work]


class StoreRendezvous:
    """The TCPStore of one communicator, held by rank 0 until all ranks are connected."""

    def __init__(self, size: int, host: str) -> None:
        self._store: c10d.TCPStore | None = c10d.TCPStore(
            host, 0, size, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
        )
        self.address = f"{host}:{self._store.port}"

    def close(self) -> None:
        """Close the store. Ranks that are connected do without it."""
        self._store = None


class _GroupCommunicator(Communicator):
    """What gloo and NCCL have in common: a process group, and the translation of its errors."""

    def __init__(
        self, address: str, rank: int, size: int, timeout: float, cancelled: threading.Event | None = None
    ) -> None:
        super().__init__(rank, size, timeout)
        self._aborted = threading.Event()
        try:
            store = self._reach(address)
            self._meet(store, cancelled or threading.Event())
            host = address.rpartition(":")[0]
            self._group = self._open(c10d.PrefixStore("ghostserve", store), host, timedelta(seconds=timeout))
        except (RuntimeError, ValueError) as error:
            raise DeadlineExceeded(f"rank {rank} of {size} could not connect through {address}: {error}") from error

    def _reach(self, address: str) -> c10d.TCPStore:
        """Connect to rank 0's store."""
        host, _, port = address.rpartition(":")
        bound = timedelta(seconds=min(self.timeout, _CUT))
        try:
            store = c10d.TCPStore(host, int(port), self.size, is_master=False, wait_for_workers=False, timeout=bound)
        except RuntimeError as error:
            raise CutOff(f"rank {self.rank} can't reach rank 0 at {address}: {error}") from error
        store.set_timeout(timedelta(seconds=min(self.timeout, _CONNECT)))
        return store

    def _meet(self, store: c10d.TCPStore, cancelled: threading.Event) -> None:
        """Wait until all ranks are here. The library would wait too, but could not be stopped."""
        store.set(f"here/{self.rank}", "")
        everyone = [f"here/{rank}" for rank in range(self.size)]
        deadline = time.monotonic() + self.timeout
        while not store.check(everyone):
            if cancelled.wait(_LOOK):
                raise CommunicatorAborted("the epoch ended before all ranks had come")
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"a rank did not come within {self.timeout} s")

    def _open(self, store: c10d.Store, host: str, timeout: timedelta) -> Any:
        raise NotImplementedError

    def all_reduce(self, tensor: torch.Tensor) -> None:
        # the backends' own sums depend on the size (rings are cut by it); gathered and added in order they don't
        parts = tensor.new_empty(self.size, *tensor.shape)
        self.all_gather(tensor, parts)
        total = parts[0].float() if tensor.dtype in (torch.bfloat16, torch.float16) else parts[0]
        for part in parts[1:]:
            total = total.add_(part)
        tensor.copy_(total)

    def all_gather(self, tensor: torch.Tensor, out: torch.Tensor) -> None:
        self._check_gather(tensor, out)
        self._run(lambda: self._group.allgather([list(out.unbind(0))], [tensor]))

    def all_to_all(self, send: Sequence[Sequence[Memory]], receive: Sequence[Sequence[Memory]]) -> None:
        self._check_exchange(send, receive)
        send_sizes = [[len(buffer) for buffer in buffers] for buffers in send]
        receive_sizes = [[len(buffer) for buffer in buffers] for buffers in receive]
        most = self._agree([sum(sizes) for sizes in send_sizes], [sum(sizes) for sizes in receive_sizes])
        part = _ROUND_BYTES // self.size
        for start in range(0, most, part):
            lengths_out = [max(0, min(part, sum(sizes) - start)) for sizes in send_sizes]
            lengths_in = [max(0, min(part, sum(sizes) - start)) for sizes in receive_sizes]
            outgoing = np.empty(sum(lengths_out), dtype=np.uint8)
            at = 0
            for buffers, sizes in zip(send, send_sizes, strict=True):
                for piece in cut(sizes, start, part):
                    outgoing[at : at + piece.length] = to_host(buffers[piece.buffer])[piece.offset :][: piece.length]
                    at += piece.length
            incoming = self._exchange(torch.from_numpy(outgoing), lengths_out, lengths_in).numpy()
            at = 0
            for buffers, sizes in zip(receive, receive_sizes, strict=True):
                for piece in cut(sizes, start, part):
                    into = to_host(buffers[piece.buffer])[piece.offset :][: piece.length]
                    into[:] = incoming[at : at + piece.length]
                    at += piece.length

    def _agree(self, sent: list[int], received: list[int]) -> int:
        """Make sure that all ranks expect what the others send; returns the most bytes from one rank to another."""
        totals = torch.empty(self.size, self.size, dtype=torch.int64, device=self._device)
        self.all_gather(torch.tensor(sent, device=self._device), totals)
        if totals[:, self.rank].tolist() != received:
            self.abort()
            raise ProtocolError(f"all_to_all: rank {self.rank} expects other sizes than its peers send")
        return int(totals.max())

    def _exchange(self, sent: torch.Tensor, lengths_out: list[int], lengths_in: list[int]) -> torch.Tensor:
        """Send uint8 `sent`, cut by lengths_out; return what came, in rank order."""
        came = torch.empty(sum(lengths_in), dtype=torch.uint8, device=self._device)
        self._receive(came, sent, lengths_in, lengths_out)
        return came

    def _receive(self, into: torch.Tensor, sent: torch.Tensor, lengths_in: list[int], lengths_out: list[int]) -> None:
        self._run(lambda: self._group.alltoall_base(into, sent, lengths_in, lengths_out, c10d.AllToAllOptions()))

    @property
    def _device(self) -> torch.device:
        return torch.device("cpu")

    def _run(self, start: _Start) -> None:
        """Start an operation and wait for it. The backend bounds the wait by the group's timeout."""
        if self._aborted.is_set():
            raise CommunicatorAborted("the epoch was aborted")
        self.entered += 1
        began = time.monotonic()
        try:
            start().wait()
            self.waited_s += time.monotonic() - began
        except RuntimeError as error:
            late = time.monotonic() - began >= 0.95 * self.timeout and not self._aborted.is_set()
            self.abort()
            if late:
                raise DeadlineExceeded(f"a peer did not take part within {self.timeout} s") from error
            raise CommunicatorAborted(f"a peer is gone, or the epoch ended: {error}") from error


class GlooCommunicator(_GroupCommunicator):
    """Ranks on CPUs, over TCP. `abort` shuts down the group's own sockets, which frees the waiters of this rank.

    gloo tells a waiter only of the peer it waits for. So a thread watches the connections to all peers, and aborts when
    one of them has ended: a failure, or an abort, travels to every rank.
    """

    _sockets: list[socket.socket]

    def _open(self, store: c10d.Store, host: str, timeout: timedelta) -> Any:
        options: Any = c10d.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        with _opening:
            before = _open_sockets()
            options._devices = [c10d.ProcessGroupGloo.create_device(hostname=_own_address(host))]
            opened = [fd for fd, inode in _open_sockets().items() if before.get(fd) != inode]
        mine = json.dumps([address for fd in opened for address in _ends(fd, listening=True)])
        store.set(f"listens/{self.rank}", mine)
        options._timeout = min(timeout, timedelta(seconds=_CONNECT))
        group = c10d.ProcessGroupGloo(store, self.rank, self.size, options)
        listening = {tuple(end) for rank in range(self.size) for end in json.loads(store.get(f"listens/{rank}"))}
        self._sockets = [_duplicate(fd) for fd in _open_sockets() if listening & set(_ends(fd, listening=False))]
        if len(self._sockets) != self.size - 1:
            raise RuntimeError(f"gloo has {len(self._sockets)} connections to {self.size - 1} peers")
        group.set_timeout(timeout)
        for one in self._sockets:
            _notice_cuts(one)
        self._closing = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="gloo-watch", daemon=True)
        self._watcher.start()
        return group

    def _watch(self) -> None:
        poll = select.poll()
        for one in self._sockets:
            poll.register(one.fileno(), select.POLLRDHUP)
        poll.poll()  # ends at the latest when `abort` shuts the sockets down
        if not self._closing.wait(_LEAVING):
            self.abort()

    def abort(self) -> None:
        self._aborted.set()
        for one in self._sockets:
            with contextlib.suppress(OSError):  # not connected any more
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._closing.set()
        self.abort()
        self._watcher.join(self.timeout)
        for one in self._sockets:
            one.close()
        self._sockets = []


def _nccl_group(store: c10d.Store, rank: int, size: int, timeout: timedelta, device: torch.device) -> Any:
    """A process group over NCCL whose ranks are connected: NCCL would wait for the first operation otherwise, and rank
    0's store is closed by then. Also keeps PyTorch from ending the process where an operation fails."""
    os.environ.update(_LEAVE_US_ALONE)
    options = c10d.ProcessGroupNCCL.Options()
    options._timeout = timeout
    group = c10d.ProcessGroupNCCL(store, rank, size, options)
    group.eager_connect_single_device(device)
    return group


class NcclCommunicator(_GroupCommunicator):
    """Ranks on GPUs, each on the device that is current when it connects. Not run yet: it needs a GPU.

    Operations only queue: the thread's current stream waits for them, the host does not. What goes wrong shows in the
    next operation, or in `check`. A thread of its own sees to the timeout; it ends the device's waits by an abort.
    """

    def _open(self, store: c10d.Store, host: str, timeout: timedelta) -> Any:
        self._on = self._own_device()
        self._late = False
        self._ending: threading.Thread | None = None
        self._abort_once = threading.Lock()
        self._looking = threading.Lock()
        self._latest: c10d.Work | None = None
        group = self._connect(store, timeout)
        threading.Thread(target=self._watch, name="nccl-watch", daemon=True).start()
        return group

    def _own_device(self) -> Device:
        return CudaDevice(torch.device("cuda", torch.cuda.current_device()))

    def _connect(self, store: c10d.Store, timeout: timedelta) -> Any:
        """NCCL's own wait for the ranks can't be stopped: it is left behind when it takes too long."""
        made: Future[Any] = Future()

        def connect() -> None:
            try:
                self._on.bind()
                made.set_result(_nccl_group(store, self.rank, self.size, timeout, self._device))
            except Exception as error:  # raised below, in the thread that waits
                made.set_exception(error)

        threading.Thread(target=connect, name="nccl-connect", daemon=True).start()
        try:
            return made.result(min(self.timeout, _NCCL_CONNECT))
        except TimeoutError as error:
            raise DeadlineExceeded(f"NCCL did not connect rank {self.rank} of {self.size} in time") from error

    @property
    def _device(self) -> torch.device:
        return self._on.where

    def all_reduce(self, tensor: torch.Tensor) -> None:
        self._run(lambda: self._group.allreduce([tensor], c10d.AllreduceOptions()))

    def all_gather(self, tensor: torch.Tensor, out: torch.Tensor) -> None:
        self._check_gather(tensor, out)
        self._run(lambda: self._group._allgather_base(out, tensor))

    def all_to_all(self, send: Sequence[Sequence[Memory]], receive: Sequence[Sequence[Memory]]) -> None:
        self._check_exchange(send, receive)
        lengths_out = [sum(map(len, buffers)) for buffers in send]
        lengths_in = [sum(map(len, buffers)) for buffers in receive]
        sent = self._flat([buffer for buffers in send for buffer in buffers])
        into = [self._here(buffer) for buffers in receive for buffer in buffers]
        if (whole := _side_by_side(into)) is not None:
            self._receive(whole, sent, lengths_in, lengths_out)
            return
        came = self._exchange(sent, lengths_out, lengths_in)
        for buffer, part in zip(into, torch.split(came, [len(buffer) for buffer in into]), strict=True):
            buffer.copy_(part)

    def _flat(self, buffers: Sequence[Memory]) -> torch.Tensor:
        """The buffers end to end, on this rank's device."""
        here = [self._here(buffer) for buffer in buffers]
        return here[0] if len(here) == 1 else torch.cat([torch.empty(0, dtype=torch.uint8, device=self._device), *here])

    def _here(self, buffer: Memory) -> torch.Tensor:
        """A buffer as a tensor. Raises ProtocolError if it is in host memory: NCCL does not go there."""
        if not isinstance(buffer, torch.Tensor):
            raise ProtocolError("the buffers that NCCL exchanges are on a GPU")
        return buffer

    def _run(self, start: _Start) -> None:
        """Queue an operation, and let the current stream go on behind it."""
        self.check()
        self.entered += 1
        try:
            work = start()
            work.wait()
        except RuntimeError as error:
            self.abort()
            raise CommunicatorAborted(f"a peer is gone, or the epoch ended: {error}") from error
        self._latest = work

    def check(self) -> None:
        if self._late:
            raise DeadlineExceeded(f"a peer did not take part within {self.timeout} s")
        if self._aborted.is_set():
            raise CommunicatorAborted("the epoch was aborted")

    def _watch(self) -> None:
        """Abort when an operation is not done within the timeout: whoever waits for the device then is free."""
        seen = watched = None
        since = 0.0
        while not self._aborted.wait(_WATCH):
            if watched is None:
                if self._latest is not seen:
                    seen = watched = self._latest
                    since = time.monotonic()
            elif self._is_done(watched):
                watched = None
            elif time.monotonic() - since > self.timeout:
                self._late = True
                self.abort()

    def _is_done(self, work: c10d.Work) -> bool:
        with self._looking:
            try:
                return work.is_completed()
            except RuntimeError:  # it failed: what follows will tell
                return True

    @contextmanager
    def still(self) -> Iterator[None]:
        with self._looking:
            before = self._latest
            try:
                yield
            finally:
                self._latest = before  # those that were captured have not run

    def abort(self) -> None:
        """NCCL's own abort may wait for the device: it has a thread of its own, and nobody here waits for it."""
        with self._abort_once:
            if self._aborted.is_set():
                return
            self._aborted.set()
            self._ending = threading.Thread(target=self._group.abort, name="nccl-abort", daemon=True)
            self._ending.start()

    def close(self) -> None:
        self.abort()
        if self._ending is not None:
            self._ending.join(_ABORT)
            if self._ending.is_alive():
                log.error("NCCL's abort does not come back within %.0f s: the device may be stuck", _ABORT)


def _side_by_side(buffers: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Buffers that follow each other in one piece of memory, as one; None: they don't."""
    if not buffers:
        return None
    first, end = buffers[0], buffers[0].data_ptr()
    for buffer in buffers:
        if buffer.data_ptr() != end or buffer.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
        end += buffer.nbytes
    return first.as_strided((end - first.data_ptr(),), (1,))


def _own_address(host: str) -> str:
    """This machine's address on the way to `host`."""
    family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def _open_sockets() -> dict[int, str]:
    """The process's sockets: file descriptor -> what /proc calls it."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{name}")
            if target.startswith("socket:"):
                found[int(name)] = target
    return found


def _ends(fd: int, *, listening: bool) -> list[tuple[str, int]]:
    """Where a socket listens; or else both ends of its connection. Nothing for sockets of other kinds."""
    try:
        with _duplicate(fd) as one:
            if one.family not in (socket.AF_INET, socket.AF_INET6):
                return []
            if one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                return [one.getsockname()[:2]] if listening else []
            return [] if listening else [one.getsockname()[:2], one.getpeername()[:2]]
    except OSError:  # closed, or not connected any more
        return []


def _notice_cuts(one: socket.socket) -> None:
    """Let the kernel end a connection whose other host acknowledges nothing for _CUT seconds."""
    one.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * _CUT))


def _duplicate(fd: int) -> socket.socket:
    return socket.socket(fileno=os.dup(fd))
