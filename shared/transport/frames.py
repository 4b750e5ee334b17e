"""Header frames of the bulk transport: typed, versioned, size-limited, and validated before anything acts on them.

On the wire: 4 bytes magic, 4 bytes header length (big endian), the header as a MessagePack array whose first item says
its kind, then the payloads that the header announces, each as it lies in memory.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgpack

from shared import errors
from shared.errors import GhostError, ProtocolError
from shared.transport.base import BulkLimits, GetShards, Outcome, PutShards, ShardLabel, ShardRef, Stream
from shared.types import is_page_key

VERSION = 2
MAGIC = b"GSB1"
PREFIX = struct.Struct(">4sI")
HELLO_BYTES = 4096  # all that an unknown peer may send before it has shown the token
_TEXT_BYTES = 512
_U64 = 1 << 64

_HELLO, _WELCOME, _PUT, _GET, _REPLY = range(1, 6)


@dataclass(frozen=True, slots=True)
class Hello:
    """First frame of a client."""

    version: int
    token: str


@dataclass(frozen=True, slots=True)
class HelloReply:
    """A server's answer to hello: go on, or why not."""

    version: int
    refusal: Outcome


@dataclass(frozen=True, slots=True)
class Reply:
    """What became of each shard of a request; for a get, the bytes of those without an error follow."""

    request_id: int
    outcomes: tuple[Outcome, ...]


@dataclass(frozen=True, slots=True)
class Numbered:
    """A request and the id that its reply will carry."""

    request_id: int
    request: PutShards | GetShards


Frame = Hello | HelloReply | Reply | Numbered

_ERRORS = {cls.__name__: cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, GhostError)}
del _ERRORS[errors.RequestRejected.__name__]  # an HTTP matter, and built differently


class Oversized(ProtocolError):
    """A header longer than its reader allows."""


def encode(frame: Frame) -> bytes:
    """Return prefix and header as bytes."""
    body: bytes = msgpack.packb(_to_wire(frame))
    return PREFIX.pack(MAGIC, len(body)) + body


def pieces(frame: Frame) -> list[memoryview]:
    """Return the two buffers in which a frame is sent, as `read` receives them."""
    encoded = memoryview(encode(frame))
    return [encoded[: PREFIX.size], encoded[PREFIX.size :]]


def _to_wire(frame: Frame) -> list[object]:
    match frame:
        case Hello():
            return [_HELLO, frame.version, frame.token]
        case HelloReply():
            return [_WELCOME, frame.version, _error_out(frame.refusal)]
        case Reply():
            good = frame.outcomes.count(None) == len(frame.outcomes)
            outcomes = frame.outcomes if good else [_error_out(outcome) for outcome in frame.outcomes]
            return [_REPLY, frame.request_id, outcomes]
        case Numbered(request=PutShards() as put):
            shards = [(s.page_key, s.number, s.k, s.m, s.length, s.checksum, s.data_checksums) for s in put.shards]
            return [_PUT, frame.request_id, put.group, put.epoch, put.serial, shards]
        case Numbered(request=GetShards() as get):
            return [_GET, frame.request_id, get.group, [(s.page_key, s.number, s.length) for s in get.shards]]
    raise TypeError(frame)


def header_length(prefix: bytes | bytearray, limit: int) -> int:
    """Return how long the header after this prefix is. Raises ProtocolError where it is none, or too long."""
    magic, length = PREFIX.unpack(prefix)
    if magic != MAGIC:
        raise ProtocolError("not a GhostServe bulk frame")
    if not 0 < length <= limit:
        raise Oversized(f"a header of {length} bytes; at most {limit} are allowed")
    return int(length)


def decode(body: bytes | bytearray, limits: BulkLimits) -> Frame:
    """Return the frame in a header. Raises ProtocolError if anything about it is not as it must be."""
    try:
        frame = msgpack.unpackb(body, max_map_len=0, max_ext_len=0, max_array_len=limits.shards)
        return _from_wire(frame, limits)
    except ProtocolError:
        raise
    except Exception as error:  # msgpack raises half a dozen kinds, unpacking ValueError and TypeError
        raise ProtocolError(f"malformed bulk header: {type(error).__name__}") from error


async def read(stream: Stream, limit: int, limits: BulkLimits) -> Frame:
    """Return the next frame of a stream. Raises PeerLost, DeadlineExceeded or ProtocolError."""
    prefix = bytearray(PREFIX.size)
    await stream.receive([memoryview(prefix)], None)
    body = bytearray(header_length(prefix, limit))
    await stream.receive([memoryview(body)], limits.stall_s)
    return decode(body, limits)


async def receive_payloads(stream: Stream, wanted: Sequence[tuple[memoryview | None, int]], stall_s: float) -> None:
    """Receive payloads in order, each into its buffer or, without one, into nothing."""
    run: list[memoryview] = []
    for place, length in wanted:
        if place is not None:
            run.append(place)
            continue
        await stream.receive(run, stall_s)
        run.clear()
        await stream.drop(length, stall_s)
    await stream.receive(run, stall_s)


def _from_wire(wire: Any, limits: BulkLimits) -> Frame:
    match wire:
        case [int(kind), int(version), str(token)] if kind == _HELLO:
            return Hello(version, token)
        case [int(kind), int(version), refusal] if kind == _WELCOME:
            return HelloReply(version, _error_in(refusal))
        case [int(kind), int(number), list(outcomes)] if kind == _REPLY:
            good = outcomes.count(None) == len(outcomes)
            return Reply(number, tuple(outcomes) if good else tuple(_error_in(outcome) for outcome in outcomes))
        case [int(kind), int(number), str(group), int(epoch), int(serial), list(shards)] if kind == _PUT:
            _check(
                0 < len(shards) <= limits.shards and 0 <= epoch < _U64 and 0 <= serial < _U64 and _is_name(group), "put"
            )
            labels = tuple(_shard_in(shard, limits) for shard in shards)
            return Numbered(number, PutShards(group, epoch, serial, labels))
        case [int(kind), int(number), str(group), list(shards)] if kind == _GET:
            _check(0 < len(shards) <= limits.shards and _is_name(group), "get")
            return Numbered(number, GetShards(group, tuple(_ref_in(shard, limits) for shard in shards)))
    raise ProtocolError("a bulk header of unknown kind or shape")


def _shard_in(wire: Any, limits: BulkLimits) -> ShardLabel:
    page_key, number, k, m, length, checksum, data_checksums = wire
    _check(is_page_key(page_key) and _is_int(number, 256) and _is_int(k, 257) and _is_int(m, 257), "shard")
    _check(k >= 1 and m >= 1 and k + m <= 256 and k <= number < k + m, "shard number")
    _check(_is_int(length, limits.shard_bytes + 1) and length > 0 and _is_int(checksum, _U64), "shard length")
    _check(len(data_checksums) == k and all(_is_int(value, _U64) for value in data_checksums), "data checksums")
    return ShardLabel(page_key, number, k, m, length, checksum, tuple(data_checksums))


def _ref_in(wire: Any, limits: BulkLimits) -> ShardRef:
    page_key, number, length = wire
    _check(is_page_key(page_key) and _is_int(number, 256), "shard")
    _check(_is_int(length, limits.shard_bytes + 1) and length > 0, "shard length")
    return ShardRef(page_key, number, length)


def _check(good: bool, what: str) -> None:
    if not good:
        raise ProtocolError(f"a bulk header with an invalid {what}")


def _is_int(value: object, below: int) -> bool:
    return type(value) is int and 0 <= value < below


def _is_name(value: str) -> bool:
    return 0 < len(value) <= 64 and value.isprintable() and not set(value) & set("{}: ")


def _error_out(outcome: Outcome) -> list[str] | None:
    if outcome is None:
        return None
    name = next((cls.__name__ for cls in type(outcome).__mro__ if cls.__name__ in _ERRORS), GhostError.__name__)
    return [name, str(outcome)[:_TEXT_BYTES]]


def _error_in(wire: Any) -> Outcome:
    if wire is None:
        return None
    name, text = wire
    return _ERRORS.get(name, GhostError)(str(text)[:_TEXT_BYTES])
