"""The worker's own shadow, coder, restorer and NCCL communicator on fake GPUs: all in order, and each wait needed."""

import asyncio
import copy
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import pytest_asyncio
import torch

from kernels.cuda import CudaCodec
from services.vllm.rank import Steps
from services.worker.agent.inventory import Inventory
from services.worker.device import Fence
from services.worker.engine.kv_pool import KVPool
from services.worker.memory import Rows
from services.worker.shadow.coder import CudaCoder
from services.worker.shadow.protect import Protector
from services.worker.shadow.restore import Restorer
from services.worker.shadow.shadow import Shadow
from shared.messages import Message, ProtectDone, ProtectPlan, RankFailed, RestoreDone, RestorePlan
from shared.types import pack_ids
from tests.pure.kernels_on_cpu import COMPILER
from tests.pure.ordering import Clock
from tests.worker.fake_cuda import FakeCuda, FakeNccl, Kernels, Wire, World
from tests.worker.test_shadow import STORE, Stores

pytestmark = pytest.mark.skipif(COMPILER is None, reason="NO C++ COMPILER: the kernel's source can't be run on the CPU")

K, M, PAGES, PAGE_TOKENS = 3, 2, 6, 4
LOST = 1


class DevicePool(KVPool):
    """A pool whose pages are tensors, as on a GPU."""

    def __init__(self, world: World):
        super().__init__(pages=PAGES, layers=2, page_tokens=PAGE_TOKENS, kv_heads=2, head_dim=8, dtype=torch.float32)
        self._host = None
        world.keep(self._bytes, host=False)


class Rank:
    """A fake device with a pool, a shadow, and a compute thread."""

    def __init__(self, number: int, world: World, wire: Wire, stores: Stores, told: Callable[[Message], None]):
        self.number, self.device = number, FakeCuda(world)
        self.pool = DevicePool(world)
        self.compute = ThreadPoolExecutor(1, f"compute-{number}", self.device.bind)
        loop = asyncio.get_running_loop()
        coder = CudaCoder(CudaCodec(K, M, Kernels(world)), self.device)
        protector = Protector("g", coder, stores, loop, told)  # type: ignore[arg-type]
        restorer = Restorer("g", coder, stores, loop, self.device)  # type: ignore[arg-type]
        self.shadow = Shadow(protector, restorer, Inventory(), told, self.device)
        self.shadow.interrupt(1)
        self.shadow._inventory.begin(1, number)
        self.compute.submit(self.join, wire).result(20)

    def join(self, wire: Wire) -> None:
        self.shadow.enter(1, FakeNccl(self.device, wire, self.number), self.pool, self.pool.tokens)

    def step(self, number: int, pages: list[int], content: torch.Tensor) -> None:
        """What a step of the model does to pages: behind what is restored, each token's row is written."""
        self.shadow.restored.wait()
        self.pool.slots.index_copy_(0, _slots(pages), content)
        self.shadow.step_done(number)

    def seen(self, pages: list[int]) -> torch.Tensor:
        """What attention of the next step finds."""
        self.shadow.restored.wait()
        return torch.index_select(self.pool.slots, 0, _slots(pages))


class VllmRank(Rank):
    """One whose model is vLLM's, on the main thread of its process."""

    def __init__(self, *given: Any):
        super().__init__(*given)
        self.steps = Steps(shadow=self.shadow)

    def step(self, number: int, pages: list[int], content: torch.Tensor) -> None:
        self.steps.begin()
        self.pool.slots.index_copy_(0, _slots(pages), content)
        self.steps.end()
        self.shadow._step = number  # which nobody tells: its pages are sealed when the step has come back

    def seen(self, pages: list[int]) -> torch.Tensor:
        self.steps.begin()
        return torch.index_select(self.pool.slots, 0, _slots(pages))


def _slots(pages: list[int]) -> torch.Tensor:
    return torch.tensor([page * 4 * PAGE_TOKENS + at for page in pages for at in range(4 * PAGE_TOKENS)])


class Ranks:
    """K ranks in one world."""

    def __init__(self, kind: type[Rank] = Rank) -> None:
        self.world, self.stores, self.told = World(), Stores(), list[Message]()
        self.passed_on: list[Clock] = []
        wire = Wire(self.world, K)
        self.ranks = [kind(number, self.world, wire, self.stores, self.tell) for number in range(K)]

    async def until(self, done: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not done() and not any(isinstance(each, RankFailed) for each in self.told):
                await asyncio.sleep(0.002)

    def tell(self, message: Message) -> None:
        """What a rank reports the coordinator passes on: who hears of it comes after what the rank has done."""
        if isinstance(message, ProtectDone | RestoreDone):
            self.passed_on.append(self.world.tell(self.ranks[message.rank].shadow._thread))
        self.told.append(message)

    async def run(self, rank: Rank, work: Callable[[], Any]) -> Any:
        """On the compute thread, after all that was told so far."""

        def heard() -> Any:
            for clock in self.passed_on:
                self.world.hear(clock)
            return work()

        return await asyncio.wrap_future(rank.compute.submit(heard))

    async def protect(self, pages: list[int], keys: list[bytes], step: int, *, tail: bool = False) -> None:
        """Returns when all ranks have told."""
        plan = ProtectPlan(1, 0, pack_ids(pages), tuple(keys), (STORE,), step, tail)
        for rank in self.ranks:
            rank.shadow.submit(plan)

        def told() -> set[bytes]:
            done = [each for each in self.told if isinstance(each, ProtectDone)]
            return {key for each in done for key in (*each.protected, *each.failed)}

        await self.until(lambda: told() >= set(keys))

    async def restore(self, pages: list[int], keys: list[bytes], *, tail: bool = False) -> None:
        stripes = tuple(self.stores.stripe(page, key, (LOST,)) for page, key in zip(pages, keys, strict=True))
        plan = RestorePlan.of(1, 1, stripes, tail)
        rank = self.ranks[LOST]
        rank.shadow.prefetch(plan, LOST, (rank.pool.tokens if tail else rank.pool).page_bytes)
        for each in self.ranks:
            each.shadow.submit(plan)
        await self.until(lambda: any(isinstance(each, RestoreDone) and each.upto == len(pages) for each in self.told))

    async def live(self, *, tail: bool = False) -> list[str]:
        """Steps, protection, a loss, restoration, and the next step. Returns all that was wrong, in words."""
        pages = [1, 4]
        rows = len(pages) * 4 * PAGE_TOKENS
        contents = [torch.randn(rows, 2, 8, generator=torch.Generator().manual_seed(r)) for r in range(K)]
        places = [page * PAGE_TOKENS + at for page in pages for at in range(PAGE_TOKENS)] if tail else pages
        keys = [bytes([place]) * 16 for place in places]
        for rank, content in zip(self.ranks, contents, strict=True):
            await self.run(rank, partial(rank.step, 1, pages, content))
        await self.protect(places, keys, 1, tail=tail)
        wrong = [f"unprotected: {each.reason}" for each in self.told if isinstance(each, ProtectDone) and each.failed]
        wrong += [f"hazard: {each}" for each in self.world.hazards()]
        if wrong or len(self.stores.shards) < len(keys) * M:
            return wrong or ["nothing was stored"]
        lost = self.ranks[LOST]
        await self.run(lost, partial(lost.step, 2, pages, torch.zeros(rows, 2, 8)))
        await self.restore(places, keys, tail=tail)
        found = await self.run(lost, partial(lost.seen, pages))
        wrong += [f"not restored: {each.reason}" for each in self.told if isinstance(each, RestoreDone) and each.failed]
        wrong += [f"hazard: {each}" for each in self.world.hazards()]
        if not torch.equal(found, contents[LOST]):
            wrong.append("the model finds other bytes")
        return wrong + [f"failed: {each.reason}" for each in self.told if isinstance(each, RankFailed)]

    def close(self) -> None:
        for rank in self.ranks:
            rank.shadow.interrupt(-1)
        for rank in self.ranks:
            rank.shadow.close()
            rank.compute.shutdown()


@pytest_asyncio.fixture
async def ranks() -> AsyncIterator[Ranks]:
    group = Ranks()
    yield group
    await asyncio.to_thread(group.close)


@pytest.mark.parametrize("tail", [False, True])
async def test_everything_is_in_order_and_lost_pages_come_back(ranks: Ranks, tail: bool) -> None:
    assert await ranks.live(tail=tail) == []
    assert ranks.world.counts["copies that are not pinned"] == 0


async def test_the_same_is_so_where_the_model_is_vllms() -> None:
    group = Ranks(VllmRank)
    try:
        assert await group.live() == []
    finally:
        await asyncio.to_thread(group.close)


@pytest.mark.parametrize("part", ["begin", "end"])
async def test_each_mark_of_vllms_steps_is_needed(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Steps, part, lambda self: None)
    group = Ranks(VllmRank)
    try:
        assert any("hazard" in each for each in await group.live(tail=part == "begin"))
    finally:
        await asyncio.to_thread(group.close)


class _Nothing(Fence):
    """A fence that orders nothing."""

    def wait(self) -> None:
        pass


def no_computed_fence(ranks: Ranks, patch: pytest.MonkeyPatch) -> None:
    for rank in ranks.ranks:
        rank.shadow.computed = _Nothing(rank.device)


def no_mark_after_a_step(ranks: Ranks, patch: pytest.MonkeyPatch) -> None:
    for rank in ranks.ranks:
        patch.setattr(rank.shadow.computed, "leave", lambda: None)


def no_restored_fence(ranks: Ranks, patch: pytest.MonkeyPatch) -> None:
    for rank in ranks.ranks:
        rank.shadow.restored = _Nothing(rank.device)


def no_wait_for_nccl(ranks: Ranks, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("tests.worker.fake_cuda._Queued.wait", lambda self: None)


def no_wait_for_the_coder(ranks: Ranks, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FakeCuda, "finish", lambda self: None)


def no_wait_for_parity_to_be_copied(ranks: Ranks, patch: pytest.MonkeyPatch) -> None:
    for rank in ranks.ranks:
        coder: Any = rank.shadow._restorer._coder
        coder._device = copy.copy(coder._device)
        patch.setattr(coder._device, "wait", lambda mark: None)
        patch.setattr(coder._device.world, "check_bound", lambda device: None)


def kernels_on_another_stream(ranks: Ranks, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FakeCuda, "address", 0)


def _in_host(rows: Rows) -> Rows:
    assert not isinstance(rows.memory, torch.Tensor)
    return Rows(torch.from_numpy(rows.memory), rows.index)


def shards_left_in_host_memory(ranks: Ranks, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CudaCoder, "_copy_in", lambda self, shards: iter(map(_in_host, shards)))


@pytest.mark.parametrize(
    ("breaks", "tail", "found"),
    [
        (no_computed_fence, False, "hazard"),
        (no_mark_after_a_step, False, "hazard"),
        (no_restored_fence, True, "hazard"),
        (no_wait_for_nccl, False, "hazard"),
        (no_wait_for_the_coder, False, "other bytes"),
        (no_wait_for_parity_to_be_copied, False, "copy from the host"),
        (kernels_on_another_stream, False, "hazard"),
        (shards_left_in_host_memory, False, "illegal memory access"),
    ],
)
async def test_each_wait_that_is_taken_away_is_found(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch, breaks: Callable[..., None], tail: bool, found: str
) -> None:
    breaks(ranks, monkeypatch)
    wrong = await ranks.live(tail=tail)
    assert any(found in each for each in wrong), wrong


async def test_a_thread_that_was_not_given_its_device_is_found(ranks: Ranks) -> None:
    with pytest.raises(AssertionError, match="not bound to the device"):
        ranks.ranks[0].device.mark()


async def test_the_model_does_not_wait_for_protection(ranks: Ranks) -> None:
    """Marks of the shadow that the model waits for are left by restoring alone."""
    pages, keys = [1, 4], [b"a" * 16, b"b" * 16]
    for rank in ranks.ranks:
        await ranks.run(rank, partial(rank.step, 1, pages, torch.ones(2 * 4 * PAGE_TOKENS, 2, 8)))
    await ranks.protect(pages, keys, 1)
    assert all(rank.shadow.restored._mark is None for rank in ranks.ranks)


def _aborted(rank: Rank, work: Callable[..., Any], *given: Any) -> Any:
    result = work(*given)
    assert rank.shadow._exchange is not None
    rank.shadow._exchange.communicator.abort()
    return result


@pytest.mark.parametrize("at", ["encode", "decode"])
async def test_what_came_over_a_communicator_that_was_aborted_goes_nowhere(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """NCCL only queues: an abort while the coder waits for the device means that it may have worked on nothing."""
    for rank in ranks.ranks:
        coder: Any = rank.shadow._restorer._coder

        monkeypatch.setattr(coder, at, partial(_aborted, rank, getattr(coder, at)))
    await ranks.live()
    await ranks.until(lambda: any(isinstance(each, RankFailed) for each in ranks.told))
    assert not any(isinstance(each, ProtectDone if at == "encode" else RestoreDone) for each in ranks.told)
    assert bool(ranks.stores.shards) is (at == "decode")
