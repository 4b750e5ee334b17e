"""The stripe index: an entry means that these bytes are in this store, of this epoch, with this checksum.

Kept in Redis (or Valkey). Whoever writes an entry has the bytes in place first, and removes the entry before the bytes.

    ghost:{<group>}:epoch           the group's epoch, a decimal integer that only grows
    ghost:{<group>}:lease           who leads the group, as services/coordinator/membership/lease.py packs it; runs out
    ghost:{<group>}:cordons         MessagePack map: worker that is not to be taken -> rank that it was drained of
    ghost:{<group>}:s:<page key>    hash, one stripe: parity shard number -> MessagePack array [store id, incarnation,
                                    epoch, k, m, length, checksum, data checksums]; page key is 16 to 32 raw bytes

    ghost:store:<store id>          the incarnation whose entries are all in the index; gone when Redis lost its memory

The braces make a group's keys one slot of a Redis cluster, so that a script can compare the epoch and write stripes at
once; groups spread over the slots. A store that restarts has another incarnation, so that what the index says of its
former life is void: readers keep only entries whose store is alive under the same incarnation (StripeEntry.alive), and
the store deletes them when it is back.
"""

import asyncio
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from importlib.resources import files
from itertools import zip_longest
from typing import Any, NamedTuple, Self, TypeVar
from urllib.parse import urlsplit

import msgpack
import redis.asyncio
import redis.exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from shared.errors import ConfigError, DeadlineExceeded, Fenced, PeerLost, ProtocolError
from shared.types import MAX_KEY_BYTES, PAGE_KEY_BYTES, PageKey, is_page_key

_SCRIPT = files("shared").joinpath("stripe_index.lua").read_text()
_BATCH = 512  # entries in one script call: bounds how long Redis serves nobody else
_KNOWN_S = 24 * 3600
"""After so long a store writes its entries again, so that the marks of stores that are gone go too."""
_T = TypeVar("_T")


class ShardEntry(NamedTuple):  # which is made in a third of the time of a frozen dataclass
    """Where one parity shard is. The store that holds the bytes fills it."""

    page_key: PageKey
    number: int  # k .. k+m-1
    store_id: str
    incarnation: str  # of the store, new at every start
    epoch: int  # of the group, when the shard was written
    k: int
    m: int
    length: int
    checksum: int  # xxh3_64 of the parity shard
    data_checksums: tuple[int, ...]  # xxh3_64 of data shards 0..k-1


class StripeEntry(NamedTuple):
    """All that the index says of one stripe."""

    page_key: PageKey
    shards: tuple[ShardEntry, ...]  # ordered by number

    def alive(self, stores: Mapping[str, str]) -> tuple[ShardEntry, ...]:
        """Return the shards in stores that are alive (store id -> incarnation)."""
        return tuple(shard for shard in self.shards if stores.get(shard.store_id) == shard.incarnation)


class StripeIndex:
    """The index in one Redis. Every call raises PeerLost if Redis is away, DeadlineExceeded if it is too slow."""

    def __init__(self, url: str, *, timeout: float = 5.0):
        """Connects at the first call. url: redis://, rediss:// or unix://; timeout: seconds for each call.

        Raises ConfigError for any other; each call does where it reaches what is no Redis of its own.
        """
        scheme = url.partition("://")[0]
        if scheme not in ("redis", "rediss", "unix") or "," in urlsplit(url).netloc.rpartition("@")[2]:
            text = "one Redis as redis://, rediss:// or unix://; no Sentinel, and no Cluster"
            raise ConfigError(f"--redis-url / GHOST_REDIS_URL: {text}; got {scheme[:20]}://")
        try:
            self._redis: Any = redis.asyncio.Redis.from_url(
                url,
                # bounded by _call: redis-py's own is asyncio.wait_for, which in Python 3.11 may swallow a cancellation
                socket_timeout=None,
                socket_connect_timeout=timeout,
                max_connections=16,
                retry=Retry(
                    NoBackoff(), 1
                ),  # once more, for a pooled connection that Redis closed; our callers do the rest
            )
        except ValueError as error:
            raise ConfigError(f"--redis-url / GHOST_REDIS_URL: {error}") from error
        self._script = self._redis.register_script(_SCRIPT)
        self._timeout = timeout

    async def close(self) -> None:
        await self._redis.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def epoch(self, group: str) -> int:
        """Return the group's epoch, 0 if it never had one."""
        return int(await self._call(self._redis.get(_epoch_key(group))) or 0)

    async def advance_epoch(self, group: str, *, at_least: int = 0) -> int:
        """Let the group's epoch grow, past at_least (what the caller knows, if Redis forgot), and return the new one.

        From the moment Redis has done it, writes of older epochs are refused.
        """
        epoch = at_least + 1
        while (before := await self.raise_epoch(group, epoch)) >= epoch:  # another's, or sent twice as a call was lost
            epoch = before + 1
        return epoch

    async def raise_epoch(self, group: str, epoch: int) -> int:
        """Let the group's epoch be no less than this, and return what it was. Doing it twice is doing it once."""
        _, before = await self._call(self._script(keys=[_epoch_key(group)], args=["raise", epoch]))
        return int(before)

    async def take_lease(self, group: str, holder: bytes, seconds: float, dead: bytes = b"") -> bytes:
        """Take the group's lease for so long, or prolong it, unless another than `dead` has it. Returns who has it."""
        call = self._script(keys=[_lease_key(group)], args=["lease", holder, int(1000 * seconds), dead])
        return bytes((await self._call(call))[1])

    async def leave_lease(self, group: str, holder: bytes) -> None:
        """Give the lease back, if this holder has it."""
        await self._call(self._script(keys=[_lease_key(group)], args=["leave", holder]))

    async def cordons(self, group: str) -> dict[str, int | None]:
        """Return the workers that are cordoned, and the rank that each was drained of."""
        packed = await self._call(self._redis.get(_cordons_key(group)))
        try:
            return {str(name): rank for name, rank in msgpack.unpackb(packed).items()} if packed else {}
        except (ValueError, AttributeError, msgpack.UnpackException) as error:
            raise ProtocolError(f"the journal of group {group} holds malformed cordons") from error

    async def keep_cordons(self, group: str, cordons: Mapping[str, int | None]) -> None:
        """Write which workers are cordoned."""
        await self._call(self._redis.set(_cordons_key(group), msgpack.packb(dict(cordons))))

    async def command(self, *words: str) -> Any:
        """Run a command of Redis's: for drills, which break it."""
        return await self._call(self._redis.execute_command(*words))

    async def put_many(self, group: str, epoch: int, entries: Sequence[ShardEntry]) -> None:
        """Write entries, each over what the index said of that shard. Raises Fenced if the epoch is older.

        Fenced may come after a part of a large batch has been written: only if the epoch grew meanwhile.
        """
        await self._run("put", group, epoch, [(e.page_key, str(e.number).encode(), _pack(e)) for e in entries])

    async def get_many(self, group: str, page_keys: Sequence[PageKey]) -> dict[PageKey, StripeEntry]:
        """Return what the index says of these stripes; a stripe it doesn't know is left out."""
        found: dict[PageKey, StripeEntry] = {}
        batches = [page_keys[start : start + _BATCH] for start in range(0, len(page_keys), _BATCH)]
        coming: asyncio.Task[bytes] | None = None
        try:
            for batch, following in zip_longest(batches, batches[1:]):
                packed = await (coming or self._find(group, batch))
                coming = asyncio.create_task(self._find(group, following)) if following else None
                await asyncio.sleep(0)  # it is asked for, and Redis looks while what came is unpacked
                found |= _unpack_stripes(batch, packed)
        finally:
            if coming is not None:
                coming.cancel()
        return found

    async def _find(self, group: str, page_keys: Sequence[PageKey]) -> bytes:
        keys = [_epoch_key(group), *(_stripe_key(group, page_key) for page_key in page_keys)]
        _, packed = await self._call(self._script(keys=keys, args=["find", 0]))  # one value: redis-py reads it fast
        return bytes(packed)

    async def delete_many(self, group: str, epoch: int, page_keys: Sequence[PageKey]) -> int:
        """Delete whole stripes, wherever their shards are; return how many there were. Raises Fenced."""
        return await self._run("delete", group, epoch, [(page_key, b"", b"") for page_key in page_keys])

    async def drop_many(
        self, group: str, store_id: str, incarnation: str, shards: Sequence[tuple[PageKey, int]]
    ) -> int:
        """Delete the entries of shards (page key, number) that still name this store; return how many there were.

        Not fenced: a store may always say that it has lost or given up its own bytes.
        """
        owner = _owner(store_id, incarnation)
        return await self._run(
            "drop", group, 0, [(page_key, str(number).encode(), owner) for page_key, number in shards]
        )

    async def forget_former_lives(self, store_id: str, incarnation: str) -> int:
        """Delete, in all groups, the entries of this store's earlier incarnations; return how many there were.

        Walks over the whole index, some hundred stripes at a time; who writes meanwhile is not disturbed.
        """
        store, owner = _owner(store_id), _owner(store_id, incarnation)
        touched, cursor = 0, 0
        while True:
            scan = self._redis.scan(cursor, match=b"ghost:{*}:s:*", count=_BATCH)
            cursor, found = await self._call(scan)
            by_group: dict[bytes, list[bytes]] = {}
            for key in found:
                by_group.setdefault(key[: key.index(b"}:s:") + 1], []).append(key)
            for group, keys in by_group.items():
                purge = self._script(keys=[group + b":epoch", *keys], args=["purge", 0, store, owner])
                touched += int((await self._call(purge))[1])
            if not cursor:
                return touched

    async def knows(self, store_id: str, incarnation: str) -> bool:
        """Whether `know` was called for this life of the store, and Redis has not lost its memory since."""
        return bool(await self._call(self._redis.get(_store_key(store_id))) == incarnation.encode())

    async def know(self, store_id: str, incarnation: str) -> None:
        """Remember that all entries of this life of the store have been written."""
        await self._call(self._redis.set(_store_key(store_id), incarnation, ex=_KNOWN_S))

    async def _run(self, operation: str, group: str, epoch: int, items: Sequence[tuple[bytes, bytes, bytes]]) -> int:
        """Run the script over (page key, shard number, value) in batches."""
        touched = 0
        for start in range(0, len(items), _BATCH):
            batch = items[start : start + _BATCH]
            keys = [_epoch_key(group), *(_stripe_key(group, page_key) for page_key, _, _ in batch)]
            values = [value for _, number, entry in batch for value in (number, entry)]
            done, count = await self._call(self._script(keys=keys, args=[operation, epoch, *values]))
            if not done:
                raise Fenced(f"epoch {epoch} of group {group} is over; the group is at {count}")
            touched += int(count)
        return touched

    async def _call(self, awaitable: Awaitable[_T]) -> _T:
        """Await a call to Redis within the deadline, its errors translated."""
        try:
            async with asyncio.timeout(self._timeout):
                return await awaitable
        except (TimeoutError, redis.exceptions.TimeoutError) as error:
            raise DeadlineExceeded(f"Redis did not answer within {self._timeout:g} s") from error
        except (redis.exceptions.RedisError, OSError) as error:
            if (what := _no_redis_of_ours(error)) is not None:
                raise ConfigError(f"--redis-url / GHOST_REDIS_URL: one Redis is needed; this is {what}") from error
            raise PeerLost(f"Redis: {error}") from error


def _no_redis_of_ours(error: Exception) -> str | None:
    """What was reached, if it is a kind of Redis that will never do; else None."""
    text = str(error)
    moved = isinstance(error, redis.exceptions.MovedError | redis.exceptions.AskError)
    if moved or text.startswith(("MOVED ", "ASK ")):
        return "a node of a Redis Cluster, of which others have the keys"
    return f"a Redis Sentinel, or lacks a command: {text}" if text.lower().startswith("unknown command") else None


def _epoch_key(group: str) -> bytes:
    return b"ghost:{%s}:epoch" % group.encode()


def _lease_key(group: str) -> bytes:
    return b"ghost:{%s}:lease" % group.encode()


def _cordons_key(group: str) -> bytes:
    return b"ghost:{%s}:cordons" % group.encode()


def _store_key(store_id: str) -> bytes:
    return b"ghost:store:" + store_id.encode()


def _stripe_key(group: str, page_key: PageKey) -> bytes:
    if not is_page_key(page_key):
        raise ProtocolError(f"a page key of {len(page_key)} bytes; {PAGE_KEY_BYTES} to {MAX_KEY_BYTES} are allowed")
    return b"ghost:{%s}:s:%s" % (group.encode(), page_key)


def _owner(store_id: str, incarnation: str = "") -> bytes:
    """Return what an entry of this store, and of this incarnation where one is given, begins with."""
    head: bytes = msgpack.packb([store_id, incarnation, 0, 0, 0, 0, 0, 0])[:1]
    store: bytes = msgpack.packb(store_id)
    return head + store + (bytes(msgpack.packb(incarnation)) if incarnation else b"")


def _pack(entry: ShardEntry) -> bytes:
    e = entry
    body = (e.store_id, e.incarnation, e.epoch, e.k, e.m, e.length, e.checksum, e.data_checksums)
    return bytes(msgpack.packb(body))


def _unpack(page_key: PageKey, number: int, entry: bytes) -> ShardEntry:
    store_id, incarnation, epoch, k, m, length, checksum, data_checksums = msgpack.unpackb(entry)
    return ShardEntry(page_key, number, store_id, incarnation, epoch, k, m, length, checksum, tuple(data_checksums))


def _unpack_stripes(page_keys: Sequence[PageKey], packed: bytes) -> Iterator[tuple[PageKey, StripeEntry]]:
    """What a script has found of these stripes, of those that it knows."""
    for page_key, shards in zip(page_keys, msgpack.unpackb(packed, raw=True), strict=True):
        if shards:
            try:
                entries = [
                    _unpack(page_key, int(number), entry)
                    for number, entry in zip(shards[::2], shards[1::2], strict=True)
                ]
            except (ValueError, TypeError, msgpack.UnpackException) as error:
                raise ProtocolError(f"the index holds a malformed entry for stripe {page_key.hex()}") from error
            yield page_key, StripeEntry(page_key, tuple(sorted(entries)))
