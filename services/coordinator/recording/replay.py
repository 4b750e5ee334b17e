"""A recorded life, lived again: the core gets the same events, must send the same, and must hold what always holds.

Page tables are compared with the pool at each new epoch, and else as often as a quarter of the time allows; where they
disagree, the way from the last time that they agreed is gone again, event by event.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from services.coordinator.events import Came, Effect, Left, Said, Send
from services.coordinator.group import Group
from services.coordinator.recording.recorder import PATTERN
from services.coordinator.recording.segments import Entry, Header, Segment, checksum, encode, fingerprint
from shared.errors import GhostError, ProtocolError
from shared.types import ClusterStatus


class Watcher(Protocol):
    """Is told what happens, in order; between the two, the core logs what it does."""

    def begins(self, entry: Entry, group: Group) -> None:
        """An event is about to be dealt with."""

    def ended(self, entry: Entry, group: Group, outputs: Sequence[Effect]) -> None:
        """It was, and this came out."""


@dataclass(frozen=True, slots=True)
class Until:
    """Where to end: after the event of this number, or before the first one that is later, by the core's clock."""

    event: int | None = None
    now: float | None = None

    def over(self, entry: Entry) -> bool:
        """Whether this event is past the end."""
        return (self.event is not None and entry.number > self.event) or (self.now is not None and entry.now > self.now)


@dataclass(frozen=True, slots=True)
class Replayed:
    """How a replay went. `failure`: what is wrong, and at which event; empty if all is as it was recorded."""

    events: int
    seconds: float
    """From the beginning to the last event, when they happened."""
    failure: str
    status: ClusterStatus


def lives(paths: Iterable[Path]) -> list[list[Path]]:
    """The recordings in these files and folders: of each life its segments in order. Raises ProtocolError."""
    found: dict[str, list[tuple[int, Path]]] = {}
    for path in paths:
        segments = sorted(path.glob(PATTERN)) if path.is_dir() else [path]
        if not segments:
            raise ProtocolError(f"no recording in {path}")
        for segment in segments:
            told = header(segment)
            found.setdefault(told.life, []).append((told.segment, segment))
    return [[path for _, path in sorted(segments)] for segments in found.values()]


def header(path: Path) -> Header:
    """What a segment says of itself. Raises ProtocolError."""
    return _read(path).header


def replay(paths: Sequence[Path], watcher: Watcher, until: Until) -> Replayed:
    """Run the core over a life's segments, from the first keyframe on. Raises ProtocolError for what can't be read."""
    first = _read(paths[0])
    run = _Run(first)
    for entry in _entries(paths):
        if until.over(entry):
            break
        watcher.begins(entry, run.group)
        outputs = run.take(entry)
        watcher.ended(entry, run.group, outputs)
        if run.failure:
            break
    run.check(run.number)
    if run.inconsistent:
        run = _first_inconsistent(paths, run)
    began = first.header
    return Replayed(run.number - began.first, run.group.outbox.now - began.now, run.failure, run.group.status())


def other_code(of: Header) -> bool:
    """Whether a segment was recorded by other code than this, though of the same version."""
    return of.code != fingerprint()


def _read(path: Path) -> Segment:
    try:
        return Segment(path.read_bytes())
    except OSError as error:
        raise ProtocolError(f"can't read {path}: {error.strerror}") from error
    except ProtocolError as error:
        raise ProtocolError(f"{path}: {error}") from error


def _entries(paths: Sequence[Path]) -> Iterator[Entry]:
    number: int | None = None
    for path in paths:
        segment = _read(path)
        if number is not None and segment.header.first != number:
            raise ProtocolError(f"{path}: events {number + 1} to {segment.header.first} are missing before it")
        number = segment.header.first
        for entry in segment.entries():
            number = entry.number
            yield entry


def _first_inconsistent(paths: Sequence[Path], failed: "_Run") -> "_Run":
    """Go the way again, and check after each event since all was well."""
    run = _Run(_read(paths[0]), every=failed.good)
    for entry in _entries(paths):
        run.take(entry)
        if run.failure or entry.number >= failed.number:
            break
    return run if run.failure else failed


class _Run:
    """A core on its way through a recording; `failure` says what is wrong with it. `every`: checked since then."""

    def __init__(self, segment: Segment, every: int | None = None):
        self.group: Group = segment.core()
        self.number = self.good = segment.header.first
        self.failure = ""
        self.inconsistent = False
        self._every = every
        self._epoch = -1
        self._spent_s = self._checked_s = 0.0

    def take(self, entry: Entry) -> list[Effect]:
        """Deal with one event. Returns what came out."""
        began = time.perf_counter()
        self.number = entry.number
        try:
            self.group.handle(entry.now, entry.event)
        except GhostError:
            pass  # the peer's fault; its channel is closed, which is an event of its own
        except Exception as error:
            self.failure = f"event {entry.number}, {shown(entry)}: the core fails: {type(error).__name__}: {error}"
        outputs = self.group.take()
        if not self.failure and checksum([(output, encode(output)) for output in outputs]) != entry.sent:
            told = ", ".join(map(sent, outputs)) or "nothing"
            self.failure = f"event {entry.number}, {shown(entry)}: something else was sent then; now it is {told}"
        self._spent_s += time.perf_counter() - began
        due = self._spent_s > 3 * self._checked_s if self._every is None else entry.number > self._every
        if due or self.group.membership.epoch != self._epoch:
            self.check(entry.number)
        return outputs

    def check(self, number: int) -> None:
        """See that pages, page tables, ranks and members agree."""
        if self.failure:
            return
        began, self._epoch = time.perf_counter(), self.group.membership.epoch
        try:
            self.group.check()
            self.good = number
        except Exception as error:
            self.failure, self.inconsistent = f"after event {number}: {error}", True
        self._checked_s += time.perf_counter() - began


def shown(entry: Entry) -> str:
    """An event in a few words."""
    match entry.event:
        case Said(peer, message):
            return f"peer {peer} says {type(message).__name__}"
        case Came(peer, hello):
            return f"peer {peer} comes with {type(hello).__name__}"
        case Left(peer, reason):
            return f"peer {peer} leaves: {reason}"
        case event:
            return type(event).__name__


def sent(output: Effect) -> str:
    """A message or question in a few words."""
    if isinstance(output, Send):
        return f"{type(output.message).__name__} to {len(output.peers)}"
    return type(output.question).__name__
