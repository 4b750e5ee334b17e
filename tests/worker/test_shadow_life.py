"""The shadow's own thread, with real parts: epochs that end while it waits for peers, steps or stores."""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import pytest_asyncio
import torch

from services.worker.agent.inventory import Inventory
from services.worker.communicator import Communicator, create, open_rendezvous
from services.worker.device import HostDevice
from services.worker.engine.kv_pool import KVPool
from services.worker.shadow.coder import make_coder
from services.worker.shadow.protect import Protector
from services.worker.shadow.restore import Restorer
from services.worker.shadow.shadow import Shadow
from shared.messages import Message, ParityShard, ProtectDone, ProtectPlan, RankFailed, RestorePlan, StripeRestore
from shared.transport.base import GetShards, Outcome, PutShards
from shared.types import StoreInfo, pack_ids

K, WAIT_S = 2, 20.0
STORE = StoreInfo("store", "one", "tcp://store:1", "http://store:1", 1)
KEYS = tuple(bytes([number]) + bytes(15) for number in range(4))  # some for each rank to encode

STRIPE = StripeRestore(0, KEYS[0], (1,), (ParityShard(K, STORE.bulk_address, 7),), (1, 2))  # rank 1 has lost it


class Stores:
    """They take everything, and answer no read before `answer` is set."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.answer = asyncio.Event()

    async def put(self, address: str, request: PutShards, payloads: Sequence[memoryview]) -> tuple[Outcome, ...]:
        return (None,) * len(request.shards)

    async def get(self, address: str, request: GetShards, into: Sequence[memoryview]) -> tuple[Outcome, ...]:
        self.asked.set()
        await self.answer.wait()
        return (None,) * len(request.shards)


class Rank:
    """One rank's shadow, and what it reports."""

    def __init__(self, stores: Stores) -> None:
        self.told: asyncio.Queue[Message] = asyncio.Queue()
        loop, device = asyncio.get_running_loop(), HostDevice()
        coder = make_coder(K, 1, device)
        self.pool = KVPool(pages=5, layers=2, page_tokens=4, kv_heads=2, head_dim=8, dtype=torch.float32)
        self.pool.kv.normal_()
        self.inventory = Inventory()

        def report(message: Message) -> None:
            loop.call_soon_threadsafe(self.told.put_nowait, message)

        self.protector = Protector("g", coder, stores, loop, report)  # type: ignore[arg-type]
        self.restorer = Restorer("g", coder, stores, loop, device)  # type: ignore[arg-type]
        self.shadow = Shadow(self.protector, self.restorer, self.inventory, report, device)

    def enter(self, epoch: int, rank: int, communicator: Communicator) -> None:
        self.inventory.begin(epoch, rank)
        self.shadow.enter(epoch, communicator, self.pool, self.pool.tokens)

    async def next(self, epoch: int = 1) -> Message:
        """What it tells next. As for its coordinator, what is of an earlier epoch counts no more: a rank whose epoch is
        about to end tells that its peers' has."""
        return await asyncio.wait_for(self._of(epoch), WAIT_S)

    async def _of(self, epoch: int) -> Message:
        while (told := await self.told.get()).epoch < epoch:  # type: ignore[attr-defined]
            pass
        return told


class Group:
    """All ranks, and a communicator for them in each epoch."""

    def __init__(self) -> None:
        self.stores = Stores()
        self.ranks = [Rank(self.stores) for _ in range(K)]
        self._threads = ThreadPoolExecutor(K)

    async def communicators(self) -> list[Communicator]:
        handle = open_rendezvous("shm", K)
        connecting = [self._threads.submit(create, "shm", handle.address, rank, K, timeout=60) for rank in range(K)]
        made = [await asyncio.wrap_future(each) for each in connecting]
        handle.close()
        return made

    async def begin(self, epoch: int) -> list[Communicator]:
        for rank in self.ranks:
            rank.shadow.interrupt(epoch)
        made = await self.communicators()
        for number, communicator in enumerate(made):
            self.ranks[number].enter(epoch, number, communicator)
        return made

    async def protects(self, epoch: int) -> None:
        """Each rank encodes its share in this epoch, and reports nothing else."""
        for rank in self.ranks:
            rank.shadow.submit(plan(epoch))
        done = [await rank.next(epoch) for rank in self.ranks]
        assert all(isinstance(each, ProtectDone) and each.epoch == epoch for each in done), done
        assert {key for each in done if isinstance(each, ProtectDone) for key in each.protected} == set(KEYS)
        assert all(rank.told.empty() for rank in self.ranks)

    async def close(self) -> None:
        self.stores.answer.set()
        for rank in self.ranks:
            await asyncio.to_thread(rank.shadow.close)
            assert not rank.shadow._thread.is_alive()
        self._threads.shutdown()


@pytest_asyncio.fixture
async def group() -> AsyncIterator[Group]:
    made = Group()
    yield made
    await made.close()


def plan(epoch: int, *, after_step: int = 0) -> ProtectPlan:
    return ProtectPlan(epoch, after_step, pack_ids(range(len(KEYS))), KEYS, (STORE,), 0)


async def test_a_communicator_that_comes_after_its_epoch_has_ended_is_closed_and_not_used(group: Group) -> None:
    for rank in group.ranks:
        rank.shadow.interrupt(1)
    late = await group.communicators()
    for rank in group.ranks:
        rank.shadow.interrupt(2)  # before the ranks that were connecting have said so
    for number, communicator in enumerate(late):
        group.ranks[number].enter(1, number, communicator)
        group.ranks[number].shadow.submit(plan(1))
    for number, communicator in enumerate(await group.communicators()):
        group.ranks[number].enter(2, number, communicator)
    await group.protects(2)
    assert all(communicator._closed for communicator in late)  # type: ignore[attr-defined]


async def test_an_epoch_that_ends_frees_who_waits_for_a_peer_or_a_step_and_nothing_is_reported(group: Group) -> None:
    await group.begin(1)
    group.ranks[0].shadow.submit(plan(1))  # its peer never comes
    group.ranks[1].shadow.submit(plan(1, after_step=9))
    await group.begin(2)
    await group.protects(2)


async def test_a_store_that_never_answers_holds_up_no_epoch_after_the_one_that_asked_it(group: Group) -> None:
    """A rank is lost again while the parity of the first loss is on its way."""
    await group.begin(1)
    restore = RestorePlan.of(1, 1, (STRIPE,))
    for number, rank in enumerate(group.ranks):
        rank.shadow.prefetch(restore, number, rank.pool.page_bytes)
        rank.shadow.submit(restore)
    await asyncio.wait_for(group.stores.asked.wait(), WAIT_S)
    await group.begin(2)
    await group.protects(2)
    assert not group.ranks[1].restorer._parity._windows


async def test_parity_that_comes_while_its_epoch_ends_is_forgotten_or_taken_never_both(group: Group) -> None:
    """`forget` runs on the loop while the shadow takes the window: over and over, at every moment."""
    reader = group.ranks[1].restorer._parity
    group.stores.answer.set()
    outcomes: queue.Queue[str] = queue.Queue()

    def take(number: int) -> None:
        try:
            outcomes.put("nothing" if reader.take((1, number, 0)) == {} else "taken")
        except Exception as error:
            outcomes.put(type(error).__name__)

    for number in range(200):
        group.ranks[1].restorer.prefetch(RestorePlan.of(1, number, (STRIPE,)), 1, 64)
        taking = asyncio.get_running_loop().run_in_executor(None, take, number)
        for _ in range(number % 7):
            await asyncio.sleep(0)
        group.ranks[1].restorer.forget()
        await asyncio.wait_for(taking, WAIT_S)
        assert not reader._windows
    assert {outcomes.get() for _ in range(200)} <= {"nothing", "taken", "CommunicatorAborted"}


async def test_an_error_of_the_shadow_is_told_as_no_loss_of_the_rank_and_its_thread_lives(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: object) -> None:
        raise RuntimeError("a bug")

    await group.begin(1)
    with monkeypatch.context() as patch:
        patch.setattr(group.ranks[0].protector, "protect", breaks)
        for rank in group.ranks:
            rank.shadow.submit(plan(1))
        told = [await rank.next() for rank in group.ranks]
    assert all(isinstance(each, RankFailed) and not each.fatal for each in told), told
    assert isinstance(told[0], RankFailed)
    assert "a bug" in told[0].reason
    await group.begin(2)
    await group.protects(2)


async def test_while_it_is_paused_no_plan_is_begun_and_none_is_interrupted(group: Group) -> None:
    """A CUDA graph is captured meanwhile. To wait for a plan could mean to wait for a rank that waits for this one."""
    await group.begin(1)
    one, begun, goes_on = group.ranks[0], threading.Event(), threading.Event()
    protect = one.protector.protect

    def slow(*given: Any) -> None:
        begun.set()
        goes_on.wait(WAIT_S)
        protect(*given)

    one.protector.protect = slow  # type: ignore[method-assign]
    protecting = asyncio.create_task(group.protects(1))
    assert await asyncio.to_thread(begun.wait, WAIT_S)
    with one.shadow.paused() as still:
        assert not still
    goes_on.set()
    await protecting
    begun.clear()
    async with asyncio.timeout(WAIT_S):
        while True:
            with one.shadow.paused() as still:
                if still:
                    for rank in group.ranks:
                        rank.shadow.submit(plan(1))
                    assert not await asyncio.to_thread(begun.wait, 0.1)
                    break
            await asyncio.sleep(0.001)
    assert await asyncio.to_thread(begun.wait, WAIT_S)
