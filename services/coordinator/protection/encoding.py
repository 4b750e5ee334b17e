"""Sealed pages on their way to the stores: which are encoded, and what the stores acknowledged, lost or may forget.

The ledger keeps each page's state; this sends what follows from it to ranks and stores.
"""

import logging
from collections.abc import Callable, Iterable
from functools import partial

from services.coordinator.events import FindStripes, Peer, StripesFound
from services.coordinator.membership.members import Membership
from services.coordinator.outbox import Outbox
from services.coordinator.protection.costs import StoredStripe
from services.coordinator.protection.host import Host, Span
from services.coordinator.protection.ledger import Ledger, Parity
from services.coordinator.protection.stores import Stores
from services.coordinator.protection.tails import Tails
from shared.messages import (
    KeepStripes,
    Message,
    ProtectDone,
    ProtectPlan,
    ReleaseStripes,
    ShardsLost,
    StoreDrains,
)
from shared.types import GroupConfig, PageKey, pack_ids

log = logging.getLogger(__name__)

RETRY_S = 2.0
MAKE_ROOM_S = 0.2
"""After stripes were given up for others: how long until those are tried again."""
FULL_S = 30.0
"""How long stores that had no room are taken for full, but for what they were told to release since."""
KEYS_AT_ONCE = 1 << 16
"""In one message to the stores: far below the largest frame."""
BATCH_PAGES = 256
IN_FLIGHT_PAGES = 1024


class Encoding:
    """What of the ledger is under way. `tails`: where those are protected too."""

    def __init__(
        self,
        config: GroupConfig,
        membership: Membership,
        host: Host,
        ledger: Ledger,
        tails: Tails | None,
        stores: Stores,
        outbox: Outbox,
    ):
        self._host = host
        self._ledger = ledger
        self._tails = tails
        self._stores = stores
        self.parity_bytes = 0
        """Acknowledged since the start."""
        self._group = config.group
        self._parity = config.parity if config.protection == "parity" else 0
        self._shards = config.shards
        self._membership = membership
        self._outbox = outbox
        self._serial = 0  # of releases sent
        self._step = 0  # the last one done in this epoch: the KV of all before it is there
        self._tried = 0.0
        self._room: int | None = None  # where the stores are full: stripes released since
        self._full_since = 0.0
        self._open = False  # whether it is known which pages there are: before, the stores forget nothing
        self._looking: set[PageKey] | None = None  # while the index is read: what it may say wrongly by now

    @property
    def trouble(self) -> str:
        """Why the last stripe that could not be protected was not."""
        return self._ledger.unprotected_reason if self._stores.infos() else "no parity store is connected"

    @property
    def storable(self) -> bool:
        """Whether there is a store."""
        return bool(self._stores.infos())

    def flow(self) -> None:
        """Send sealed pages to the shadow, and tell the stores which stripes are gone."""
        if self._tails is not None:
            self._tails.prune()
            if released := self._tails.take_released():
                self._release(released)
        if keys := self._ledger.take_released():
            self._release(keys)
            if self._room is not None:
                self._room += len(keys)
        if self._membership.state != "serving" or not self._stores.open():
            return
        while pages := self._ledger.start_protection(BATCH_PAGES, IN_FLIGHT_PAGES):
            if self._host.confirm(pages):
                self.pinned(pages)

    def pinned(self, numbers: Iterable[int]) -> None:
        """These pages, which are pending, are kept by now: have them encoded."""
        pages = {
            number: key
            for number in numbers
            if self._ledger.parity(number) is Parity.PENDING and (key := self._ledger.key(number)) is not None
        }
        if not pages or self._membership.state != "serving":
            return  # what is pending then is queued again by `resumed`
        if stores := self._stores.open():
            plan = ProtectPlan(
                self._membership.epoch, self._step, pack_ids(pages), tuple(pages.values()), stores, self._serial
            )
            self._outbox.to_ranks(plan)
        else:  # the last one left meanwhile
            self._ledger.end_protection(pages.values(), 0, protected=False, reason="no parity store is connected")

    def _release(self, keys: tuple[PageKey, ...]) -> None:
        self._outdated(keys)
        for start in range(0, len(keys), KEYS_AT_ONCE):
            part = keys[start : start + KEYS_AT_ONCE]
            self._stores.send(ReleaseStripes(self._group, part, self._membership.epoch, self._serial))
        self._serial += 1

    def step_done(self, step: int, spans: Iterable[Span]) -> None:
        """A step is done: the pages that it filled are protected, where it is asked also the tokens of others."""
        self._step = step
        stores = self._stores.open()
        if self._tails is not None and stores and (begun := self._tails.computed(self._membership.epoch, step, spans)):
            slots, keys = pack_ids(token.slot for token in begun), tuple(token.key for token in begun)
            plan = ProtectPlan(self._membership.epoch, step, slots, keys, stores, self._serial, tail=True)
            self._outbox.to_ranks(plan)
        self.flow()

    def interrupted(self) -> None:
        """The epoch is over: in the next one no step is done yet, and none needs to be waited for."""
        self._step = 0
        if self._tails is not None:
            self._tails.interrupted()

    def done(self, message: ProtectDone) -> None:
        """A rank tells what became of the stripes that it encoded."""
        if self._tails is not None and any(map(self._tails.knows, (*message.protected, *message.failed))):
            for key in (*message.protected, *message.failed):
                self._tails.ended(key, protected=key not in message.failed)
            self.flow()
            return
        self._ledger.end_protection(message.protected, message.rank, protected=True)
        self.parity_bytes += message.parity_bytes
        if message.failed:
            self._ledger.end_protection(message.failed, message.rank, protected=False, reason=message.reason)
            log.warning("%d stripes are not protected: %s", len(message.failed), message.reason)
        if message.full:
            self._make_room(message.failed)
        self.flow()

    def _make_room(self, failed: tuple[PageKey, ...]) -> None:
        """Stores are full: parity of pages in use goes before that of pages that are only cached."""
        self._room, self._full_since = 0, self._ledger.now
        if keys := self._ledger.make_room(failed):
            self._release(keys)
            self._tried = self._ledger.now + MAKE_ROOM_S - RETRY_S

    def retry(self, now: float) -> None:
        """Try what failed again, RETRY_S after the last time; cached pages as far as a full store was given room."""
        if now - self._tried > RETRY_S:
            self._tried = now
            if now - self._full_since > FULL_S:
                self._room = None
            self._again()

    def resumed(self) -> None:
        """The group serves: what failed, or was under way when the epoch before ended, is tried again."""
        self._ledger.protect_again(Parity.PENDING)
        self._again()

    def _again(self) -> None:
        if self._looking is None:  # otherwise the index may yet say that there is nothing to do
            self._ledger.protect_again(Parity.UNPROTECTED, idle=self._room)
            if self._room is not None:
                self._room = 0
        self.flow()

    # -- stores ------------------------------------------------------------------------------------------------------

    def store_joined(self, peer: Peer) -> None:
        """A parity store offers its memory: what it has is recognised, and all else that lacks protection gets it."""
        self._room = None
        if len(self._stores.open()) <= self._parity:
            self._ledger.protect_again(Parity.PROTECTED)  # before, shards of one stripe had to share a store
        if self._open:
            self._keep(partial(self._outbox.send, peer))

    def store_gone(self) -> None:
        """A parity store is lost, and with it the parity that it held: all is encoded anew where there is room."""
        self._ledger.protection_lost()
        self.flow()

    def parity_gone(self, message: ShardsLost | StoreDrains) -> None:
        """A store gave parity up, or wants to be rid of it: it is encoded anew from the live pages."""
        if message.group == self._group:
            self._outdated(message.keys)
            self._ledger.shards_lost(message.keys)
            self.flow()

    # -- what an earlier coordinator left ----------------------------------------------------------------------------

    def begin(self) -> None:
        """It is known now which pages there are: the stores may forget all others, and what they have counts."""
        self._open = True
        self._keep(self._stores.send)

    @property
    def begun(self) -> bool:
        """Whether it is known which pages there are."""
        return self._open

    def _keep(self, send: Callable[[Message], None]) -> None:
        keys, after = sorted(self._ledger.keys), b""
        for start in range(0, max(1, len(keys)), KEYS_AT_ONCE):
            part = tuple(keys[start : start + KEYS_AT_ONCE])
            upto = part[-1] if start + KEYS_AT_ONCE < len(keys) else b""
            send(KeepStripes(self._group, part, self._membership.epoch, self._serial, after, upto))
            after = upto
        self._serial += 1
        if self._looking is None:
            self._look()

    def _look(self) -> None:
        """Ask the index for the stripes of unprotected pages."""
        self._looking = set()
        keys, epoch = self._ledger.unprotected(), self._membership.epoch
        self._outbox.ask(FindStripes("recognise", epoch, keys, self._stores.open()))

    def looked_up(self, question: FindStripes, found: StripesFound) -> None:
        """Complete stripes are protected, others are tried again; where stores came or went meanwhile, look again."""
        if found.trouble:
            log.warning("the stripe index can't be read, so all is encoded anew: %s", found.trouble)
        elif question.stores != self._stores.open():
            self._look()
            return
        outdated, self._looking = self._looking or set(), None
        complete = [key for key, stripe in found.stripes.items() if key not in outdated and self._complete(stripe)]
        self._ledger.found_protected(complete)
        self._again()

    def _complete(self, stripe: StoredStripe) -> bool:
        """Whether all shards of a stripe are there, and as far apart as there are stores."""
        apart = len({shard.bulk_address for shard in stripe.parity})
        return len(stripe.parity) >= self._shards and apart >= min(self._parity, len(self._stores.open()))

    def _outdated(self, keys: Iterable[PageKey]) -> None:
        if self._looking is not None:
            self._looking.update(keys)
