"""A parity store under its operator's hands: scrub, drain, capacity; as a real process."""

import asyncio
from pathlib import Path

from shared.errors import ShardMissing, StoreFull
from shared.messages import ShardsLost, StoreDrains
from shared.stripe_index import StripeIndex
from shared.transport.client import BulkClient
from shared.types import StoreInfo
from tests.cluster.store_harness import (
    DEADLINE_S,
    StoreCoordinator,
    StoreProcess,
    asking,
    keys,
    store_process,
    stripes,
    until,
)


def flip(pid: int, payload: bytes) -> None:
    """Change one byte of a copy of `payload` in another process's arena."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        start, _, end = line.split()[0].partition("-")
        if " rw-p " not in line or line.split()[4] != "0" or int(end, 16) - int(start, 16) < 16 << 20:
            continue
        with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
            memory.seek(int(start, 16))
            found = memory.read(16 << 20).find(payload)
            if found >= 0:
                memory.seek(int(start, 16) + found)
                memory.write(bytes([payload[0] ^ 1]))
                return
    raise AssertionError("the shard is nowhere in the store's memory")


async def test_scrub_drops_what_is_damaged_and_says_so_and_nothing_else(
    coordinator: StoreCoordinator, store: StoreProcess, info: StoreInfo, index: StripeIndex, group: str
) -> None:
    put, payloads = stripes(group, 40)
    async with await BulkClient.connect(info.bulk_address, timeout=DEADLINE_S) as client:
        await client.put(put, payloads, timeout=DEADLINE_S)
        flip(store.process.pid, bytes(payloads[7]))
        assert (await store.admin("POST", "/admin/scrub"))[0] == 202

        async def is_over() -> bool:
            scrub = (await store.admin("GET", "/admin/status"))[1]["scrub"]
            return bool(scrub["checked"] == 40 and not scrub["running"])

        await until(is_over)
        assert (await store.admin("GET", "/admin/status"))[1]["scrub"]["damaged"] == 1
        get, into = asking(put)
        outcomes = await client.get(get, into, timeout=DEADLINE_S)
        assert [i for i, outcome in enumerate(outcomes) if isinstance(outcome, ShardMissing)] == [7]

        async def is_told() -> bool:
            return coordinator.heard == [ShardsLost(group, (keys(put)[7],))]

        await until(is_told)

        async def is_forgotten() -> bool:
            return set(await index.get_many(group, keys(put))) == set(keys(put)) - {keys(put)[7]}

        await until(is_forgotten)


async def test_a_drained_store_leaves_when_its_stripes_are_elsewhere(
    coordinator: StoreCoordinator, redis_url: str, index: StripeIndex, group: str
) -> None:
    put, payloads = stripes(group, 5)
    async with (
        store_process(coordinator.url, redis_url, "--name", "leaves") as leaves,
        store_process(coordinator.url, redis_url, "--name", "stays"),
    ):
        infos = {info.store_id: info for info in (await coordinator.next_store(), await coordinator.next_store())}
        old = await BulkClient.connect(infos["leaves"].bulk_address, timeout=DEADLINE_S)
        await old.put(put, payloads, timeout=DEADLINE_S)
        assert (await leaves.admin("POST", "/admin/drain"))[0] == 202

        async def is_told() -> bool:
            return [type(message) for message in coordinator.heard] == [StoreDrains]

        await until(is_told)
        assert set(coordinator.heard[0].keys) == set(keys(put))  # type: ignore[attr-defined]
        outcomes = await old.put(*stripes(group, 1), timeout=DEADLINE_S)
        assert isinstance(outcomes[0], StoreFull)
        get, into = asking(put)
        assert await old.get(get, into, timeout=DEADLINE_S) == (None,) * 5  # until they are elsewhere
        assert leaves.process.returncode is None
        async with await BulkClient.connect(infos["stays"].bulk_address, timeout=DEADLINE_S) as new:
            assert await new.put(put, payloads, timeout=DEADLINE_S) == (None,) * 5
        async with asyncio.timeout(DEADLINE_S):
            assert await leaves.process.wait() == 0
        found = await index.get_many(group, keys(put))
        assert {shard.store_id for stripe in found.values() for shard in stripe.shards} == {"stays"}
        await old.close()


async def test_capacity_can_be_changed_while_it_serves(store: StoreProcess, info: StoreInfo, group: str) -> None:
    async with await BulkClient.connect(info.bulk_address, timeout=DEADLINE_S) as client:
        full, payloads = stripes(group, 4, 4 << 20)
        assert await client.put(full, payloads, timeout=DEADLINE_S) == (None,) * 4
        more, more_payloads = stripes(group, 1, 4 << 20)
        assert isinstance((await client.put(more, more_payloads, timeout=DEADLINE_S))[0], StoreFull)
        status, answer = await store.admin("PUT", "/admin/capacity", json={"capacity_bytes": 32 << 20})
        assert (status, answer["capacity_bytes"]) == (200, 32 << 20)
        assert await client.put(more, more_payloads, timeout=DEADLINE_S) == (None,)
    for wrong in ({"capacity_bytes": "1"}, {"capacity_bytes": True}, [], {}):
        assert (await store.admin("PUT", "/admin/capacity", json=wrong))[0] == 400
    for impossible in (0, 1 << 60):
        assert (await store.admin("PUT", "/admin/capacity", json={"capacity_bytes": impossible}))[0] == 409
