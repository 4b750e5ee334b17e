"""Server-sent events: their headers, and writes that end when the client does not read."""

import asyncio
import json
from typing import Any

from aiohttp import web

HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
WRITE_DEADLINE_S = 60.0
"""How long a client may leave a full socket unread."""

_LINE_ENDS = {ord(each): f"\\u{ord(each):04x}" for each in "\x85\u2028\u2029"}
"""Ends of lines to Unicode, though not to JSON: what splits a stream by them would cut an event."""


def event(content: dict[str, Any], name: str = "") -> bytes:
    """One event with this content as JSON, of this name if it has one."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).translate(_LINE_ENDS)
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {text}\n\n".encode()


async def write(request: web.Request, response: web.StreamResponse, data: bytes) -> None:
    """Send. Raises ConnectionError when the client is gone, or has read nothing for WRITE_DEADLINE_S."""
    try:
        async with asyncio.timeout(WRITE_DEADLINE_S):
            await response.write(data)
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError(f"the client read nothing for {WRITE_DEADLINE_S:.0f} s") from None
