"""Ranks of vLLM die under real streams: the streams go on with the same tokens, and nothing else dies.

Each test is told by the coordinator's record what came back from parity and what was computed again.
"""

import asyncio
import os
import signal

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

from tests.cluster.test_store_loss import flip_all
from tests.vllm.protected import Protected
from tests.vllm.server import Seen, prompt, stream
from tests.vllm.streams import Breaks, run_streams, same

pytestmark = pytest.mark.timeout(300)

BLOCK = 32


async def _known(whole: Protected) -> float:
    """When, by the cluster, all that was computed before has its parity."""
    await whole.protected()
    return (await whole.status())["now"]


@pytest.mark.parametrize(("rank", "count"), [(1, 1), (0, 4), (2, 16)])
async def test_streams_are_identical_when_a_rank_dies_in_decode(whole: Protected, rank: int, count: int) -> None:
    server = whole.server
    before = await run_streams(server, count)
    known = await _known(whole)
    survivors = {each: pid for each, pid in server.ranks().items() if each != rank}
    kill = Breaks(8, lambda: server.kill(rank))
    after = await run_streams(server, count, kill)
    same(after, before)
    assert survivors.items() <= server.ranks().items()
    (record,) = await whole.records(known)
    assert record["lost_ranks"] == [rank]
    assert record["restored_pages"] > 0
    assert record["recomputed_tokens"] <= count * (BLOCK + 1)
    print(f"rank {rank}, {count} streams: stall {max(seen.stall(kill.at) for seen in after):.3f} s")


@pytest.mark.parametrize("rank", [0, 1, 2])
async def test_stream_is_identical_when_a_rank_dies_in_chunked_prefill(whole: Protected, rank: int) -> None:
    ids = prompt(100 + rank, 3900)  # 16 chunks

    async def read(salt: str) -> Seen:
        return await stream(whole.server, ids, 8, extra_body={"cache_salt": salt})

    before = await read("before")
    known = await _known(whole)
    held = (await whole.status())["stripes_protected"]
    with whole.ordered("slow"):
        reading = asyncio.create_task(read("after"))
        await whole.until(lambda status: status["stripes_protected"] >= held + 30, "no prefill")
        whole.server.kill(rank)
    after = await reading
    assert (after.tokens, len(after.tokens)) == (before.tokens, 8)
    (record,) = await whole.records(known)
    assert record["restored_pages"] >= 30
    assert record["recomputed_tokens"] < 3900 - 30 * BLOCK


async def test_streams_are_identical_when_a_second_rank_dies_while_the_first_comes_back(whole: Protected) -> None:
    server = whole.server
    before = await run_streams(server, 4)
    known = await _known(whole)
    spares = server.spares()
    kill = Breaks(8, lambda: server.kill(1))
    reading = asyncio.create_task(run_streams(server, 4, kill))
    while server.ranks().get(1) not in spares:  # it takes the rank: the recovery runs
        await asyncio.sleep(0.005)
    server.kill(2)
    same(await reading, before)
    records = await whole.records(known)
    assert {rank for record in records for rank in record["lost_ranks"]} == {1, 2}
    assert sum(record["restored_pages"] for record in records) > 0


async def test_streams_are_identical_when_the_spare_dies_as_it_takes_the_rank(whole: Protected) -> None:
    server = whole.server
    before = await run_streams(server, 4)
    known = await _known(whole)
    (spare,) = server.spares()
    kill = Breaks(8, lambda: server.kill(0))
    reading = asyncio.create_task(run_streams(server, 4, kill))
    while server.ranks().get(0) != spare:
        await asyncio.sleep(0.005)
    os.kill(spare, signal.SIGKILL)
    same(await reading, before)
    assert sum(record["restored_pages"] for record in await whole.records(known)) > 0


async def test_streams_are_identical_when_as_many_ranks_die_as_there_are_parity_shards(whole: Protected) -> None:
    before = await run_streams(whole.server, 4)
    known = await _known(whole)
    same(await run_streams(whole.server, 4, Breaks(8, lambda: whole.server.kill(0, 2))), before)
    (record,) = await whole.records(known)
    assert record["lost_ranks"] == [0, 2]
    assert record["restored_pages"] > 0
    assert record["recomputed_tokens"] <= 4 * (BLOCK + 1)


async def test_streams_are_identical_when_all_ranks_die(whole: Protected) -> None:
    before = await run_streams(whole.server, 4)
    known = await _known(whole)
    same(await run_streams(whole.server, 4, Breaks(8, lambda: whole.server.kill(0, 1, 2))), before)
    (record, *_) = await whole.records(known)
    assert record["lost_ranks"] == [0, 1, 2]
    assert record["restored_pages"] == 0
    assert record["recomputed_tokens"] > 0


# -- controls: without parity's bytes it is not the same, or is computed again ---------------------------------------


async def test_control_tokens_differ_when_what_was_decoded_is_not_written(whole: Protected) -> None:
    before = await run_streams(whole.server, 1, salt="forget")
    known = await _known(whole)
    with whole.ordered("forget"):
        after = await run_streams(whole.server, 1, Breaks(8, lambda: whole.server.kill(1)), salt="forget")
        (record,) = await whole.records(known)
    assert record["restored_pages"] > 0
    assert [seen.tokens for seen in after] != [seen.tokens for seen in before]


async def test_control_pages_whose_parity_was_changed_are_computed_again(whole: Protected) -> None:
    before = await run_streams(whole.server, 4, salt="flip")
    known = await _known(whole)
    for number in range(2):
        await whole.on_loop(flip_all(whole.cluster, f"store-{number}"))
    same(await run_streams(whole.server, 4, Breaks(4, lambda: whole.server.kill(1)), salt="flip"), before)
    (record,) = await whole.records(known)
    assert record["restored_pages"] == 0
    assert record["recomputed_tokens"] > 4 * BLOCK


# -- what protects is lost beside ------------------------------------------------------------------------------------


async def test_streams_go_on_while_store_redis_and_coordinator_are_lost_beside(whole: Protected) -> None:
    before = await run_streams(whole.server, 4)
    for name in ("store-0", "redis", "coordinator"):
        await whole.protected()
        kill = Breaks(8, lambda: whole.server.kill(1))
        reading = asyncio.create_task(run_streams(whole.server, 4, kill))
        await asyncio.to_thread(kill.done.wait, 60)
        await whole.kill(name)
        await whole.respawn(name)
        same(await reading, before)
        await whole.whole()


async def test_a_rank_that_dies_while_the_coordinator_is_away_is_replaced_when_it_is_back(whole: Protected) -> None:
    before = await run_streams(whole.server, 4)
    await whole.kill("coordinator")
    kill = Breaks(8, lambda: whole.server.kill(2))
    reading = asyncio.create_task(run_streams(whole.server, 4, kill))
    await asyncio.to_thread(kill.done.wait, 60)
    done, _ = await asyncio.wait([reading], timeout=1.0)
    assert not done, "who decided about the rank?"
    await whole.respawn("coordinator")
    same(await reading, before)
