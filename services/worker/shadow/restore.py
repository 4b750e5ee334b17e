"""Recovery of pages: survivors send their slices, stores the parity, and a new rank decodes its own into its pool."""

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field

import numpy as np

from kernels.codec import checksum
from services.worker.memory import Bytes, Memory
from services.worker.shadow.coder import Coder
from services.worker.shadow.exchange import Exchange
from services.worker.shadow.stores import StoreClients
from shared.errors import CommunicatorAborted
from shared.messages import ParityShard, RestoreDone, RestorePlan, StripeRestore
from shared.transport.base import GetShards, ShardRef

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


class Restorer:
    """One rank's part in restoring: a sender where it survived, a decoder where it is new."""

    def __init__(self, group: str, coder: Coder, stores: StoreClients, loop: asyncio.AbstractEventLoop):
        self._group = group
        self._coder = coder
        self._stores = stores
        self._loop = loop
        self._fetches: dict[tuple[int, int], Future[dict[bytes, Stored]]] = {}

    def prefetch(self, plan: RestorePlan, rank: int, length: int) -> None:
        """Begin to read what `rank` has lost, before its turn comes or the ranks are even connected."""
        mine = {stripe.key: self._share(stripe, rank) for stripe in plan.stripes if rank in stripe.lost}
        if mine:
            fetch = asyncio.run_coroutine_threadsafe(self._get(mine, length), self._loop)
            self._fetches[plan.epoch, plan.plan] = fetch

    def forget(self) -> None:
        """The epoch is over: give up what was begun; who waits for it is told so."""
        while self._fetches:
            self._fetches.popitem()[1].cancel()

    def restore(self, plan: RestorePlan, exchange: Exchange) -> RestoreDone:
        """Take part in a plan; says which stripes this rank could not decode, and why the first of them.

        Raises CommunicatorAborted when the epoch ends; nothing is written to the pool any more then.
        """
        with self._coder.working():
            return self._restore(plan, exchange)

    def _restore(self, plan: RestorePlan, exchange: Exchange) -> RestoreDone:
        fetch = self._fetches.get((plan.epoch, plan.plan))
        failed: dict[bytes, str] = {}
        began = time.monotonic()
        slices = self._gather(plan.stripes, exchange)
        exchanged = time.monotonic()
        try:
            stored = fetch.result() if fetch is not None else {}
        except CancelledError:
            raise CommunicatorAborted("the epoch ended while parity was on its way") from None
        fetched = time.monotonic()
        damaged = sum(each.damaged for each in stored.values())
        for index, by_rank in slices.items():
            stripe = plan.stripes[index]
            rows = stored.get(stripe.key)
            if rows is None:
                failed[stripe.key] = "its parity was not asked for"
            elif rows.missing:
                failed[stripe.key] = rows.trouble
            else:
                with exchange.writing():
                    why = self._decode(stripe, by_rank, rows, exchange)
                if why:
                    failed[stripe.key] = why
                    damaged += 1
        self._fetches.pop((plan.epoch, plan.plan), None)
        return RestoreDone(
            epoch=plan.epoch,
            plan=plan.plan,
            rank=exchange.rank,
            failed=tuple(failed),
            reason=next(iter(failed.values()), ""),
            bytes_restored=(len(slices) - len(failed)) * exchange.pool.page_bytes,
            fetch_s=fetched - exchanged,
            exchange_s=exchanged - began,
            decode_s=time.monotonic() - fetched,
            seconds=time.monotonic() - began,
            damaged=damaged,
        )

    def _gather(self, stripes: Sequence[StripeRestore], exchange: Exchange) -> dict[int, dict[int, Memory]]:
        """Bring the survivors' slices to the ranks that decode; see Exchange.gather."""
        return exchange.gather([stripe.page for stripe in stripes], [stripe.lost for stripe in stripes])

    def _share(self, stripe: StripeRestore, rank: int) -> Stored:
        """What `rank` reads of a stripe."""
        return Stored(deque(stripe.parity), len(stripe.lost))

    async def _get(self, stripes: dict[bytes, Stored], length: int) -> dict[bytes, Stored]:
        """Read as many rows of each stripe as are wanted; another one for each that is damaged or can't be had."""
        while True:
            wanted = [(key, stored, shard) for key, stored in stripes.items() for shard in stored.next()]
            rows = np.empty((len(wanted), length), dtype=np.uint8)  # in one piece, which may be in huge pages
            batches: dict[str, list[Read]] = {}
            for (key, stored, shard), row in zip(wanted, rows, strict=True):
                read = Read(stored, shard, ShardRef(key, shard.shard, length), row)
                batches.setdefault(shard.bulk_address, []).append(read)
            if not batches:
                return stripes
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

    def _decode(self, stripe: StripeRestore, by_rank: dict[int, Memory], stored: Stored, exchange: Exchange) -> str:
        """Decode this rank's slice straight into its pool. Returns what was wrong, or nothing."""
        target = exchange.pool.page(stripe.page)
        present: dict[int, Memory] = {rank: shard for rank, shard in by_rank.items() if rank not in stripe.lost}
        present |= stored.rows
        plan = self._coder.codec.plan(present.keys(), [exchange.rank])
        decoded = self._coder.decode(plan, [present[source] for source in plan.sources], target)
        if decoded != stripe.data_checksums[exchange.rank]:
            return f"page {stripe.page}, decoded, {DAMAGED}"
        exchange.pool.wrote(stripe.page, target)
        return ""
