"""Protection: sealed pages are exchanged, encoded, and their parity put to the stores, in the shadow of the model."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from kernels.codec import checksum
from services.worker.memory import Bytes, Ids
from services.worker.shadow.coder import Coder
from services.worker.shadow.exchange import Came, Exchange
from services.worker.shadow.stores import StoreClients
from services.worker.shadow.windows import page_ids
from shared.errors import CommunicatorAborted, DeadlineExceeded, GhostError, StoreFull
from shared.messages import ProtectDone, ProtectPlan
from shared.transport.base import PutShards, ShardLabel
from shared.types import PageKey, encoding_rank, place_shards

log = logging.getLogger(__name__)

PARITY_IN_FLIGHT_BYTES = 128 << 20
"""Parity that waits for a store's acknowledgement; the shadow waits above it, the model never."""
ROOM_S = 10.0
"""How long it waits: stores that take nothing for so long leave what follows unprotected."""
_SLICE_S = 0.1


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
        pages = page_ids(plan.pages)
        for start in range(0, len(pages), exchange.round_pages):
            end = start + exchange.round_pages
            self._round(plan, exchange, pages[start:end], plan.keys[start:end])

    def _round(self, plan: ProtectPlan, exchange: Exchange, pages: Ids, keys: Sequence[PageKey]) -> None:
        """One round of exchange, which all ranks take part in, and this rank's share of what follows.

        Whatever goes wrong with that leaves its stripes unprotected, and is told; it ends nothing else.
        """
        began = time.monotonic()
        owners = np.array([encoding_rank(key, exchange.size) for key in keys])
        came = exchange.gather(pages, owners[:, None] == np.arange(exchange.size))
        at = np.flatnonzero(owners == exchange.rank)
        mine = [keys[index] for index in at.tolist()]
        if not mine:
            return
        try:
            self._encode(plan, exchange, mine, pages[at], at, came, began)
        except CommunicatorAborted:
            raise
        except Exception as error:
            log.exception("stripes could not be encoded")
            self._failed(plan, exchange.rank, mine, error, began)

    def _encode(
        self,
        plan: ProtectPlan,
        exchange: Exchange,
        keys: Sequence[PageKey],
        pages: Ids,
        at: Ids,
        came: Came,
        began: float,
    ) -> None:
        k, m, length = self._coder.k, self._coder.m, exchange.pool.page_bytes
        size = len(keys) * m * length
        self._take_room(size, exchange)
        try:
            own = exchange.own(pages)
            encoded = self._coder.encode([own if rank == exchange.rank else came.of(rank, at) for rank in range(k)])
            exchange.communicator.check()  # what came may be nothing if it did not come to its end
            labels = [
                tuple(
                    ShardLabel(key, k + number, k, m, length, checksum(shard), sums)
                    for number, shard in enumerate(shards)
                )
                for key, shards, sums in zip(keys, encoded.parity, encoded.data_checksums, strict=True)
            ]
        except BaseException:
            self._give_room(size)
            raise
        work = self._put(plan, exchange.rank, labels, encoded.parity, began)
        asyncio.run_coroutine_threadsafe(work, self._loop)

    def _failed(self, plan: ProtectPlan, rank: int, keys: Sequence[bytes], error: Exception, began: float) -> None:
        reason = f"{type(error).__name__}: {error}"
        self._report(ProtectDone(plan.epoch, rank, (), tuple(keys), reason, 0, time.monotonic() - began))

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
            await self._put_all(plan, rank, labels, parity, began)
        except Exception as error:
            log.exception("parity could not be put")
            self._failed(plan, rank, [shards[0].page_key for shards in labels], error, began)
        finally:
            self._give_room(parity.nbytes)

    async def _put_all(
        self,
        plan: ProtectPlan,
        rank: int,
        labels: Sequence[tuple[ShardLabel, ...]],
        parity: Bytes,
        began: float,
    ) -> None:
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

    def _take_room(self, size: int, exchange: Exchange) -> None:
        """Raises CommunicatorAborted when the epoch ends meanwhile, DeadlineExceeded when stores take nothing."""
        end = time.monotonic() + ROOM_S
        with self._room:
            while self._in_flight and self._in_flight + size > PARITY_IN_FLIGHT_BYTES:
                if exchange.ended:
                    raise CommunicatorAborted("the epoch is over")
                if time.monotonic() > end:
                    raise DeadlineExceeded(f"the stores acknowledge nothing for {ROOM_S:.0f} s")
                self._room.wait(_SLICE_S)
            self._in_flight += size

    def _give_room(self, size: int) -> None:
        with self._room:
            self._in_flight -= size
            self._room.notify_all()


def _in_words(reason: GhostError) -> str:
    """Why stripes are unprotected, as the cluster's status shows it."""
    return f"store full: {reason}" if isinstance(reason, StoreFull) else f"{type(reason).__name__}: {reason}"
