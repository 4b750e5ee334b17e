"""Ranks of a real cluster are killed in mid-stream; the text, and the KV, are those of the fault-free run."""

import asyncio
import os
import random
import signal
import time

import aiohttp
import pytest

from services.cli.drill import Options, Stream, run_drill, stream_all
from services.cli.local import LocalCluster
from services.worker.agent.supervisor import tell_of_death
from services.worker.identity import host_id
from shared.config import WorkerSettings
from shared.messages import WorkerHello
from tests.cluster.conftest import quiet, whole

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(400)]

RANDOM_KILLS = int(os.environ.get("GHOST_TEST_KILLS", "12"))


async def conserved(cluster: LocalCluster) -> None:
    """With nothing running, every page is free or cached, and the store holds the stripes of cached pages, no other."""
    async with aiohttp.ClientSession() as session, asyncio.timeout(30):
        while True:
            status = await quiet(cluster)
            assert status["stripes_unprotected"] == 0, status["unprotected_reason"]
            async with session.get(cluster.processes["store-0"].address + "/admin/status") as response:
                stored = (await response.json())["stripes"]
            if stored == status["stripes_protected"] == status["pages_cached"]:
                return
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("streams", [1, 4])
@pytest.mark.parametrize("when", ["prefill", "decode"])
@pytest.mark.parametrize("rank", [0, 1, 2])
async def test_text_and_kv_are_the_same_when_a_rank_dies(
    cluster: LocalCluster, rank: int, when: str, streams: int
) -> None:
    await whole(cluster)
    decode = when == "decode"  # cached: what comes back is what is protected, and that is sure only of cached prompts
    options = Options("kill", (f"rank:{rank}",), when, 300, 48, streams, seed=rank, cached=decode)
    report = await run_drill(cluster, options)
    assert report.identical
    assert report.kv_identical
    if decode:
        assert report.restored_pages >= streams * (299 // 16)
        assert report.recomputed_tokens <= streams * (300 % 16 + 48)


async def test_a_rank_that_died_of_its_device_is_recorded_with_what_failed(cluster: LocalCluster) -> None:
    """Its supervisor says so when the recovery has begun, or is over."""
    status = await whole(cluster)
    victim = next(worker for worker in status["workers"] if worker["rank"] == 1)
    os.kill(victim["pid"], signal.SIGKILL)
    await whole(cluster, without=victim["name"])
    settings = WorkerSettings(coordinator_url=cluster.coordinator_url, secret=cluster.settings.secret)
    dead = WorkerHello(victim["name"], victim["host"], host_id(), victim["pid"], "cuda:1")
    assert await tell_of_death(settings, dead, "the device failed: Xid 79") == 0
    status = await whole(cluster, without=victim["name"])
    reason = f"rank 1 ({victim['name']}): the device failed: Xid 79"
    assert status["recoveries"][-1]["reason"] == reason


async def test_more_ranks_lost_than_parity_covers_are_recomputed(cluster: LocalCluster) -> None:
    await whole(cluster)
    report = await run_drill(cluster, Options("kill", ("rank:0", "rank:2"), "decode", 200, 32, 2))
    assert report.identical
    assert report.restored_pages == 0
    assert report.recomputed_tokens >= 2 * 200


@pytest.mark.timeout(120 + 12 * RANDOM_KILLS)
async def test_random_kills_at_random_moments_change_no_token(cluster: LocalCluster) -> None:
    seed = int(os.environ.get("GHOST_TEST_SEED", str(time.time_ns() % 1_000_000)))
    print(f"seed {seed}")
    dice = random.Random(seed)
    prompts = [[dice.randrange(3, 400) for _ in range(dice.randrange(1, 700))] for _ in range(4)]
    options = Options(max_tokens=40, streams=len(prompts))
    calm = await stream_all(cluster, prompts, options, f"calm-{seed}")
    calm_s = max(each.times[-1] - each.started for each in calm)
    victim = {"name": ""}
    for kill in range(RANDOM_KILLS):
        status = await whole(cluster, without=victim["name"])
        victim = dice.choice(status["workers"])
        moment = dice.uniform(0.0, calm_s)

        async def strike(pid: int = victim["pid"], moment: float = moment) -> None:
            await asyncio.sleep(moment)
            os.kill(pid, signal.SIGKILL)

        hit = await stream_all(cluster, prompts, options, f"hit-{seed}-{kill}", background=strike)
        told = f"seed {seed}, kill {kill}: {victim['name']} (rank {victim['rank']}) after {moment:.3f} s"
        assert [each.tokens for each in hit] == [each.tokens for each in calm], told
        assert [each.digests for each in hit] == [each.digests for each in calm], told
    await whole(cluster, without=victim["name"])
    await conserved(cluster)


async def test_a_group_without_a_spare_says_so_and_goes_on_when_one_comes(cluster: LocalCluster) -> None:
    status = await whole(cluster)
    supervisor = cluster.processes["workers"].pid
    prompts = [[5] * 100]
    options = Options(max_tokens=64)
    calm = await stream_all(cluster, prompts, options, "no-spare-calm")
    seen_waiting = asyncio.Event()

    async def starve() -> None:
        """Stop the supervisor, kill a rank and the spare, and let it start new ones once /health has said so."""
        os.kill(supervisor, signal.SIGSTOP)
        try:
            for worker in status["workers"]:
                if worker["rank"] in (None, 1):
                    os.kill(worker["pid"], signal.SIGKILL)
            async with aiohttp.ClientSession() as session, asyncio.timeout(30):
                while not seen_waiting.is_set():
                    async with session.get(cluster.base_url + "/health") as response:
                        text = await response.text()
                        if response.status == 503 and "waiting for 1 more worker" in text:
                            seen_waiting.set()
                    await asyncio.sleep(0.02)
        finally:
            os.kill(supervisor, signal.SIGCONT)

    struck: list[asyncio.Task[None]] = []

    def watch(index: int, stream: Stream) -> None:
        if len(stream.tokens) == 20 and not struck:
            struck.append(asyncio.get_running_loop().create_task(starve()))

    hit = await stream_all(cluster, prompts, options, "no-spare-hit", watch=watch)
    await struck[0]
    assert seen_waiting.is_set()
    assert hit[0].tokens == calm[0].tokens
    assert hit[0].digests == calm[0].digests
    await whole(cluster)
