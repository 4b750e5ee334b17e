"""Protection: sealed pages are exchanged, encoded, and their parity put to the stores, in the shadow of the model."""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence

from kernels.codec import checksum
from services.worker.memory import Bytes
from services.worker.shadow.coder import Coder
from services.worker.shadow.exchange import Exchange
from services.worker.shadow.stores import StoreClients
from shared.errors import GhostError, StoreFull
from shared.messages import ProtectDone, ProtectPlan
from shared.transport.base import PutShards, ShardLabel
from shared.types import encoding_rank, place_shards, unpack_ids

PARITY_IN_FLIGHT_BYTES = 128 << 20
"""Parity that waits for a store's acknowledgement; the shadow waits above it, the model never."""


class Protector:
    """Encodes one rank's share of each batch of stripes and puts the parity to the stores."""

    def __init__(
        self,
        group: str,
        coder: Coder,
        stores: StoreClients,
        loop: asyncio.AbstractEventLoop,
        report: Callable[[ProtectDone], None],
    ):
        self._group = group
        self._coder = coder
        self._stores = stores
        self._loop = loop
        self._report = report
        self._in_flight = 0
        self._room = threading.Condition()

    def protect(self, plan: ProtectPlan, exchange: Exchange) -> None:
        """Protect the pages of a plan. Returns when all is encoded; acknowledgements are reported as they come."""
        pages = unpack_ids(plan.pages)
        with self._coder.working():
            for start in range(0, len(pages), exchange.round_pages):
                end = start + exchange.round_pages
                self._round(plan, exchange, pages[start:end], plan.keys[start:end])

    def _round(self, plan: ProtectPlan, exchange: Exchange, pages: Sequence[int], keys: Sequence[bytes]) -> None:
        began = time.monotonic()
        k, m, length = self._coder.k, self._coder.m, exchange.pool.page_bytes
        owners = [(encoding_rank(key, exchange.size),) for key in keys]
        slices = exchange.gather(pages, owners)
        if not slices:
            return
        self._take_room(len(slices) * m * length)
        encoded = self._coder.encode([[by_rank[rank] for rank in range(k)] for by_rank in slices.values()])
        labels = [
            tuple(
                ShardLabel(keys[index], k + number, k, m, length, checksum(shard), sums)
                for number, shard in enumerate(shards)
            )
            for index, shards, sums in zip(slices, encoded.parity, encoded.data_checksums, strict=True)
        ]
        work = self._put(plan, exchange.rank, labels, encoded.parity, began)
        asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _put(
        self,
        plan: ProtectPlan,
        rank: int,
        labels: Sequence[tuple[ShardLabel, ...]],
        parity: Bytes,
        began: float,
    ) -> None:
        """Put shards [stripes, m, length] to their stores, each store's in one request, and report the outcome."""
        try:
            addresses = {store.store_id: store.bulk_address for store in plan.stores}
            batches: dict[str, list[tuple[ShardLabel, Bytes]]] = {}
            for row, shards in enumerate(labels):
                places = place_shards(shards[0].page_key, shards[0].m, list(addresses))
                for number, label in enumerate(shards):
                    store = places[label.number - label.k]
                    batches.setdefault(addresses[store], []).append((label, parity[row][number]))
            reasons: dict[bytes, GhostError] = {}
            await asyncio.gather(*(self._put_batch(plan, where, batch, reasons) for where, batch in batches.items()))
            keys = [shards[0].page_key for shards in labels]
            failed = tuple(key for key in keys if key in reasons)
            self._report(
                ProtectDone(
                    epoch=plan.epoch,
                    rank=rank,
                    protected=tuple(key for key in keys if key not in reasons),
                    failed=failed,
                    reason=_in_words(reasons[failed[0]]) if failed else "",
                    parity_bytes=(len(keys) - len(failed)) * parity.shape[1] * parity.shape[2],
                    seconds=time.monotonic() - began,
                    full=any(isinstance(reason, StoreFull) for reason in reasons.values()),
                )
            )
        finally:
            self._give_room(parity.nbytes)

    async def _put_batch(
        self,
        plan: ProtectPlan,
        address: str,
        batch: Sequence[tuple[ShardLabel, Bytes]],
        reasons: dict[bytes, GhostError],
    ) -> None:
        request = PutShards(self._group, plan.epoch, plan.serial, tuple(label for label, _ in batch))
        outcomes = await self._stores.put(address, request, [shard.data for _, shard in batch])
        for (label, _), outcome in zip(batch, outcomes, strict=True):
            if outcome is not None:
                reasons[label.page_key] = outcome

    def _take_room(self, size: int) -> None:
        with self._room:
            self._room.wait_for(lambda: not self._in_flight or self._in_flight + size <= PARITY_IN_FLIGHT_BYTES)
            self._in_flight += size

    def _give_room(self, size: int) -> None:
        with self._room:
            self._in_flight -= size
            self._room.notify_all()


def _in_words(reason: GhostError) -> str:
    """Why stripes are unprotected, as the cluster's status shows it."""
    return f"store full: {reason}" if isinstance(reason, StoreFull) else f"{type(reason).__name__}: {reason}"
