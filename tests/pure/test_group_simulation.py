"""The whole coordinator under random faults at random moments: no token is wrong, lost or sent twice, no page leaks."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from services.coordinator.pages import Shadow
from services.coordinator.scheduler import Sequence
from shared.messages import Applied, RankFailed, Refused, StoreDrains
from shared.stripe_index import Stripe
from shared.types import OperatorAction, PageKey, StoreInfo
from tests.pure.world import Wire, World

MOVES = 100_000


@pytest.fixture(autouse=True)
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cached pages come back without a pause."""
    monkeypatch.setattr("services.coordinator.restoration.CACHED_PAUSE_S", 0.001)


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that moves goes on with each tick."""
    monkeypatch.setattr("services.coordinator.group.TICK_S", 0.001)


@asynccontextmanager
async def running(world: World) -> AsyncIterator[None]:
    await world.start()
    try:
        yield
    finally:
        await world.stop()


async def serving(world: World) -> None:
    """Let messages through until the group serves."""
    async with asyncio.timeout(10):
        while world.group.membership.state != "serving":
            if not await world.move():
                await asyncio.sleep(0.001)


async def finish(world: World) -> None:
    """No more faults: enough workers and a store, until every request has ended."""
    world.add_store()
    world.copy_failures = 0.0
    for worker in world.group.membership.members.values():
        worker.cordoned = False
    while len(world.workers) < world.size + 1:
        world.add_worker()
    for _ in range(MOVES):
        if len(world.finished) == len(world.requests):
            break
        if not await world.move():
            await asyncio.sleep(0.005)  # the group's own tick is all that can bring it on
    assert len(world.finished) == len(world.requests), "a request hangs"
    await serving(world)
    async with asyncio.timeout(10):
        while await world.move() or world.group.pool.held or world.group.pool.lost:
            await asyncio.sleep(0.0005)  # cached pages still come back, or get their parity
    world.group.protection.flow()
    world.group.check()
    assert world.group.pool.held == 0
    assert not world.group.scheduler or not list(world.group.scheduler.sequences())
    world.check_nothing_stale()


@pytest.mark.usefixtures("ticking")
@pytest.mark.parametrize("parity", [1, 2])
@pytest.mark.parametrize("seed", range(40))
async def test_streams_are_right_whatever_dies_when(seed: int, parity: int) -> None:
    silent_loss = seed % 4 == 3
    world = World(seed, parity=parity, protect_tail=seed % 8 >= 4)
    world.room = 5 if seed % 5 == 2 else world.room
    dice = world.dice
    async with running(world):
        for _ in range(world.size + 1):
            world.add_worker()
        world.add_store()
        for _ in range(dice.randrange(200, 900)):
            what = dice.random()
            if what < 0.006 and world.workers:
                for worker in dice.sample(
                    list(world.workers.values()), min(len(world.workers), dice.choice((1, 1, 1, 2, 3)))
                ):
                    world.kill(worker)
            elif what < 0.015 and len(world.workers) < world.size + 2:
                world.add_worker()
            elif what < 0.03:
                world.submit(shared_prefix=dice.random() < 0.5, digest=dice.random() < 0.5)
            elif what < 0.034:
                world.abort()
            elif what < 0.036:
                world.lose_store()
            elif what < 0.045:
                world.add_store()
            elif what < 0.05:
                world.abort_collective()
            elif what < 0.056 and world.client is not None:
                world.copy_failures = dice.choice((0.0, 0.0, 0.3))
                action = dice.choice(("drain", "replace", "replace", "resume"))
                world.operate(action, f"rank:{dice.randrange(world.size)}")
            elif what < 0.058:
                await world.crash()
            elif what < 0.060 and world.workers:
                world.cut_off(dice.choice(list(world.workers.values())))
            elif what < 0.062:
                world.cut_gateway()
            elif what < 0.064:
                world.damage()
            elif what < 0.068 and silent_loss:
                world.parity_of.clear()  # a store loses its memory and tells nobody
            elif not await world.move():
                await asyncio.sleep(0)
            world.group.check()
            if not silent_loss:
                world.check_parity()
            await world.settle()
        await finish(world)


async def test_one_lost_rank_is_restored_from_parity_and_only_the_tail_recomputed() -> None:
    world = World(1, pages=64)
    async with running(world):
        for _ in range(world.size + 1):
            world.add_worker()
        world.add_store()
        await serving(world)
        name = world.submit(length=23, max_tokens=40)
        while len(world.received[name]) < 10:
            await world.move()
        while world.group.status().stripes_pending:
            await world.move()
        assert name not in world.finished
        sealed = world.group.status().stripes_protected
        world.kill(next(each for each in world.workers.values() if each.assign is not None and each.assign.rank == 1))
        await finish(world)
        record = world.group.status().recoveries[-1]
        assert record.restored_pages == sealed > 0
        assert record.recomputed_tokens < world.page_tokens
        assert record.lost_ranks == (1,)


async def test_each_stream_goes_on_when_its_own_pages_are_back() -> None:
    world = World(7, pages=200)
    async with running(world):
        for _ in range(world.size + 1):
            world.add_worker()
        world.add_store()
        await serving(world)
        long = world.submit(length=160, max_tokens=60)
        short = world.submit(length=9, max_tokens=60)
        while not (world.received[long] and world.received[short]) or world.group.status().stripes_pending:
            await world.move()
        had = len(world.received[short])
        world.kill(next(each for each in world.workers.values() if each.assign is not None and each.assign.rank == 1))
        while world.group.membership.state != "restoring":
            await world.move()
        while world.group.membership.state == "restoring":
            await world.move()
        ahead = len(world.received[short]) - had
        assert ahead > 3, "the short stream waited for the long one's pages"
        await finish(world)
        record = world.group.status().recoveries[-1]
        streams = {stream.request_id: stream for stream in record.streams}
        assert streams[short].resumed_s < streams[long].resumed_s
        assert {stream.way for stream in record.streams} == {"restore"}
        assert streams[long].restored_pages >= 160 // world.page_tokens


@pytest.mark.parametrize("length", [2, 23])
@pytest.mark.parametrize("parity", [1, 2])
async def test_with_tails_protected_nothing_is_recomputed(parity: int, length: int) -> None:
    world = World(11, pages=64, parity=parity, protect_tail=True)
    async with running(world):
        for _ in range(world.size + parity):
            world.add_worker()
        world.add_store()
        await serving(world)
        name = world.submit(length=length, max_tokens=60, digest=True)
        for had in (1, 12, 13, 14, 15):
            while len(world.received[name]) < had:
                await world.move()
            pool = world.group.pool
            while any(page.pins or page.shadow in (Shadow.QUEUED, Shadow.PENDING) for page in pool.pages):
                await world.move()
            epoch = world.group.membership.epoch
            for rank in range(parity):
                world.kill(world.workers[str(world.group.membership.ranks[(had + rank) % world.size])])
            while len(world.workers) < world.size + parity:
                world.add_worker()
            while world.group.membership.epoch == epoch or world.group.membership.state != "serving":
                if not await world.move():
                    await asyncio.sleep(0.001)
        await finish(world)
        records = world.group.status().recoveries
        assert len(records) == 5
        assert [record.recomputed_tokens for record in records] == [0] * 5
        assert sum(record.tail_tokens for record in records) > 0
        world.group.protection.flow()  # as it does every two seconds
        while world.store_wire is not None and world.store_wire.sent:
            await world.settle()
        kept = [page.key for page in world.group.pool.pages]
        assert all(key in kept for key in world.parity_of), "stripes of tails are left"


def stored(world: World, sequence: Sequence) -> int:
    """Tokens from a sequence's start whose parity the store has."""
    tails = world.group.protection.tails
    assert tails is not None
    pages = list(itertools.takewhile(world.parity_of.__contains__, sequence.keys))
    run = tails.run(sequence, len(pages) * world.page_tokens)
    return len(pages) * world.page_tokens + len(
        list(itertools.takewhile(lambda token: token.key in world.parity_of, run))
    )


@pytest.mark.parametrize("missing", [0, 1])
@pytest.mark.parametrize("seed", range(4))
async def test_of_a_page_that_has_just_sealed_only_tokens_without_a_stripe_are_recomputed(
    seed: int, missing: int
) -> None:
    world = World(seed, pages=64, protect_tail=True)
    async with running(world):
        for _ in range(world.size + 1):
            world.add_worker()
        world.add_store()
        await serving(world)
        name = world.submit(length=6, max_tokens=200, digest=True)
        while len(world.received[name]) < 3:
            await world.move()
        assert world.group.scheduler is not None
        (sequence,) = world.group.scheduler.running

        def sealed_alone() -> bool:
            """Whether its last page is full, has no parity of its own, and its tokens have, but for those `missing`."""
            full = sequence.computed == len(sequence.keys) * world.page_tokens
            have = stored(world, sequence)
            return full and sequence.keys[-1] not in world.parity_of and have == sequence.computed - missing

        while not sealed_alone():
            await world.move()
        world.kill(world.workers[str(world.group.membership.ranks[seed % world.size])])
        await finish(world)
        assert world.group.status().recoveries[-1].recomputed_tokens == missing


@pytest.mark.parametrize("parity", [1, 2])
async def test_the_prefix_cache_comes_back_after_a_loss(parity: int) -> None:
    world = World(8, pages=64, parity=parity)
    async with running(world):
        for _ in range(world.size + parity):
            world.add_worker()
        world.add_store()
        await serving(world)
        world.submit(length=40, max_tokens=5, shared_prefix=True)
        await finish(world)
        cached = world.group.status().pages_cached
        for worker in [each for each in world.workers.values() if each.assign is not None][:parity]:
            world.kill(worker)
        await serving(world)
        assert world.group.status().pages_lost == cached > 0
        assert world.group.status().can_lose == 0
        async with asyncio.timeout(10):
            while world.group.pool.lost:
                if not await world.move():
                    await asyncio.sleep(0.001)
        assert world.group.status().pages_cached == cached
        assert world.group.status().can_lose == parity
        world.check_slices()
        restored = world.restored
        world.submit(length=30, max_tokens=5, shared_prefix=True)
        await finish(world)
        assert world.group.pool.count(Shadow.PROTECTED) > cached
        assert world.restored == restored == cached * parity


async def test_a_page_being_restored_is_nobody_elses_when_its_request_ends() -> None:
    world = World(10, pages=12)
    async with running(world):
        for _ in range(world.size + 1):
            world.add_worker()
        world.add_store()
        await serving(world)
        name = world.submit(length=30, max_tokens=10)
        while len(world.received[name]) < 3 or world.group.status().stripes_pending:
            await world.move()
        world.kill(next(each for each in world.workers.values() if each.assign is not None and each.assign.rank == 1))
        while world.group.membership.state != "restoring":
            await world.move()
        under_way = [page.number for page in world.group.pool.pages if page.pins]
        assert under_way
        world.abort()
        world.submit(length=30, max_tokens=10)  # needs all the room that there is
        held = (
            {page for each in world.group.scheduler.sequences() for page in each.pages} if world.group.scheduler else ()
        )
        assert not set(held) & set(under_way)
        await finish(world)


async def test_cached_pages_that_no_store_has_are_dropped() -> None:
    world = World(9, pages=64)
    async with running(world):
        for _ in range(world.size + 1):
            world.add_worker()
        world.add_store()
        await serving(world)
        world.submit(length=40, max_tokens=5)
        await finish(world)
        world.parity_of.clear()
        world.kill(next(each for each in world.workers.values() if each.assign is not None))
        await serving(world)
        async with asyncio.timeout(10):
            while world.group.pool.lost:
                if not await world.move():
                    await asyncio.sleep(0.001)
        assert world.group.status().pages_cached == 0


async def decoding(world: World, *, spares: int = 1) -> str:
    """A group that serves, and a stream with protected pages that is far from its end. Returns its name."""
    for _ in range(world.size + spares):
        world.add_worker()
    world.add_store()
    await serving(world)
    name = world.submit(length=23, max_tokens=200, digest=True)
    while len(world.received[name]) < 10 or world.group.status().stripes_pending:
        await world.move()
    return name


async def moved(world: World, rank: int, old: str) -> None:
    async with asyncio.timeout(10):
        while world.group.membership.ranks[rank] == old or world.group.membership.state != "serving":
            if not await world.move():
                await asyncio.sleep(0.001)


@pytest.mark.usefixtures("ticking")
@pytest.mark.parametrize("action", ["drain", "replace"])
async def test_a_rank_moves_to_a_spare_and_nothing_is_restored_or_recomputed(action: OperatorAction) -> None:
    world = World(20, pages=128)
    async with running(world):
        await decoding(world)
        old = str(world.group.membership.ranks[1])
        answer = world.operate(action, "rank:1")
        assert isinstance(answer, Applied)
        assert isinstance(world.operate(action, "rank:2"), Refused)
        assert "draining" in [worker.state for worker in world.group.status().workers]
        await moved(world, 1, old)
        states = {worker.name: worker.state for worker in world.group.status().workers}
        assert states[old] == ("cordoned" if action == "drain" else "spare")
        assert world.group.status().pages_lost == 0
        world.check_slices()
        await finish(world)
        (record,) = world.group.status().recoveries
        assert record.planned
        assert record.restored_pages == record.recomputed_tokens == 0
        assert [stream.way for stream in record.streams] == ["kept"]
        assert world.restored == 0
        assert world.prepared_switches == 1 + 2  # the successor, and the two ranks that stay


@pytest.mark.usefixtures("ticking")
async def test_a_drained_worker_is_not_taken_before_it_is_resumed() -> None:
    world = World(21, pages=128)
    async with running(world):
        await decoding(world)
        old = str(world.group.membership.ranks[0])
        world.operate("drain", "rank:0")
        await moved(world, 0, old)
        world.kill(world.workers[str(world.group.membership.ranks[2])])
        for _ in range(200):
            await world.move()
        assert world.group.membership.state == "forming"
        world.operate("resume", "rank:0")
        await serving(world)
        assert world.group.membership.ranks[2] == old
        await finish(world)


@pytest.mark.usefixtures("ticking")
@pytest.mark.parametrize("dies", ["old", "new", "other"])
@pytest.mark.parametrize("after", [3, 10, 20, 40])
async def test_a_rank_that_moves_and_a_loss_on_the_way(dies: str, after: int) -> None:
    world = World(22 + after, pages=128)
    async with running(world):
        await decoding(world, spares=3)
        old = str(world.group.membership.ranks[1])
        world.operate("replace", "rank:1")
        async with asyncio.timeout(10):
            while (
                world.group.handover is None or world.group.handover.move is None or not world.group.handover.move.new
            ):
                await asyncio.sleep(0.001)
        move = world.group.handover.move
        for _ in range(after):
            await world.move()
        world.kill(world.workers[{"old": old, "new": move.new, "other": str(world.group.membership.ranks[2])}[dies]])
        await moved(world, 1, old)
        world.group.check()
        await finish(world)


@pytest.mark.usefixtures("ticking")
async def test_without_a_spare_a_rank_waits_to_move_and_the_group_serves() -> None:
    world = World(23, pages=128)
    async with running(world):
        name = await decoding(world, spares=0)
        world.operate("drain", "rank:1")
        had = len(world.received[name])
        while len(world.received[name]) < had + 5:
            await world.move()
        status = world.group.status()
        assert status.handover is not None
        assert status.handover.phase == "waiting"
        world.operate("resume", "rank:1")
        assert world.group.status().handover is None
        await finish(world)


async def test_what_can_not_move_is_refused() -> None:
    world = World(24)
    async with running(world):
        for _ in range(world.size + 1):
            world.add_worker()
        await serving(world)
        spare = world.group.membership.spares()[0].name
        for action, target, status in (
            ("drain", "rank:7", 404),
            ("drain", "rank:x", 404),
            ("drain", "elephant", 404),
            ("replace", f"worker:{spare}", 409),
        ):
            answer = world.operate(action, target)  # type: ignore[arg-type]
            assert isinstance(answer, Refused)
            assert answer.status == status
        assert isinstance(world.operate("drain", f"worker:{spare}"), Applied)
        assert world.group.membership.spares() == []


async def test_without_a_spare_it_says_what_it_waits_for_and_goes_on_when_one_comes() -> None:
    world = World(2)
    async with running(world):
        for _ in range(world.size):
            world.add_worker()
        await serving(world)
        world.submit()
        await world.move()
        world.kill(next(iter(world.workers.values())))
        while await world.move():
            pass
        status = world.group.status()
        assert status.state == "forming"
        assert "waiting for 1 more worker" in status.detail
        await finish(world)


async def test_a_late_word_of_the_epoch_before_does_not_break_the_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.coordinator.group.BROKEN_GRACE_S", 0.05)
    world = World(3)
    async with running(world):
        for _ in range(world.size + 1):
            world.add_worker()
        await serving(world)
        survivor, victim = world.group.membership.ranks[:2]
        world.kill(world.workers[str(victim)])
        assert world.group.membership.state == "forming"
        world.group.from_worker(str(survivor), RankFailed(1, 0, "its peer is gone", fatal=False))
        await serving(world)
        await asyncio.sleep(0.2)  # more than the grace, in which a broken epoch would be given up
        assert world.group.membership.state == "serving"
        assert world.group.membership.epoch == 2


async def test_an_epoch_that_is_broken_though_nobody_is_lost_is_formed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.coordinator.group.BROKEN_GRACE_S", 0.01)
    world = World(4)
    async with running(world):
        for _ in range(world.size):
            world.add_worker()
        await serving(world)
        world.submit()
        world.group.from_worker("w0", RankFailed(1, 0, "a collective failed", fatal=False))
        async with asyncio.timeout(5):
            while world.group.membership.epoch == 1:  # the group's own tick gives the epoch up
                await asyncio.sleep(0.005)
        await finish(world)
        assert world.group.membership.epoch == 2


async def test_a_rank_that_is_cut_off_from_the_others_gives_its_place_to_a_spare(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("services.coordinator.group.BROKEN_GRACE_S", 0.01)
    world = World(5)
    async with running(world):
        for _ in range(world.size + 1):
            world.add_worker()
        await serving(world)
        world.submit()
        cut = str(world.group.membership.ranks[1])
        world.group.from_worker(cut, RankFailed(1, 1, "rank 0 can't be reached", fatal=False, cut_off=True))
        async with asyncio.timeout(5):
            while world.group.membership.epoch == 1:
                await asyncio.sleep(0.005)
        assert cut not in world.group.membership.ranks
        await finish(world)


async def test_parity_that_a_store_lost_or_wants_to_be_rid_of_is_encoded_anew() -> None:
    world = World(5, pages=64)
    async with running(world):
        for _ in range(world.size):
            world.add_worker()
        world.add_store()
        while world.group.membership.state != "serving":
            await world.move()
        world.submit(length=23, max_tokens=40)
        await finish(world)
        protected = world.group.status().stripes_protected
        for _ in range(3):
            world.damage()
        assert world.group.status().stripes_protected < protected
        while world.group.status().stripes_pending:
            await world.move()
        assert world.group.status().stripes_protected == protected
        world.check_parity()
        world.group.from_store("store", StoreDrains(world.group.config.group, tuple(world.parity_of)))
        assert world.group.stores.open() == ()
        assert world.group.status().stripes_pending == protected  # and they stay so until there is another store


async def test_in_a_full_store_pages_in_use_take_the_room_of_cached_ones() -> None:
    world = World(7, pages=64)
    world.room = 12
    async with running(world):
        for _ in range(world.size):
            world.add_worker()
        world.add_store()
        await serving(world)
        world.submit(length=44, max_tokens=2)
        await finish(world)
        assert world.group.status().stripes_protected == 11
        name = world.submit(length=23, max_tokens=200)
        clock = time.monotonic()
        while len(world.received[name]) < 20 or world.group.status().can_lose == 0:
            assert name not in world.finished, "pages in use stay without parity"
            if world.dice.random() < 0.1:
                clock += 0.5
                world.group.pool.now = clock
                world.group.protection.retry(clock)
            await world.move()
        status = world.group.status()
        assert status.stripes_protected == 12
        assert status.unprotected_reason == "no room"
        world.check_parity()


@pytest.mark.parametrize(("stores", "reduced"), [(1, True), (2, False)])
async def test_fewer_stores_than_parity_shards_are_reported(stores: int, reduced: bool) -> None:
    world = World(8, parity=2)
    async with running(world):
        for _ in range(world.size):
            world.add_worker()
        world.add_store()
        await serving(world)
        world.submit(length=23, max_tokens=4)
        await finish(world)
        protected = world.group.status().stripes_protected
        if stores == 2:
            other = StoreInfo("other", "first", "tcp://nowhere:2", "http://nowhere:2", 1)
            world.group.store_joins(other, Wire())  # type: ignore[arg-type]
            assert world.group.status().stripes_pending == protected  # encoded anew, now to different stores
        assert bool(world.group.status().reduced_protection) is reduced
        assert world.group.status().can_lose == 2


async def test_a_store_keeps_what_it_holds_until_it_is_known_which_pages_there_are() -> None:
    world = World(6)
    async with running(world):
        stale, later = b"an earlier one's", b"one of this life"
        world.parity_of = {stale: [], later: []}
        world.written = {stale: (0, 99), later: (1, 99)}
        world.add_store()
        while await world.move():
            pass
        assert set(world.parity_of) == {stale, later}
        for _ in range(world.size):
            world.add_worker()
        await serving(world)
        while world.store_wire is not None and world.store_wire.sent:
            await world.settle()
        assert set(world.parity_of) == {later}


async def half_way(world: World, tokens: int = 10) -> str:
    """A request that has got so many tokens, all its pages protected."""
    for _ in range(world.size + 1):
        world.add_worker()
    world.add_store()
    await serving(world)
    name = world.submit(length=23, max_tokens=40)
    while len(world.received[name]) < tokens or world.group.status().stripes_pending:
        await world.move()
    assert name not in world.finished
    return name


async def test_a_coordinator_that_is_back_takes_all_over_and_recomputes_the_tail_only() -> None:
    world = World(7, pages=64)
    async with running(world):
        await half_way(world)
        before = world.group.status()
        await world.crash()
        world.group.membership.return_grace_s = 60.0  # which nobody has to wait for
        await serving(world)
        assert world.group.status().epoch == before.epoch + 1
        assert {worker.name: worker.rank for worker in world.group.status().workers} == {
            worker.name: worker.rank for worker in before.workers
        }
        await finish(world)
        record = world.group.status().recoveries[-1]
        assert record.reason == "the coordinator was restarted"
        assert record.lost_ranks == ()
        assert record.recomputed_tokens < world.page_tokens
        assert world.group.protection.parity_bytes < len(world.parity_of)  # most were not encoded again


async def test_a_rank_that_dies_with_the_coordinator_is_restored_from_parity() -> None:
    world = World(8, pages=64)
    async with running(world):
        await half_way(world)
        sealed = world.group.status().stripes_protected
        await world.crash()
        world.group.membership.return_grace_s = 0.1
        world.kill(next(each for each in world.workers.values() if each.assign is not None and each.assign.rank == 1))
        await finish(world)
        record = world.group.status().recoveries[-1]
        assert record.lost_ranks == (1,)
        assert record.restored_pages >= sealed > 0
        assert record.recomputed_tokens < world.page_tokens


async def test_a_worker_that_was_cut_off_returns_to_its_rank_if_no_other_has_taken_it() -> None:
    world = World(9, pages=64)
    async with running(world):
        for _ in range(world.size):
            world.add_worker()
        await serving(world)
        name = world.submit(length=23, max_tokens=40)
        while len(world.received[name]) < 10:
            await world.move()
        world.cut_off(world.workers["w1"])
        await serving(world)
        await finish(world)
        record = world.group.status().recoveries[0]
        assert record.restored_pages == 0
        assert record.recomputed_tokens < world.page_tokens


async def test_parity_that_is_lost_while_the_index_is_read_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(10, pages=64)
    async with running(world):
        await half_way(world)
        await world.crash()
        read, get_many = asyncio.Event(), world.index.get_many

        async def slow(group: str, keys: list[PageKey]) -> dict[PageKey, Stripe]:
            answer = await get_many(group, keys)
            await read.wait()
            return answer

        monkeypatch.setattr(world.index, "get_many", slow)
        await serving(world)
        world.damage()
        read.set()
        await world.settle()
        world.check_parity()
        await finish(world)
        world.check_parity()
        assert len(world.parity_of) == len(world.group.pool.keys)


@pytest.mark.usefixtures("ticking")
async def test_a_rank_that_has_moved_keeps_its_pages_when_the_coordinator_is_back() -> None:
    world = World(11, pages=128)
    async with running(world):
        await decoding(world)
        old = str(world.group.membership.ranks[1])
        assert isinstance(world.operate("replace", "rank:1"), Applied)
        await moved(world, 1, old)
        await world.crash()
        world.group.membership.return_grace_s = 60.0
        await serving(world)
        assert world.group.membership.ranks[1] != old
        assert world.group.pool.lost == 0
        assert world.group.pool.held + world.group.pool.cached > 0
        await finish(world)
        record = world.group.status().recoveries[0]
        assert record.restored_pages == 0
        assert record.recomputed_tokens < world.page_tokens
