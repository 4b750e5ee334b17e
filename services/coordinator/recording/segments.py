"""The format of a recording: what went into the core, and a checksum of what came out.

A recording is a row of segments, files of MessagePack objects one after the other. Each segment begins with a header
and a keyframe, so that it can be replayed without those before it. Then an entry for each event:

    [event, seen, sent]   event: MessagePack [time, kind, ...], messages as the frames that they came in
                          seen: xxh3_64 of the event, seeded with `seen` of the entry before (0: the keyframe's own)
                          sent: xxh3_64 of the frames that were sent and the questions that were asked, 0: nothing

What was sent is not kept: the same core sends it again. Prompts of requests are in it, as token ids; no secrets are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import msgpack
from xxhash import xxh3_64_hexdigest, xxh3_64_intdigest

from services.coordinator import events
from services.coordinator.events import Answer, Answered, Came, Effect, Event, Hello, Left, Said, Send, Tick
from services.coordinator.group import Group
from services.coordinator.recording.keyframe import freeze, thaw
from services.coordinator.views.metrics import Metrics
from shared import messages
from shared.config import CoordinatorSettings
from shared.errors import ProtocolError
from shared.tracing import NoTracing
from shared.wire import Codec

FORMAT = 1
MAX_OBJECT_BYTES = 1 << 30
SECRET = frozenset({"token", "redis_url", "tls_cert_file", "tls_key_file", "tls_ca_file", "fault_dir", "record_dir"})
"""Settings that stay out of recordings: secrets, what may contain them, and paths of this machine."""

CODEC = Codec(messages, events, limit=MAX_OBJECT_BYTES)


@dataclass(frozen=True, slots=True)
class Header:
    """The first object of a segment. `life` names the coordinator's process, `segment` counts from 0 in it."""

    format: int
    version: str
    code: str
    """Hash of the source that recorded it."""
    life: str
    segment: int
    first: int
    """Number of its first event, in this life."""
    now: float
    """The core's clock when the segment began, and the wall's, seconds since 1970."""
    wall: float
    settings: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Entry:
    """One event, and the checksum of what it made the core send."""

    number: int
    now: float
    event: Event
    sent: int


class Writer:
    """Makes the bytes of a recording; what becomes of them is the caller's. Numbers run through a whole life."""

    def __init__(self, group: Group, settings: CoordinatorSettings, life: str):
        self._group = group
        self._settings = settings
        self._life = life
        self._segments = 0
        self._events = 0
        self._seen = 0

    def segment(self, now: float, wall: float) -> bytes:
        """The beginning of a new segment: header and keyframe of the core as it is."""
        shown = self._settings.model_dump(mode="json", exclude=set(SECRET))
        header = [
            FORMAT,
            version("ghostserve"),
            fingerprint(),
            self._life,
            self._segments,
            self._events,
            now,
            wall,
            shown,
        ]
        group = self._group
        keyframe = freeze(group, externals(group.metrics, group.tracing, self._settings))
        self._segments += 1
        self._seen = xxh3_64_intdigest(keyframe)
        return bytes(msgpack.packb(header) + msgpack.packb(keyframe))

    def entry(self, now: float, event: Event, frame: bytes, sent: int) -> bytes:
        """An event that was dealt with. `frame`: its message as it came, if it came in one."""
        self._events += 1
        packed = msgpack.packb(_plain(now, event, frame))
        self._seen = xxh3_64_intdigest(packed, self._seen)
        return bytes(msgpack.packb([packed, self._seen, sent]))


@cache
def fingerprint() -> str:
    """A hash of the core's source, and of the words that it speaks."""
    roots = (Path(str(files("services.coordinator"))), Path(str(files("shared"))))
    sources = [path for root in roots for path in sorted(root.rglob("*.py"))]
    return xxh3_64_hexdigest(b"".join(path.read_bytes() for path in sources))


def externals(metrics: Metrics, tracing: object, settings: CoordinatorSettings) -> dict[str, object]:
    """What of a core is not its state."""
    return {"metrics": metrics, "tracing": tracing, "settings": settings}


def encode(output: Effect) -> bytes:
    """The frame of a message or question that came out."""
    return CODEC.encode(output.message if isinstance(output, Send) else output.question)


def checksum(outputs: Sequence[tuple[Effect, bytes]]) -> int:
    """Of what one event made the core send and ask, in order, with the frames that `encode` made. 0: nothing."""
    seed = 0
    for output, frame in outputs:
        to = repr(output.peers if isinstance(output, Send) else output.number).encode()
        seed = xxh3_64_intdigest(frame, xxh3_64_intdigest(to, seed))
    return seed


def _plain(now: float, event: Event, frame: bytes) -> list[Any]:
    match event:
        case Tick():
            return [now, 0]
        case Said(peer, message):
            return [now, 1, peer, frame or CODEC.encode(message)]
        case Answered(number, answer):
            return [now, 2, number, CODEC.encode(answer)]
        case Came(peer, hello):
            return [now, 3, peer, CODEC.encode(hello)]
        case Left(peer, reason):
            return [now, 4, peer, reason]


def _event(kind: int, rest: list[Any]) -> Event:
    match kind, rest:
        case 0, []:
            return Tick()
        case 1, [int(peer), bytes(frame)]:
            return Said(peer, CODEC.decode(frame))
        case 2, [int(number), bytes(frame)]:
            return Answered(number, cast(Answer, CODEC.decode(frame)))
        case 3, [int(peer), bytes(frame)]:
            return Came(peer, cast(Hello, CODEC.decode(frame)))
        case 4, [int(peer), str(reason)]:
            return Left(peer, reason)
    raise ProtocolError(f"an event of kind {kind!r} with {len(rest)} parts")


class Segment:
    """A segment as it is read: its header and its core, then `entries` once."""

    def __init__(self, data: bytes):
        """Raises ProtocolError for what is not the beginning of a segment, or was recorded by other code."""
        self._unpacker = msgpack.Unpacker(max_buffer_size=MAX_OBJECT_BYTES, strict_map_key=False)
        self._unpacker.feed(data)
        try:
            self.header = Header(*next(self._unpacker))
            keyframe = bytes(next(self._unpacker))
        except (StopIteration, TypeError, ValueError, msgpack.UnpackException) as error:
            raise ProtocolError("this is no recording: it does not begin with a header and a keyframe") from error
        if (self.header.format, self.header.version) != (FORMAT, version("ghostserve")):
            raise ProtocolError(
                f"recorded by version {self.header.version} in format {self.header.format}: "
                f"this is {version('ghostserve')} with {FORMAT}; replay it with the version that recorded it"
            )
        self._seen = xxh3_64_intdigest(keyframe)
        self._keyframe = keyframe
        try:
            self.settings = CoordinatorSettings(**self.header.settings)
        except (TypeError, ValueError) as error:
            raise ProtocolError(f"its settings can't be read: {error}") from error

    def core(self) -> Group:
        """The core as it was when the segment began. Raises ProtocolError."""
        metrics = Metrics(lambda: group.status())
        group = thaw(self._keyframe, externals(metrics, NoTracing(), self.settings))
        if not isinstance(group, Group):
            raise ProtocolError(f"its keyframe is no core but {type(group).__name__}")
        return group

    def entries(self) -> Iterator[Entry]:
        """The events. One that was written in part, at the end, is left out. Raises ProtocolError for damage."""
        number = self.header.first
        while True:
            number += 1
            try:
                packed, seen, sent = next(self._unpacker)
                self._seen = xxh3_64_intdigest(packed, self._seen)
                now, kind, *rest = msgpack.unpackb(packed)
                if seen != self._seen:
                    raise ValueError("its checksum does not fit")
                entry = Entry(number, now, _event(kind, rest), sent)
            except StopIteration:
                return
            except (TypeError, ValueError, msgpack.UnpackException, ProtocolError) as error:
                raise ProtocolError(f"the recording is damaged at event {number}: {error}") from error
            yield entry
