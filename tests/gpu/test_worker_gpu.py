"""The worker's parts on one real GPU: its communicator, its coder beside a busy stream, its shadow, its model."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels.codec import make_codec
from services.worker.agent.inventory import Inventory
from services.worker.communicator import create, open_rendezvous
from services.worker.communicator.base import Communicator
from services.worker.device import CudaDevice
from services.worker.engine.batch import Chunk
from services.worker.engine.host_slices import host_memory
from services.worker.engine.kv_pool import KVPool
from services.worker.engine.model import RankModel
from services.worker.memory import Rows
from services.worker.shadow.coder import make_coder
from services.worker.shadow.protect import Protector
from services.worker.shadow.restore import Restorer
from services.worker.shadow.shadow import Shadow
from shared.errors import CommunicatorAborted
from shared.messages import Message, ProtectDone, ProtectPlan, RankFailed, RestoreDone, RestorePlan
from shared.types import pack_ids
from tests.worker.rank_threads import small_model
from tests.worker.test_shadow import STORE, Stores

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, or a torch without CUDA")
GPU = torch.device("cuda", 0)


def connect() -> Communicator:
    """A group of one, over NCCL; its meeting point is closed when it returns."""
    handle = open_rendezvous("nccl", 1)
    try:
        return create("nccl", handle.address, 0, 1, timeout=30)
    finally:
        handle.close()


def test_a_group_of_one_works_over_nccl_after_its_meeting_point_is_closed() -> None:
    comm = connect()
    value = torch.arange(8, device=GPU, dtype=torch.float32)
    gathered = torch.empty(1, 8, device=GPU)
    comm.all_reduce(value)
    comm.all_gather(value, gathered)
    comm.all_to_all([[]], [[]])
    assert gathered[0].tolist() == list(range(8))
    comm.check()
    comm.close()


def test_an_aborted_group_says_so_and_another_one_can_be_made() -> None:
    for _ in range(2):
        comm = connect()
        comm.abort()
        with pytest.raises(CommunicatorAborted):
            comm.all_reduce(torch.zeros(1, device=GPU))
        comm.close()


def test_parity_is_that_of_pages_whose_writing_is_still_queued_elsewhere() -> None:
    """The model's stream is kept busy; the shadow's goes on behind its mark."""
    device, k, m, length = CudaDevice(GPU), 4, 2, 1 << 20
    coder = make_coder(k, m, device)
    coder.prepare()
    content = np.random.default_rng(1).integers(0, 256, (8, k, length), dtype=np.uint8)
    arriving = device.host(8, k, length)
    arriving.numpy()[:] = content
    pages, busy = torch.zeros(8, k, length, dtype=torch.uint8, device=GPU), torch.randn(4096, 4096, device=GPU)
    torch.cuda.synchronize()
    for _ in range(50):
        busy = busy @ busy.clamp(-1, 1) / 4096
    pages.copy_(arriving, non_blocking=True)
    written = device.mark()
    with device.on(device.stream()):
        device.wait(written)
        encoded = coder.encode([Rows.all(pages[:, shard].contiguous()) for shard in range(k)])
    on_cpu, expected = make_codec(k, m, "cpu"), np.empty((m, length), dtype=np.uint8)
    for stripe, parity in zip(content, encoded.parity, strict=True):
        on_cpu.encode(list(stripe), list(expected))
        assert np.array_equal(parity, expected)


async def until(done: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not done():
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("tail", [False, True])
async def test_a_rank_protects_loses_and_restores_its_pages(tail: bool) -> None:
    """The whole shadow on the device: TP = 1, parity to a store, over NCCL."""
    device, told, stores = CudaDevice(GPU), list[Message](), Stores()
    pool = KVPool(pages=8, layers=4, page_tokens=16, kv_heads=4, head_dim=64, dtype=torch.bfloat16, device=GPU)
    loop, coder = asyncio.get_running_loop(), make_coder(1, 1, device)
    protector = Protector("g", coder, stores, loop, told.append)  # type: ignore[arg-type]
    restorer = Restorer("g", coder, stores, loop, device)  # type: ignore[arg-type]
    shadow = Shadow(protector, restorer, Inventory(), told.append, device)
    compute = ThreadPoolExecutor(1, initializer=device.bind)
    shadow.interrupt(1)
    shadow._inventory.begin(1, 0)

    def write() -> None:
        shadow.enter(1, connect(), pool, pool.tokens)
        pool.kv.normal_()
        shadow.step_done(1)

    await loop.run_in_executor(compute, write)
    places = [5, 37, 100] if tail else [3, 0, 5]
    keys = [bytes([place]) * 16 for place in places]
    shadow.submit(ProtectPlan(1, 0, pack_ids(places), tuple(keys), (STORE,), 1, tail))
    await until(lambda: any(isinstance(each, ProtectDone | RankFailed) for each in told))
    before = pool.kv.clone()

    def lose() -> None:
        for place in places:
            page, offset = divmod(place, 16) if tail else (place, slice(None))
            pool.kv[page, :, :, offset] = 0
        shadow.step_done(2)

    await loop.run_in_executor(compute, lose)
    plan = RestorePlan.of(1, 1, tuple(stores.stripe(*pair, (0,)) for pair in zip(places, keys, strict=True)), tail)
    shadow.prefetch(plan, 0, (pool.tokens if tail else pool).page_bytes)
    shadow.submit(plan)
    await until(lambda: any(isinstance(each, RestoreDone | RankFailed) for each in told))

    def look() -> bool:
        shadow.restored.wait()
        return torch.equal(pool.kv, before)

    assert await loop.run_in_executor(compute, look), told
    await asyncio.to_thread(shadow.close)
    compute.shutdown()


def test_the_model_on_the_gpu_gives_the_cpus_logits(tmp_path: Path) -> None:
    directory, logits = small_model(tmp_path, "Llama"), []
    chunk = Chunk(np.arange(1, 40, dtype=np.int32), 0, 39, np.arange(3, dtype=np.int32), "all")
    for device in (torch.device("cpu"), GPU):
        model = RankModel(directory, size=1, dtype=torch.float32, device=device, host_memory=host_memory())
        model.prepare(0)
        model.load(0)
        pool = model.make_pool(16, memory_bytes=1 << 20)
        logits.append(model.logits(model.forward([chunk], pool, None)).cpu())
    assert torch.allclose(logits[0], logits[1], atol=1e-2, rtol=1e-2)
