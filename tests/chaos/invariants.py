"""What must hold of a cluster that has come to rest, whatever befell it before."""

import asyncio
import contextlib
import time
from typing import Any

import aiohttp
from xxhash import xxh3_64_intdigest

from services.cli.local import LocalCluster
from shared.errors import GhostError
from shared.stripe_index import StripeIndex
from shared.transport.base import GetShards, ShardRef
from shared.transport.client import BulkClient
from shared.types import PageKey

KEYS_AT_ONCE = 256
FETCH_S = 20.0
DAMAGED = "is damaged"


async def check(cluster: LocalCluster, deadline_s: float, *, scrub: bool) -> list[str]:
    """The promises that do not hold once nothing runs any more; waits for it up to a deadline.

    `scrub`: shards were spoilt on purpose. Where nobody has read them since, only a scrub finds them.
    """
    end = time.monotonic() + deadline_s
    while True:
        wrong = await _check(cluster)
        if not wrong or time.monotonic() > end:
            return wrong
        if scrub and any(each.endswith(DAMAGED) for each in wrong):
            await _scrub(cluster)
        await asyncio.sleep(0.5)


async def _scrub(cluster: LocalCluster) -> None:
    """An operator's word: the stores look at all that they have, and tell what is damaged."""
    headers = {"Authorization": f"Bearer {cluster.settings.secret or ''}"}
    with contextlib.suppress(aiohttp.ClientError, TimeoutError):
        async with aiohttp.ClientSession(headers=headers) as session:
            for store in (await cluster.status())["stores"]:
                await session.post(store["admin_url"] + "/admin/scrub")


async def _check(cluster: LocalCluster) -> list[str]:
    try:
        status = await cluster.wait_serving(5.0)
        stored = await _stored(status, cluster.settings.secret or "")
        return [*_at_rest(cluster, status, stored), *await _index(cluster, status, stored)]
    except (GhostError, aiohttp.ClientError, TimeoutError) as error:
        return [f"the cluster does not come to rest: {error}"]


def _at_rest(cluster: LocalCluster, status: dict[str, Any], stored: dict[str, set[PageKey]]) -> list[str]:
    wrong = []
    settings, states = cluster.settings, [worker["state"] for worker in status["workers"]]
    if states.count("member") != settings.tp or states.count("spare") != settings.spares:
        wrong.append(f"workers are {states}")
    if len(status["stores"]) != settings.stores:
        wrong.append(f"{len(status['stores'])} stores are there")
    if status["running"] or status["waiting"] or status["pages_held"]:
        wrong.append(f"{status['running']} run, {status['waiting']} wait, {status['pages_held']} pages are held")
    if status["stripes_pending"] or status["stripes_unprotected"]:
        wrong.append(f"{status['stripes_unprotected']} stripes unprotected: {status['unprotected_reason']}")
    if status["can_lose"] != settings.parity:
        wrong.append(f"{status['can_lose']} ranks can be lost, not {settings.parity}")
    if not cluster.hosted and status["stripes_protected"] != status["pages_cached"]:  # of a hash once
        wrong.append(f"{status['pages_cached']} pages are cached, {status['stripes_protected']} protected")
    kept = set().union(*stored.values())
    if len(kept) != status["stripes_protected"]:
        wrong.append(f"stores keep {len(kept)} stripes, {status['stripes_protected']} are in use")
    return wrong


async def _stored(status: dict[str, Any], token: str) -> dict[str, set[PageKey]]:
    """Page keys by store, as the stores tell them."""
    found: dict[str, set[PageKey]] = {}
    headers = {"Authorization": f"Bearer {token}"}
    async with aiohttp.ClientSession(raise_for_status=True, headers=headers) as session:
        for store in status["stores"]:
            keys = found[store["store_id"]] = set()
            query: dict[str, str] = {"limit": str(KEYS_AT_ONCE)}
            while True:
                async with session.get(store["admin_url"] + "/admin/stripes", params=query) as response:
                    page = await response.json()
                keys.update(bytes.fromhex(each["page_key"]) for each in page["stripes"])
                if page["next_cursor"] is None:
                    break
                query["cursor"] = page["next_cursor"]
    return found


async def _index(cluster: LocalCluster, status: dict[str, Any], stored: dict[str, set[PageKey]]) -> list[str]:
    """An index entry means: these bytes are in this store, with this checksum. Reads every one of them."""
    alive = {store["store_id"]: store["incarnation"] for store in status["stores"]}
    addresses = {store["store_id"]: store["bulk_address"] for store in status["stores"]}
    keys = sorted(set().union(*stored.values()))
    async with StripeIndex(cluster.redis_url) as index:
        stripes = await index.get_many(status["group"], keys)
    wrong = [f"stripe {key.hex()} is stored, but not in the index" for key in keys if key not in stripes]
    shards = [shard for stripe in stripes.values() for shard in stripe.alive(alive)]
    if len(shards) != len(keys) * cluster.settings.parity:
        wrong.append(f"{len(shards)} parity shards can be found of {len(keys)} stripes")
    for store_id, address in addresses.items():
        mine = [shard for shard in shards if shard.store_id == store_id]
        if not mine:
            continue
        async with await BulkClient.connect(address, token=cluster.settings.secret or "") as client:
            for start in range(0, len(mine), KEYS_AT_ONCE):
                batch = mine[start : start + KEYS_AT_ONCE]
                into = [memoryview(bytearray(shard.length)) for shard in batch]
                refs = tuple(ShardRef(shard.page_key, shard.number, shard.length) for shard in batch)
                outcomes = await client.get(GetShards(status["group"], refs), into, timeout=FETCH_S)
                for shard, data, outcome in zip(batch, into, outcomes, strict=True):
                    if outcome is not None:
                        wrong.append(f"the index names a shard that {store_id} has not: {outcome}")
                    elif xxh3_64_intdigest(data) != shard.checksum:
                        wrong.append(f"a shard in {store_id} {DAMAGED}")
    return wrong
