"""The usual checkpoint, which parity is compared with: every rank puts raw copies of its own pages to the stores.

A copy of rank r's page is shard k + r of its stripe, as if the code were the identity: stores and index see no
difference.
"""

import asyncio
import time
from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np

from kernels.codec import checksum
from services.worker.memory import Memory, to_host, write
from services.worker.shadow.exchange import Exchange
from services.worker.shadow.parity_reader import DAMAGED, Stored
from services.worker.shadow.protect import Protector
from services.worker.shadow.restore import Restorer, Trouble
from shared.messages import ProtectPlan, StripeRestore
from shared.transport.base import ShardLabel


class Replicator(Protector):
    """Puts one rank's own pages to the stores."""

    def _round(self, plan: ProtectPlan, exchange: Exchange, pages: Sequence[int], keys: Sequence[bytes]) -> None:
        began = time.monotonic()
        size, rank, length = exchange.size, exchange.rank, exchange.pool.page_bytes
        copies = np.empty((len(pages), 1, length), dtype=np.uint8)
        self._take_room(copies.nbytes, exchange)
        labels = []
        for row, (page, key) in enumerate(zip(pages, keys, strict=True)):
            copies[row, 0] = to_host(exchange.pool.page(page))
            sums = [0] * size
            sums[rank] = checksum(copies[row, 0])
            labels.append((ShardLabel(key, size + rank, size, size, length, sums[rank], tuple(sums)),))
        work = self._put(plan, rank, labels, copies, began)
        asyncio.run_coroutine_threadsafe(work, self._loop)


class CopyRestorer(Restorer):
    """Reads a lost rank's copies back. The survivors have no part in it."""

    def _gather(self, stripes: Sequence[StripeRestore], exchange: Exchange) -> dict[int, dict[int, Memory]]:
        return {index: {} for index, stripe in enumerate(stripes) if exchange.rank in stripe.lost}

    def _share(self, stripe: StripeRestore, rank: int) -> Stored:
        size = len(stripe.data_checksums)
        return Stored(deque(shard for shard in stripe.parity if shard.shard == size + rank), 1)

    def _decode(
        self, ready: Sequence[tuple[StripeRestore, Mapping[int, Memory], Stored]], exchange: Exchange
    ) -> Trouble:
        wrong: Trouble = {}
        places = exchange.targets([stripe.page for stripe, _, _ in ready])
        for (stripe, _, stored), page in zip(ready, places, strict=True):
            row = next(iter(stored.rows.values()))
            write(page, row)
            exchange.pool.wrote(stripe.page, page)
            if checksum(to_host(page)) != checksum(row):
                wrong[stripe.key] = f"page {stripe.page}, copied, {DAMAGED}"
        return wrong
