"""The fault matrix on a real cluster: whatever breaks, all streams end with the text of the run without a fault."""

import asyncio
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from services.cli.drill import Options, Report, Stream, run_drill, stream_all
from services.cli.local import LocalCluster
from services.worker.agent.supervisor import RESTART_PAUSE_S
from tests.cluster.conftest import quiet, whole

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]

BASE = Options(prompt_tokens=200, max_tokens=48, streams=2)
UNDISTURBED_S = 2.5
"""No stall as long as this, though a store or Redis does not answer: far above what a busy machine adds, far below
each of the deadlines for which somebody could have waited."""


RESTORED = BASE.streams * ((BASE.prompt_tokens - 1) // 16)
"""Pages of prompts that are `cached`. Of others it is up to the machine which are protected when the fault comes."""


async def drilled(cluster: LocalCluster, fault: str, *targets: str, **changes: object) -> Report:
    """A drill in the shared cluster, which is whole before and after; all streams are as they should be."""
    await whole(cluster)
    async with cluster.kept():
        report = await run_drill(cluster, replace(BASE, fault=fault, targets=targets, **changes))  # type: ignore[arg-type]
        await whole(cluster)
    assert report.identical, report.events
    # a bit may flip before its page is sealed, and then is what the checksum is taken of
    assert report.kv_identical or fault == "corrupt:page", report.events
    return report


# -- workers ---------------------------------------------------------------------------------------------------------


async def test_a_stopped_worker_is_seen_within_a_second_and_never_heard_again(cluster: LocalCluster) -> None:
    report = await drilled(cluster, "stop", "rank:1", for_s=3.0, cached=True)
    assert report.phases["detect_s"] <= 1.0
    assert report.restored_pages >= RESTORED


async def test_a_worker_that_wakes_up_finds_itself_fenced_and_becomes_a_spare(cluster: LocalCluster) -> None:
    """Its supervisor is stopped with it, and can't kill it: the coordinator sees that it alone is silent."""
    before = await whole(cluster)
    victim = next(each for each in before["workers"] if each["rank"] == 1)
    both = (victim["pid"], cluster.processes["workers"].pid)
    calm = await stream_all(cluster, [[7] * 200, [9] * 90], BASE, "fenced-calm")

    async def stop_until_replaced() -> None:
        for pid in both:
            os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        try:
            async with asyncio.timeout(30):
                while (status := await cluster.status())["epoch"] == before["epoch"]:
                    await asyncio.sleep(0.02)
        finally:
            for pid in both:
                os.kill(pid, signal.SIGCONT)
        assert time.monotonic() - began < 2.9, status["recoveries"][-1:]

    struck: list[asyncio.Task[None]] = []

    def strike(index: int, stream: Stream) -> None:
        if len(stream.tokens) == 20 and not struck:
            struck.append(asyncio.get_running_loop().create_task(stop_until_replaced()))

    hit = await stream_all(cluster, [[7] * 200, [9] * 90], BASE, "fenced-hit", watch=strike)
    await struck[0]
    assert [each.tokens for each in hit] == [each.tokens for each in calm]
    assert [each.digests for each in hit] == [each.digests for each in calm]
    after = await whole(cluster)
    woken = next(each for each in after["workers"] if each["pid"] == victim["pid"])
    assert (woken["name"], woken["rank"], woken["state"]) == (victim["name"], None, "spare")


async def test_a_supervisor_that_is_stopped_while_a_restart_is_due_starts_the_worker_when_it_goes_on(
    cluster: LocalCluster,
) -> None:
    before = await whole(cluster)
    victim = next(each for each in before["workers"] if each["rank"] is None)
    supervisor = cluster.processes["workers"]
    assert supervisor.command.log is not None
    os.kill(victim["pid"], signal.SIGKILL)
    async with asyncio.timeout(10):
        while f"(pid {victim['pid']}) died with signal SIGKILL" not in supervisor.command.log.read_text():
            await asyncio.sleep(0.002)
    os.kill(supervisor.pid, signal.SIGSTOP)
    await asyncio.sleep(3 * RESTART_PAUSE_S)  # for as long it is stopped
    os.kill(supervisor.pid, signal.SIGCONT)
    after = await whole(cluster, without=victim["name"])
    assert after["epoch"] == before["epoch"]
    assert supervisor.alive


async def test_a_worker_that_hangs_while_it_beats_is_lost(cluster: LocalCluster) -> None:
    report = await drilled(cluster, "hang", "rank:2", for_s=0.1, cached=True)
    assert report.phases["detect_s"] >= 1.9  # not by a missed heartbeat, or a closed channel
    assert report.restored_pages >= RESTORED


async def test_a_worker_that_hangs_when_its_epoch_ends_does_not_hold_up_the_next_one(cluster: LocalCluster) -> None:
    """A rank dies before the hang is seen. In the new epoch the stuck thread begins nothing, and the others wait."""
    report = await drilled(cluster, "hang", "rank:0", for_s=0.1, then=("rank:1",), then_s=0.5)
    assert report.stall_s < 20.0  # far below the time that ranks have to join


@pytest.mark.parametrize("fault", ["cut:peers", "cut:coordinator"])
async def test_a_worker_cut_off_is_replaced(cluster: LocalCluster, fault: str) -> None:
    report = await drilled(cluster, fault, "rank:1", for_s=6.0, cached=True)
    assert report.restored_pages >= RESTORED


async def test_a_worker_cut_off_from_the_stores_serves_on(cluster: LocalCluster) -> None:
    before = await whole(cluster)
    report = await drilled(cluster, "cut:store", "rank:1", for_s=1.0)
    assert report.stall_s < UNDISTURBED_S
    assert (await quiet(cluster))["epoch"] == before["epoch"]


async def test_a_worker_slowed_to_a_tenth_is_a_straggler_and_no_more(cluster: LocalCluster) -> None:
    before = await whole(cluster)
    seen: set[str] = set()

    async def look() -> None:
        while True:
            seen.update(each["name"] for each in (await cluster.status())["workers"] if each["straggler"])
            await asyncio.sleep(0.1)

    looking = asyncio.create_task(look())
    await drilled(cluster, "slow", "rank:1", for_s=8.0, max_tokens=140)
    looking.cancel()
    after = await whole(cluster)
    assert seen == {each["name"] for each in before["workers"] if each["rank"] == 1}
    assert after["epoch"] == before["epoch"]


async def test_a_spare_that_dies_with_the_rank_that_it_would_take(cluster: LocalCluster) -> None:
    report = await drilled(cluster, "kill", "rank:1", "spare", cached=True)
    assert report.restored_pages >= RESTORED


async def test_all_ranks_at_once_are_recomputed(cluster: LocalCluster) -> None:
    report = await drilled(cluster, "kill", "rank:0", "rank:1", "rank:2")
    assert report.restored_pages == 0
    assert report.recomputed_tokens >= 2 * 200


async def test_a_rank_that_dies_while_another_is_recovered(cluster: LocalCluster) -> None:
    """The second one so soon after the first that pages are being decoded, or the tail recomputed."""
    await drilled(cluster, "kill", "rank:0", then=("rank:2",), then_s=0.08)


async def test_weights_that_are_gone_cost_spares_but_no_rank_and_are_read_when_they_are_back(
    cluster: LocalCluster, small_model_dir: Path
) -> None:
    """A worker that starts anew finds no weights and says so; the host's others, who hold theirs, serve on."""
    status = await whole(cluster)
    log = cluster.processes["workers"].command.log
    seen = len(log.read_text())
    spare = next(worker["name"] for worker in status["workers"] if worker["rank"] is None)
    async with asyncio.timeout(60):  # it reads what it may need when nothing else is to do
        while not re.search(rf"{re.escape(spare)} .*holds the slices", log.read_text()):
            await asyncio.sleep(0.05)
    weights = small_model_dir / "model.safetensors"
    weights.rename(small_model_dir / "gone")
    try:
        async with asyncio.timeout(60):
            report = await run_drill(cluster, replace(BASE, fault="kill", targets=("rank:1",)))
        assert report.identical
        async with asyncio.timeout(60):
            while "died with exit code 78" not in log.read_text()[seen:]:
                await asyncio.sleep(0.05)
        assert "no *.safetensors" in log.read_text()[seen:]
        after = await cluster.wait_serving(5)
        assert len(after["workers"]) == len(status["workers"]) - 1
    finally:
        (small_model_dir / "gone").rename(weights)
    await whole(cluster)
    assert " filled: " not in log.read_text()[seen:]  # whoever starts anew takes what the host holds


# -- stores and Redis ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "seen"), [("kill", "0 store(s)"), ("stop", ""), ("slow", ""), ("full", "no room: a drill says so")]
)
async def test_serving_never_waits_for_a_store(cluster: LocalCluster, fault: str, seen: str) -> None:
    before = await whole(cluster)
    report = await drilled(cluster, fault, "store:0", for_s=2.0)
    assert report.stall_s < UNDISTURBED_S
    assert any(seen in event for event in report.events), report.events
    after = await quiet(cluster)
    assert after["epoch"] == before["epoch"]


async def test_a_worker_and_the_only_store_at_once_are_recomputed(cluster: LocalCluster) -> None:
    report = await drilled(cluster, "kill", "store:0", "rank:1")
    assert report.restored_pages == 0


@pytest.mark.parametrize("fault", ["kill", "stop", "full", "empty"])
async def test_serving_never_waits_for_redis(cluster: LocalCluster, fault: str) -> None:
    before = await whole(cluster)
    report = await drilled(cluster, fault, "redis", for_s=2.0)
    assert report.stall_s < UNDISTURBED_S
    assert (await quiet(cluster))["epoch"] == before["epoch"]


@pytest.mark.parametrize("fault", ["kill", "stop"])
async def test_a_rank_lost_while_redis_is_away_is_restored_from_what_the_stores_say(
    cluster: LocalCluster, fault: str
) -> None:
    report = await drilled(
        cluster, fault, "redis", for_s=3.0, then=("rank:1",), when="token:20", then_s=0.05, max_tokens=120, cached=True
    )
    assert report.restored_pages >= RESTORED


# -- flipped bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "target"), [("corrupt:page", "rank:0"), ("corrupt:parity", "store:0"), ("garbage", "store:0")]
)
async def test_flipped_bits_never_reach_a_restored_page(cluster: LocalCluster, fault: str, target: str) -> None:
    report = await drilled(
        cluster, fault, target, then=("rank:1",), then_s=0.15, for_s=0.1, max_tokens=160, when="token:20"
    )
    assert report.recomputed_tokens >= 200


async def test_bits_flipped_on_the_wire_are_refused_by_the_store_and_put_again(cluster: LocalCluster) -> None:
    report = await drilled(cluster, "corrupt:wire", "rank:0", for_s=2.0, when="token:10", max_tokens=160)
    assert any("arrived damaged" in event for event in report.events), report.events
    await cluster.wait_protected(30)


# -- gateways and all ------------------------------------------------------------------------------------------------


async def test_a_killed_gateway_breaks_its_own_streams_and_leaves_nothing_running(cluster: LocalCluster) -> None:
    report = await drilled(cluster, "kill", "gateway")
    assert report.broken == report.streams
    await quiet(cluster)


@pytest.mark.parametrize(
    "targets",
    [
        pytest.param(("all",), id="Redis too"),
        pytest.param(("coordinator", "gateway", "store:0", "rank:0", "rank:1", "rank:2", "spare"), id="Redis lives"),
    ],
)
async def test_after_everything_was_killed_it_comes_up_clean(cluster: LocalCluster, targets: tuple[str, ...]) -> None:
    """What Redis still says of the stores' former lives must not be believed."""
    report = await drilled(cluster, "kill", *targets)
    assert report.broken == report.streams
    assert report.restored_pages == 0
    await cluster.wait_protected(30)
