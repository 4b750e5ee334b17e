"""Writes a store's changes to the stripe index, in order, and repeats them while Redis is away."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from services.parity_store.shards import Shard
from shared.errors import GhostError, PeerLost
from shared.stripe_index import ShardEntry, StripeIndex

log = logging.getLogger(__name__)

MAX_QUEUED = 65536  # shards whose change the index has not taken yet
_BATCH = 2048
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0

OnDone = Callable[[GhostError | None], None]


@dataclass(frozen=True, slots=True)
class _Change:
    """Shards that the index shall name (put) or forget (drop), and whom to tell."""

    is_put: bool
    group: str
    epoch: int  # of the group, for a put
    shards: Sequence[Shard]
    on_done: OnDone


class IndexWriter:
    """One queue to the index: what was queued first is written first, whatever fails in between."""

    def __init__(self, index: StripeIndex, store_id: str, incarnation: str):
        self._index = index
        self._store_id = store_id
        self._incarnation = incarnation
        self._queue: deque[_Change] = deque()
        self._wake = asyncio.Event()
        self.queued = 0  # shards
        self.is_away = False  # Redis, at the last try

    def put(self, group: str, epoch: int, shards: Sequence[Shard], on_done: OnDone) -> None:
        """Queue entries. on_done hears None once they are written, or Fenced. Raises PeerLost if the queue is full."""
        if self.queued + len(shards) > MAX_QUEUED:
            raise PeerLost(f"the stripe index is behind: {self.queued} shards wait for Redis")
        self._add(_Change(True, group, epoch, shards, on_done))

    def drop(self, group: str, shards: Sequence[Shard], on_done: OnDone) -> None:
        """Queue the removal of entries. Never refused: what waits here still has its room in the arena, a bound."""
        self._add(_Change(False, group, 0, shards, on_done))

    def _add(self, change: _Change) -> None:
        self._queue.append(change)
        self.queued += len(change.shards)
        self._wake.set()

    async def run(self) -> None:
        """Write what is queued, for ever."""
        while True:
            while self._queue:
                batch = self._next_batch()
                error = await self._write_until_heard(batch)
                for change in batch:
                    self._queue.popleft()
                    self.queued -= len(change.shards)
                    change.on_done(error)
            self._wake.clear()
            await self._wake.wait()

    def _next_batch(self) -> list[_Change]:
        """Return the changes at the head of the queue that go into one call."""
        batch: list[_Change] = []
        size = 0
        for change in self._queue:
            size += len(change.shards)
            first = batch[0] if batch else change
            alike = (change.is_put, change.group, change.epoch) == (first.is_put, first.group, first.epoch)
            if batch and (size > _BATCH or not alike):
                break
            batch.append(change)
        return batch

    async def _write_until_heard(self, batch: list[_Change]) -> GhostError | None:
        """Return None when the index has taken the batch, or the error by which it refused it."""
        pause = _FIRST_PAUSE_S
        while True:
            try:
                await self._write(batch)
            except PeerLost as error:
                if not self.is_away:
                    log.warning("the stripe index is away, writes are held and repeated: %s", error)
                self.is_away = True
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
                continue
            except GhostError as error:
                return error
            if self.is_away:
                log.warning("the stripe index is back")
            self.is_away = False
            return None

    async def _write(self, batch: list[_Change]) -> None:
        first = batch[0]
        shards = [shard for change in batch for shard in change.shards]
        if first.is_put:
            await self._index.put_many(first.group, first.epoch, [self._entry(shard) for shard in shards])
        else:
            names = [(shard.label.page_key, shard.label.number) for shard in shards]
            await self._index.drop_many(first.group, self._store_id, self._incarnation, names)

    def _entry(self, shard: Shard) -> ShardEntry:
        label = shard.label
        return ShardEntry(
            page_key=label.page_key,
            number=label.number,
            store_id=self._store_id,
            incarnation=self._incarnation,
            epoch=shard.epoch,
            k=label.k,
            m=label.m,
            length=label.length,
            checksum=label.checksum,
            data_checksums=label.data_checksums,
        )
