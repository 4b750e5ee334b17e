"""One coordinator leads a group: another is refused, whoever is known to be dead is succeeded at once."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from services.coordinator.app import run
from services.coordinator.membership import lease
from services.coordinator.membership.lease import Holder, Lease
from shared.config import CoordinatorSettings
from shared.errors import ConfigError
from shared.stripe_index import StripeIndex
from tests.cluster.test_coordinator_alone import DEADLINE_S, coordinator, health

URL = "ws://127.0.0.1:1"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("LEASE_S", 0.5), ("RENEW_S", 0.05), ("PAUSE_S", 0.02), ("PATIENCE_S", 0.7)):
        monkeypatch.setattr(lease, name, value)


def heard(told: list[str]) -> Any:
    return lambda what: told.append(what)


async def leads(url: str) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while (await health(url))[1]["state"] != "forming":
            await asyncio.sleep(0.01)


async def test_a_second_coordinator_is_refused_and_the_first_goes_on(redis_url: str, group: str) -> None:
    async with coordinator(redis_url=redis_url, group=group) as first:
        await leads(first)
        with pytest.raises(ConfigError, match=f"has a coordinator already, at {first}"):
            await run(CoordinatorSettings(port=0, redis_url=redis_url, group=group), asyncio.Event())
        await leads(first)
        async with coordinator(redis_url=redis_url, group=group + "-other") as other:
            await leads(other)


async def test_who_stops_gives_the_lease_back(redis_url: str, group: str, index: StripeIndex) -> None:
    async with coordinator(redis_url=redis_url, group=group) as first:
        await leads(first)
    stranger = replace(Holder.here(URL), network="elsewhere", processes="elsewhere").pack()
    assert await index.take_lease(group, stranger, 60) == stranger


@pytest.mark.parametrize(
    "dead",
    [
        {"url": "ws://127.0.0.1:2", "began": 7},  # its pid is another process's now
        {"url": "ws://127.0.0.1:2", "pid": 2**22 + 1},
        {"processes": "a container that is gone"},  # we listen where it did
    ],
)
async def test_who_is_known_to_be_dead_is_succeeded_at_once(
    redis_url: str, group: str, index: StripeIndex, dead: dict[str, Any]
) -> None:
    await index.take_lease(group, replace(Holder.here(URL), **dead).pack(), 600)
    told: list[str] = []
    async with asyncio.timeout(0.4):
        await Lease(index, group, URL).take(heard(told))
    assert not told


async def test_a_lease_of_another_machine_has_to_run_out(group: str, index: StripeIndex) -> None:
    gone = replace(Holder.here(URL), network="elsewhere", processes="elsewhere")
    await index.take_lease(group, gone.pack(), 0.5)
    told: list[str] = []
    async with asyncio.timeout(DEADLINE_S):
        await Lease(index, group, URL).take(heard(told))
    assert f"the lease of the coordinator at {URL} has to run out" in told


async def test_a_coordinator_whose_lease_another_has_taken_ends(redis_url: str, group: str, index: StripeIndex) -> None:
    """It was stopped, or cut off from Redis, for longer than its lease: it must not raise the epoch any more."""
    stop, listening = asyncio.Event(), asyncio.get_running_loop().create_future()
    settings = CoordinatorSettings(port=0, redis_url=redis_url, group=group)
    running = asyncio.create_task(run(settings, stop, listening.set_result))
    await leads(await listening)
    other = replace(Holder.here(URL), network="elsewhere").pack()
    first = await index.take_lease(group, other, 60)
    assert await index.take_lease(group, other, 60, first) == other
    with pytest.raises(ExceptionGroup) as ended:
        async with asyncio.timeout(DEADLINE_S):
            await running
    assert "is led by the coordinator at" in str(ended.value.exceptions[0])
