"""Server-sent events: their form, and a stream of them that ends when the client does not read."""

import logging
from types import TracebackType

from aiohttp import web

from services.gateway.alarm import Alarm

log = logging.getLogger(__name__)

HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
WRITE_DEADLINE_S = 60.0
"""How long a client may leave a full socket unread."""

_LINE_ENDS = [(each.encode(), f"\\u{ord(each):04x}".encode()) for each in "\x85\u2028\u2029"]
"""Ends of lines to Unicode, though not to JSON: what splits a stream by them would cut an event."""


def event(content: bytes, name: str = "") -> bytes:
    """One event with this content, which is JSON, of this name if it has one."""
    if not content.isascii():
        for end, escaped in _LINE_ENDS:
            content = content.replace(end, escaped)
    head = b"event: %b\n" % name.encode() if name else b""
    return b"%bdata: %b\n\n" % (head, content)


class Stream:
    """The answer to one request, as events. Use as an async context manager; leaving it does not end the answer."""

    def __init__(self, request: web.Request, headers: dict[str, str] | None = None):
        self.response = web.StreamResponse(headers=HEADERS | (headers or {}))
        self._request = request
        self._unread = Alarm(WRITE_DEADLINE_S, self._give_up)

    async def __aenter__(self) -> "Stream":
        await self.response.prepare(self._request)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._unread.close()

    async def write(self, data: bytes) -> None:
        """Send. Raises ConnectionError when the client is gone; one that reads nothing for long is cut off."""
        self._unread.begin()
        await self.response.write(data)
        self._unread.end()

    def _give_up(self) -> None:
        log.info("the client read nothing for %g s", WRITE_DEADLINE_S)
        if self._request.transport is not None:
            self._request.transport.abort()
