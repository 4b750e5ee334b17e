"""A parity store as a real process, over each bulk transport: bytes arrive, and its death is heard at once."""

import asyncio
import random
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from urllib.parse import urlsplit

import pytest

from shared.errors import PeerLost
from shared.transport import ucx_engine
from shared.transport.client import BulkClient
from tests.cluster.store_harness import (
    DEADLINE_S,
    StoreCoordinator,
    StoreProcess,
    asking,
    store_process,
    stripes,
)

NO_UCX = pytest.mark.skipif(not ucx_engine.is_installed(), reason="UCXX IS NOT INSTALLED: nothing of ucx is tested")
HEARD_S = 2.0  # seconds; 0.1 on a machine with nothing else to do, and no deadline anywhere near


@pytest.fixture(params=["tcp", pytest.param("ucx", marks=NO_UCX)])
async def store(request: pytest.FixtureRequest, group: str, redis_url: str) -> AsyncIterator[tuple[StoreProcess, str]]:
    flags = ("--transport", request.param, "--capacity-mb", "128")
    async with StoreCoordinator(group) as coordinator, store_process(coordinator.url, redis_url, *flags) as process:
        info = await coordinator.next_store()
        assert urlsplit(info.bulk_address).scheme == request.param
        yield process, info.bulk_address


async def test_what_is_put_into_another_process_is_got_back(store: tuple[StoreProcess, str], group: str) -> None:
    async with await BulkClient.connect(store[1], timeout=DEADLINE_S) as client:
        for count, length in ((64, 122880), (3, 5 << 20), (500, 17)):
            put, payloads = stripes(group, count, length)
            assert await client.put(put, payloads, timeout=DEADLINE_S) == (None,) * count
            get, into = asking(put)
            assert await client.get(get, into, timeout=DEADLINE_S) == (None,) * count
            assert into == payloads


@pytest.mark.parametrize("when", ["idle", "put", "get"])
async def test_a_store_that_is_killed_is_lost_at_once(store: tuple[StoreProcess, str], group: str, when: str) -> None:
    process, address = store
    async with await BulkClient.connect(address, timeout=DEADLINE_S) as client:
        kept, payloads = stripes(group, 8, 4 << 20)
        await client.put(kept, payloads, timeout=DEADLINE_S)
        asked: list[asyncio.Task[object]] = []
        if when != "idle":
            process.process.send_signal(signal.SIGSTOP)  # so that it is in the middle, whatever the machine does
            if when == "put":
                asked.append(asyncio.create_task(client.put(*stripes(group, 8, 4 << 20), timeout=DEADLINE_S)))
            asked.append(asyncio.create_task(client.get(*asking(kept), timeout=DEADLINE_S)))
            await asyncio.sleep(0.1)
        process.kill()
        killed = time.monotonic()
        await client.wait_closed()
        heard = time.monotonic() - killed
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [PeerLost] * len(asked)
        assert heard < HEARD_S, f"heard after {heard:.3f} s"


async def test_a_transfer_that_is_cancelled_touches_its_buffers_no_more(
    store: tuple[StoreProcess, str], group: str
) -> None:
    _, address = store
    async with await BulkClient.connect(address, timeout=DEADLINE_S) as client:
        put, payloads = stripes(group, 6, 8 << 20)
        assert await client.put(put, payloads, timeout=DEADLINE_S) == (None,) * 6
    chooser = random.Random(11)
    for _ in range(6):
        async with await BulkClient.connect(address, timeout=DEADLINE_S) as client:
            get, into = asking(put)
            getting = asyncio.create_task(client.get(get, into, timeout=DEADLINE_S))
            await asyncio.sleep(chooser.uniform(0, 0.02))
            getting.cancel()
            with suppress(asyncio.CancelledError):
                await getting
            if not getting.cancelled():
                continue
            left = [bytes(buffer) for buffer in into]
            await asyncio.sleep(0.03)
            assert left == [bytes(buffer) for buffer in into]


async def test_garbage_does_not_reach_beyond_the_handshake(store: tuple[StoreProcess, str], group: str) -> None:
    _, address = store
    chooser = random.Random(7)
    port = urlsplit(address).port or 0
    for _ in range(20):
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as peer:
            peer.sendall(chooser.randbytes(chooser.randrange(1, 5000)))
            peer.shutdown(socket.SHUT_WR)
            peer.recv(100)
    async with await BulkClient.connect(address, timeout=DEADLINE_S) as client:
        put, payloads = stripes(group, 3)
        assert await client.put(put, payloads, timeout=DEADLINE_S) == (None,) * 3
