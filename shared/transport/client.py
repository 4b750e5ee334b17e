"""BulkClient: many puts and gets in flight on one connection to a store, over any backend's Stream."""

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from shared.errors import DeadlineExceeded, GhostError, PeerLost, ProtocolError
from shared.transport import backends, frames
from shared.transport.base import DEFAULT_LIMITS, BulkLimits, GetShards, Outcome, PutShards, Stream
from shared.transport.frames import Hello, HelloReply, Numbered, Reply

log = logging.getLogger(__name__)


class BulkClient:
    """One connection to a bulk server, for many requests at once. Made by connect; closed by close or `async with`."""

    def __init__(self, stream: Stream, address: str, limits: BulkLimits):
        self.address = address
        self._stream = stream
        self._limits = limits
        self._budget = _Budget(limits.in_flight_bytes)
        self._sending = asyncio.Lock()
        self._pending: dict[int, _Pending] = {}
        self._arriving: _Pending | None = None
        self._next_id = 0
        self._lost: str | None = None
        self._reader = asyncio.create_task(self._read_replies(), name=f"bulk client {address}")

    @classmethod
    async def connect(
        cls, address: str, *, token: str = "", timeout: float = 5.0, limits: BulkLimits = DEFAULT_LIMITS
    ) -> Self:
        """Connect and shake hands. Raises PeerLost, DeadlineExceeded, ConfigError (token), ProtocolError (version)."""
        try:
            async with asyncio.timeout(timeout):
                stream = await backends.connect(address)
                try:
                    await stream.send(frames.pieces(Hello(frames.VERSION, token)), limits.stall_s)
                    welcome = await frames.read(stream, frames.HELLO_BYTES, limits)
                    if not isinstance(welcome, HelloReply):
                        raise ProtocolError(f"{address} did not answer like a bulk server")
                    if welcome.refusal is not None:
                        raise welcome.refusal
                    await stream.upgrade(limits.stall_s)
                except BaseException:
                    stream.close()
                    raise
        except TimeoutError:
            raise DeadlineExceeded(f"{address} did not answer within {timeout:g} s") from None
        return cls(stream, address, limits)

    async def put(self, request: PutShards, payloads: Sequence[memoryview], *, timeout: float) -> tuple[Outcome, ...]:
        """Store the shards; return for each None once it counts, or why it was refused.

        payloads are not touched after return. Raises PeerLost or DeadlineExceeded (then it is unknown which count).
        If time runs out, or the caller is cancelled, while these bytes are being sent, the connection is closed.
        """
        _check_sizes(request, payloads, self._limits)
        return await self._ask(request, payloads, (), timeout)

    async def get(self, request: GetShards, into: Sequence[memoryview], *, timeout: float) -> tuple[Outcome, ...]:
        """Read the shards straight into the buffers; return for each None or why it can't be had.

        into is not written any more after return. Raises PeerLost or DeadlineExceeded. Checksums are the caller's
        matter. If time runs out, or the caller is cancelled, while these bytes are arriving, the connection is closed.
        """
        _check_sizes(request, into, self._limits)
        return await self._ask(request, (), into, timeout)

    @property
    def is_open(self) -> bool:
        """Say whether requests can still be made."""
        return self._lost is None

    async def wait_closed(self) -> None:
        """Return when the connection is gone, whichever side ended it."""
        await asyncio.wait([self._reader])

    async def close(self) -> None:
        """Close at once; requests in flight raise PeerLost."""
        self._fail("the connection was closed")
        self._reader.cancel()
        await asyncio.wait([self._reader])

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _ask(
        self,
        request: PutShards | GetShards,
        payloads: Sequence[memoryview],
        into: Sequence[memoryview],
        timeout: float,
    ) -> tuple[Outcome, ...]:
        try:
            async with asyncio.timeout(timeout):
                await self._budget.take(sum(request.lengths))
                try:
                    self._check_open()
                except PeerLost:
                    self._budget.give(sum(request.lengths))
                    raise
                self._next_id += 1
                answer: asyncio.Future[tuple[Outcome, ...]] = asyncio.get_running_loop().create_future()
                pending = _Pending(self._next_id, request, into, answer)
                self._pending[pending.request_id] = pending
                await self._send(pending, payloads)
                try:
                    return await answer
                except asyncio.CancelledError:
                    self._forget(pending)
                    raise
        except TimeoutError:
            raise DeadlineExceeded(f"{self.address} did not answer within {timeout:g} s") from None

    async def _send(self, pending: "_Pending", payloads: Sequence[memoryview]) -> None:
        head = frames.pieces(Numbered(pending.request_id, pending.request))
        try:
            await self._sending.acquire()
        except asyncio.CancelledError:
            self._settle(pending)
            raise
        try:
            self._check_open()
            await self._stream.send([*head, *payloads], self._limits.stall_s)
        except BaseException as error:
            if not pending.answer.cancel() and not pending.answer.cancelled():
                pending.answer.exception()  # seen: this error is raised in its stead
            self._fail(f"sending to {self.address} ended early: {error or type(error).__name__}")
            raise
        finally:
            self._sending.release()

    def _forget(self, pending: "_Pending") -> None:
        """Nobody waits for this answer any more: what arrives of it is dropped."""
        pending.into = None
        if pending is self._arriving:
            self._fail(f"a reply of {self.address} was given up while it arrived")

    async def _read_replies(self) -> None:
        try:
            while True:
                reply = await frames.read(self._stream, self._limits.header_bytes, self._limits)
                pending = self._pending.get(reply.request_id) if isinstance(reply, Reply) else None
                if not isinstance(reply, Reply) or pending is None or not pending.fits(reply):
                    raise ProtocolError(f"{self.address} sent a reply to nothing that was asked")
                if isinstance(pending.request, GetShards):
                    self._arriving = pending
                    wanted = [
                        (pending.into[i] if pending.into is not None else None, length)
                        for i, length in enumerate(pending.request.lengths)
                        if reply.outcomes[i] is None
                    ]
                    await frames.receive_payloads(self._stream, wanted, self._limits.stall_s)
                    self._arriving = None
                self._settle(pending)
                if not pending.answer.done():
                    pending.answer.set_result(reply.outcomes)
        except GhostError as error:
            self._fail(str(error))
        except Exception as error:
            log.exception("bulk client of %s failed", self.address)
            self._fail(f"{type(error).__name__} while reading replies")

    def _settle(self, pending: "_Pending") -> None:
        if self._pending.pop(pending.request_id, None) is not None:
            self._budget.give(sum(pending.request.lengths))

    def _check_open(self) -> None:
        if self._lost is not None:
            raise PeerLost(f"{self.address}: {self._lost}")

    def _fail(self, why: str) -> None:
        if self._lost is not None:
            return
        self._lost = why
        self._stream.close()
        for pending in list(self._pending.values()):
            self._settle(pending)
            if not pending.answer.done():
                pending.answer.set_exception(PeerLost(f"{self.address}: {why}"))


@dataclass(eq=False, slots=True)
class _Pending:
    """A request without an answer yet."""

    request_id: int
    request: PutShards | GetShards
    into: Sequence[memoryview] | None  # None: given up, its bytes are dropped
    answer: "asyncio.Future[tuple[Outcome, ...]]"

    def fits(self, reply: Reply) -> bool:
        return len(reply.outcomes) == len(self.request.shards)


class _Budget:
    """Bytes in flight: taken first come, first served; more than the whole is let through alone."""

    def __init__(self, limit: int):
        self._limit = limit
        self._used = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, size: int) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._admit()
            else:
                self.give(size)
            raise

    def give(self, size: int) -> None:
        self._used -= size
        self._admit()

    def _admit(self) -> None:
        while self._waiting:
            size, turn = self._waiting[0]
            if not turn.done():
                if self._used and self._used + size > self._limit:
                    return
                self._used += size
                turn.set_result(None)
            self._waiting.popleft()


def _check_sizes(request: PutShards | GetShards, buffers: Sequence[memoryview], limits: BulkLimits) -> None:
    lengths = request.lengths
    if not 0 < len(lengths) <= limits.shards or max(lengths) > limits.shard_bytes or min(lengths) < 1:
        raise ProtocolError(f"a request of {len(lengths)} shards, at most {max(lengths, default=0)} bytes each")
    if [buffer.nbytes for buffer in buffers] != list(lengths):
        raise ProtocolError("buffers and shards differ in number or length")
