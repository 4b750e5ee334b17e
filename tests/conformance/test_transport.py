"""What every backend of the bulk transport must do. A new one adds its address to BACKENDS."""

import asyncio
import os
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shared.errors import ConfigError, DeadlineExceeded, GhostError, PeerLost, ProtocolError, ShardMissing, StoreFull
from shared.transport import backends, frames, ucx_engine
from shared.transport.base import (
    DEFAULT_LIMITS,
    BulkLimits,
    GetShards,
    Outcome,
    PutShards,
    ShardLabel,
    ShardRef,
    Stream,
)
from shared.transport.client import BulkClient
from shared.transport.server import BulkServer, serve

BACKENDS = [
    "tcp://127.0.0.1:0",
    pytest.param(
        "ucx://127.0.0.1:0",
        marks=pytest.mark.skipif(
            not ucx_engine.is_installed(), reason="UCXX IS NOT INSTALLED: nothing of ucx is tested"
        ),
    ),
]
TIMEOUT = 20.0


@pytest.fixture(params=BACKENDS, ids=lambda address: address.split(":")[0])
def listen_at(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Shelf:
    """A handler that keeps shards in a dict, and can be told to wait or to refuse."""

    def __init__(self) -> None:
        self.shards: dict[tuple[str, bytes, int], bytearray] = {}
        self.refusals: dict[bytes, GhostError] = {}  # page key -> why
        self.hold: asyncio.Event | None = None  # commits wait for it
        self.waiting = 0  # bytes that wait to be committed
        self.most_waiting = 0
        self.arriving = 0  # puts neither committed nor abandoned
        self.abandoned = 0
        self.reading = 0
        self.reads = 0  # since the beginning
        self.changed = asyncio.Event()

    def put(self, request: PutShards) -> "ShelfPut":
        return ShelfPut(self, request)

    def get(self, request: GetShards) -> "ShelfGet":
        return ShelfGet(self, request)

    def _change(self) -> None:
        self.changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(TIMEOUT):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


class ShelfPut:
    def __init__(self, shelf: Shelf, request: PutShards):
        self.shelf, self.request = shelf, request
        self.buffers: list[bytearray | GhostError] = [
            shelf.refusals.get(label.page_key) or bytearray(label.length) for label in request.shards
        ]
        shelf.arriving += 1
        shelf._change()

    @property
    def places(self) -> Sequence[memoryview | GhostError]:
        return [buffer if isinstance(buffer, GhostError) else memoryview(buffer) for buffer in self.buffers]

    async def commit(self) -> Sequence[Outcome]:
        shelf, size = self.shelf, sum(self.request.lengths)
        shelf.waiting += size
        shelf.most_waiting = max(shelf.most_waiting, shelf.waiting)
        shelf._change()
        try:
            if shelf.hold is not None:
                await shelf.hold.wait()
        finally:
            shelf.waiting -= size
        for label, buffer in zip(self.request.shards, self.buffers, strict=True):
            if isinstance(buffer, bytearray):
                shelf.shards[self.request.group, label.page_key, label.number] = buffer
        shelf.arriving -= 1
        shelf._change()
        return [buffer if isinstance(buffer, GhostError) else None for buffer in self.buffers]

    def abandon(self) -> None:
        self.shelf.arriving -= 1
        self.shelf.abandoned += 1
        self.shelf._change()


class ShelfGet:
    def __init__(self, shelf: Shelf, request: GetShards):
        self.shelf = shelf
        self.found = [shelf.shards.get((request.group, ref.page_key, ref.number)) for ref in request.shards]
        shelf.reading += 1
        shelf.reads += 1
        shelf._change()

    @property
    def places(self) -> Sequence[memoryview | GhostError]:
        return [ShardMissing("not here") if item is None else memoryview(item) for item in self.found]

    def release(self) -> None:
        self.shelf.reading -= 1
        self.shelf._change()


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
async def server(listen_at: str, shelf: Shelf) -> AsyncIterator[BulkServer]:
    async with serve(listen_at, shelf, token="secret") as server:
        yield server
    assert shelf.arriving == 0, "a put neither committed nor abandoned"
    assert shelf.reading == 0, "a get was not released"


@pytest.fixture
async def client(server: BulkServer) -> AsyncIterator[BulkClient]:
    async with await BulkClient.connect(server.address, token="secret", timeout=TIMEOUT) as client:
        yield client


def batch(lengths: Sequence[int], group: str = "g") -> tuple[PutShards, list[memoryview]]:
    labels = tuple(ShardLabel(os.urandom(16), 3, 3, 2, length, 7, (1, 2, 3)) for length in lengths)
    return PutShards(group, 1, 0, labels), [memoryview(bytearray(os.urandom(length))) for length in lengths]


def asking(put: PutShards) -> tuple[GetShards, list[memoryview]]:
    refs = tuple(ShardRef(label.page_key, label.number, label.length) for label in put.shards)
    return GetShards(put.group, refs), [memoryview(bytearray(length)) for length in put.lengths]


@pytest.mark.parametrize("lengths", [[1], [7, 1, 4097], [122880] * 64, [5 << 20, 1, 3 << 20], [13] * 2000])
async def test_what_is_put_is_got_back(client: BulkClient, lengths: list[int]) -> None:
    put, payloads = batch(lengths)
    assert await client.put(put, payloads, timeout=TIMEOUT) == (None,) * len(lengths)
    get, into = asking(put)
    assert await client.get(get, into, timeout=TIMEOUT) == (None,) * len(lengths)
    assert into == payloads


async def test_a_refused_shard_does_not_harm_its_batch(client: BulkClient, shelf: Shelf) -> None:
    put, payloads = batch([3 << 20, 2 << 20, 1 << 20])
    shelf.refusals[put.shards[1].page_key] = StoreFull("no room for this one")
    first, second, third = await client.put(put, payloads, timeout=TIMEOUT)
    assert first is None
    assert third is None
    assert isinstance(second, StoreFull)
    assert "no room for this one" in str(second)
    get, into = asking(put)
    into[1][:] = b"x" * len(into[1])
    outcomes = await client.get(get, into, timeout=TIMEOUT)
    assert [type(outcome) for outcome in outcomes] == [type(None), ShardMissing, type(None)]
    assert (into[0], into[2]) == (payloads[0], payloads[2])
    assert bytes(into[1]) == b"x" * len(into[1])


async def test_many_requests_share_a_connection(client: BulkClient) -> None:
    async def there_and_back(lengths: list[int]) -> None:
        put, payloads = batch(lengths)
        assert await client.put(put, payloads, timeout=TIMEOUT) == (None,) * len(lengths)
        get, into = asking(put)
        assert await client.get(get, into, timeout=TIMEOUT) == (None,) * len(lengths)
        assert into == payloads

    chooser = random.Random(3)
    sizes = [[chooser.randrange(1, 200_000) for _ in range(chooser.randrange(1, 20))] for _ in range(50)]
    await asyncio.gather(*(there_and_back(lengths) for lengths in sizes))


async def test_a_put_that_waits_for_the_index_holds_up_nobody(client: BulkClient, shelf: Shelf) -> None:
    quick, quick_bytes = batch([1000])
    await client.put(quick, quick_bytes, timeout=TIMEOUT)
    shelf.hold = asyncio.Event()
    slow = asyncio.create_task(client.put(*batch([1000]), timeout=TIMEOUT))
    await shelf.until(lambda: shelf.waiting == 1000)
    get, into = asking(quick)
    assert await client.get(get, into, timeout=TIMEOUT) == (None,)
    assert not slow.done()
    shelf.hold.set()
    assert await slow == (None,)


async def test_a_late_answer_is_dropped_and_the_connection_goes_on(client: BulkClient, shelf: Shelf) -> None:
    quick, quick_bytes = batch([1000])
    await client.put(quick, quick_bytes, timeout=TIMEOUT)
    shelf.hold = asyncio.Event()
    late = asyncio.create_task(client.put(*batch([1000]), timeout=TIMEOUT))
    await shelf.until(lambda: shelf.waiting == 1000)
    get, into = asking(quick)
    assert await client.get(get, into, timeout=TIMEOUT) == (None,)  # so the put before it is sent as a whole
    late.cancel()
    with pytest.raises(asyncio.CancelledError):
        await late
    shelf.hold.set()
    assert await client.put(*batch([1000]), timeout=TIMEOUT) == (None,)
    assert client.is_open


async def test_bytes_in_flight_are_bounded(server: BulkServer, shelf: Shelf) -> None:
    limits = replace(DEFAULT_LIMITS, in_flight_bytes=250_000)
    shelf.hold = asyncio.Event()
    async with await BulkClient.connect(server.address, token="secret", limits=limits) as client:
        puts = [asyncio.create_task(client.put(*batch([100_000]), timeout=TIMEOUT)) for _ in range(8)]
        await shelf.until(lambda: shelf.waiting == 200_000)
        shelf.hold.set()
        assert await asyncio.gather(*puts) == [(None,)] * 8
        assert shelf.most_waiting == 200_000
        assert await client.put(*batch([300_000]), timeout=TIMEOUT) == (None,)  # larger than the whole: alone


async def test_those_who_wait_for_room_hear_at_once_that_the_peer_is_lost(listen_at: str) -> None:
    async def play(stream: Stream) -> None:
        await next_request(stream)
        await asyncio.sleep(0.05)
        stream.close()

    limits = replace(DEFAULT_LIMITS, in_flight_bytes=1000)
    async with actor(listen_at, play) as address, await BulkClient.connect(address, limits=limits) as client:
        gets = [client.get(*asking(batch([1000])[0]), timeout=TIMEOUT) for _ in range(5)]
        started = time.monotonic()
        outcomes = await asyncio.gather(*gets, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [PeerLost] * 5
        assert time.monotonic() - started < 2


async def test_a_deadline_while_waiting_for_others_bytes_harms_nobody(server: BulkServer, shelf: Shelf) -> None:
    limits = replace(DEFAULT_LIMITS, in_flight_bytes=1000)
    shelf.hold = asyncio.Event()
    async with await BulkClient.connect(server.address, token="secret", limits=limits) as client:
        first = asyncio.create_task(client.put(*batch([1000]), timeout=TIMEOUT))
        await shelf.until(lambda: shelf.waiting == 1000)
        with pytest.raises(DeadlineExceeded):
            await client.put(*batch([1000]), timeout=0.05)
        shelf.hold.set()
        assert await first == (None,)
        assert await client.put(*batch([1000]), timeout=TIMEOUT) == (None,)


async def test_a_wrong_token_is_refused(server: BulkServer) -> None:
    for token in ("", "Secret", "secret ", "sécret"):
        with pytest.raises(ConfigError, match="token"):
            await BulkClient.connect(server.address, token=token, timeout=TIMEOUT)
    assert server.refused == {"token": 4}


async def test_another_protocol_version_is_refused_by_name(server: BulkServer) -> None:
    stream = await backends.connect(server.address)
    await stream.send(frames.pieces(frames.Hello(99, "secret")), TIMEOUT)
    welcome = await frames.read(stream, frames.HELLO_BYTES, DEFAULT_LIMITS)
    stream.close()
    assert isinstance(welcome, frames.HelloReply)
    assert isinstance(welcome.refusal, ProtocolError)
    assert "99" in str(welcome.refusal)


async def test_nobody_there_is_peer_lost(listen_at: str) -> None:
    listener = await backends.listen(listen_at)
    address = listener.address
    listener.close()
    with pytest.raises(PeerLost):
        await BulkClient.connect(address, timeout=TIMEOUT)


@pytest.mark.parametrize(
    "address", ["", "127.0.0.1:1", "http://127.0.0.1:1", "tcp://", "tcp://h:99999", "tcp://h", "ucx://", "ucx://h"]
)
async def test_a_malformed_address_is_a_config_error(address: str) -> None:
    with pytest.raises(ConfigError):
        await BulkClient.connect(address, timeout=TIMEOUT)


async def test_without_ucxx_an_ucx_address_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ucxx._lib.libucxx", None)
    monkeypatch.setattr(ucx_engine, "is_installed", lambda: False)
    ucx_engine.context.cache_clear()
    for use in (backends.listen, backends.connect):
        with pytest.raises(ConfigError, match="needs UCXX"):
            await use("ucx://127.0.0.1:1")
    with pytest.raises(ConfigError, match="needs UCXX"):
        backends.choose("ucx")
    assert backends.choose("auto")[0] == "tcp"


def test_auto_takes_ucx_only_where_it_has_more_to_offer_than_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ucx_engine, "is_installed", lambda: True)
    monkeypatch.setattr(backends, "cuda_present", lambda: True)  # parity leaves from host memory: no reason
    monkeypatch.setattr(backends, "rdma_devices", list)
    assert backends.choose("auto")[0] == "tcp"
    monkeypatch.setattr(backends, "rdma_devices", lambda: ["mlx5_0"])
    assert backends.choose("auto") == ("ucx", "RDMA over mlx5_0")
    assert backends.choose("tcp")[0] == "tcp"


async def test_wrong_sizes_are_refused_before_anything_is_sent(client: BulkClient) -> None:
    put, payloads = batch([10, 20])
    for bad in (payloads[:1], payloads[::-1], [*payloads, payloads[0]]):
        with pytest.raises(ProtocolError):
            await client.put(put, bad, timeout=TIMEOUT)
    with pytest.raises(ProtocolError):
        await client.put(PutShards("g", 1, 0, ()), [], timeout=TIMEOUT)
    assert await client.put(put, payloads, timeout=TIMEOUT) == (None, None)


# A peer that misbehaves, played frame by frame.


@asynccontextmanager
async def actor(listen_at: str, play: Callable[[Stream], Awaitable[None]]) -> AsyncIterator[str]:
    """A server whose first peer is greeted, and then treated as `play` says; the stream stays open until the end."""
    listener = await backends.listen(listen_at)
    address = listener.address

    async def act() -> None:
        stream = await listener.accept()
        try:
            await frames.read(stream, frames.HELLO_BYTES, DEFAULT_LIMITS)
            await stream.send(frames.pieces(frames.HelloReply(frames.VERSION, None)), TIMEOUT)
            await stream.upgrade(TIMEOUT)
            await play(stream)
            await asyncio.Event().wait()
        finally:
            stream.close()

    acting = asyncio.create_task(act())
    try:
        yield address
    finally:
        acting.cancel()
        with suppress(asyncio.CancelledError, PeerLost):
            await acting
        listener.close()


async def next_request(stream: Stream) -> frames.Numbered:
    frame = await frames.read(stream, DEFAULT_LIMITS.header_bytes, DEFAULT_LIMITS)
    assert isinstance(frame, frames.Numbered)
    return frame


async def reply(stream: Stream, number: int, *payloads: bytes) -> None:
    head = frames.pieces(frames.Reply(number, (None,)))
    await stream.send([*head, *(memoryview(payload) for payload in payloads)], TIMEOUT)


async def test_a_silent_peer_is_deadline_exceeded(listen_at: str) -> None:
    listener = await backends.listen(listen_at)
    with pytest.raises(DeadlineExceeded):
        await BulkClient.connect(listener.address, timeout=0.1)
    listener.close()


async def test_a_peer_that_dies_is_peer_lost_for_all_at_once(listen_at: str) -> None:
    async def play(stream: Stream) -> None:
        await next_request(stream)
        await next_request(stream)
        stream.close()

    async with actor(listen_at, play) as address, await BulkClient.connect(address) as client:
        started = time.monotonic()
        get, into = asking(batch([1000])[0])
        gets = [client.get(get, into, timeout=TIMEOUT) for _ in range(2)]
        outcomes = await asyncio.gather(*gets, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [PeerLost, PeerLost]
        await client.wait_closed()
        assert time.monotonic() - started < 2
        assert not client.is_open
        with pytest.raises(PeerLost):
            await client.get(get, into, timeout=TIMEOUT)


async def test_a_buffer_is_not_written_after_its_deadline(listen_at: str) -> None:
    late = asyncio.Event()

    async def play(stream: Stream) -> None:
        first, second = await next_request(stream), await next_request(stream)
        await late.wait()
        await reply(stream, first.request_id, b"1" * 1000)
        await reply(stream, second.request_id, b"2" * 1000)

    async with actor(listen_at, play) as address, await BulkClient.connect(address) as client:
        get, into = asking(batch([1000])[0])
        with pytest.raises(DeadlineExceeded):
            await client.get(get, into, timeout=0.05)
        other, other_into = asking(batch([1000])[0])
        waiting = asyncio.create_task(client.get(other, other_into, timeout=TIMEOUT))
        late.set()
        assert await waiting == (None,)
        assert bytes(other_into[0]) == b"2" * 1000
        assert bytes(into[0]) == bytes(1000)


async def test_a_deadline_in_the_middle_of_the_bytes_closes_the_connection(listen_at: str) -> None:
    half_sent, go_on = asyncio.Event(), asyncio.Event()

    async def play(stream: Stream) -> None:
        asked = await next_request(stream)
        head = frames.pieces(frames.Reply(asked.request_id, (None, None)))
        await stream.send([*head, memoryview(b"a" * 1000)], TIMEOUT)
        half_sent.set()
        await go_on.wait()
        with suppress(PeerLost):
            await stream.send([memoryview(b"b" * 1000)], TIMEOUT)

    async with actor(listen_at, play) as address, await BulkClient.connect(address) as client:
        get, into = asking(batch([1000, 1000])[0])
        asking_task = asyncio.create_task(client.get(get, into, timeout=0.3))
        await half_sent.wait()
        with pytest.raises(DeadlineExceeded):
            await asking_task
        assert not client.is_open
        go_on.set()
        await client.wait_closed()
        assert bytes(into[1]) == bytes(1000)


@pytest.mark.parametrize("forged", [b"x" * 64, frames.encode(frames.Reply(77, (None,))), frames.MAGIC + b"\xff" * 8])
async def test_a_client_leaves_a_server_that_talks_nonsense(listen_at: str, forged: bytes) -> None:
    async def play(stream: Stream) -> None:
        await next_request(stream)
        await stream.send([memoryview(forged)], TIMEOUT)

    async with actor(listen_at, play) as address, await BulkClient.connect(address) as client:
        get, into = asking(batch([1000])[0])
        with pytest.raises(PeerLost):
            await client.get(get, into, timeout=TIMEOUT)
        assert not client.is_open


async def greeted(server: BulkServer) -> Stream:
    stream = await backends.connect(server.address)
    await stream.send(frames.pieces(frames.Hello(frames.VERSION, "secret")), TIMEOUT)
    await frames.read(stream, frames.HELLO_BYTES, DEFAULT_LIMITS)
    await stream.upgrade(TIMEOUT)
    return stream


async def test_a_put_that_ends_in_the_middle_is_abandoned(server: BulkServer, shelf: Shelf) -> None:
    stream = await greeted(server)
    put, payloads = batch([1000, 1000])
    await stream.send([*frames.pieces(frames.Numbered(1, put)), payloads[0]], TIMEOUT)
    await shelf.until(lambda: shelf.arriving == 1)
    stream.close()
    await shelf.until(lambda: shelf.abandoned == 1)
    assert shelf.shards == {}


async def test_a_put_whose_sender_goes_before_the_ack_is_abandoned_or_kept(server: BulkServer, shelf: Shelf) -> None:
    shelf.hold = asyncio.Event()
    client = await BulkClient.connect(server.address, token="secret")
    putting = asyncio.create_task(client.put(*batch([1000]), timeout=TIMEOUT))
    await shelf.until(lambda: shelf.waiting == 1000)
    await client.close()
    with pytest.raises(PeerLost):
        await putting
    await shelf.until(lambda: shelf.abandoned == 1 and shelf.waiting == 0)


async def test_a_reader_that_stops_reading_is_left(listen_at: str, shelf: Shelf) -> None:
    limits = replace(DEFAULT_LIMITS, stall_s=0.2)
    async with serve(listen_at, shelf, token="secret", limits=limits) as server:
        put, payloads = batch([32 << 20])
        async with await BulkClient.connect(server.address, token="secret") as client:
            await client.put(put, payloads, timeout=TIMEOUT)
        stream = await greeted(server)
        await stream.send(frames.pieces(frames.Numbered(1, asking(put)[0])), TIMEOUT)
        await shelf.until(lambda: shelf.reads == 1 and shelf.reading == 0)
        stream.close()


async def test_a_sender_that_stops_in_the_middle_is_left(listen_at: str, shelf: Shelf) -> None:
    limits = replace(DEFAULT_LIMITS, stall_s=0.2)
    async with serve(listen_at, shelf, token="secret", limits=limits) as server:
        stream = await greeted(server)
        put, payloads = batch([1000, 1000])
        await stream.send([*frames.pieces(frames.Numbered(1, put)), payloads[0]], TIMEOUT)
        await shelf.until(lambda: shelf.abandoned == 1)
        with pytest.raises(PeerLost):
            await stream.receive([memoryview(bytearray(1))], TIMEOUT)
        stream.close()


async def test_a_peer_without_a_hello_is_left(listen_at: str, shelf: Shelf) -> None:
    async with serve(listen_at, shelf, limits=replace(DEFAULT_LIMITS, handshake_s=0.1)) as server:
        stream = await backends.connect(server.address)
        with pytest.raises(PeerLost):
            await stream.receive([memoryview(bytearray(1))], TIMEOUT)
        stream.close()


async def test_connections_beyond_the_limit_are_closed(listen_at: str, shelf: Shelf) -> None:
    async with serve(listen_at, shelf, limits=replace(DEFAULT_LIMITS, connections=2)) as server:
        first = await BulkClient.connect(server.address)
        second = await BulkClient.connect(server.address)
        with pytest.raises(PeerLost):
            await BulkClient.connect(server.address)
        await first.close()
        assert await second.put(*batch([10]), timeout=TIMEOUT) == (None,)
        await second.close()


async def test_strangers_take_no_place_from_those_who_know_the_token(listen_at: str, shelf: Shelf) -> None:
    limits = replace(DEFAULT_LIMITS, connections=2, strangers=3, handshake_s=60.0)
    async with serve(listen_at, shelf, token="secret", limits=limits) as server:
        strangers = [await backends.connect(server.address) for _ in range(10)]
        first = await BulkClient.connect(server.address, token="secret")
        strangers += [await backends.connect(server.address) for _ in range(10)]
        second = await BulkClient.connect(server.address, token="secret")
        for client in (first, second):
            assert await client.put(*batch([10]), timeout=TIMEOUT) == (None,)
            await client.close()
        with pytest.raises(PeerLost):  # it made room
            await strangers[0].receive([memoryview(bytearray(1))], TIMEOUT)
        assert server.refused["too many"] >= 10
        for stream in strangers:
            stream.close()


async def test_refusals_are_counted_by_their_reason(server: BulkServer) -> None:
    for sent, reason in (
        (frames.encode(frames.Hello(99, "secret")), "version"),
        (frames.encode(frames.Hello(frames.VERSION, "wrong")), "token"),
        (frames.PREFIX.pack(frames.MAGIC, frames.HELLO_BYTES + 1), "oversized"),
        (b"GET / HTTP/1.1\r\n\r\n", "frame"),
        (frames.encode(frames.Reply(1, (None,))), "frame"),
    ):
        before = server.refused[reason]
        stream = await backends.connect(server.address)
        await stream.send([memoryview(sent)], TIMEOUT)
        with suppress(PeerLost):
            while True:
                await stream.receive([memoryview(bytearray(1))], TIMEOUT)
        stream.close()
        assert server.refused[reason] == before + 1, sent
    assert server.refused.total() == 5


async def test_garbage_is_closed_and_others_are_served_on(server: BulkServer, client: BulkClient) -> None:
    chooser = random.Random(5)
    put, _ = batch([1000])
    valid = frames.encode(frames.Numbered(1, put))
    hello = frames.encode(frames.Hello(frames.VERSION, "secret"))
    attacks = [chooser.randbytes(chooser.randrange(1, 3000)) for _ in range(20)]
    attacks += [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", frames.MAGIC + b"\x7f\xff\xff\xff", valid]
    attacks += [hello + frames.PREFIX.pack(frames.MAGIC, 50) + chooser.randbytes(50) for _ in range(20)]
    attacks += [hello + hello, hello + frames.PREFIX.pack(frames.MAGIC, (4 << 20) + 1)]
    for position in range(8, len(valid), 3):
        damaged = bytearray(valid)
        damaged[position] ^= chooser.randrange(1, 256)
        attacks.append(hello + damaged)
    for attack in attacks:
        stream = await backends.connect(server.address)
        with suppress(PeerLost):
            await stream.send([memoryview(attack)], TIMEOUT)
        stream.close()
    assert await client.put(*batch([1000]), timeout=TIMEOUT) == (None,)


@settings(max_examples=300)
@given(body=st.binary(max_size=300))
@example(body=b"\x93\x04\x01")
@example(body=b"\x95\x04\x01\xa1g\x01\xdd\xff\xff\xff\xff")
def test_any_bytes_are_a_frame_or_a_protocol_error(body: bytes) -> None:
    with suppress(ProtocolError):
        frames.decode(body, BulkLimits())


_KEYS = st.binary(min_size=16, max_size=16)
_U64 = st.integers(0, (1 << 64) - 1)
_LABELS = st.builds(
    ShardLabel,
    page_key=_KEYS,
    number=st.integers(3, 4),
    k=st.just(3),
    m=st.just(2),
    length=st.integers(1, 1 << 28),
    checksum=_U64,
    data_checksums=st.tuples(_U64, _U64, _U64),
)
_REQUESTS = st.one_of(
    st.builds(PutShards, st.just("group"), _U64, _U64, st.lists(_LABELS, min_size=1, max_size=5).map(tuple)),
    st.builds(GetShards, st.just("g-1"), st.just((ShardRef(b"k" * 16, 3, 5),))),
)


@settings(max_examples=100)
@given(request=_REQUESTS, number=st.integers(0, 1 << 40))
def test_a_request_survives_the_wire(request: PutShards | GetShards, number: int) -> None:
    encoded = frames.encode(frames.Numbered(number, request))
    assert frames.header_length(encoded[: frames.PREFIX.size], 1 << 20) == len(encoded) - frames.PREFIX.size
    assert frames.decode(encoded[frames.PREFIX.size :], BulkLimits()) == frames.Numbered(number, request)


@pytest.mark.parametrize(
    "change",
    [
        {"page_key": b"short"},
        {"number": 2},
        {"number": 5},
        {"k": 0},
        {"m": 300},
        {"length": 0},
        {"length": (256 << 20) + 1},
        {"checksum": -1},
        {"data_checksums": (1, 2)},
        {"length": True},
    ],
)
def test_a_label_that_can_not_be_is_a_protocol_error(change: dict[str, object]) -> None:
    label = replace(batch([10])[0].shards[0], **change)  # type: ignore[arg-type]
    encoded = frames.encode(frames.Numbered(1, PutShards("g", 1, 0, (label,))))
    with pytest.raises(ProtocolError):
        frames.decode(encoded[frames.PREFIX.size :], BulkLimits())


@pytest.mark.parametrize("group", ["", "a{b", "x" * 65, "a b", "a:b", "a\n"])
def test_a_group_name_that_could_not_be_a_key_is_a_protocol_error(group: str) -> None:
    encoded = frames.encode(frames.Numbered(1, batch([10], group)[0]))
    with pytest.raises(ProtocolError):
        frames.decode(encoded[frames.PREFIX.size :], BulkLimits())
