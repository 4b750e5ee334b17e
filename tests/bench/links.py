"""What the links of a restore reach on this machine, with its own messages: from a store, and between ranks.

A store's link is a bulk connection, over which the shards of one plan are read at a time; the ranks' is a communicator
over shared memory, over which one rank sends the slices of a plan to another. Nothing is looked up, coded or written.
"""

import asyncio
import time
from dataclasses import dataclass

import numpy as np

from services.coordinator.protection.restoration import PLAN_STRIPES
from services.worker.communicator.base import Communicator
from services.worker.shadow.shadow import SLOT_BYTES
from shared.types import round_pages
from tests.bench.transport import figure, server
from tests.conformance.rank_processes import RankProcesses

SECONDS = 0.6


@dataclass(frozen=True, slots=True)
class Links:
    """Bytes a second."""

    store: float
    exchange: float

    @property
    def slowest(self) -> float:
        """What a restore can reach at most."""
        return min(self.store, self.exchange)


async def measure_links(page_bytes: int, *, ranks: int) -> Links:
    """Both links, for pages of this size; of the ranks one sends, and one receives."""
    count = min(PLAN_STRIPES, round_pages(page_bytes))
    async with server("tcp") as (client, pid):
        await figure(client, pid, "get", count, page_bytes)  # warms up
        store = 1e9 * (await figure(client, pid, "get", count, page_bytes)).gb_s
    return Links(store, await asyncio.to_thread(_exchange, count * page_bytes, ranks))


def _exchange(size: int, ranks: int) -> float:
    processes = RankProcesses(ranks)
    try:
        outcomes = processes.play("shm", _send, size, slot_bytes=SLOT_BYTES)
        return min(float(each.result) for each in outcomes if each is not None)
    finally:
        processes.close()


def _send(communicator: Communicator, size: int) -> float:
    """Rank 0 sends to rank 1, so many bytes at a time. Bytes a second."""
    content = np.zeros(size, dtype=np.uint8)
    send = [[content] if (communicator.rank, to) == (0, 1) else [] for to in range(communicator.size)]
    receive = [[content] if (of, communicator.rank) == (0, 1) else [] for of in range(communicator.size)]
    goes_on, moved, began = np.ones(1, dtype=np.uint8), 0, time.monotonic()
    while goes_on[0]:
        communicator.all_to_all(send, receive)
        moved += size
        if communicator.rank == 0:
            goes_on[0] = time.monotonic() - began < SECONDS
        communicator.all_to_all(
            [[goes_on] if communicator.rank == 0 and to else [] for to in range(communicator.size)],
            [[goes_on] if of == 0 and communicator.rank else [] for of in range(communicator.size)],
        )
    return moved / (time.monotonic() - began)
