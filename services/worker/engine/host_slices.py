"""One copy of the weights for all workers of a host: the supervisor's memory, filled by whoever needs a part first.

The memory is an anonymous file (memfd) that the supervisor's forks inherit, so it is gone when they are, and no limit
of /dev/shm applies. It is in areas, one a rank's slice and one for what all ranks have alike, and takes no room before
they are filled. Its first page says which weights they are of, and how far each is filled. Locks of the kernel's (OFD,
which end with their process) say who is at it: a filler that is killed leaves an area that the next one fills from its
beginning.

Other weights (another model or type, files that were replaced) take the memory only when nobody uses it; until then a
worker holds its own copy.
"""

import fcntl
import logging
import mmap
import os
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import numpy as np

from services.worker.memory import Bytes

log = logging.getLogger(__name__)

ALIGN = 2 << 20  # huge pages, where the system has them for shared memory
ATTACH_S = 3.0
"""Workers of other weights that are about to end, as when a group's configuration has changed, are gone by then."""
STALL_S = 5.0
"""Who waits for a process that fills an area, and gets no further for so long, goes its own way."""
POLL_S = 0.02
_HEADER = 4096
_MADV_POPULATE_READ = 22  # of linux/mman.h; Python has no name for it
_NAME = 32  # bytes that say which weights these are; a progress word for each area follows
_WHOLE = 1 << 63
_USERS = 0  # the byte that all who use the memory lock together; each area's has its number and one

Fill = Callable[[Bytes], Iterator[object]]
"""Writes an area, a part a turn."""


def host_memory() -> int:
    """A file descriptor of empty memory, to be inherited."""
    return os.memfd_create("ghostserve-weights", os.MFD_CLOEXEC)


class HostSlices:
    """The areas of one process. For one thread.

    `shared`: what the supervisor made; None for memory of this process alone. `name`: 32 bytes that are equal for equal
    weights only. `sizes`: of the areas, in bytes.
    """

    def __init__(self, shared: int | None, name: bytes, sizes: Sequence[int]) -> None:
        assert len(name) == _NAME
        assert _NAME + 8 * len(sizes) <= _HEADER
        self.name = name
        self._sizes = tuple(sizes)
        starts = np.cumsum([ALIGN, *(-(-size // ALIGN) * ALIGN for size in sizes)]).tolist()
        self._starts, self._total = starts[:-1], starts[-1]
        self._fd = -1
        if shared is None or not self._attach(shared):
            self._fd = host_memory()
            self._begin()
        header = mmap.mmap(self._fd, _HEADER)
        self._progress = np.frombuffer(header, dtype="<u8", count=len(sizes), offset=_NAME)
        self._held: dict[int, Bytes] = {}

    def hold(self, area: int, fill: Fill, *, writable: bool = False) -> Bytes | None:
        """An area's bytes, which `fill` writes if they are not whole. None: another process has it in hand.

        `writable`: mapped for writing too, as pinning wants it; nobody writes to what is whole.
        """
        if area in self._held:
            return self._held[area]
        with self._locked(1 + area) as mine:
            if not mine:
                return None
            if self._progress[area] != _WHOLE:
                self._fill(area, fill)
        self._held[area] = self._map(area, writable=writable)
        return self._held[area]

    def wait(self, area: int, fill: Fill, *, writable: bool = False) -> Bytes | None:
        """As `hold`, but waits for another process as long as that gets on; None only where it does not."""
        seen, since = -1, time.monotonic()
        while (memory := self.hold(area, fill, writable=writable)) is None:
            if (progress := int(self._progress[area])) != seen:
                seen, since = progress, time.monotonic()
            elif time.monotonic() - since > STALL_S:
                log.warning("another process fills area %d and stands still: it is read once more, for this one", area)
                break
            time.sleep(POLL_S)
        return memory

    def forget(self) -> None:
        """Map areas no longer, but for those whose bytes somebody here still refers to."""
        self._held.clear()

    def _fill(self, area: int, fill: Fill) -> None:
        began = time.monotonic()
        self._progress[area] = 0
        for _ in fill(self._map(area, writable=True)):
            self._progress[area] += 1
        self._progress[area] = _WHOLE
        log.info("area %d filled: %d MiB in %.2f s", area, self._sizes[area] >> 20, time.monotonic() - began)

    def _map(self, area: int, *, writable: bool) -> Bytes:
        memory = mmap.mmap(
            self._fd,
            self._sizes[area],
            prot=mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0),
            offset=self._starts[area],
        )
        with suppress(OSError):  # a kernel may have none
            memory.madvise(mmap.MADV_HUGEPAGE)
        if not writable:
            with suppress(OSError):  # older than Linux 5.14: the first step pays for its page faults
                memory.madvise(_MADV_POPULATE_READ)
        return np.frombuffer(memory, dtype=np.uint8)

    # -- whose memory it is ------------------------------------------------------------------------------------------

    def _attach(self, shared: int) -> bool:
        """Use the supervisor's memory; False while it is in use for other weights."""
        self._fd = os.open(f"/proc/self/fd/{shared}", os.O_RDWR | os.O_CLOEXEC)  # of its own: locks are by opening
        end = time.monotonic() + ATTACH_S
        while True:
            if self._lock(fcntl.F_WRLCK, _USERS):  # nobody uses it
                if os.pread(self._fd, _NAME, 0) != self.name:
                    self._begin()
                self._lock(fcntl.F_RDLCK, _USERS)
                return True
            if self._lock(fcntl.F_RDLCK, _USERS):
                if os.pread(self._fd, _NAME, 0) == self.name:
                    return True
                self._lock(fcntl.F_UNLCK, _USERS)
            if time.monotonic() > end:
                log.warning("this host's memory for weights is in use for others: this worker holds a copy of its own")
                os.close(self._fd)
                return False
            time.sleep(POLL_S)

    def _begin(self) -> None:
        os.ftruncate(self._fd, 0)
        os.ftruncate(self._fd, self._total)
        os.pwrite(self._fd, self.name, 0)

    @contextmanager
    def _locked(self, byte: int) -> Iterator[bool]:
        """Whether this process alone has the byte, which is decided at once."""
        mine = self._lock(fcntl.F_WRLCK, byte)
        try:
            yield mine
        finally:
            if mine:
                self._lock(fcntl.F_UNLCK, byte)

    def _lock(self, kind: int, byte: int) -> bool:
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, byte, 1, 0))
        except (BlockingIOError, PermissionError):
            return False
        return True
