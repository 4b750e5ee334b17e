"""How lost pages that are in no use come back: while the group serves, a few at a time, or they are given up.

Each few are looked up, pinned, and restored when the host keeps them: it steps meanwhile, and may want their room.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

from services.coordinator.events import FindStripes, StripesFound
from services.coordinator.membership.members import Membership
from services.coordinator.outbox import Outbox
from services.coordinator.protection.costs import restorable
from services.coordinator.protection.host import Host
from services.coordinator.protection.ledger import Ledger
from services.coordinator.protection.restoration import PLAN_STRIPES, Restoration
from services.coordinator.protection.stores import Stores
from shared.messages import StripeRestore

log = logging.getLogger(__name__)

BATCH_BYTES = 2 << 20
PAUSE_S = 0.05
"""At most BATCH_BYTES come back every PAUSE_S: the running sequences have the first call."""
INDEX_RETRY_S = 2.0


@dataclass(slots=True)
class Pass:
    """One way through them in this epoch: so many were lost when it began, and these are looked up."""

    began: int
    pages: tuple[int, ...] = ()
    asked: bool = False
    ways: dict[int, StripeRestore] = field(default_factory=dict)
    """Page -> how to restore it, of those that are pinned, until the host keeps them."""
    not_before: float = 0.0


class Background:
    """Asks where the parity of lost idle pages is, and has those restored of which there is some."""

    def __init__(
        self,
        page_bytes: int,
        membership: Membership,
        host: Host,
        ledger: Ledger,
        stores: Stores,
        restoration: Restoration,
        outbox: Outbox,
    ):
        self._batch = min(PLAN_STRIPES, max(1, BATCH_BYTES // page_bytes))
        self._membership = membership
        self._host = host
        self._ledger = ledger
        self._stores = stores
        self._restoration = restoration
        self._outbox = outbox
        self._pass: Pass | None = None

    def begin(self) -> None:
        """From now on, while the epoch serves, they come back."""
        self.interrupted()
        self._pass = Pass(self._ledger.lost) if self._membership.state == "serving" else None

    def interrupted(self) -> None:
        """The epoch is over."""
        under_way, self._pass = self._pass, None
        for number in under_way.ways if under_way is not None else ():
            self._host.unpin(number)

    def tick(self) -> None:
        """Ask for the next ones, if it is time and those before are done with."""
        under_way, now = self._pass, self._outbox.now
        if under_way is None or under_way.asked or under_way.ways:
            return
        if now < under_way.not_before or not self._restoration.idle:
            return
        under_way.pages = tuple(self._ledger.lost_idle(self._batch))
        if not under_way.pages:
            if done := under_way.began - self._ledger.lost:
                log.info("idle pages are restored or given up", extra={"pages": done})
            self._pass = None
            return
        under_way.asked, under_way.not_before = True, now + PAUSE_S
        if not self._restoration.redundancy.stored:
            self.found(self._membership.epoch, StripesFound({}))
            return
        keys = tuple(key for number in under_way.pages if (key := self._ledger.key(number)) is not None)
        self._outbox.ask(FindStripes("cached", self._membership.epoch, keys, self._stores.infos()))

    def found(self, epoch: int, found: StripesFound) -> None:
        """It is known where their parity is: those that have some are restored."""
        under_way = self._pass
        if under_way is None or epoch != self._membership.epoch:
            return
        under_way.asked = False
        if found.trouble:
            log.warning("the stripe index can't be read: %s", found.trouble)
            under_way.not_before = self._outbox.now + INDEX_RETRY_S
            return
        for number in under_way.pages:
            key, missing = self._ledger.key(number), self._ledger.missing(number)
            if key is None or not missing:
                continue
            stripe = restorable(number, key, missing, found.stripes, redundancy=self._restoration.redundancy)
            if stripe is None:
                self._ledger.forget((number,))
            else:
                under_way.ways[number] = stripe
                self._host.pin(number)
        if under_way.ways and self._host.confirm(list(under_way.ways)):
            self.pinned(list(under_way.ways))

    def pinned(self, numbers: Iterable[int]) -> None:
        """These pages are kept by now, as `Host.confirm` asked: those that wait for it are restored."""
        ways = self._pass.ways if self._pass is not None else {}
        kept = [number for number in numbers if number in ways]
        self._restoration.add([ways.pop(number) for number in kept])
        for number in kept:
            self._host.unpin(number)

    def dropped(self, number: int) -> None:
        """This page is given away: it is not waited for."""
        if self._pass is not None and self._pass.ways.pop(number, None) is not None:
            self._host.unpin(number)
