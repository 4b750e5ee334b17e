"""What a store does on its operator's word: check all checksums (scrub), and leave in order (drain)."""

import asyncio
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass

from xxhash import xxh3_64_intdigest

from services.parity_store.shards import Shard
from services.parity_store.store import Store
from shared.channel import Channel
from shared.errors import GhostError, PeerLost
from shared.messages import TOLD_TO_STOP, Goodbye, Message, ShardsLost, StoreDrains
from shared.stripe_index import StripeIndex
from shared.types import PageKey

log = logging.getLogger(__name__)

_TURN_BYTES = 4 << 20  # checked before other tasks get a turn
_KEYS = 4096  # in one message or call
_DRAIN_POLL_S = 0.25


@dataclass(slots=True)
class Scrub:
    """How far the last scrub is. The admin endpoint shows it."""

    running: bool = False
    checked: int = 0  # shards
    total: int = 0
    damaged: int = 0
    seconds: float = 0.0


class Upkeep:
    """Scrub and drain of one store. Tells the coordinator what is gone, over the channel that app.py keeps."""

    def __init__(self, store: Store, index: StripeIndex, store_id: str, incarnation: str):
        self.scrub = Scrub()
        self.channel: Channel | None = None
        self._store = store
        self._index = index
        self._me = (store_id, incarnation)
        self._wanted = asyncio.Event()

    async def run_scrubs(self) -> None:
        """Scrub whenever asked to, for ever."""
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            await self._scrub()

    def start_scrub(self) -> None:
        """Begin a scrub, unless one runs."""
        if not self.scrub.running:
            self.scrub = Scrub(running=True, total=self._store.table.count)
            self._wanted.set()

    def start_drain(self) -> None:
        """From now on refuse shards; the coordinator has what is here encoded anew, elsewhere."""
        self._store.draining = True
        self.say_drains()

    def say_drains(self) -> None:
        """Tell the coordinator, if the store drains. For every new channel as well."""
        if self._store.draining:
            for group, keys in self._keys():
                self._tell(StoreDrains(group, keys))

    def take_leave(self) -> None:
        """Tell the coordinator that the store ends in order; sent before the channel is closed."""
        self._tell(Goodbye(TOLD_TO_STOP))

    async def drained(self) -> None:
        """Return when a drain is over: nothing that is here is named by the index any more."""
        while not (self._store.draining and self._store.table.count == self._store.writer.queued == 0):
            await asyncio.sleep(_DRAIN_POLL_S)
            if self._store.draining:
                await self._let_go()

    async def _scrub(self) -> None:
        began = time.monotonic()
        turn = 0
        for group, keys in list(self._keys()):
            damaged: list[PageKey] = []
            for key in keys:
                for shard in self._store.table.stripe(key):
                    self.scrub.checked += 1
                    if shard.group == group and self._is_damaged(shard):
                        damaged.append(key)
                    turn += shard.label.length
                if turn > _TURN_BYTES:
                    turn = 0
                    await asyncio.sleep(0)
            if damaged:
                self.scrub.damaged += self._store.release(group, damaged)
                self._tell(ShardsLost(group, tuple(damaged)))
                log.error("scrub: %d damaged stripes are dropped", len(damaged))
        self.scrub.seconds = time.monotonic() - began
        self.scrub.running = False

    def _is_damaged(self, shard: Shard) -> bool:
        return xxh3_64_intdigest(self._store.table.view(shard)) != shard.label.checksum

    async def _let_go(self) -> None:
        """Forget the stripes whose entry names another store, or nobody, by now."""
        for group, keys in list(self._keys()):
            try:
                found = await self._index.get_many(group, keys)
            except GhostError as error:
                log.warning("drain waits for the stripe index: %s", error)
                return
            named = {
                key
                for key, stripe in found.items()
                if any((shard.store_id, shard.incarnation) == self._me for shard in stripe.shards)
            }
            self._store.release(group, [key for key in keys if key not in named])

    def _keys(self) -> Iterator[tuple[str, tuple[PageKey, ...]]]:
        """Yield all page keys, some thousand at a time, by group."""
        for group in self._store.table.groups:
            keys = self._store.table.keys(group)
            for start in range(0, len(keys), _KEYS):
                yield group, tuple(keys[start : start + _KEYS])

    def _tell(self, message: Message) -> None:
        """Send, if the coordinator is there: one that comes anew has all that was here encoded again anyhow."""
        if self.channel is not None and not self.channel.closed:
            try:
                self.channel.send(message)
            except PeerLost as error:
                log.warning("%s", error)
