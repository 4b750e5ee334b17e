"""Bulk transport over TCP: asyncio readiness, then recvmsg_into and sendmsg on the caller's own buffers, no copy."""

import asyncio
import socket
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any
from urllib.parse import urlsplit

from shared.errors import ConfigError, DeadlineExceeded, PeerLost
from shared.transport.base import Listener, Stream

_VECTOR = 64  # buffers in one system call
_TURN_BYTES = 2 << 20  # moved without waiting before other tasks get a turn
_SCRATCH_BYTES = 256 << 10


def parse(address: str) -> tuple[str, int]:
    """Return host and port of tcp://host:port. Raises ConfigError."""
    parts = urlsplit(address)
    try:
        port = parts.port
    except ValueError:
        port = None
    if parts.scheme != "tcp" or not parts.hostname or port is None:
        raise ConfigError(f"{address!r} is not an address of the form tcp://host:port")
    return parts.hostname, port


class TcpStream(Stream):
    """One connected socket."""

    def __init__(self, sock: socket.socket):
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, option):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._reading: asyncio.Future[None] | None = None
        self._writing: asyncio.Future[None] | None = None
        self._closed = False

    async def send(self, buffers: Sequence[memoryview], stall_s: float) -> None:
        left, moved = _flat(buffers), 0
        while left:
            try:
                count = self._sock.sendmsg(list(islice(left, _VECTOR)))
            except (BlockingIOError, InterruptedError):
                await self._wait_writable(stall_s)
                continue
            except OSError as error:
                raise PeerLost(f"sending failed: {error}") from error
            _advance(left, count)
            moved = await self._give_turn(moved + count)

    async def receive(self, into: Sequence[memoryview], stall_s: float | None) -> None:
        left, moved = _flat(into), 0
        while left:
            moved = await self._give_turn(moved + await self._receive_some(left, stall_s))

    async def drop(self, length: int, stall_s: float) -> None:
        scratch = memoryview(bytearray(min(length, _SCRATCH_BYTES)))
        moved = 0
        while length:
            step = min(length, len(scratch))
            await self.receive([scratch[:step]], stall_s)
            length -= step
            moved = await self._give_turn(moved + step)

    def when_readable(self, callback: Callable[[], None]) -> None:
        """Call back when something arrives, or the peer is gone, once this end neither sends nor receives any more."""
        self._loop.add_reader(self._sock, callback)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()
        for future in (self._reading, self._writing):
            if future is not None and not future.done():
                future.set_exception(PeerLost("the connection was closed"))

    async def _receive_some(self, left: deque[memoryview], stall_s: float | None) -> int:
        """Receive what is there into the first buffers of left, and take off what is full."""
        while True:
            try:
                count = self._sock.recvmsg_into(list(islice(left, _VECTOR)))[0]
            except (BlockingIOError, InterruptedError):
                await self._wait_readable(stall_s)
                continue
            except OSError as error:
                raise PeerLost(f"receiving failed: {error}") from error
            if not count:
                raise PeerLost("the peer closed the connection")
            _advance(left, count)
            return count

    async def _give_turn(self, moved: int) -> int:
        """Return moved, or 0 after other tasks had a turn."""
        if moved < _TURN_BYTES:
            return moved
        await asyncio.sleep(0)
        if self._closed:
            raise PeerLost("the connection was closed")
        return 0

    async def _wait_readable(self, stall_s: float | None) -> None:
        self._reading = self._loop.create_future()
        try:
            await self._wait(self._reading, self._loop.add_reader, stall_s)
        finally:
            self._reading = None
            if not self._closed:
                self._loop.remove_reader(self._sock)

    async def _wait_writable(self, stall_s: float | None) -> None:
        self._writing = self._loop.create_future()
        try:
            await self._wait(self._writing, self._loop.add_writer, stall_s)
        finally:
            self._writing = None
            if not self._closed:
                self._loop.remove_writer(self._sock)

    async def _wait(self, ready: "asyncio.Future[None]", watch: Callable[..., Any], stall_s: float | None) -> None:
        if self._closed:
            raise PeerLost("the connection was closed")
        watch(self._sock, _wake, ready)
        try:
            async with asyncio.timeout(stall_s):
                await ready
        except TimeoutError:
            raise DeadlineExceeded(f"no progress for {stall_s:g} s") from None


class TcpListener(Listener):
    """A listening socket."""

    def __init__(self, sock: socket.socket):
        self._sock = sock
        host, port = sock.getsockname()[:2]
        self._address = f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"

    @property
    def address(self) -> str:
        return self._address

    async def accept(self) -> TcpStream:
        while True:
            try:
                sock, _ = self._sock.accept()
            except BlockingIOError:
                await self._readable()
            except OSError:
                if self._sock.fileno() == -1:
                    raise PeerLost("the listener was closed") from None
                await asyncio.sleep(0.1)  # out of descriptors, or the peer was gone already
            else:
                sock.setblocking(False)
                return TcpStream(sock)

    async def _readable(self) -> None:
        """Wait for a connection. Unlike loop.sock_accept it has none in hand that a cancellation would lose."""
        loop, fd, ready = asyncio.get_running_loop(), self._sock.fileno(), asyncio.Event()
        loop.add_reader(fd, ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_reader(fd)

    def close(self) -> None:
        self._sock.close()


async def listen(address: str) -> TcpListener:
    """Listen on tcp://host:port, port 0 for a free one. Raises ConfigError if that can't be had."""
    host, port = parse(address)
    loop = asyncio.get_running_loop()
    sock: socket.socket | None = None
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, where = found[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setblocking(False)
        sock.bind(where)
        sock.listen(128)
    except OSError as error:
        if sock is not None:
            sock.close()
        raise ConfigError(f"can't listen on {address}: {error}") from error
    return TcpListener(sock)


async def connect(address: str) -> TcpStream:
    """Connect to tcp://host:port, at the first address that answers; the caller bounds the wait. Raises PeerLost."""
    host, port = parse(address)
    loop = asyncio.get_running_loop()
    trouble: OSError | None = None
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        found, trouble = [], error
    for family, kind, protocol, _, where in found:
        sock = socket.socket(family, kind, protocol)
        sock.setblocking(False)
        try:
            await loop.sock_connect(sock, where)
        except BaseException as error:
            sock.close()
            if not isinstance(error, OSError):
                raise
            trouble = error
        else:
            return TcpStream(sock)
    raise PeerLost(f"can't connect to {address}: {trouble}") from trouble


def _flat(buffers: Iterable[memoryview]) -> deque[memoryview]:
    return deque(buffer.cast("B") for buffer in buffers if buffer.nbytes)


def _advance(left: deque[memoryview], count: int) -> None:
    while count:
        first = left.popleft()
        if count < first.nbytes:
            left.appendleft(first[count:])
            return
        count -= first.nbytes


def _wake(ready: "asyncio.Future[None]") -> None:
    if not ready.done():
        ready.set_result(None)
