"""Writes recordings to a folder, within a bound of bytes: the oldest segments go, of earlier lives first.

What was recorded is handed to the kernel with each flush, so that the end of the process, however it comes, loses no
more than what came since. Files are written by a thread: a slow disk holds nobody up, and what it can't take in time
ends the recording, with a line in the log.
"""

import asyncio
import logging
import os
import time
from pathlib import Path

from services.coordinator.events import Effect, Event
from services.coordinator.group import Group
from services.coordinator.recording.segments import Writer, checksum
from shared.config import CoordinatorSettings
from shared.errors import ConfigError

log = logging.getLogger(__name__)

PATTERN = "coordinator-*.ghostrec"
MIB = 1 << 20
SEGMENTS = 8
"""Of the bound, each segment takes one part of so many."""
FLUSH_S = 0.25
MAX_BUFFERED_BYTES = 64 << 20


class Recorder:
    """The recording of one life of a core, in `settings.record_dir`."""

    def __init__(self, group: Group, settings: CoordinatorSettings):
        """Raises ConfigError where the folder can't be written to."""
        self._group = group
        self._folder = Path(settings.record_dir)
        self._bound = settings.record_mb * MIB
        self._life = time.strftime("%Y%m%dT%H%M%S", time.gmtime()) + f"-{os.getpid()}"
        self._writer = Writer(group, settings, self._life)
        self._buffer = bytearray()
        self._segments = 0
        self._segment_bytes = self._full = 0
        self._flushed = 0.0
        self._writing: asyncio.Task[None] | None = None
        self._on = True
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._begin(group.outbox.now)
            self._write(self._path(), self._take())
        except OSError as error:
            raise ConfigError(f"can't record to {self._folder}: {error.strerror}") from error
        log.info("events are recorded, prompts among them", extra={"file": str(self._path())})

    def saw(self, now: float, event: Event, frame: bytes, outputs: list[tuple[Effect, bytes]]) -> None:
        """An event was dealt with; `outputs` came out, with their frames. `frame`: of the event's message."""
        if self._on:
            entry = self._writer.entry(now, event, frame, checksum(outputs))
            self._buffer += entry
            self._segment_bytes += len(entry)

    def tick(self, now: float) -> None:
        """Flush what is due; to be called again and again, between two events."""
        if not self._on or now - self._flushed < FLUSH_S or (self._writing is not None and not self._writing.done()):
            if self._on and len(self._buffer) > MAX_BUFFERED_BYTES:
                self._end("the disk is too slow")
            return
        self._flushed = now
        self._writing = asyncio.create_task(self._written(self._path(), self._take()))
        if self._segment_bytes > (self._full / 2 if self._idle else self._full):
            try:
                self._begin(now)
            except TypeError as error:  # serving goes on
                self._end(str(error))

    async def flushed(self) -> None:
        """Wait until what is being written is."""
        if self._writing is not None:
            await self._writing

    async def close(self) -> None:
        """Write what is left."""
        await self.flushed()
        if self._on:
            await self._written(self._path(), self._take())

    @property
    def _idle(self) -> bool:
        """Whether no request waits for the moment that a keyframe takes."""
        engine = self._group.engine
        return engine is None or engine.quiet

    def _begin(self, now: float) -> None:
        self._segments += 1
        self._buffer += self._writer.segment(now, time.time())
        self._segment_bytes = len(self._buffer)
        self._full = max(self._bound // SEGMENTS, 2 * len(self._buffer))  # more than its keyframe, however large

    def _end(self, why: str) -> None:
        log.warning("events are recorded no more: %s", why)
        self._on = False
        self._buffer.clear()

    def _path(self) -> Path:
        return self._folder / f"coordinator-{self._life}-{self._segments:04}.ghostrec"

    def _take(self) -> bytes:
        data = bytes(self._buffer)
        self._buffer.clear()
        return data

    async def _written(self, path: Path, data: bytes) -> None:
        try:
            await asyncio.to_thread(self._write, path, data)
        except OSError as error:
            self._end(str(error))

    def _write(self, path: Path, data: bytes) -> None:
        self._make_room(path, len(data))
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as file:
            file.write(data)

    def _make_room(self, current: Path, wanted: int) -> None:
        """Drop whole segments, the oldest first, until there is room."""
        sizes = {path: path.stat() for path in self._folder.glob(PATTERN)}
        total = sum(size.st_size for size in sizes.values())
        for path in sorted(sizes, key=lambda path: (sizes[path].st_mtime_ns, path.name)):
            if total + wanted <= self._bound:
                return
            if path != current:
                total -= sizes[path].st_size
                path.unlink()
