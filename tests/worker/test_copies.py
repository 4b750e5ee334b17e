"""Pages of a rank that moves, from pool to pool over the bulk transport: whole, wherever the pools have their parts."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from services.vllm.pages import BlockPages
from services.worker.device import Fence, HostDevice
from services.worker.shadow.copies import PageServer, copy_pages
from services.worker.shadow.stores import StoreClients
from shared.messages import CopyPages, PagesCopied
from shared.transport.server import serve
from shared.types import OPEN_KEY, pack_ids

BLOCKS, LAYERS, LENGTH = 8, 3, 40


@dataclass
class Placed:
    """As vLLM places a layer's blocks."""

    layers: tuple[str, ...]
    layer_stride: int
    block_stride: int
    offset: int = 0


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
        return np.array_equal(np.asarray(self.spare.page(page)), np.asarray(self.serving.page(page)))


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
    page = moved.serving.page

    def written_meanwhile(number: int) -> object:
        nonlocal reads
        reads += 1
        content = page(number)
        moved.serving.wrote(number, np.full(LAYERS * LENGTH, reads, dtype=np.uint8))
        return content

    moved.serving.page = written_meanwhile  # type: ignore[method-assign, assignment]
    assert not (await moved.copy(4)).reason
    assert reads == 1


async def test_nothing_is_written_of_pages_that_are_not_there() -> None:
    moved = Moved(IN_PARTS)
    assert "ShardMissing" in (await moved.copy(1, BLOCKS)).reason
    assert not moved.equal(1)
