"""The store itself: takes and gives shards (a BulkHandler), and keeps table and index in step."""

import asyncio
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial

from xxhash import xxh3_64_intdigest

from services.parity_store.index_writer import IndexWriter
from services.parity_store.shards import Shard, ShardTable
from shared.errors import ChecksumMismatch, GhostError, ShardMissing, StoreFull
from shared.messages import HeldShard, KeepStripes
from shared.transport.base import GetShards, Outcome, PutShards
from shared.types import PageKey


@dataclass(slots=True)
class Totals:
    """What a store has done since its start; counted here, shown by the admin endpoint."""

    puts: int = 0  # shards stored
    gets: int = 0  # shards read
    refused_puts: int = 0
    refused_gets: int = 0
    released: int = 0  # shards
    bytes_in: int = 0
    bytes_out: int = 0


class Store:
    """Shards of all groups, in memory. Nothing here waits but for the index."""

    def __init__(self, table: ShardTable, writer: IndexWriter):
        self.table = table
        self.writer = writer
        self.totals = Totals()
        self.draining = False  # takes no shard any more

    def put(self, request: PutShards) -> "IncomingShards":
        """Make room for shards whose bytes will follow. Refusals, Fenced or StoreFull, are in its places."""
        return IncomingShards(self, request)

    def get(self, request: GetShards) -> "OutgoingShards":
        """Hold shards for reading. ShardMissing is in its places."""
        return OutgoingShards(self, request)

    def release(self, group: str, page_keys: Collection[PageKey], up_to: tuple[int, int] | None = None) -> int:
        """Forget these stripes: entries first, then bytes. Return how many shards.

        up_to: the (epoch, serial) after which shards stay, because they were asked for later than this was.
        """
        shards = self.table.take_out(group, page_keys, up_to)
        if shards:
            self.totals.released += len(shards)
            self.writer.drop(group, shards, partial(self._forgotten, shards))
        return len(shards)

    def keep(self, told: KeepStripes) -> int:
        """Forget all stripes of the group but those named, as `release` does. Return how many shards."""
        kept, after, upto = set(told.keys), told.after, told.upto
        concerned = (key for key in self.table.keys(told.group) if key > after and (not upto or key <= upto))
        return self.release(told.group, [key for key in concerned if key not in kept], (told.epoch, told.serial))

    def find(self, group: str, page_keys: Collection[PageKey]) -> tuple[HeldShard, ...]:
        """The shards of these stripes that can be read here, also those that the index does not name yet."""
        labels = (shard.label for key in page_keys for shard in self.table.stripe(key) if shard.group == group)
        return tuple(HeldShard(each.page_key, each.number, each.checksum, each.data_checksums) for each in labels)

    def advance_epoch(self, group: str, epoch: int) -> None:
        """Refuse writes of older epochs from now on."""
        self.table.advance_epoch(group, epoch)

    def _forgotten(self, shards: Sequence[Shard], _: GhostError | None) -> None:
        """The index has no entries of these any more (it never refuses to drop them): their bytes may go."""
        for shard in shards:
            self.table.free(shard)


class IncomingShards:
    """A put in progress."""

    def __init__(self, store: Store, request: PutShards):
        self._store = store
        self._table = store.table
        self._request = request
        self._shards: list[Shard | GhostError] = []
        for label in request.shards:
            try:
                if store.draining:
                    raise StoreFull("the store is being drained")
                self._shards.append(self._table.begin(request.group, request.epoch, label, time.time(), request.serial))
            except GhostError as error:
                self._shards.append(error)

    @property
    def places(self) -> list[memoryview | GhostError]:
        return [shard if isinstance(shard, GhostError) else self._table.view(shard) for shard in self._shards]

    async def commit(self) -> list[Outcome]:
        """Compare checksums, then let the index name the shards; return when it does.

        A shard whose acknowledgement nobody waits for any more is still written to the index, and kept.
        """
        outcomes: list[Outcome] = [self._finish(shard) for shard in self._shards]
        kept = [
            s for s, outcome in zip(self._shards, outcomes, strict=True) if isinstance(s, Shard) and outcome is None
        ]
        if kept:
            refusal = await self._index(kept)
            outcomes = [refusal if outcome is None else outcome for outcome in outcomes]
        totals = self._store.totals
        for label, outcome in zip(self._request.shards, outcomes, strict=True):
            totals.puts += outcome is None
            totals.bytes_in += label.length if outcome is None else 0
            totals.refused_puts += outcome is not None
        return outcomes

    def abandon(self) -> None:
        for shard in self._shards:
            if isinstance(shard, Shard):
                self._table.abandon(shard)

    def _finish(self, shard: Shard | GhostError) -> Outcome:
        """Make one shard readable, or say why not."""
        if isinstance(shard, GhostError):
            return shard
        try:
            if xxh3_64_intdigest(self._table.view(shard)) != shard.label.checksum:
                raise ChecksumMismatch(f"shard {shard.label.number} of {shard.label.page_key.hex()} arrived damaged")
            self._table.finish(shard)
        except GhostError as error:
            self._table.abandon(shard)
            return error
        return None

    async def _index(self, shards: list[Shard]) -> Outcome:
        """Return None when the index names the shards, or why it does not; then they are gone."""
        heard: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()

        def on_done(error: GhostError | None) -> None:
            for shard in shards:
                if error is None:
                    self._table.settle(shard)
                else:
                    self._table.revert(shard)
            if not heard.done():
                heard.set_result(error)

        try:
            self._store.writer.put(self._request.group, self._request.epoch, shards, on_done)
        except GhostError as error:
            on_done(error)
        return await heard


class OutgoingShards:
    """A get in progress: its shards are pinned."""

    def __init__(self, store: Store, request: GetShards):
        self._store = store
        self._table = store.table
        self._shards: list[Shard | GhostError] = []
        for ref in request.shards:
            try:
                shard = self._table.pin(request.group, ref.page_key, ref.number)
            except GhostError as error:
                self._shards.append(error)
                continue
            if shard.label.length == ref.length:
                self._shards.append(shard)
            else:
                self._table.unpin(shard)
                self._shards.append(ShardMissing(f"the shard has {shard.label.length} bytes, not {ref.length}"))

    @property
    def places(self) -> list[memoryview | GhostError]:
        return [shard if isinstance(shard, GhostError) else self._table.view(shard) for shard in self._shards]

    def release(self) -> None:
        totals = self._store.totals
        for shard in self._shards:
            if isinstance(shard, Shard):
                self._table.unpin(shard)
                totals.gets += 1
                totals.bytes_out += shard.label.length
            else:
                totals.refused_gets += 1
