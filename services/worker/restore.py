"""Recovery of pages: survivors send their slices, stores the parity, and a new rank decodes its own into its pool."""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass

import numpy as np

from kernels.codec import Codec, checksum
from services.worker.exchange import Bytes, Exchange
from services.worker.stores import StoreClients
from shared.errors import CommunicatorAborted
from shared.messages import RestoreDone, RestorePlan, StripeRestore
from shared.transport.base import GetShards, ShardRef

DAMAGED = "differs from its recorded checksum"


@dataclass(frozen=True, slots=True)
class Fetch:
    """Parity [len(stripe.parity), page_bytes] by page key, as it comes in; `reasons`: stripes that can't be had."""

    shards: dict[bytes, Bytes]
    reasons: Future[dict[bytes, str]]


class Restorer:
    """One rank's part in restoring: a sender where it survived, a decoder where it is new."""

    def __init__(self, group: str, codec: Codec, stores: StoreClients, loop: asyncio.AbstractEventLoop):
        self._group = group
        self._codec = codec
        self._stores = stores
        self._loop = loop
        self._fetches: dict[tuple[int, int], Fetch] = {}

    def prefetch(self, plan: RestorePlan, rank: int, length: int) -> None:
        """Begin to read what `rank` has lost, before its turn comes or the ranks are even connected."""
        mine = [self._share(stripe, rank) for stripe in plan.stripes if rank in stripe.lost]
        if mine:
            shards = {stripe.key: np.empty((len(stripe.parity), length), dtype=np.uint8) for stripe in mine}
            reasons = asyncio.run_coroutine_threadsafe(self._get(mine, shards, length), self._loop)
            self._fetches[plan.epoch, plan.plan] = Fetch(shards, reasons)

    def forget(self) -> None:
        """The epoch is over: give up what was begun; who waits for it is told so."""
        while self._fetches:
            self._fetches.popitem()[1].reasons.cancel()

    def restore(self, plan: RestorePlan, exchange: Exchange) -> RestoreDone:
        """Take part in a plan; says which stripes this rank could not decode, and why the first of them.

        Raises CommunicatorAborted when the epoch ends; nothing is written to the pool any more then.
        """
        fetch = self._fetches.get((plan.epoch, plan.plan))
        failed: dict[bytes, str] = {}
        damaged = 0
        began = time.monotonic()
        slices = self._gather(plan.stripes, exchange)
        exchanged = time.monotonic()
        try:
            reasons = fetch.reasons.result() if fetch is not None else {}
        except CancelledError:
            raise CommunicatorAborted("the epoch ended while parity was on its way") from None
        fetched = time.monotonic()
        for index, by_rank in slices.items():
            stripe = plan.stripes[index]
            why = reasons.get(stripe.key, "") if fetch is not None else "its parity was not asked for"
            if fetch is not None and not why:
                with exchange.writing():
                    why = self._decode(stripe, by_rank, fetch.shards[stripe.key], exchange)
            if why:
                failed[stripe.key] = why
                damaged += why.endswith(DAMAGED)
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

    def _gather(self, stripes: Sequence[StripeRestore], exchange: Exchange) -> dict[int, dict[int, Bytes]]:
        """Bring the survivors' slices to the ranks that decode; see Exchange.gather."""
        return exchange.gather([stripe.page for stripe in stripes], [stripe.lost for stripe in stripes])

    def _share(self, stripe: StripeRestore, rank: int) -> StripeRestore:
        """The stripe with those of its stored shards that `rank` needs."""
        return stripe

    async def _get(self, stripes: Sequence[StripeRestore], shards: dict[bytes, Bytes], length: int) -> dict[bytes, str]:
        """Read parity, each store's in one request. Returns the reasons of stripes that can't be had."""
        batches: dict[str, list[tuple[ShardRef, Bytes, int]]] = {}
        for stripe in stripes:
            for row, shard in enumerate(stripe.parity):
                entry = (ShardRef(stripe.key, shard.shard, length), shards[stripe.key][row], shard.checksum)
                batches.setdefault(shard.bulk_address, []).append(entry)
        reasons: dict[bytes, str] = {}

        async def get(address: str, batch: list[tuple[ShardRef, Bytes, int]]) -> None:
            request = GetShards(self._group, tuple(ref for ref, _, _ in batch))
            outcomes = await self._stores.get(address, request, [into.data for _, into, _ in batch])
            for (ref, into, recorded), outcome in zip(batch, outcomes, strict=True):
                if outcome is not None:
                    reasons[ref.page_key] = f"{address}: {type(outcome).__name__}: {outcome}"
                elif checksum(into) != recorded:
                    reasons[ref.page_key] = f"{address}: a parity shard {DAMAGED}"

        await asyncio.gather(*(get(address, batch) for address, batch in batches.items()))
        return reasons

    def _decode(self, stripe: StripeRestore, by_rank: dict[int, Bytes], parity: Bytes, exchange: Exchange) -> str:
        """Decode this rank's slice straight into its pool. Returns what was wrong, or nothing."""
        target = exchange.pool.page(stripe.page)
        data = {rank: shard for rank, shard in by_rank.items() if rank not in stripe.lost}
        rows = {shard.shard: parity[row] for row, shard in enumerate(stripe.parity)}
        present = {**data, **rows}
        plan = self._codec.plan(present.keys(), [exchange.rank])
        self._codec.reconstruct(plan, [present[source] for source in plan.sources], [target])
        if checksum(target) != stripe.data_checksums[exchange.rank]:
            return f"page {stripe.page}, decoded, {DAMAGED}"
        return ""
