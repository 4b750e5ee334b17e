"""What a rank reads from the stores for its part in restore plans: window by window, ahead of their turn, bounded."""

import asyncio
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field

from kernels.codec import checksum
from services.worker.device import Device
from services.worker.memory import Bytes
from services.worker.shadow.stores import StoreClients
from shared.errors import CommunicatorAborted
from shared.messages import ParityShard
from shared.transport.base import GetShards, ShardRef

AHEAD_BYTES = 64 << 20
"""Of windows that are read, or on their way, before their turn has come."""
_AHEAD_ROUNDS = 3
DAMAGED = "differs from its recorded checksum"


@dataclass(slots=True)
class Stored:
    """What is read of one stripe's stored shards."""

    untried: deque[ParityShard]
    wanted: int  # rows
    rows: dict[int, Bytes] = field(default_factory=dict)  # shard number -> its bytes [page_bytes]
    trouble: str = "no shard is left to try"  # with the row that was read last
    damaged: int = 0  # rows

    @property
    def missing(self) -> int:
        """Rows that are wanted and not there."""
        return self.wanted - len(self.rows)

    def next(self) -> list[ParityShard]:
        """The rows to read now: none if there are enough, or can't be."""
        if len(self.untried) < self.missing:
            return []
        return [self.untried.popleft() for _ in range(self.missing)]


@dataclass(frozen=True, slots=True)
class Read:
    """One row on its way from a store."""

    stripe: Stored
    shard: ParityShard
    ref: ShardRef
    into: Bytes


WindowId = tuple[int, int, int]
"""The epoch, the plan, and the first stripe's place in it."""


@dataclass(slots=True)
class Window:
    """The stripes of which something is read for one window, by page key. `reading` once it has begun."""

    stripes: dict[bytes, Stored]
    length: int
    reading: Future[None] | None = None

    @property
    def nbytes(self) -> int:
        """The memory that its rows take."""
        return self.length * sum(stripe.wanted for stripe in self.stripes.values())


class ParityReader:
    """Windows in the order in which they will be wanted. `ask` comes from the event loop, `take` from the shadow."""

    def __init__(self, group: str, stores: StoreClients, loop: asyncio.AbstractEventLoop, device: Device):
        self._group = group
        self._device = device
        self._ahead_bytes = max(AHEAD_BYTES, _AHEAD_ROUNDS * device.round_bytes)
        self._stores = stores
        self._loop = loop
        self._windows: dict[WindowId, Window] = {}
        self._lock = threading.Lock()

    def ask(self, window: WindowId, stripes: dict[bytes, Stored], length: int) -> None:
        """Shards of `length` bytes of these stripes will be wanted."""
        with self._lock:
            self._windows[window] = Window(stripes, length)
        self._read_on()

    def take(self, window: WindowId) -> dict[bytes, Stored]:
        """What was read for a window, none if nothing was asked; waits for it. Raises CommunicatorAborted."""
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
                    work = self._get(window.stripes, window.length)
                    window.reading = asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _get(self, stripes: dict[bytes, Stored], length: int) -> None:
        """Read as many rows of each stripe as are wanted; another one for each that is damaged or can't be had."""
        while True:
            wanted = [(key, stored, shard) for key, stored in stripes.items() for shard in stored.next()]
            rows = self._device.host(len(wanted), length).numpy()  # in one piece: huge pages, and one copy to a GPU
            batches: dict[str, list[Read]] = {}
            for (key, stored, shard), row in zip(wanted, rows, strict=True):
                read = Read(stored, shard, ShardRef(key, shard.shard, length), row)
                batches.setdefault(shard.bulk_address, []).append(read)
            if not batches:
                return
            await asyncio.gather(*(self._get_batch(address, batch) for address, batch in batches.items()))

    async def _get_batch(self, address: str, batch: Sequence[Read]) -> None:
        """Read rows from one store, in one request, and enter each with its stripe: the bytes, or what was wrong."""
        request = GetShards(self._group, tuple(read.ref for read in batch))
        outcomes = await self._stores.get(address, request, [read.into.data for read in batch])
        for read, outcome in zip(batch, outcomes, strict=True):
            if outcome is not None:
                read.stripe.trouble = f"{address}: {type(outcome).__name__}: {outcome}"
            elif checksum(read.into) != read.shard.checksum:
                read.stripe.trouble = f"{address}: a parity shard {DAMAGED}"
                read.stripe.damaged += 1
            else:
                read.stripe.rows[read.shard.shard] = read.into
