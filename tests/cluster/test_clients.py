"""Clients that come in crowds, leave, or lose their gateway: the others get what they asked for, and nothing stays."""

import asyncio
import contextlib
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from services.cli.drill import Options, stream_all
from services.cli.local import LocalCluster
from tests.cluster.conftest import quiet, whole

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]

CROWD = 1000
MEMORY_MB = 150
"""What a thousand clients at once may cost a service."""


def resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


async def test_a_thousand_clients_at_once_are_served_or_told_to_come_back(cluster: LocalCluster) -> None:
    model = (await whole(cluster))["served_name"]
    services = ("gateway", "coordinator")
    before = {name: resident_mb(cluster.processes[name].pid) for name in services}
    answers: Counter[int] = Counter()

    async def ask(session: aiohttp.ClientSession, number: int) -> None:
        body = {"model": model, "prompt": [number % 300 + 5, 6, 7], "max_tokens": 2, "ignore_eos": True}
        async with session.post(cluster.base_url + "/v1/completions", json=body) as response:
            answer = await response.json()
            answers[response.status] += 1
            if response.status == 200:
                assert answer["usage"]["completion_tokens"] == 2
            else:
                assert response.headers["Retry-After"]

    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(120)) as session,
        asyncio.TaskGroup() as tasks,
    ):
        for number in range(CROWD):
            tasks.create_task(ask(session, number))
    assert set(answers) <= {200, 429}
    assert answers[200] >= 256
    for name in services:
        assert resident_mb(cluster.processes[name].pid) - before[name] < MEMORY_MB, name
    await quiet(cluster)


async def test_clients_that_leave_take_their_work_with_them(cluster: LocalCluster) -> None:
    model = (await whole(cluster))["served_name"]
    calm = await stream_all(cluster, [[11] * 60], Options(max_tokens=40), "stays-calm")
    body = {"model": model, "prompt": [5] * 100, "max_tokens": 3000, "stream": True, "ignore_eos": True}

    async def leave(session: aiohttp.ClientSession) -> None:
        async with session.post(cluster.base_url + "/v1/completions", json=body) as response:
            await response.content.readline()
            response.close()

    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as tasks:
        staying = tasks.create_task(stream_all(cluster, [[11] * 60], Options(max_tokens=40), "stays"))
        for _ in range(20):
            tasks.create_task(leave(session))
    assert staying.result()[0].tokens == calm[0].tokens
    await quiet(cluster)


@asynccontextmanager
async def second_gateway(cluster: LocalCluster) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """Another gateway of the cluster: its process and URL."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.cli", "gateway", "--port", "0",
        "--coordinator-url", cluster.processes["coordinator"].address,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        async with asyncio.timeout(60):
            url = (await process.stdout.readline()).decode().removeprefix("listening on ").strip()
            async with aiohttp.ClientSession() as session:
                while True:
                    async with session.get(url + "/health") as response:
                        if response.status == 200:
                            break
                    await asyncio.sleep(0.02)
        yield process, url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        await process.wait()


async def test_a_killed_gateway_takes_only_its_own_streams_with_it(cluster: LocalCluster) -> None:
    model = (await whole(cluster))["served_name"]
    options = Options(max_tokens=60)
    calm = await stream_all(cluster, [[13] * 90], options, "two-gateways-calm")
    body = {"model": model, "prompt": [5] * 100, "max_tokens": 3000, "stream": True, "ignore_eos": True}
    async with second_gateway(cluster) as (process, url), aiohttp.ClientSession() as session:
        async with session.post(url + "/v1/completions", json=body) as response:
            await response.content.readline()
            staying = asyncio.create_task(stream_all(cluster, [[13] * 90], options, "two-gateways"))
            os.kill(process.pid, signal.SIGKILL)
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.content.read()
        assert (await staying)[0].tokens == calm[0].tokens
    await quiet(cluster)
