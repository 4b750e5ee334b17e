"""Hosts die, are cut off, pause and restart in mid-stream; the official client sees the text of the fault-free run."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio

from tests.docker.client import PROMPTS, STREAM_S, TOKENS, Seen, Strike, stream_all
from tests.docker.conftest import ENGINE, IMAGE
from tests.docker.hosts import TOKEN, Hosts

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]

MODEL = "tiny"
STALL_S = 40.0
"""No stream may stand still longer, on a machine with two slow cores. Each test prints how long its streams did."""


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def hosts(models: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Hosts]:
    """All hosts, up."""
    running = Hosts(ENGINE, IMAGE, models, tmp_path_factory.mktemp("hosts"))
    await running.start()
    yield running


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def calm(hosts: Hosts) -> list[Seen]:
    """What the clients see when nothing fails."""
    seen = await stream_all(hosts.urls, TOKEN, MODEL, "calm")
    assert [len(each.tokens) for each in seen] == [TOKENS] * len(seen)
    assert all(each.digests for each in seen)
    return seen


async def survives(hosts: Hosts, calm: list[Seen], what: str, strike: Strike) -> dict[str, Any]:
    """Stream with a fault in it. Returns the status after it."""
    before = await hosts.whole()
    hit = await stream_all(hosts.urls, TOKEN, MODEL, what, strike)
    status = await hosts.status()
    stall_s = max(each.stall_s for each in hit)
    print(f"\n{what}: longest stall {stall_s:.2f} s, epoch {before['epoch']} to {status['epoch']}")
    assert [each.tokens for each in hit] == [each.tokens for each in calm]
    assert [each.text for each in hit] == [each.text for each in calm]
    assert [each.digests for each in hit] == [each.digests for each in calm]
    assert stall_s < STALL_S
    return status


def restored(before: dict[str, Any], after: dict[str, Any]) -> int:
    """Pages decoded from parity between two statuses."""
    known = {record["started"] for record in before["recoveries"]}
    return sum(record["restored_pages"] for record in after["recoveries"] if record["started"] not in known)


async def busiest(hosts: Hosts) -> str:
    """The worker host with most ranks."""
    counted = Counter(hosts.host_of(project) for project in (await hosts.ranks()).values())
    return counted.most_common(1)[0][0]


@pytest.mark.essential
async def test_containers_are_healthy_unprivileged_and_read_only(hosts: Hosts) -> None:
    await hosts.whole()
    async with asyncio.timeout(60):
        while True:
            found = json.loads(await hosts.docker("inspect", *hosts.containers.values()))
            if all(each["State"]["Health"]["Status"] == "healthy" for each in found):
                break
            await asyncio.sleep(0.5)
    assert {each["Config"]["User"] for each in found} == {"ghost"}
    assert all(each["HostConfig"]["ReadonlyRootfs"] for each in found)


async def test_addresses_are_those_that_reach_the_coordinator(hosts: Hosts) -> None:
    status = await hosts.whole()
    assert {store["bulk_address"] for store in status["stores"]} == {
        f"tcp://{hosts.hosts[name].address}:8200" for name in ("store-a", "store-b")
    }


@pytest.mark.essential
async def test_a_worker_container_is_killed(hosts: Hosts, calm: list[Seen]) -> None:
    before = await hosts.whole()
    victim = hosts.containers[(await hosts.ranks())[1]]
    try:
        after = await survives(hosts, calm, f"kill {victim}", lambda: hosts_do(hosts, "kill", victim))
        assert restored(before, after) > 0
    finally:
        await hosts.docker("start", victim)


async def test_a_whole_worker_host_is_killed(hosts: Hosts, calm: list[Seen]) -> None:
    before = await hosts.whole()
    victim = await busiest(hosts)
    try:
        after = await survives(hosts, calm, f"kill host {victim}", lambda: hosts.kill_host(victim))
        assert restored(before, after) > 0
    finally:
        await hosts.revive_host(victim)


async def test_a_store_host_and_a_worker_are_killed_at_once(hosts: Hosts, calm: list[Seen]) -> None:
    before = await hosts.whole()
    held = Counter((await hosts.ranks()).values())
    alone = next(project for project, ranks in held.items() if ranks == 1)  # half of the parity goes with the store
    victim = hosts.containers[alone]

    async def strike() -> None:
        await asyncio.gather(hosts.kill_host("store-a"), hosts_do(hosts, "kill", victim))

    try:
        after = await survives(hosts, calm, f"kill host store-a and {victim}", strike)
        assert restored(before, after) > 0
    finally:
        await hosts.revive_host("store-a")
        await hosts.docker("start", victim)


@pytest.mark.essential
async def test_a_worker_host_is_cut_off_from_all_others(hosts: Hosts, calm: list[Seen]) -> None:
    before = await hosts.whole()
    victim = await busiest(hosts)
    try:
        after = await survives(hosts, calm, f"disconnect {victim}", lambda: hosts.disconnect(victim))
        assert restored(before, after) > 0
    finally:
        await hosts.connect(victim)


async def test_worker_hosts_are_cut_off_from_one_another_only(hosts: Hosts, calm: list[Seen]) -> None:
    before = await hosts.whole()
    victim = hosts.host_of((await hosts.ranks())[2])
    others = [name for name in hosts.hosts if name.startswith("worker") and name != victim]
    try:
        await survives(hosts, calm, f"blackhole {victim}", lambda: hosts.blackhole(victim, others))
        assert (await hosts.status())["epoch"] > before["epoch"]
    finally:
        await hosts.blackhole(victim, others, end=True)


async def test_a_worker_container_is_paused_and_goes_on(hosts: Hosts, calm: list[Seen]) -> None:
    before = await hosts.whole()
    victim = hosts.containers[(await hosts.ranks())[0]]
    try:
        after = await survives(hosts, calm, f"pause {victim}", lambda: hosts_do(hosts, "pause", victim))
        assert restored(before, after) > 0
    finally:
        await hosts.docker("unpause", victim)


@pytest.mark.essential
async def test_the_coordinator_is_killed_and_started_again(hosts: Hosts, calm: list[Seen]) -> None:
    """Ranks keep their KV meanwhile, gateways have their streams go on. What both lives saw can be replayed."""
    coordinator = hosts.containers["coordinator"]

    async def strike() -> None:
        await hosts.docker("kill", coordinator)
        await hosts.docker("start", coordinator)

    after = await survives(hosts, calm, "restart coordinator", strike)
    assert [record["lost_ranks"] for record in after["recoveries"]] == [[]]
    assert after["recoveries"][0]["recomputed_tokens"] < sum(map(len, PROMPTS)) / 2
    story = await hosts.docker("exec", coordinator, "ghostserve", "replay", "/data")
    assert story.count("all as it was recorded") >= 2


@pytest.mark.essential
async def test_a_gateway_that_is_stopped_lets_its_streams_end_while_another_takes_the_new_ones(
    hosts: Hosts, calm: list[Seen]
) -> None:
    gateway = hosts.containers["gateway-a"]
    new: list[Seen] = []

    async def strike() -> None:
        stopping = asyncio.create_task(hosts.docker("stop", "--time", str(round(STREAM_S)), gateway))
        new.extend(await stream_all(hosts.urls, TOKEN, MODEL, "meanwhile"))
        await stopping

    try:
        await survives(hosts, calm, f"stop {gateway}", strike)
        assert [each.tokens for each in new] == [each.tokens for each in calm]
        assert (await hosts.exit_codes())["gateway-a"] == 0
    finally:
        await hosts.docker("start", gateway)


async def test_a_gateway_that_is_killed_takes_no_streams_of_another_with_it(hosts: Hosts, calm: list[Seen]) -> None:
    await hosts.whole()
    gateway, others = hosts.containers["gateway-a"], hosts.urls[1:]
    try:
        broken = asyncio.create_task(stream_all(hosts.urls[:1], TOKEN, MODEL, "broken"))
        hit = await stream_all(others, TOKEN, MODEL, "other", lambda: hosts_do(hosts, "kill", gateway))
        assert [each.tokens for each in hit] == [each.tokens for each in calm]
        with pytest.raises(openai.APIError):
            await broken
    finally:
        await hosts.docker("start", gateway)


async def test_everything_is_restarted_one_by_one(hosts: Hosts, calm: list[Seen]) -> None:
    """As the upgrade in docs/operations.md goes, while streams run: each of them is identical."""
    await hosts.whole()
    workers = ("c", "b", "a1", "a2")
    order = ("store-a", "store-b", *workers, "redis", "coordinator", "gateway-a", "gateway-b")
    done = asyncio.Event()

    async def roll() -> None:
        for name in order:
            if name in workers:
                await hosts.drain(name)
            elif name == "store-a":  # the other one's parity is encoded anew
                await hosts.drain_store(name)
            await hosts.docker("restart", "--time", str(round(STREAM_S)), hosts.containers[name])
            await hosts.whole()
        done.set()

    rolling = asyncio.create_task(roll())
    rounds = 0
    while not done.is_set() and not rolling.done():
        rounds += 1
        seen = await stream_all(hosts.urls, TOKEN, MODEL, f"rolling-{rounds}")
        assert [each.tokens for each in seen] == [each.tokens for each in calm], f"round {rounds}"
        assert [each.digests for each in seen] == [each.digests for each in calm], f"round {rounds}"
    await rolling
    print(f"\nrolling restart of {len(order)} containers: {rounds} rounds of streams, all identical")


@pytest.mark.essential
async def test_every_service_ends_cleanly_when_it_is_told_to(hosts: Hosts) -> None:
    await hosts.whole()
    await hosts.docker("stop", "--time", "20", *reversed(hosts.containers.values()))
    assert set((codes := await hosts.exit_codes()).values()) == {0}, codes


async def hosts_do(hosts: Hosts, *arguments: str) -> None:
    """A docker command as a fault."""
    await hosts.docker(*arguments)
