"""The usual checkpoint, which parity is compared with: every rank puts raw copies of its own pages to the stores.

A copy of rank r's page is shard k + r of its stripe, as if the code were the identity: stores and index see no
difference.
"""

import asyncio
import time
from collections.abc import Sequence

import numpy as np

from kernels.codec import checksum
from services.worker.memory import Ids, Rows, Sums, to_host, write
from services.worker.shadow.exchange import Came, Exchange
from services.worker.shadow.parity_reader import Stored
from services.worker.shadow.protect import Protector
from services.worker.shadow.restore import Restorer
from services.worker.shadow.windows import Alike, Window
from shared.messages import ProtectPlan
from shared.transport.base import ShardLabel
from shared.types import PageKey


class Replicator(Protector):
    """Puts one rank's own pages to the stores."""

    def _round(self, plan: ProtectPlan, exchange: Exchange, pages: Ids, keys: Sequence[PageKey]) -> None:
        began = time.monotonic()
        size, rank, length = exchange.size, exchange.rank, exchange.pool.page_bytes
        copies = np.empty((len(pages), 1, length), dtype=np.uint8)
        self._take_room(copies.nbytes, exchange)
        labels = []
        for row, (page, key) in enumerate(zip(exchange.own(pages), keys, strict=True)):
            copies[row, 0] = to_host(page)
            sums = [0] * size
            sums[rank] = checksum(copies[row, 0])
            labels.append((ShardLabel(key, size + rank, size, size, length, sums[rank], tuple(sums)),))
        work = self._put(plan, rank, labels, copies, began)
        asyncio.run_coroutine_threadsafe(work, self._loop)


class CopyRestorer(Restorer):
    """Reads a lost rank's copies back. The survivors have no part in it."""

    def _gather(self, window: Window, exchange: Exchange) -> Came:
        return Came(0, (), ())

    def _share(self, group: Alike, rank: int) -> Stored:
        mine = slice(at := group.kind.lost.index(rank), at + 1)  # each lost rank's own copy is there, and no other
        kind = group.kind
        return Stored(group.keys, kind.shards[mine], kind.addresses[mine], group.shard_sums[:, mine], 1)

    def _decode_alike(
        self, group: Alike, at: Ids, read: Stored, came: Came, targets: Rows, exchange: Exchange
    ) -> tuple[Sums, Sums]:
        for page, row in zip(targets, Rows(read.rows[0], at), strict=True):
            write(page, row)
        sums = np.fromiter((checksum(to_host(page)) for page in targets), dtype=np.uint64, count=len(at))
        return sums, read.sums[at, 0]
