"""Parity that is lost, damaged or has no room, in a real cluster: no stream differs, and protection becomes whole."""

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from services.cli.drill import Options, Stream, stream_all
from services.cli.local import LocalCluster
from shared.stripe_index import StripeIndex
from tests.cluster.conftest import SERVING_S, quiet, settings, whole
from tests.cluster.test_survival import conserved

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]

PROMPTS = [[token] * 210 for token in (5, 6)]
SEALED = len(PROMPTS) * (210 // 16)
STRIPES = "ghost:{*}:s:*"
"""The index's keys of stripes."""


async def admin(cluster: LocalCluster, store: str, method: str, path: str, json: object = None) -> dict[str, Any]:
    """The answer of a store's admin endpoint."""
    url = cluster.processes[store].address + "/admin/" + path
    async with aiohttp.ClientSession(raise_for_status=True) as session, session.request(method, url, json=json) as said:
        return dict(await said.json())


async def flip_all(cluster: LocalCluster, store: str) -> None:
    """Change a byte in every shard of a store's memory."""
    _flip(cluster.processes[store].pid, (await admin(cluster, store, "GET", "status"))["capacity_bytes"])


def _flip(pid: int, capacity: int) -> None:
    """The arena is the largest range of memory that is no file's; shards begin at multiples of 512."""
    maps = (line.split() for line in Path(f"/proc/{pid}/maps").read_text().splitlines())
    private = [each[0].split("-") for each in maps if (each[1], each[4]) == ("rw-p", "0")]
    arena = max((int(end, 16) - int(start, 16), int(start, 16)) for start, end in private)[1]
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
        memory.seek(arena)
        content = bytearray(memory.read(capacity))
        content[::512] = bytes(byte ^ 1 for byte in content[::512])
        memory.seek(arena)
        memory.write(content)


async def scrubbed(cluster: LocalCluster, store: str) -> dict[str, Any]:
    """Scrub, and return how it ended."""
    scrub = await admin(cluster, store, "POST", "scrub")
    async with asyncio.timeout(30):
        while scrub["running"]:
            await asyncio.sleep(0.01)
            scrub = (await admin(cluster, store, "GET", "status"))["scrub"]
    return scrub


async def same_after_a_kill(cluster: LocalCluster, calm: list[Stream], salt: str) -> int:
    """Ask the same again, kill rank 1 in the middle, compare; return how many pages came back from parity."""
    epoch, victim = (before := await whole(cluster))["epoch"], {each["rank"]: each for each in before["workers"]}[1]
    struck: list[int] = []

    def watch(index: int, stream: Stream) -> None:
        if index == 0 and len(stream.tokens) >= 10 and not struck:
            struck.append(victim["pid"])
            os.kill(victim["pid"], signal.SIGKILL)

    hit = await stream_all(cluster, PROMPTS, Options(max_tokens=40), salt, watch=watch)
    assert [(each.tokens, each.digests) for each in hit] == [(each.tokens, each.digests) for each in calm]
    status = await whole(cluster, without=victim["name"])
    return sum(record["restored_pages"] for record in status["recoveries"] if record["epoch"] > epoch)


async def test_protection_becomes_whole_after_a_store_was_killed_under_load(cluster: LocalCluster) -> None:
    await whole(cluster)
    options, salt = Options(max_tokens=40), "loss of a store"
    calm = await stream_all(cluster, PROMPTS, options, salt)
    known = {store["incarnation"] for store in (await quiet(cluster))["stores"]}
    async with cluster.kept():
        os.kill(cluster.processes["store-0"].pid, signal.SIGKILL)
        killed = time.monotonic()
        for number in range(3):  # the load, with pages of its own
            hit = await stream_all(cluster, PROMPTS, options, f"{salt} {number}")
            assert [(each.tokens, each.digests) for each in hit] == [(each.tokens, each.digests) for each in calm]
        async with asyncio.timeout(60):
            while True:
                status = await quiet(cluster)
                if {store["incarnation"] for store in status["stores"]} - known and not status["stripes_unprotected"]:
                    break
                await asyncio.sleep(0.02)
        print(f"protection is whole {time.monotonic() - killed:.2f} s after the store was killed")
        assert await same_after_a_kill(cluster, calm, salt) >= SEALED
    await conserved(cluster)


async def test_after_redis_forgot_everything_a_lost_rank_is_restored_from_the_same_parity(
    cluster: LocalCluster,
) -> None:
    """By the time that a rank dies the store has told it all again."""
    await whole(cluster)
    calm = await stream_all(cluster, PROMPTS, Options(max_tokens=40), "forgotten")
    await conserved(cluster)
    async with StripeIndex(cluster.redis_url) as index, asyncio.timeout(30):
        known = set(await index.command("KEYS", STRIPES))
        assert len(known) >= SEALED
        await index.command("FLUSHALL")
        while set(await index.command("KEYS", STRIPES)) != known:
            await asyncio.sleep(0.02)
    assert await same_after_a_kill(cluster, calm, "forgotten") >= SEALED


async def test_a_scrub_has_damaged_parity_encoded_anew(cluster: LocalCluster) -> None:
    calm = await stream_all(cluster, PROMPTS, Options(max_tokens=40), "scrub")
    await conserved(cluster)
    await flip_all(cluster, "store-0")
    scrub = await scrubbed(cluster, "store-0")
    assert scrub["damaged"] == scrub["checked"] >= SEALED
    await conserved(cluster)
    assert (await scrubbed(cluster, "store-0"))["damaged"] == 0
    assert await same_after_a_kill(cluster, calm, "scrub") >= SEALED


async def test_a_damaged_row_is_made_up_for_by_another_and_pages_in_use_have_room_in_full_stores(
    small_model_dir: Path,
) -> None:
    shape = settings(parity=2, stores=2, store_memory_mb=4, page_tokens=128, kv_memory_mb=32)
    async with LocalCluster(shape, small_model_dir) as cluster:
        await cluster.wait_serving(SERVING_S)
        calm = await stream_all(cluster, PROMPTS, Options(max_tokens=40), "rows")
        assert (await quiet(cluster))["stripes_protected"] == len(PROMPTS)
        await flip_all(cluster, "store-0")
        assert await same_after_a_kill(cluster, calm, "rows") == len(PROMPTS)
        await scrubbed(cluster, "store-0")

        many = [[token] * 1500 for token in range(10, 20)]
        await stream_all(cluster, many, Options(max_tokens=2), "full")
        status = await quiet(cluster)
        assert status["unprotected_reason"].startswith("store full"), status["unprotected_reason"]
        assert 0 < status["stripes_protected"] < status["pages_cached"]

        long = Options(max_tokens=3400)  # and the client leaves when all is seen: what failed is tried again every 2 s
        streams = asyncio.create_task(stream_all(cluster, [[30] * 600], long, "in use"))
        try:
            async with asyncio.timeout(60):
                while True:
                    now = await cluster.status()
                    given = now["stripes_unprotected"] - status["stripes_unprotected"]
                    if now["running"] and now["can_lose"] == 2 and given > 0:
                        break  # all pages in use have parity, and some cached ones no more
                    assert not streams.done(), now
                    await asyncio.sleep(0.02)
        finally:
            streams.cancel()
            await asyncio.wait([streams])
