"""Garbage on every port of a real cluster: clean errors, no crash, and the service goes on."""

import asyncio
import contextlib
import io
import random
from urllib.parse import urlsplit

import aiohttp
import msgpack
import pytest

from services.cli.drill import Options, stream_all
from services.cli.local import LocalCluster
from shared import wire
from shared.channel import CHANNEL_PATH
from tests.cluster.conftest import whole

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]

ROUNDS = 40


async def throw(host: str, port: int, data: bytes) -> bytes:
    """Send bytes to a port and read what comes back until it closes, within a deadline."""
    reader, writer = await asyncio.open_connection(host, port)
    answer = b""
    with contextlib.suppress(OSError):
        writer.write(data)
        writer.write_eof()
        async with asyncio.timeout(10):
            answer = await reader.read(1 << 16)
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return answer


def junk(dice: random.Random) -> bytes:
    """Random bytes, sometimes with a plausible beginning."""
    start = dice.choice(
        [
            b"",
            b"GET / HTTP/1.1\r\n",
            b"POST /v1/completions HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n",
            b"\x00\x00\x00\x10",
        ]
    )
    return start + dice.randbytes(dice.randrange(0, 4096))


async def still_serves(cluster: LocalCluster) -> None:
    """All processes are the same as before, and a completion comes back whole."""
    await cluster.check_alive()
    streams = await stream_all(cluster, [[5, 6, 7]], Options(max_tokens=4), "after garbage")
    assert len(streams[0].tokens) == 4


async def test_random_bytes_on_every_port(cluster: LocalCluster) -> None:
    before = await whole(cluster)
    dice = random.Random(11)
    addresses = [child.address for child in cluster.processes.values() if child.address]
    addresses += [store["bulk_address"] for store in before["stores"]]
    assert len(addresses) == 4  # coordinator, gateway, the store's admin and bulk ports
    for address in addresses:
        parts = urlsplit(address)
        assert parts.hostname is not None
        assert parts.port is not None
        for _ in range(ROUNDS):
            await throw(parts.hostname, parts.port, junk(dice))
    await still_serves(cluster)
    after = await whole(cluster)
    assert after["epoch"] == before["epoch"]
    assert [w["pid"] for w in after["workers"]] == [w["pid"] for w in before["workers"]]


async def test_random_frames_on_the_control_channel(cluster: LocalCluster) -> None:
    before = await whole(cluster)
    dice = random.Random(12)
    url = cluster.processes["coordinator"].address + CHANNEL_PATH
    names = wire.CONTROL.kinds

    def frame() -> bytes:
        kind = dice.randrange(5)
        if kind == 0:
            return dice.randbytes(dice.randrange(0, 200))
        fields = {
            dice.choice(["epoch", "rank", "name", "step", "request"]): dice.choice([1, -1, "x", None, b"y", [], {}])
        }
        version = wire.VERSION if kind > 1 else dice.randrange(100)
        name = dice.choice(names) if kind > 2 else "Nonsense"
        return bytes(msgpack.packb([version, name, fields]))

    async with aiohttp.ClientSession() as session:
        for round_number in range(ROUNDS):
            async with session.ws_connect(url) as socket:
                if round_number % 2:  # a valid gateway that then goes mad
                    await socket.send_bytes(bytes(msgpack.packb([wire.VERSION, "GatewayHello", {"name": "mad"}])))
                with contextlib.suppress(ConnectionError, aiohttp.ClientError):
                    for _ in range(5):
                        await socket.send_bytes(frame())
                    await socket.send_str("text")
                    async with asyncio.timeout(10):
                        async for _ in socket:  # it must be closed from the other side
                            pass
    await still_serves(cluster)
    after = await whole(cluster)
    assert after["epoch"] == before["epoch"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/completions", b"{", 400),
        ("POST", "/v1/completions", b"[]", 400),
        ("POST", "/v1/completions", b'{"prompt": 3, "model": "x"}', 400),
        ("POST", "/v1/completions", b'{"prompt": "x", "max_tokens": -1}', 400),
        ("POST", "/v1/chat/completions", b'{"messages": "x"}', 400),
        ("GET", "/v1/completions", b"", 405),
        ("GET", "/nothing", b"", 404),
        ("POST", "/v1/completions", b'{"prompt": "' + b"x" * (9 << 20) + b'"}', 413),
    ],
)
async def test_bad_http_requests_get_openai_errors(
    cluster: LocalCluster, method: str, path: str, body: bytes, status: int
) -> None:
    await whole(cluster)
    headers, payload = {"Content-Type": "application/json"}, io.BytesIO(body) if body else None
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, cluster.base_url + path, data=payload, headers=headers) as response,
    ):
        assert response.status == status
        assert (await response.json())["error"]["message"]
    await still_serves(cluster)
