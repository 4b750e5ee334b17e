"""The control channel: typed messages over one WebSocket, dialled by all other services to the coordinator."""

import asyncio
import contextlib
import hmac
import logging
import socket
import ssl
from collections import deque
from collections.abc import AsyncIterator, Callable
from types import TracebackType

import aiohttp
from aiohttp import web

from shared import wire
from shared.errors import DeadlineExceeded, PeerLost, ProtocolError
from shared.messages import Goodbye, Message

log = logging.getLogger(__name__)

CHANNEL_PATH = "/channel"
HELLO_DEADLINE_S = 10.0
CLOSE_DEADLINE_S = 2.0
PING_S = 10.0
"""Half of it is how long a pong may take: a worker that loads on a busy machine is slow to answer."""
REDIAL_S = 0.2
"""Pause of whoever dials, while the coordinator is away: short, since streams stand still meanwhile."""
MAX_QUEUED_BYTES = 64 * 1024 * 1024
"""Frames waiting for a peer that does not read; past this the peer is given up."""
BULK_QUEUED_BYTES = 4 * 1024 * 1024
"""While so much waits, who sends in bulk waits too: what others send does not stand behind all of it."""

WebSocket = web.WebSocketResponse | aiohttp.ClientWebSocketResponse


class Channel:
    """Messages to and from one peer, in order. Use as an async context manager and iterate to receive.

    `send` never blocks: frames queue up to MAX_QUEUED_BYTES, past which the connection is broken off. Iteration ends
    when the peer is gone; a frame that is not valid raises ProtocolError.
    """

    def __init__(self, socket: WebSocket, peer: str):
        self.peer = peer
        self._socket = socket
        self._queue: deque[bytes] = deque()
        self._queued_bytes = 0
        self._wake = asyncio.Event()
        self._sent = asyncio.Event()
        self._closed = False
        self._writer: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Channel":
        self._writer = asyncio.create_task(self._write(), name=f"channel writer to {self.peer}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def closed(self) -> bool:
        """Whether nothing can be sent any more."""
        return self._closed or self._socket.closed

    def send(self, message: Message) -> None:
        """Queue one message. Raises PeerLost if the channel is closed or its queue is full.

        Raises ProtocolError for a message that is too large for any peer.
        """
        self.send_frame(wire.encode(message))

    async def send_bulk(self, message: Message) -> None:
        """Queue one of many large messages, when little else waits to be sent. Raises as `send` does."""
        while self._queued_bytes > BULK_QUEUED_BYTES and not self.closed:
            self._sent.clear()
            await self._sent.wait()
        self.send(message)

    def send_frame(self, frame: bytes) -> None:
        """Queue a message that is encoded already: one that goes to several peers."""
        if self.closed:
            raise PeerLost(f"channel to {self.peer} is closed")
        wire.check_size(len(frame))
        if self._queued_bytes + len(frame) > MAX_QUEUED_BYTES:
            self.abort()
            raise PeerLost(f"{self.peer} does not read: {MAX_QUEUED_BYTES} bytes were waiting for it")
        self._queue.append(frame)
        self._queued_bytes += len(frame)
        self._wake.set()

    async def receive(self, deadline_s: float) -> Message:
        """The next message. Raises PeerLost when the peer is gone, DeadlineExceeded when nothing comes in time."""
        try:
            async with asyncio.timeout(deadline_s):
                async for message in self:
                    return message
        except TimeoutError as error:
            raise DeadlineExceeded(f"{self.peer} sent nothing for {deadline_s} s") from error
        raise PeerLost(f"{self.peer} closed the channel")

    async def __aiter__(self) -> AsyncIterator[Message]:
        async for frame in self.frames():
            yield wire.decode(frame)

    async def frames(self) -> AsyncIterator[bytes]:
        """What comes, not decoded. Raises ProtocolError for what is not a binary frame."""
        async for frame in self._socket:
            if frame.type is not aiohttp.WSMsgType.BINARY:
                if frame.type is aiohttp.WSMsgType.ERROR:
                    raise ProtocolError(f"{self.peer}: {self._socket.exception()}")
                raise ProtocolError(f"{self.peer} sent a {frame.type.name} frame; frames are binary")
            yield frame.data

    async def close(self) -> None:
        """Send what is queued, within CLOSE_DEADLINE_S, then close."""
        if self._writer is None:
            return
        writer, self._writer = self._writer, None
        self._closed = True
        self._wake.set()
        self._sent.set()
        with contextlib.suppress(TimeoutError, Exception):
            async with asyncio.timeout(CLOSE_DEADLINE_S):
                await writer
                await self._socket.close()
        writer.cancel()
        await asyncio.gather(writer, return_exceptions=True)

    def abort(self) -> None:
        """Break the connection off at once, for both ends: nothing that is queued is sent, and iteration ends."""
        self._end()
        connection = self._socket.get_extra_info("socket")
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _end(self) -> None:
        self._closed = True
        self._queue.clear()
        self._queued_bytes = 0
        self._wake.set()
        self._sent.set()

    async def _write(self) -> None:
        try:
            while True:
                while self._queue:
                    frame = self._queue.popleft()
                    self._queued_bytes -= len(frame)
                    await self._socket.send_bytes(frame)
                    self._sent.set()
                if self._closed:
                    return
                self._wake.clear()
                await self._wake.wait()
        except (ConnectionError, aiohttp.ClientError, RuntimeError) as error:
            log.debug("channel to %s: %s", self.peer, error)
            self._end()


async def accept(request: web.Request, token: str | None) -> tuple[web.WebSocketResponse, Message | None]:
    """Server side: authenticate, upgrade, and read the peer's hello; None, and closed, if it says something else.

    Raises web.HTTPUnauthorized for a wrong token.
    """
    if token is not None:
        given = request.headers.get("Authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise web.HTTPUnauthorized(text="wrong or missing token\n")
    socket = web.WebSocketResponse(max_msg_size=wire.MAX_FRAME_BYTES, heartbeat=PING_S, compress=False)
    await socket.prepare(request)
    try:
        frame = await socket.receive(timeout=HELLO_DEADLINE_S)
        if frame.type is not aiohttp.WSMsgType.BINARY:
            raise ProtocolError(f"it opened with a {frame.type.name} frame")
        return socket, wire.decode(frame.data)
    except (TimeoutError, ProtocolError) as error:
        log.warning("%s was turned away: %s", request.remote, error or "it did not say hello")
        await socket.close(code=aiohttp.WSCloseCode.PROTOCOL_ERROR)
        return socket, None


@contextlib.asynccontextmanager
async def dial(
    url: str, token: str | None, hello: Callable[[str], Message], deadline_s: float, tls: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[Channel, Message]]:
    """Client side: connect, say hello, and yield the channel with the coordinator's answer.

    `tls` verifies the other end of a wss:// URL; None: by the system's authorities.
    `hello` is given this end's address on the way to the coordinator: the one by which others can reach this host.
    Raises PeerLost when the coordinator can't be reached, refuses the token, or says Goodbye.
    """
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with aiohttp.ClientSession() as session:
        try:
            async with asyncio.timeout(deadline_s):
                socket = await session.ws_connect(
                    url.rstrip("/") + CHANNEL_PATH,
                    headers=headers,
                    max_msg_size=wire.MAX_FRAME_BYTES,
                    heartbeat=PING_S,
                    compress=0,
                    ssl=tls if tls is not None else True,
                )
        except TimeoutError as error:
            raise DeadlineExceeded(f"no answer from the coordinator at {url} for {deadline_s} s") from error
        except aiohttp.WSServerHandshakeError as error:
            raise PeerLost(f"coordinator at {url} refused the connection: {error.status} {error.message}") from error
        except (aiohttp.ClientError, OSError) as error:
            raise PeerLost(f"no coordinator at {url}: {error}") from error
        async with Channel(socket, "coordinator") as channel:
            channel.send(hello(socket.get_extra_info("sockname", ("127.0.0.1",))[0]))
            answer = await channel.receive(deadline_s)
            if isinstance(answer, Goodbye):
                raise PeerLost(f"the coordinator refused: {answer.reason}")
            yield channel, answer
