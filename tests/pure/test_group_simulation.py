"""The whole coordinator under random faults at random moments: no token is wrong, lost or sent twice, no page leaks."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.pure.world import World

MOVES = 100_000


@asynccontextmanager
async def running(world: World) -> AsyncIterator[None]:
    stop = asyncio.Event()
    task = asyncio.create_task(world.group.run(stop))
    await asyncio.sleep(0)
    try:
        yield
    finally:
        stop.set()
        await asyncio.wait_for(task, 5.0)


async def finish(world: World) -> None:
    """No more faults: enough workers and a store, until every request has ended."""
    world.add_store()
    while len(world.workers) < world.size + 1:
        world.add_worker()
    for _ in range(MOVES):
        if len(world.finished) == len(world.requests):
            break
        if not await world.move():
            await asyncio.sleep(0.005)  # the group's own tick is all that can bring it on
    assert len(world.finished) == len(world.requests), "a request hangs"
    while await world.move():
        pass
    world.group.check()
    assert world.group.pool.held == 0
    assert not world.group.scheduler or not list(world.group.scheduler.sequences())


@pytest.mark.parametrize("parity", [1, 2])
@pytest.mark.parametrize("seed", range(40))
async def test_streams_are_right_whatever_dies_when(seed: int, parity: int) -> None:
    world = World(seed, parity=parity)
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
            elif not await world.move():
                await asyncio.sleep(0)
            world.group.check()
            await world.settle()
        await finish(world)


async def test_one_lost_rank_is_restored_from_parity_and_only_the_tail_recomputed() -> None:
    world = World(1, pages=64)
    async with running(world):
        for _ in range(world.size + 1):
            world.add_worker()
        world.add_store()
        while world.group.membership.state != "serving":
            await world.move()
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


async def test_without_a_spare_it_says_what_it_waits_for_and_goes_on_when_one_comes() -> None:
    world = World(2)
    async with running(world):
        for _ in range(world.size):
            world.add_worker()
        while world.group.membership.state != "serving":
            await world.move()
        world.submit()
        await world.move()
        world.kill(next(iter(world.workers.values())))
        while await world.move():
            pass
        status = world.group.status()
        assert status.state == "forming"
        assert "waiting for 1 more worker" in status.detail
        await finish(world)
