"""Bulk transport over UCX: tagged messages straight into their buffers, beside a TCP connection to the same peer.

A stream begins as that TCP connection, over which the handshake goes: what strangers send never reaches UCX. Once both
sides have shown the token, `upgrade` exchanges UCX addresses over it, and from then on it only tells whether the peer
is there: the kernel closes it at the moment in which a process dies, where UCX would notice after 20 s or never.
"""

import asyncio
import ipaddress
import os
from collections.abc import Iterator, Sequence
from itertools import repeat

import msgpack

from shared.errors import ConfigError, DeadlineExceeded, PeerLost, ProtocolError
from shared.transport import tcp
from shared.transport.base import Listener, Stream
from shared.transport.tcp import TcpListener, TcpStream
from shared.transport.ucx_engine import Engine, Operation, array

_PIECE_BYTES = 4 << 20  # a buffer travels in pieces of this size, so that one that stalls is told from one that is long
_SEND, _RECEIVE = "send", "receive"
_ADDRESS_BYTES = 16 << 10  # largest UCX address


class UcxStream(Stream):
    """A TCP connection, and from upgrade on a UCX endpoint beside it."""

    def __init__(self, control: TcpStream, engine: Engine):
        self._control = control
        self._engine = engine
        self._endpoint: object | None = None
        self._tags: dict[str, object] = {}
        self._operations: dict[str, Operation] = {}
        self._closed = False

    async def upgrade(self, stall_s: float) -> None:
        tag = os.urandom(8)
        body = msgpack.packb([self._engine.address, tag])
        await self._control.send([memoryview(len(body).to_bytes(4, "big") + body)], stall_s)
        prefix = bytearray(4)
        await self._control.receive([memoryview(prefix)], stall_s)
        length = int.from_bytes(prefix, "big")
        if not 0 < length <= _ADDRESS_BYTES:
            raise ProtocolError("a peer that did not go on with its UCX address")
        theirs = bytearray(length)
        await self._control.receive([memoryview(theirs)], stall_s)
        address, their_tag = _address_in(theirs)
        if self._closed:
            raise PeerLost("the connection was closed")
        self._endpoint = self._engine.connect(address)
        self._tags = {
            _SEND: self._engine.tag(int.from_bytes(their_tag, "big")),
            _RECEIVE: self._engine.tag(int.from_bytes(tag, "big")),
        }
        self._control.when_readable(self._peer_went)

    async def send(self, buffers: Sequence[memoryview], stall_s: float) -> None:
        if self._endpoint is None:
            await self._control.send(buffers, stall_s)
        else:
            await self._run(_SEND, _pieces(buffers), stall_s)

    async def receive(self, into: Sequence[memoryview], stall_s: float | None) -> None:
        if self._endpoint is None:
            await self._control.receive(into, stall_s)
        else:
            await self._run(_RECEIVE, _pieces(into), stall_s)

    async def drop(self, length: int, stall_s: float) -> None:
        if self._endpoint is None:
            await self._control.drop(length, stall_s)
            return
        scratch = memoryview(bytearray(min(length, _PIECE_BYTES)))
        whole, rest = divmod(length, _PIECE_BYTES)
        for piece in (*repeat(scratch, whole), *([scratch[:rest]] if rest else [])):
            await self._run(_RECEIVE, iter((piece,)), stall_s)

    def close(self) -> None:
        self._end("the connection was closed")

    async def _run(self, way: str, pieces: Iterator[memoryview], stall_s: float | None) -> None:
        """Send or receive all pieces; if that does not come to its end, the stream is closed."""
        if self._closed:
            raise PeerLost("the connection was closed")
        post = getattr(self._endpoint, f"tag_{'send' if way == _SEND else 'recv'}")
        tag = self._tags[way]
        operation = Operation(pieces, lambda piece: post(array(piece), tag))
        self._operations[way] = operation
        self._engine.start(operation)
        try:
            moved = -1
            while not operation.done.done():
                if stall_s is not None and moved == operation.moved:
                    raise DeadlineExceeded(f"no progress for {stall_s:g} s")
                moved = operation.moved
                await asyncio.wait([operation.done], timeout=stall_s)
            operation.done.result()
        except BaseException as error:
            self._end(f"a transfer ended early: {error or type(error).__name__}")
            raise
        finally:
            self._operations.pop(way, None)

    def _peer_went(self) -> None:
        self._end("the peer closed the connection")

    def _end(self, why: str) -> None:
        if self._closed:
            return
        self._closed = True
        self._control.close()
        operations = list(self._operations.values())
        for operation in operations:
            operation.fail(PeerLost(why))
        endpoint, self._endpoint = self._endpoint, None
        if endpoint is not None:
            self._endpoint = _GONE
            self._engine.close_endpoint(endpoint, operations)
        self._engine.release()


_GONE = object()
"""Stands for the endpoint of a closed stream."""


class UcxListener(Listener):
    """A TCP listener whose streams go on over UCX."""

    def __init__(self, listener: TcpListener, engine: Engine, loopback: bool):
        self._listener = listener
        self._engine = engine
        self._loopback = loopback
        self._closed = False

    @property
    def address(self) -> str:
        return self._listener.address.replace("tcp://", "ucx://", 1)

    async def accept(self) -> Stream:
        control = await self._listener.accept()
        try:
            return UcxStream(control, await Engine.hold(self._loopback))
        except BaseException:
            control.close()
            raise

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._listener.close()
            self._engine.release()


async def listen(address: str) -> UcxListener:
    """Listen on ucx://host:port, port 0 for a free one. Raises ConfigError, also where UCXX is not installed."""
    below, loopback = _below(address)
    engine = await Engine.hold(loopback)
    try:
        return UcxListener(await tcp.listen(below), engine, loopback)
    except BaseException:
        engine.release()
        raise


async def connect(address: str) -> UcxStream:
    """Connect to ucx://host:port; the caller bounds the wait. Raises PeerLost, or ConfigError without UCXX."""
    below, loopback = _below(address)
    engine = await Engine.hold(loopback)
    try:
        return UcxStream(await tcp.connect(below), engine)
    except BaseException:
        engine.release()
        raise


def _below(address: str) -> tuple[str, bool]:
    """Return the address of the TCP connection, and whether it stays on this machine. Raises ConfigError."""
    try:
        host, _ = tcp.parse(address.replace("ucx://", "tcp://", 1))
    except ConfigError:
        raise ConfigError(f"{address!r} is not an address of the form ucx://host:port") from None
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    return address.replace("ucx://", "tcp://", 1), loopback


def _address_in(body: bytearray) -> tuple[bytes, bytes]:
    try:
        match msgpack.unpackb(body):
            case [bytes(address), bytes(tag)] if address and len(tag) == 8:
                return address, tag
    except (ValueError, TypeError, msgpack.UnpackException):
        pass
    raise ProtocolError("a peer that did not go on with its UCX address")


def _pieces(buffers: Sequence[memoryview]) -> Iterator[memoryview]:
    for buffer in buffers:
        flat = buffer.cast("B")
        for start in range(0, flat.nbytes, _PIECE_BYTES):
            yield flat[start : start + _PIECE_BYTES]
