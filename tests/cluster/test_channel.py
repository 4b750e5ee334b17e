"""The control channel with much to send: no frame that its receiver refuses, no queue that nobody reads for ever."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from services.gateway.call import Call
from services.gateway.cluster import Cluster
from shared import channel as channels
from shared import port, wire
from shared.channel import CHANNEL_PATH, Channel, accept, dial
from shared.config import GatewaySettings
from shared.errors import PeerLost, ProtocolError, RequestRejected
from shared.messages import GatewayHello, Goodbye, Message
from shared.types import GenerationRequest, SamplingParams, pack_ids
from tests.cluster.fake_coordinator import FakeCoordinator, Script, a_status

DEADLINE_S = 20.0
MIB = 1 << 20


@asynccontextmanager
async def a_pair() -> AsyncIterator[tuple[Channel, Channel]]:
    """Both ends of a channel, whose other side reads nothing by itself."""
    served: asyncio.Future[Channel] = asyncio.get_running_loop().create_future()
    over = asyncio.Event()

    async def serve(request: web.Request) -> web.StreamResponse:
        socket, _ = await accept(request, None)
        async with Channel(socket, "dialler") as channel:
            channel.send(Goodbye("hello"))
            served.set_result(channel)
            await over.wait()
        return socket

    application = web.Application()
    application.router.add_get(CHANNEL_PATH, serve)
    async with port.serving(application, "127.0.0.1", 0, tls=None, scheme="ws") as listening:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(channels, "Goodbye", type("Never", (), {}))  # here it is any answer
            async with dial(listening.url, None, lambda _: GatewayHello("g"), DEADLINE_S) as (dialled, _):
                try:
                    yield await served, dialled
                finally:
                    over.set()


async def received(channel: Channel) -> list[Message]:
    """All that comes until the channel ends, in whatever way."""
    with contextlib.suppress(ProtocolError):
        return [message async for message in channel]
    return []


async def test_the_end_of_whoever_dialled_is_noticed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(port, "EOF_S", 3600.0)  # a client of HTTP may wait for its answer; a killed worker does not
    async with a_pair() as (server, client):
        client._socket.get_extra_info("socket").shutdown(socket.SHUT_WR)  # as the kernel does for a process that died
        async with asyncio.timeout(channels.PING_S / 2):  # long before a ping would tell
            assert await received(server) == []


async def test_a_channel_that_overflows_is_closed_at_both_ends() -> None:
    async with a_pair() as (server, client):
        big = Goodbye("x" * (8 * MIB))

        def send() -> None:
            for _ in range(20):
                client.send(big)

        with pytest.raises(PeerLost, match="does not read"):
            send()
        assert client.closed
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.gather(received(server), received(client))
        with pytest.raises(PeerLost, match="closed"):
            client.send(Goodbye(""))


async def test_a_message_that_is_too_large_for_any_peer_is_never_sent() -> None:
    with pytest.raises(ProtocolError, match=f"Goodbye of .* at most {wire.MAX_FRAME_BYTES}"):
        wire.encode(Goodbye("x" * wire.MAX_FRAME_BYTES))
    async with a_pair() as (server, client):
        with pytest.raises(ProtocolError):
            client.send(Goodbye("x" * wire.MAX_FRAME_BYTES))
        with pytest.raises(ProtocolError):
            client.send_frame(bytes(wire.MAX_FRAME_BYTES + 1))
        client.send(Goodbye("small"))
        assert await server.receive(DEADLINE_S) == Goodbye("small")


async def test_who_sends_in_bulk_waits_for_who_reads() -> None:
    async with a_pair() as (server, client):
        big = Goodbye("x" * MIB)

        async def send() -> None:
            for _ in range(100):
                await client.send_bulk(big)
            client.send(Goodbye("last"))

        sending = asyncio.create_task(send())
        count = 0
        async with asyncio.timeout(DEADLINE_S):
            async for message in server:
                assert client._queued_bytes <= channels.BULK_QUEUED_BYTES + 2 * MIB
                if message == Goodbye("last"):
                    break
                count += 1
        await sending
        assert count == 100


async def test_who_waits_to_send_in_bulk_is_told_when_the_channel_breaks() -> None:
    async with a_pair() as (_, client):

        async def send() -> None:
            while True:
                await client.send_bulk(Goodbye("x" * (4 * MIB)))

        sending = asyncio.create_task(send())
        while client._queued_bytes <= channels.BULK_QUEUED_BYTES:
            await asyncio.sleep(0)
        client.abort()
        with pytest.raises(PeerLost):
            async with asyncio.timeout(DEADLINE_S):
                await sending


# -- the gateway's -----------------------------------------------------------------------------------------------------


def a_request(number: int, prompt: bytes) -> GenerationRequest:
    return GenerationRequest(f"r-{number}", prompt, 4, SamplingParams())


@asynccontextmanager
async def a_cluster(coordinator: FakeCoordinator) -> AsyncIterator[Cluster]:
    """The gateway's side of a channel that stays, whatever becomes of the coordinator."""
    cluster = Cluster(GatewaySettings(coordinator_url=coordinator.url))
    running = asyncio.create_task(cluster.run())
    try:
        async with asyncio.timeout(DEADLINE_S):
            while cluster.status is None:
                await cluster.changed.wait()
        yield cluster
    finally:
        cluster.stop()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_160_long_agents_survive_a_restart_of_the_coordinator() -> None:
    prompt = pack_ids([5] * 110_000)
    async with FakeCoordinator(a_status("", 400, (2,), max_model_len=1 << 20)) as coordinator:
        gate = asyncio.Event()
        coordinator.script = lambda request: Script((5, 6, 7, 8), finish="length", gate=gate, gate_at=2)
        async with a_cluster(coordinator) as cluster:
            calls: list[Call] = [cluster.open([a_request(number, prompt)]) for number in range(160)]

            async def follow(call: Call) -> bytes:
                found = b""
                async with call:
                    await call.accepted(DEADLINE_S)
                    while len(found) < 16:
                        found += b"".join(event.tokens for _, event in await call.next())
                return found

            async with asyncio.timeout(60):
                following = [asyncio.create_task(follow(call)) for call in calls]
                await coordinator.until(lambda: len(coordinator.submitted) == 160)
                await coordinator.stop()
                await coordinator.start()
                gate.set()
                assert await asyncio.gather(*following) == [pack_ids([5, 6, 7, 8])] * 160
            assert len(coordinator.resumed) == 160


async def test_a_request_too_large_for_a_frame_is_refused_and_the_channel_stays() -> None:
    async with (
        FakeCoordinator(a_status("", 400, (2,), max_model_len=1 << 24)) as coordinator,
        a_cluster(coordinator) as cluster,
    ):
        with pytest.raises(RequestRejected, match="at most") as refused:
            async with cluster.open([a_request(0, bytes(wire.MAX_FRAME_BYTES))]):
                pass
        assert refused.value.status == 413
        assert cluster.in_flight == 0
        coordinator.script = lambda request: Script((5,))
        async with cluster.open([a_request(1, pack_ids([5]))]) as call:
            await call.accepted(DEADLINE_S)


async def test_a_gateway_whose_channel_overflowed_dials_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async with (
        FakeCoordinator(a_status("", 400, (2,), max_model_len=1 << 20)) as coordinator,
        a_cluster(coordinator) as cluster,
    ):
        first = coordinator.channels[0]
        monkeypatch.setattr(channels, "MAX_QUEUED_BYTES", 10)
        cluster.forget("nobody", abort=True)
        with pytest.raises(Exception, match="away"):
            cluster.send(Goodbye("x" * 100))
        monkeypatch.undo()
        async with asyncio.timeout(DEADLINE_S):
            while cluster.status is None or first in coordinator.channels:
                await asyncio.sleep(0.01)
        coordinator.script = lambda request: Script((5,))
        async with cluster.open([a_request(1, pack_ids([5]))]) as call:
            await call.accepted(DEADLINE_S)
