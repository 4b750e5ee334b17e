"""Pages of a rank that moves, from pool to pool over the bulk transport: whole, wherever the pools have their parts."""

import asyncio
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from services.vllm.pages import BlockPages
from services.vllm.rank import HostedRank, Steps
from services.worker.agent.inventory import Inventory
from services.worker.device import Fence, HostDevice
from services.worker.memory import Ids, Room, Rows
from services.worker.shadow.copies import PageServer, copy_pages
from services.worker.shadow.stores import StoreClients
from shared.config import WorkerSettings
from shared.errors import GhostError
from shared.messages import CopyPages, Message, PagesCopied, Prepare, Prepared
from shared.transport.server import serve
from shared.types import OPEN_KEY, GroupConfig, pack_ids
from tests.pure.world import MODEL

BLOCKS, LAYERS, LENGTH = 8, 3, 40


@dataclass
class Placed:
    """As vLLM places a layer's blocks."""

    layers: tuple[str, ...]
    layer_stride: int
    block_stride: int
    offset: int = 0


GROUP = GroupConfig("g", "", "m", "float32", 3, 1, "parity", 16, 1 << 20, 64, 4, "shm", 0.2, 3.0, 10.0)
IN_PARTS = Placed(("a", "b", "c"), BLOCKS * LENGTH, LENGTH)
IN_ONE = Placed(("a", "b", "c"), LENGTH, LAYERS * LENGTH)


def pool(placed: Placed, seed: int | None) -> BlockPages:
    content = np.zeros(BLOCKS * LAYERS * LENGTH, dtype=np.uint8)
    if seed is not None:
        content[:] = np.random.default_rng(seed).integers(0, 256, content.size)
    return BlockPages(torch.from_numpy(content), [placed], BLOCKS)


class Moved:
    """Pools of a worker, of which `serving` is the one that counts, and of a spare."""

    def __init__(self, placed: Placed):
        self.serving = pool(placed, 1)
        self.spare = pool(placed, None)

    async def copy(self, *pages: int) -> PagesCopied:
        handler = PageServer(lambda: self.serving, BLOCKS, Fence(HostDevice()))
        clients = StoreClients("", put_deadline_s=5.0, fetch_deadline_s=5.0)
        async with serve("tcp://127.0.0.1:0", handler) as bulk:
            message = CopyPages(1, bulk.address, pack_ids(pages), (OPEN_KEY,) * len(pages))
            copied = await copy_pages(message, self.spare, clients, "g")
            await clients.close()
        return copied

    def equal(self, page: int) -> bool:
        (copied,), (kept,) = (each.rows(np.array([page]), each.empty) for each in (self.spare, self.serving))
        return np.array_equal(copied, kept)


@pytest.mark.parametrize("placed", [IN_PARTS, IN_ONE])
async def test_a_page_arrives_whole_wherever_the_pool_has_its_parts(placed: Placed) -> None:
    moved = Moved(placed)
    assert not (await moved.copy(2, 5)).reason
    assert [page for page in range(BLOCKS) if moved.equal(page)] == [2, 5]


async def test_a_worker_that_became_another_rank_serves_that_ranks_pages() -> None:
    moved = Moved(IN_PARTS)
    assert not (await moved.copy(3)).reason
    moved.serving = pool(IN_PARTS, 2)
    assert not moved.equal(3)
    assert not (await moved.copy(3)).reason
    assert moved.equal(3)


async def test_a_page_that_is_written_while_it_is_read_is_what_it_was_at_one_time() -> None:
    moved = Moved(IN_PARTS)
    reads = 0
    rows = moved.serving.rows

    def written_meanwhile(pages: Ids, room: Room) -> Rows:
        nonlocal reads
        reads += 1
        content = rows(pages, room)
        moved.serving.wrote(pages, Rows.all(np.full((1, LAYERS * LENGTH), reads, dtype=np.uint8)))
        return content

    moved.serving.rows = written_meanwhile  # type: ignore[method-assign, assignment]
    assert not (await moved.copy(4)).reason
    assert reads == 1


async def test_nothing_is_written_of_pages_that_are_not_there() -> None:
    moved = Moved(IN_PARTS)
    assert "ShardMissing" in (await moved.copy(1, BLOCKS)).reason
    assert not moved.equal(1)


async def test_a_spare_of_vllm_prepares_the_pages_of_the_rank_it_is_told_and_of_no_other() -> None:
    pools = {rank: pool(IN_PARTS, rank) for rank in (0, 2)}

    def pool_of(rank: int) -> BlockPages:
        if rank not in pools:
            raise GhostError("it was not made for this rank")
        return pools[rank]

    told: list[Message] = []
    stores = StoreClients("", put_deadline_s=5.0, fetch_deadline_s=5.0)
    spare = HostedRank(
        Steps(), MODEL, BLOCKS, pool_of, torch.device("cpu"), WorkerSettings(), GROUP, Inventory(), stores,
        asyncio.get_running_loop(), told.append,
    )  # fmt: skip
    try:
        spare.submit(Prepare(7, 2))
        assert told == [Prepared(7)]
        assert spare.pool is pools[2]
        with pytest.raises(GhostError, match="not made for this rank"):
            spare.submit(Prepare(8, 1))
    finally:
        spare.shadow.close()
        await stores.close()
