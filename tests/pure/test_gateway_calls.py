"""A call hands out what has come, bounded, and an alarm rings for a wait that is too long; no network."""

import asyncio
from collections.abc import Sequence

import pytest

from services.gateway import call as calls
from services.gateway.alarm import Alarm
from services.gateway.call import Call, StreamLost
from shared.messages import Tokens
from shared.types import GenerationRequest, SamplingParams, pack_ids


class Nowhere:
    """A cluster that only remembers what is not wanted any more."""

    def __init__(self) -> None:
        self.aborted: list[str] = []

    async def submit(self, call: Call, sequences: Sequence[GenerationRequest]) -> None:
        """Nothing is sent."""

    def forget(self, request_id: str, *, abort: bool) -> None:
        if abort:
            self.aborted.append(request_id)


def a_call(cluster: Nowhere, buffer_tokens: int) -> Call:
    names = ("r-0", "r-1")
    return Call(cluster, [GenerationRequest(name, b"", 9, SamplingParams()) for name in names], buffer_tokens)


def a_token(name: str, token: int) -> Tokens:
    return Tokens(name, pack_ids([token]), (), (), None, 0)


async def test_who_is_behind_gets_all_that_has_come_in_one_go() -> None:
    async with a_call(Nowhere(), 10_000) as call:
        for token in range(calls.MOST_AT_ONCE):
            call.deliver(a_token(f"r-{token % 2}", token))
        call.deliver(a_token("r-0", 5))
        first, second = await call.next(), await call.next()
        assert [(index, event.request_id) for index, event in first[:2]] == [(0, "r-0"), (1, "r-1")]
        assert (len(first), len(second)) == (calls.MOST_AT_ONCE, 1)


async def test_a_reader_that_is_too_slow_gets_what_was_held_and_then_an_error() -> None:
    cluster = Nowhere()
    async with a_call(cluster, 100) as call:
        for _ in range(3):  # what is taken counts no more
            for token in range(100):
                call.deliver(a_token("r-0", token))
            assert len(await call.next()) == 100
        assert cluster.aborted == []
        for token in range(101):
            call.deliver(a_token("r-0", token))
        assert sorted(cluster.aborted) == ["r-0", "r-1"]
        assert len(await call.next()) == 101
        with pytest.raises(StreamLost, match="more than 100 tokens unread"):
            await call.next()


async def test_an_alarm_rings_once_for_each_wait_that_is_too_long_and_for_no_other() -> None:
    rung: list[float] = []
    rings, loop = asyncio.Event(), asyncio.get_running_loop()

    def ring() -> None:
        rung.append(loop.time())
        rings.set()

    alarm = Alarm(0.05, ring)
    until = loop.time() + 0.2
    while loop.time() < until:  # many short ones
        alarm.begin()
        await asyncio.sleep(0)
        alarm.end()
    assert not rung
    for _ in range(2):
        rings.clear()
        began = loop.time()
        alarm.begin()
        await rings.wait()
        assert rung[-1] - began > 0.049
    alarm.begin()
    alarm.close()
    await asyncio.sleep(0.1)
    assert len(rung) == 2
