"""Bodies of requests, from the socket to a parsed request: in bounded memory, and never long in one go."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import TypeVar

from aiohttp import web
from pydantic import BaseModel, ValidationError

from services.gateway import schemas
from services.gateway.schemas import Part
from shared.errors import RequestRejected

BODY_DEADLINE_S = 60.0
ENCODINGS = ("identity", "gzip", "deflate")
SMALL_BYTES = 64 * 1024
"""A body up to this counts for nothing: not as memory, nor as work that others would wait for."""
LARGE_BODIES = 8
"""As many of the largest size may be in memory at a time."""
MAX_VALUES = 5 << 18
"""Values in a body, texts aside: a prompt may be a million token ids. Parsing so many takes a fifth of a second."""
MAX_PARTS = 1 << 18
"""Lists, objects and names in a body: each takes ten times the memory of a token id."""

Kind = TypeVar("Kind", bound=BaseModel)


class Bodies:
    """Reads bodies of at most `most_bytes`; all that are in memory at a time are LARGE_BODIES times that at most."""

    def __init__(self, most_bytes: int):
        self._most = most_bytes
        self._room = LARGE_BODIES * most_bytes

    @asynccontextmanager
    async def read(self, request: web.Request) -> AsyncIterator[bytes]:
        """The body of a JSON request, as long as it is looked at. Raises RequestRejected."""
        if request.content_type != "application/json":
            raise RequestRejected(
                "the body must be JSON, with Content-Type: application/json", status=415, code="unsupported_media_type"
            )
        if request.headers.get("Content-Encoding", "identity").lower() not in ENCODINGS:
            text = f"the body's Content-Encoding must be one of {', '.join(ENCODINGS)}"
            raise RequestRejected(text, status=415, code="unsupported_media_type")
        body = bytearray()
        try:
            await self._receive(request, body)
            yield bytes(body)
        finally:
            self._room += _counted(body)

    async def _receive(self, request: web.Request, body: bytearray) -> None:
        if (request.content_length or 0) > self._most:
            raise self._too_large()
        try:
            async with asyncio.timeout(BODY_DEADLINE_S):
                async for part in request.content.iter_any():
                    before = _counted(body)
                    body += part
                    self._room -= _counted(body) - before
                    if len(body) > self._most:
                        raise self._too_large()
                    if self._room < 0:
                        raise RequestRejected("too many large requests at once", status=503, code="overloaded")
        except TimeoutError:
            raise RequestRejected("the body did not arrive in time", status=408, code="request_timeout") from None
        except web.RequestPayloadError as error:
            raise RequestRejected("the body is broken", code="invalid_body") from error

    def _too_large(self) -> RequestRejected:
        text = f"the body has more than {self._most} bytes (GHOST_MAX_BODY_MB)"
        return RequestRejected(text, status=413, code="request_too_large")


def _counted(body: bytearray) -> int:
    return len(body) if len(body) > SMALL_BYTES else 0


def check_values(body: bytes, most: int = MAX_VALUES, parts: int = MAX_PARTS) -> None:
    """Raise RequestRejected for a body of more than `most` values, or of more than `parts` lists, objects and names.

    It is known before anything is made of them.
    """
    if _parts(body) <= parts and _values(body) <= most:
        return
    plain = body.replace(rb"\\", b"").replace(rb"\"", b"")  # the marks that are left in it begin and end its strings
    if plain.count(b'"') // 2 > parts:
        raise RequestRejected(f"the body has more than {parts} texts", code="too_many_values")
    plain = b"".join(plain.split(b'"')[::2])
    if _parts(plain) > parts:
        raise RequestRejected(f"the body has more than {parts} lists, objects and names", code="too_many_values")
    if _values(plain) > most:
        raise RequestRejected(f"the body has more than {most} values", code="too_many_values")


def _parts(body: bytes) -> int:
    return sum(map(body.count, (b"[", b"{", b":")))


def _values(body: bytes) -> int:
    """No fewer than the body's values and names: each is the first one in a list or an object, or follows a , or :."""
    return _parts(body) + body.count(b",") + 1


def parse(kind: type[Kind], body: bytes) -> Kind:
    """The request in a body. Raises RequestRejected, naming the parameter, for anything else."""
    check_values(body)
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if problem["type"] == "json_invalid":
        raise RequestRejected("the body is not valid JSON", code="invalid_json")
    if not problem["loc"]:
        raise RequestRejected("the body is not a JSON object", code="invalid_json")
    param = "".join(_path(problem["loc"])).lstrip(".")
    if param == "prompt" or param.startswith("prompt["):
        param, reason = "prompt", "should be a string, strings, token ids, or lists of token ids"
        if problem["type"] == "missing":
            reason = "is missing"
    else:
        reason = "is missing" if problem["type"] == "missing" else problem["msg"].removeprefix("Input ")
    raise RequestRejected(f"{param!r}: {reason}", param=param)


_NAMES = frozenset(
    name
    for kind in vars(schemas).values()
    if isinstance(kind, type) and issubclass(kind, Part)
    for name in kind.model_fields
)


def _path(location: tuple[int | str, ...]) -> Iterator[str]:
    """A location as a client would write it, up to the first part that is pydantic's own (a type of a union)."""
    for part in location:
        if isinstance(part, int):
            yield f"[{part}]"
        elif part in _NAMES:
            yield f".{part}"
        else:
            return
