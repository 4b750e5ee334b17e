"""What a rank reads from the stores for its part in restore plans: window by window, ahead of their turn, bounded.

Nobody looks at the bytes of rows when they come: what is decoded of them has a checksum. Where that is wrong, `replace`
finds out which row is damaged.
"""

import asyncio
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, wait
from dataclasses import dataclass, field

import numpy as np

from kernels.codec import checksum
from services.worker.device import Device
from services.worker.memory import Bytes, Ids, Sums
from services.worker.shadow.stores import StoreClients
from shared.errors import CommunicatorAborted
from shared.transport.base import DEFAULT_LIMITS, GetShards, Outcome, ShardRef
from shared.types import PageKey

AHEAD_BYTES = 64 << 20
"""Of windows that are read, or on their way, before their turn has come."""
_AHEAD_ROUNDS = 3
_REFS = DEFAULT_LIMITS.shards
LOOK_S = 0.05
DAMAGED = "differs from its recorded checksum"
_NOTHING = np.empty((0, 0, 0), dtype=np.uint8)


@dataclass(slots=True, eq=False)
class Stored:
    """What is read of stripes that have the same shards in the same stores.

    `sums`: recorded, [stripes, shards]. So many `wanted` of each: the first ones, and others where those are damaged.
    """

    keys: Sequence[PageKey]
    shards: Sequence[int]
    addresses: Sequence[str]
    sums: Sums
    wanted: int
    rows: Bytes = field(default_factory=lambda: _NOTHING)
    """[wanted, stripes, length]"""
    held: Ids = field(init=False)
    """Which of `shards` each row is: [wanted, stripes]; -1 where none could be had."""
    trouble: dict[int, str] = field(default_factory=dict)
    """With the row of a stripe that was read last."""
    damaged: int = 0
    """Rows."""
    _tried: Ids = field(init=False)

    def __post_init__(self) -> None:
        self.held = np.full((self.wanted, len(self.keys)), -1, dtype=np.int64)
        self._tried = np.full(len(self.keys), self.wanted, dtype=np.int64)

    def first(self) -> "list[Read]":
        """The rows to read at first."""
        everyone = np.arange(len(self.keys))
        return [Read(self, row, row, everyone) for row in range(self.wanted) if row < len(self.shards)]

    def other(self, row: int, stripes: Iterable[int]) -> "list[Read]":
        """The shards to read instead of what these stripes could not have in a row: none if there are no others."""
        again: dict[int, list[int]] = {}
        for stripe in stripes:
            self.held[row, stripe] = -1
            if (shard := int(self._tried[stripe])) < len(self.shards):
                self._tried[stripe] += 1
                again.setdefault(shard, []).append(stripe)
        return [Read(self, row, shard, np.array(some)) for shard, some in again.items()]

    def without_damaged(self, stripes: Iterable[int]) -> "list[Read]":
        """Look at all rows of these stripes; what to read instead of those that are damaged."""
        instead: list[Read] = []
        for row in range(self.wanted):
            bad = [stripe for stripe in stripes if self._damaged(row, stripe)]
            self.damaged += len(bad)
            for stripe in bad:
                self.trouble[stripe] = f"{self.addresses[self.held[row, stripe]]}: a parity shard {DAMAGED}"
            instead += self.other(row, bad)
        return instead

    def _damaged(self, row: int, stripe: int) -> bool:
        held = int(self.held[row, stripe])
        return held >= 0 and checksum(self.rows[row, stripe]) != int(self.sums[stripe, held])


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """One row of some stripes, each from the same store: `shard` is its place among the shards."""

    of: Stored
    row: int
    shard: int
    stripes: Ids

    def requests(self) -> Iterator[tuple[list[ShardRef], list[memoryview]]]:
        """What to ask the store for, and where it goes: as much at a time as one request may name."""
        number, length = self.of.shards[self.shard], self.of.rows.shape[2]
        keys, room = self.of.keys, memoryview(self.of.rows[self.row].reshape(-1))
        for start in range(0, len(self.stripes), _REFS):
            some = self.stripes[start : start + _REFS].tolist()
            yield (
                [ShardRef(keys[at], number, length) for at in some],
                [room[at * length : (at + 1) * length] for at in some],
            )

    def ended(self, address: str, outcomes: Sequence[Outcome]) -> "list[Read]":
        """What became of each. Returns what to read instead of those that could not be had."""
        self.of.held[self.row, self.stripes] = self.shard
        if outcomes.count(None) == len(outcomes):
            return []
        told = zip(self.stripes.tolist(), outcomes, strict=True)
        bad = {stripe: f"{address}: {type(why).__name__}: {why}" for stripe, why in told if why is not None}
        self.of.trouble |= bad
        return self.of.other(self.row, bad)


WindowId = tuple[int, int, int]
"""The epoch, the plan, and the first stripe's place in it."""


@dataclass(slots=True)
class Asked:
    """What is read for one window, by kind of stripe. `reading` once it has begun."""

    stripes: dict[int, Stored]
    length: int
    nbytes: int
    """The memory that its rows take."""
    reading: Future[None] | None = None


class ParityReader:
    """Windows in the order in which they will be wanted. `ask` comes from the event loop, `take` from the shadow."""

    def __init__(self, group: str, stores: StoreClients, loop: asyncio.AbstractEventLoop, device: Device):
        self._group = group
        self._device = device
        self._ahead_bytes = max(AHEAD_BYTES, _AHEAD_ROUNDS * device.round_bytes)
        self._stores = stores
        self._loop = loop
        self._windows: dict[WindowId, Asked] = {}
        self._lock = threading.Lock()

    def ask(self, window: WindowId, stripes: dict[int, Stored], length: int) -> None:
        """Shards of `length` bytes of these stripes will be wanted."""
        nbytes = length * sum(stored.held.size for stored in stripes.values())
        with self._lock:
            self._windows[window] = Asked(stripes, length, nbytes)
        self._read_on()

    def take(self, window: WindowId) -> dict[int, Stored]:
        """What was read for a window, as it was asked; nothing if nothing was. Raises CommunicatorAborted."""
        with self._lock:
            asked = self._windows.get(window)
            reading = asked.reading if asked is not None else None
        if asked is None:
            return {}
        try:
            if reading is None:
                raise CancelledError
            reading.result()
        except CancelledError:
            raise CommunicatorAborted("the epoch ended while parity was on its way") from None
        with self._lock:
            self._windows.pop(window, None)
        self._read_on()
        return asked.stripes

    def replace(self, stored: Stored, stripes: Sequence[int], ended: Callable[[], bool]) -> bool:
        """Stripes came out wrong: instead of those of their rows that are damaged others are read, and waited for.

        Returns whether any is. Raises CommunicatorAborted once the epoch has `ended`.
        """
        before = stored.damaged
        if instead := stored.without_damaged(stripes):
            reading = asyncio.run_coroutine_threadsafe(self._read(instead), self._loop)
            while not wait([reading], LOOK_S).done:
                if ended():
                    reading.cancel()
                    raise CommunicatorAborted("the epoch ended while parity was on its way")
            reading.result()
        return stored.damaged > before

    def forget(self) -> None:
        """The epoch is over: give up what was begun; who waits for it is told so."""
        with self._lock:
            given_up, self._windows = self._windows, {}
        for window in given_up.values():
            if window.reading is not None:
                window.reading.cancel()

    def _read_on(self) -> None:
        """Begin with the next windows, as far as there is room."""
        with self._lock:
            taken = 0
            for window in self._windows.values():
                if taken and taken + window.nbytes > self._ahead_bytes:
                    return
                taken += window.nbytes
                if window.reading is None:
                    work = self._get([*window.stripes.values()], window.length)
                    window.reading = asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _get(self, stripes: list[Stored], length: int) -> None:
        """Read as many rows of each stripe as are wanted."""
        total = sum(stored.held.size for stored in stripes)
        room, at = self._device.host(total, length).numpy(), 0  # in one piece: huge pages, and one copy to a GPU
        for stored in stripes:
            stored.rows = room[at : at + stored.held.size].reshape(*stored.held.shape, length)
            at += stored.held.size
        await self._read([read for stored in stripes for read in stored.first()])

    async def _read(self, reads: list[Read]) -> None:
        """Read rows, another one for each that can't be had."""
        while reads:
            instead = await asyncio.gather(*map(self._ask, reads))
            reads = [read for each in instead for read in each]

    async def _ask(self, read: Read) -> list[Read]:
        address, outcomes = read.of.addresses[read.shard], list[Outcome]()
        for refs, places in read.requests():
            outcomes += await self._stores.get(address, GetShards(self._group, tuple(refs)), places)
        return read.ended(address, outcomes)
