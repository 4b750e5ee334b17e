"""Server-sent events: their headers, and writes that end when the client does not read."""

import asyncio

from aiohttp import web

HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
WRITE_DEADLINE_S = 60.0
"""How long a client may leave a full socket unread."""


async def write(request: web.Request, response: web.StreamResponse, data: bytes) -> None:
    """Send. Raises ConnectionError when the client is gone, or has read nothing for WRITE_DEADLINE_S."""
    try:
        async with asyncio.timeout(WRITE_DEADLINE_S):
            await response.write(data)
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError(f"the client read nothing for {WRITE_DEADLINE_S:.0f} s") from None
