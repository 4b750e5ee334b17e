"""BulkServer: serves a BulkHandler to all who know the token, over any backend's Listener."""

import asyncio
import hmac
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Literal

from shared.errors import ConfigError, GhostError, PeerLost, ProtocolError
from shared.transport import backends, frames
from shared.transport.base import (
    DEFAULT_LIMITS,
    BulkHandler,
    BulkLimits,
    GetShards,
    Incoming,
    Listener,
    Outcome,
    Outgoing,
    PutShards,
    Stream,
)
from shared.transport.frames import Hello, HelloReply, Numbered, Reply

log = logging.getLogger(__name__)


Refused = Literal["token", "version", "silent", "oversized", "frame", "too many"]
"""Why a connection was closed: what its hello said, or that it said none; a header too long, or not a valid frame."""


class _HelloRefused(ProtocolError):
    """The handshake failed, for a reason that is counted by itself."""

    def __init__(self, message: str, kind: Refused):
        super().__init__(message)
        self.kind = kind


def _kind(error: ProtocolError) -> Refused:
    if isinstance(error, _HelloRefused):
        return error.kind
    return "oversized" if isinstance(error, frames.Oversized) else "frame"


class BulkServer:
    """Serves puts and gets of all who know the token. Made by serve."""

    def __init__(self, listener: Listener, handler: BulkHandler, token: str, limits: BulkLimits):
        self.address = listener.address
        self._listener = listener
        self._handler = handler
        self._token = token.encode()
        self._limits = limits
        self._streams: set[Stream] = set()
        self._strangers: dict[Stream, None] = {}  # that have not shown the token, in the order in which they came
        self.refused: Counter[Refused] = Counter()  # connections that were closed for what they sent, or did not

    async def accept_forever(self, tasks: asyncio.TaskGroup) -> None:
        """Give each peer a task of its own. Those that have not shown the token take no place from those that have."""
        while True:
            stream = await self._listener.accept()
            while len(self._strangers) >= self._limits.strangers:
                self.refused["too many"] += 1
                self._forget(next(iter(self._strangers)))
            self._strangers[stream] = None
            tasks.create_task(self._serve(stream))

    def close_streams(self) -> None:
        for stream in (*self._strangers, *self._streams):
            stream.close()

    def _forget(self, stream: Stream) -> None:
        self._strangers.pop(stream, None)
        stream.close()

    async def _serve(self, stream: Stream) -> None:
        connection = _Connection(stream, self._handler, self._limits)
        try:
            await self._shake_hands(stream)
            await connection.run()
        except ProtocolError as error:
            self.refused[_kind(error)] += 1
            log.info("bulk connection closed: %s", error)
        except PeerLost as error:
            log.debug("bulk connection ended: %s", error)
        except Exception:
            log.exception("bulk connection failed")
        finally:
            self._forget(stream)
            connection.undo()
            self._streams.discard(stream)

    async def _shake_hands(self, stream: Stream) -> None:
        try:
            async with asyncio.timeout(self._limits.handshake_s):
                hello = await frames.read(stream, frames.HELLO_BYTES, self._limits)
                if not isinstance(hello, Hello):
                    raise ProtocolError("a bulk connection that did not begin with hello")
                refusal: Outcome = None
                kind: Refused = "version"
                if hello.version != frames.VERSION:
                    refusal = ProtocolError(f"bulk protocol version {hello.version}; this side speaks {frames.VERSION}")
                elif not hmac.compare_digest(hello.token.encode(), self._token):
                    refusal, kind = ConfigError("the cluster token is wrong"), "token"
                elif len(self._streams) >= self._limits.connections:
                    refusal, kind = PeerLost(f"there are {self._limits.connections} connections already"), "too many"
                else:
                    del self._strangers[stream]
                    self._streams.add(stream)
                welcome = frames.pieces(HelloReply(frames.VERSION, refusal))
                await stream.send(welcome, self._limits.stall_s)
                if refusal is not None:
                    raise _HelloRefused(str(refusal), kind)
                await stream.upgrade(self._limits.stall_s)
        except TimeoutError:
            raise _HelloRefused("a bulk connection without a hello", "silent") from None


class _Connection:
    """One peer's requests: read one after the other, committed and answered independently of each other."""

    def __init__(self, stream: Stream, handler: BulkHandler, limits: BulkLimits):
        self._stream = stream
        self._handler = handler
        self._limits = limits
        self._sending = asyncio.Lock()
        self._slots = asyncio.Semaphore(limits.requests)
        self._undo: set[Callable[[], None]] = set()  # of what the handler gave out and did not get back yet

    async def run(self) -> None:
        """Serve until the peer goes away, then raise what ended it."""
        ended: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as tasks:
                while True:
                    frame = await frames.read(self._stream, self._limits.header_bytes, self._limits)
                    if not isinstance(frame, Numbered):
                        raise ProtocolError("a bulk frame that is no request")
                    await self._slots.acquire()
                    if isinstance(frame.request, PutShards):
                        await self._take_put(frame.request_id, frame.request, tasks)
                    else:
                        self._take_get(frame.request_id, frame.request, tasks)
        except* GhostError as group:
            ended = group
        while isinstance(ended, BaseExceptionGroup):
            ended = ended.exceptions[0]
        if ended is not None:
            raise ended from None  # out here, for what is raised in an except* is a group again before Python 3.11.4

    def undo(self) -> None:
        """Give back all that is still out. For the end of the connection."""
        for undo in self._undo:
            undo()
        self._undo.clear()

    async def _take_put(self, request_id: int, request: PutShards, tasks: asyncio.TaskGroup) -> None:
        incoming = self._handler.put(request)
        self._undo.add(incoming.abandon)
        wanted = [
            (place if isinstance(place, memoryview) else None, length)
            for place, length in zip(incoming.places, request.lengths, strict=True)
        ]
        await frames.receive_payloads(self._stream, wanted, self._limits.stall_s)
        tasks.create_task(self._commit(request_id, incoming))

    async def _commit(self, request_id: int, incoming: Incoming) -> None:
        outcomes = await incoming.commit()
        self._undo.discard(incoming.abandon)
        await self._reply(Reply(request_id, tuple(outcomes)), ())

    def _take_get(self, request_id: int, request: GetShards, tasks: asyncio.TaskGroup) -> None:
        outgoing = self._handler.get(request)
        self._undo.add(outgoing.release)
        tasks.create_task(self._send(request_id, outgoing))

    async def _send(self, request_id: int, outgoing: Outgoing) -> None:
        places = outgoing.places
        outcomes = tuple(place if isinstance(place, GhostError) else None for place in places)
        await self._reply(Reply(request_id, outcomes), [place for place in places if isinstance(place, memoryview)])
        self._undo.discard(outgoing.release)
        outgoing.release()

    async def _reply(self, reply: Reply, payloads: Sequence[memoryview]) -> None:
        async with self._sending:
            await self._stream.send([*frames.pieces(reply), *payloads], self._limits.stall_s)
        self._slots.release()


@asynccontextmanager
async def serve(
    address: str, handler: BulkHandler, *, token: str = "", limits: BulkLimits = DEFAULT_LIMITS
) -> AsyncIterator[BulkServer]:
    """Serve on an address (port 0: a free one, see BulkServer.address) as long as the context lasts."""
    listener = await backends.listen(address)
    server = BulkServer(listener, handler, token, limits)
    try:
        async with asyncio.TaskGroup() as tasks:
            accepting = tasks.create_task(server.accept_forever(tasks), name=f"bulk server {server.address}")
            try:
                yield server
            finally:
                accepting.cancel()
                server.close_streams()
    finally:
        listener.close()
