"""The way of sealed pages into the shadow: which are encoded, and what the stores acknowledged, lost or may forget.

The pool keeps each page's state; this sends what follows from it to ranks and stores.
"""

import logging
from collections.abc import Callable

from services.coordinator.membership import Membership
from services.coordinator.pages import PagePool, Shadow
from services.coordinator.stores import Stores
from shared.channel import Channel
from shared.messages import (
    EpochNow,
    Message,
    ProtectDone,
    ProtectPlan,
    ReleaseStripes,
    ShardsLost,
    StoreDrains,
)
from shared.types import GroupConfig, PageKey, StoreInfo, pack_ids

log = logging.getLogger(__name__)

RETRY_S = 2.0
MAKE_ROOM_S = 0.2
"""After stripes were given up for others: how long until those are tried again."""
FULL_S = 30.0
"""How long stores that had no room are taken for full, but for what they were told to release since."""
BATCH_PAGES = 256
IN_FLIGHT_PAGES = 1024
EVERY_SERIAL = (1 << 63) - 1


class Protection:
    """Sealed pages on their way to the stores. `to_ranks` sends a message to every rank."""

    def __init__(
        self,
        config: GroupConfig,
        membership: Membership,
        pool: PagePool,
        stores: Stores,
        to_ranks: Callable[[Message], None],
    ):
        self.pool = pool
        self.stores = stores
        self.parity_bytes = 0
        """Acknowledged since the start."""
        self._group = config.group
        self._parity = config.parity if config.protection == "parity" else 0
        self._membership = membership
        self._to_ranks = to_ranks
        self._serial = 0  # of releases sent
        self._step = 0  # the last one done in this epoch: the KV of all before it is there
        self._tried = 0.0
        self._room: int | None = None  # where the stores are full: stripes released since
        self._full_since = 0.0
        self._born = membership.epoch  # what was put up to then was for the pages of an earlier coordinator

    @property
    def trouble(self) -> str:
        """Why the last stripe that could not be protected was not."""
        return self.pool.unprotected_reason if self.stores.infos() else "no parity store is connected"

    def flow(self, step: int | None = None) -> None:
        """Send sealed pages to the shadow, and tell the stores which stripes are gone. `step`: the last one done."""
        if step is not None:
            self._step = step
        epoch = self._membership.epoch
        if keys := self.pool.take_released():
            self._release(keys)
            if self._room is not None:
                self._room += len(keys)
        stores = self.stores.open()
        if self._membership.state != "serving" or not stores:
            return
        while pages := self.pool.start_protection(BATCH_PAGES, IN_FLIGHT_PAGES):
            numbers = pack_ids(page.number for page in pages)
            keys = tuple(page.key for page in pages if page.key is not None)
            self._to_ranks(ProtectPlan(epoch, self._step, numbers, keys, stores, self._serial))

    def _release(self, keys: tuple[PageKey, ...]) -> None:
        self.stores.send(ReleaseStripes(self._group, keys, self._membership.epoch, self._serial))
        self._serial += 1

    def interrupted(self) -> None:
        """The epoch is over: in the next one no step is done yet, and none needs to be waited for."""
        self._step = 0

    def done(self, message: ProtectDone) -> None:
        """A rank tells what became of the stripes that it encoded."""
        self.pool.end_protection(message.protected, message.rank, protected=True)
        self.parity_bytes += message.parity_bytes
        if message.failed:
            self.pool.end_protection(message.failed, message.rank, protected=False, reason=message.reason)
            log.warning("%d stripes are not protected: %s", len(message.failed), message.reason)
        if message.full:
            self._make_room(message.failed)
        self.flow()

    def _make_room(self, failed: tuple[PageKey, ...]) -> None:
        """Stores are full: parity of pages in use goes before that of pages that are only cached."""
        self._room, self._full_since = 0, self.pool.now
        if keys := self.pool.make_room(failed):
            self._release(keys)
            self._tried = self.pool.now + MAKE_ROOM_S - RETRY_S

    def retry(self, now: float) -> None:
        """Try what failed again, RETRY_S after the last time; cached pages as far as a full store was given room."""
        if now - self._tried > RETRY_S:
            self._tried = now
            if now - self._full_since > FULL_S:
                self._room = None
            self.pool.protect_again(Shadow.UNPROTECTED, cached=self._room)
            if self._room is not None:
                self._room = 0
            self.flow()

    # -- stores ------------------------------------------------------------------------------------------------------

    def store_joins(self, store: StoreInfo, channel: Channel) -> None:
        """A parity store offers its memory: protection is tried again for all that lacks it."""
        self.stores.join(store, channel)
        channel.send(EpochNow(self._group, self._membership.epoch))
        channel.send(ReleaseStripes(self._group, (), self._born, EVERY_SERIAL))  # of pages that nobody knows now
        self._room = None
        apart = len(self.stores.open()) <= self._parity  # before, shards of one stripe had to share a store
        self.pool.protect_again(Shadow.UNPROTECTED, *([Shadow.PROTECTED] if apart else []))
        self.flow()

    def store_gone(self, store_id: str, channel: Channel) -> bool:
        """A parity store is lost, and with it the parity that it held: all is encoded anew where there is room.

        False if another has taken its place already.
        """
        if not self.stores.leave(store_id, channel):
            return False
        log.warning("parity store %s is lost", store_id)
        self.pool.protection_lost()
        self.flow()
        return True

    def from_store(self, store_id: str, message: ShardsLost | StoreDrains) -> None:
        """A store gave parity up, or wants to be rid of it: it is encoded anew from the live pages."""
        if isinstance(message, ShardsLost):
            log.warning("a store lost damaged stripes", extra={"store": store_id, "stripes": len(message.keys)})
        else:
            self.stores.drain(store_id)
        if message.group == self._group:
            self.pool.shards_lost(message.keys)
            self.flow()
