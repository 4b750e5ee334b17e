"""An HTTP port: where it listens, for whom it has room, and what it answers to that which never reaches a handler."""

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from shared.sockets import bind, bracketed, room_for

log = logging.getLogger(__name__)

SILENT_S = 50.0
"""A connection on which no request has been in work for so long is closed, whatever has come of the next one."""
STUCK_S = 600.0
"""The same, where an answer is still on its way to a client that does not read."""
LONGEST_PAUSE_S = 5.0
RESERVED = 32
"""Idle connections that there is always room for, so that probes are answered whatever others do."""
HANDSHAKE_S = 5.0
EOF_S = 0.05
"""A request that its client ended the connection after is in a handler by then."""
BACKLOG = 1024

Refuse = Callable[[int, str], web.Response]
"""An answer for a status and a message, in the service's own shape."""
Serve = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class Connection(web.RequestHandler):
    """One client's connection. `port` is whose it is."""

    __slots__ = ("_asked", "_in_work", "answering", "port")

    def __init__(self, port: "Port", server: web.Server, **options: Any):
        super().__init__(server, loop=asyncio.get_running_loop(), **options)
        self.port = port
        self._in_work: web.BaseRequest | None = None
        self._asked = False  # something has come since the last request ended
        self.answering = False
        """The head of an answer to the request in work is sent."""

    def begin(self, request: web.BaseRequest) -> None:
        """A request is in work."""
        self._in_work = request

    def end(self) -> None:
        """None is any more."""
        self._in_work, self._asked, self.answering = None, False, False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.port.came(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        self.port.went(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._asked = self._asked or bool(data)
        super().data_received(data)

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client sends no more: it has left, or waits for its answer. Over TLS, or amid an answer, it can't wait.

        The second is also how a dead worker is noticed, whose channel is such an answer: at once.
        """
        if self.transport is None or self.transport.get_extra_info("sslcontext") is not None or self.answering:
            return False
        self._loop.call_later(EOF_S, self._after_eof)
        return True

    def _after_eof(self) -> None:
        request, transport = self._in_work, self.transport
        if transport is None:
            return
        self.close()  # once what is in work is answered
        if request is None:
            if self._asked:
                transport.write(_written(self.port.refuse(400, "the client sent a part of a request")))
            transport.close()
        elif not request.content.is_eof():
            request.content.set_exception(web.RequestPayloadError("the client sent a part of it"))
        elif request.version < (1, 1) or self.answering:
            transport.close()
        else:
            self._ask_whether_it_waits(request, EOF_S)

    def _ask_whether_it_waits(self, request: web.BaseRequest, pause_s: float) -> None:
        """Send an interim answer until there is one: nothing to who waits, but who has left resets the connection."""
        if self.transport is not None and self._in_work is request and not self.answering:
            self.transport.write(b"HTTP/1.1 102 Processing\r\n\r\n")
            self._loop.call_later(pause_s, self._ask_whether_it_waits, request, min(2 * pause_s, LONGEST_PAUSE_S))

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What is not HTTP, or not to be taken, as the service's own answers are."""
        response = super().handle_error(request, status, exc, message)
        if isinstance(exc, HttpProcessingError):
            first = (message or exc.message or type(exc).__name__).partition(":")[0].splitlines()[0]
            response = self.port.refuse(status, first[:200])
            response.force_close()
        return response


class Port:
    """The connections of one port. At most `most` have a request in work; of the idle, the longest idle make room."""

    def __init__(self, server: web.Server, most: int, refuse: Refuse | None, options: dict[str, Any]):
        self.url = ""
        self._refuse = refuse
        self._server = server
        self._most = most
        self._options = options
        self._serve: Serve = server.request_handler
        self._idle: dict[Connection, float] = {}  # since when, the longest idle first
        self._busy: set[Connection] = set()
        self._listening: list[asyncio.Server] = []
        server.request_handler = self._handle

    @property
    def is_full(self) -> bool:
        """Whether more requests are in work than may be, one of them the caller's."""
        return len(self._busy) > self._most

    def refuse(self, status: int, message: str) -> web.Response:
        """The answer to what never was a request."""
        return self._refuse(status, message) if self._refuse else web.Response(status=status, text=f"{message}\n")

    def came(self, connection: Connection) -> None:
        """A client has connected: others that are idle may have to go for it."""
        self._idle[connection] = asyncio.get_running_loop().time()
        while len(self._idle) > max(RESERVED, self._most - len(self._busy)):
            self._cut(next(iter(self._idle)))

    def went(self, connection: Connection) -> None:
        """A client is gone."""
        self._idle.pop(connection, None)
        self._busy.discard(connection)

    def stop_listening(self) -> None:
        """Take no more connections; those that are there stay."""
        for server in self._listening:
            server.close()

    async def listen(self, host: str, port: int, tls: ssl.SSLContext | None, scheme: str) -> None:
        """Take connections. Raises ConfigError."""
        loop = asyncio.get_running_loop()
        sockets = await bind(host, port)
        self.url = f"{scheme}{'' if tls is None else 's'}://{bracketed(host)}:{sockets[0].getsockname()[1]}"
        for each in sockets:
            handshake_s = HANDSHAKE_S if tls is not None else None
            self._listening.append(
                await loop.create_server(
                    self._connection, sock=each, ssl=tls, backlog=BACKLOG, ssl_handshake_timeout=handshake_s
                )
            )

    async def watch(self) -> None:
        """Close connections that have been silent for too long, until cancelled."""
        while True:
            await asyncio.sleep(SILENT_S / 10)
            now = asyncio.get_running_loop().time()
            for connection, since in list(self._idle.items()):
                transport = connection.transport
                unread = transport is not None and transport.get_write_buffer_size()
                if now - since > (STUCK_S if unread else SILENT_S * 0.9):
                    self._cut(connection)

    def _connection(self) -> Connection:
        return Connection(self, self._server, **self._options)

    def _cut(self, connection: Connection) -> None:
        self._idle.pop(connection, None)
        if connection.transport is not None:
            connection.transport.abort()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Serve a request. What the application raises before its middlewares is answered here."""
        connection = request.protocol
        assert isinstance(connection, Connection)
        self._idle.pop(connection, None)
        self._busy.add(connection)
        connection.begin(request)
        try:
            return await self._serve(request)
        except web.HTTPException as error:
            if self._refuse is None:
                raise
            return self._refuse(error.status, error.text or error.reason)
        finally:
            connection.end()
            self._busy.discard(connection)
            if connection.transport is not None:
                self._idle[connection] = asyncio.get_running_loop().time()


async def _begins_answer(request: web.Request, response: web.StreamResponse) -> None:
    if isinstance(request.protocol, Connection):
        request.protocol.answering = True


@asynccontextmanager
async def serving(
    application: web.Application,
    host: str,
    port: int,
    *,
    tls: ssl.SSLContext | None,
    scheme: str = "http",
    most: int = 1024,
    refuse: Refuse | None = None,
    shutdown_s: float = 2.0,
    cancels: bool = False,
    logger: logging.Logger = log,
) -> AsyncIterator[Port]:
    """Serve an application on a port, 0 for a free one, as long as this is entered. Raises ConfigError.

    `cancels`: a handler is cancelled when its client leaves.
    """
    application.on_response_prepare.append(_begins_answer)
    options: dict[str, Any] = {"keepalive_timeout": SILENT_S, "access_log": None, "logger": logger}
    runner = web.AppRunner(application, handler_cancellation=cancels, shutdown_timeout=shutdown_s, **options)
    await runner.setup()
    assert runner.server is not None
    made = Port(runner.server, room_for(most + RESERVED) - RESERVED, refuse, options)
    watching = asyncio.create_task(made.watch(), name="silent connections")
    try:
        await made.listen(host, port, tls, scheme)
        yield made
    finally:
        watching.cancel()
        made.stop_listening()
        await runner.cleanup()


def _written(response: web.Response) -> bytes:
    """An answer to a request that there is none of."""
    body = response.body if isinstance(response.body, bytes) else b""
    head = f"HTTP/1.1 {response.status} {response.reason}\r\nContent-Type: {response.headers['Content-Type']}\r\n"
    return head.encode() + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body
