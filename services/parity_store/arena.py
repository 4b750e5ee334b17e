"""The store's memory: one fixed range, cut into slabs of equal slots, so that shards come and go without fragments.

A slab serves one size class; classes are at most an eighth apart, so at most that much of a slot is unused. An empty
slab goes back to all classes. A shard larger than a slab takes a run of neighbouring slabs.
"""

import contextlib
import heapq
import mmap
import os
from dataclasses import dataclass, field

from shared.errors import ConfigError, StoreFull

SLAB_BYTES = 4 << 20
_SMALLEST = 512
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux: a range is only as dear as what of it is used


@dataclass(frozen=True, slots=True)
class Block:
    """A piece of the arena, owned by whom allocate gave it to until free."""

    offset: int
    length: int  # bytes asked for
    size: int  # bytes taken


@dataclass(slots=True)
class _Slab:
    """A slab in use: all of its slots have one size."""

    slot_bytes: int
    slots: int
    free: list[int] = field(default_factory=list)  # slot numbers


def size_class(length: int) -> int:
    """Return the slot size for a shard: the next multiple of an eighth of the power of two below."""
    step = max(_SMALLEST, 1 << max(0, length.bit_length() - 4))
    return -(-length // step) * step


class Arena:
    """capacity_bytes (rounded down to whole slabs, at least one) of memory, taken from the system as it is used.

    In huge pages, and private: copies are faster, and when the process dies its memory is given back sooner, and so
    its peers hear of it sooner. The range is as large as the machine's memory, so that capacity can grow within it.
    """

    def __init__(self, capacity_bytes: int, slab_bytes: int = SLAB_BYTES):
        """Raises ConfigError if the system has no such range."""
        self._slab_bytes = slab_bytes
        self._limit = max(1, capacity_bytes // slab_bytes)  # slabs that may be in use
        self._count = self._limit  # slabs that ever were within capacity
        self._most = max(self._limit, _machine_bytes() // slab_bytes)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
        try:
            self._range = mmap.mmap(-1, self._most * slab_bytes, flags=flags)
        except (OSError, OverflowError) as error:
            raise ConfigError(f"can't have {capacity_bytes} bytes of memory for parity: {error}") from error
        with contextlib.suppress(OSError):  # a kernel without transparent huge pages
            self._range.madvise(mmap.MADV_HUGEPAGE)
        self._memory = memoryview(self._range)
        self._free_slabs = list(range(self._count))  # a heap: low slabs first, so that runs stay whole at the end
        self._slabs: dict[int, _Slab] = {}
        self._runs: dict[int, int] = {}  # first slab -> how many, for shards larger than one
        self._partial: dict[int, list[int]] = {}  # slot size -> heap of slabs that may have a free slot
        self._live: dict[int, Block] = {}  # offset -> block
        self.used_bytes = 0

    @property
    def capacity_bytes(self) -> int:
        """How much may be used; more is refused with StoreFull."""
        return self._limit * self._slab_bytes

    @property
    def largest_bytes(self) -> int:
        """How far capacity can grow."""
        return self._most * self._slab_bytes

    def resize(self, capacity_bytes: int) -> None:
        """Change capacity; what is in use beyond it stays until it is freed. Raises ConfigError."""
        limit = capacity_bytes // self._slab_bytes
        if not 1 <= limit <= self._most:
            raise ConfigError(
                f"capacity must be {self._slab_bytes} to {self.largest_bytes} bytes, not {capacity_bytes}"
            )
        self._limit = limit
        for slab in range(self._count, limit):
            heapq.heappush(self._free_slabs, slab)
        self._count = max(self._count, limit)
        for slab in self._free_slabs:
            self._range.madvise(mmap.MADV_DONTNEED, slab * self._slab_bytes, self._slab_bytes)

    def allocate(self, length: int) -> Block:
        """Return a block for length bytes. Raises StoreFull."""
        size = size_class(length)
        if size > self._slab_bytes:
            size = -(-size // self._slab_bytes) * self._slab_bytes
            offset = self._take_run(size // self._slab_bytes)
        else:
            offset = self._take_slot(size)
        block = Block(offset, length, size)
        self._live[offset] = block
        self.used_bytes += size
        return block

    def view(self, block: Block) -> memoryview:
        """Return the block's bytes, writable, of the length asked for."""
        return self._memory[block.offset : block.offset + block.length]

    def free(self, block: Block) -> None:
        """Take a block back. Raises ValueError for what is not allocated: that is a bug of the caller."""
        if self._live.get(block.offset) is not block:
            raise ValueError(f"{block} is not allocated")
        del self._live[block.offset]
        self.used_bytes -= block.size
        first = block.offset // self._slab_bytes
        if first in self._runs:
            for number in range(first, first + self._runs.pop(first)):
                heapq.heappush(self._free_slabs, number)
            return
        slab = self._slabs[first]
        if not slab.free:
            heapq.heappush(self._partial.setdefault(slab.slot_bytes, []), first)
        slab.free.append((block.offset - first * self._slab_bytes) // slab.slot_bytes)
        if len(slab.free) == slab.slots:
            del self._slabs[first]
            self._partial[slab.slot_bytes].remove(first)
            heapq.heapify(self._partial[slab.slot_bytes])
            heapq.heappush(self._free_slabs, first)

    def check(self) -> None:
        """Assert conservation: every slab is free, cut into slots or part of a run; every slot is free or live."""
        runs = [first + i for first, count in self._runs.items() for i in range(count)]
        assert sorted([*self._free_slabs, *self._slabs, *runs]) == list(range(self._count)), "slabs lost or doubled"
        assert self.used_bytes == sum(block.size for block in self._live.values()), "used bytes miscounted"
        by_slab: dict[int, set[int]] = {}
        for block in self._live.values():
            first = block.offset // self._slab_bytes
            if first in self._slabs:
                slot_bytes = self._slabs[first].slot_bytes
                slot, rest = divmod(block.offset - first * self._slab_bytes, slot_bytes)
                assert rest == 0, f"{block} lies between slots"
                assert block.length <= block.size == slot_bytes, f"{block} does not fit"
                by_slab.setdefault(first, set()).add(slot)
            else:
                assert first in self._runs, f"{block} lies in a free slab"
        for first, slab in self._slabs.items():
            assert by_slab[first].isdisjoint(slab.free), f"slab {first}: a live slot is also free"
            assert len(by_slab[first]) + len(slab.free) == slab.slots, f"slab {first}: slots lost"
            assert bool(slab.free) == (first in self._partial.get(slab.slot_bytes, [])), f"slab {first}: misfiled"

    def _take_slot(self, size: int) -> int:
        partial = self._partial.setdefault(size, [])
        if not partial:
            if self._slabs_left() < 1:
                raise StoreFull(f"no room for {size} bytes: {self.used_bytes} of {self.capacity_bytes} are used")
            first = heapq.heappop(self._free_slabs)
            slots = self._slab_bytes // size
            self._slabs[first] = _Slab(size, slots, list(range(slots - 1, -1, -1)))
            heapq.heappush(partial, first)
        first = partial[0]
        slab = self._slabs[first]
        slot = slab.free.pop()
        if not slab.free:
            heapq.heappop(partial)
        return first * self._slab_bytes + slot * size

    def _slabs_left(self) -> int:
        return self._limit - (self._count - len(self._free_slabs))

    def _take_run(self, count: int) -> int:
        if self._slabs_left() < count:
            raise StoreFull(f"no room for {count} slabs: {self.used_bytes} of {self.capacity_bytes} bytes are used")
        free = sorted(self._free_slabs, reverse=True)  # from the end, away from where slabs of slots gather
        start = 0
        for i in range(len(free)):
            if i and free[i] != free[i - 1] - 1:
                start = i
            if i - start + 1 == count:
                first = free[i]
                self._free_slabs = free[:start] + free[i + 1 :]
                heapq.heapify(self._free_slabs)
                self._runs[first] = count
                return first * self._slab_bytes
        raise StoreFull(f"no run of {count} free slabs of {self._slab_bytes} bytes; {len(free)} are free")


def _machine_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
