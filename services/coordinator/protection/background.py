"""How lost pages that are only cached come back: while the group serves, a few at a time, or they are dropped."""

import logging
from dataclasses import dataclass

from services.coordinator.events import FindStripes, StripesFound
from services.coordinator.membership.members import Membership
from services.coordinator.outbox import Outside
from services.coordinator.protection.costs import restorable
from services.coordinator.protection.ledger import PagePool
from services.coordinator.protection.restoration import Restoration
from services.coordinator.protection.stores import Stores
from shared.types import GroupConfig

log = logging.getLogger(__name__)

BATCH_BYTES = 2 << 20
PAUSE_S = 0.05
"""At most BATCH_BYTES come back every PAUSE_S: the running sequences have the first call."""
INDEX_RETRY_S = 2.0


@dataclass(slots=True)
class Return:
    """Their return in this epoch: so many were lost when it began, and these are looked up."""

    began: int
    pages: tuple[int, ...] = ()
    asked: bool = False
    not_before: float = 0.0


class CachedPages:
    """Asks where the parity of lost cached pages is, and has those restored of which there is some."""

    def __init__(
        self,
        config: GroupConfig,
        page_bytes: int,
        membership: Membership,
        pool: PagePool,
        stores: Stores,
        restoration: Restoration,
        outside: Outside,
    ):
        self._copies = config.protection == "replicate"
        self._batch = max(1, BATCH_BYTES // page_bytes)
        self._membership = membership
        self._pool = pool
        self._stores = stores
        self._restoration = restoration
        self._outside = outside
        self._return: Return | None = None

    def begin(self) -> None:
        """From now on, while the epoch serves, they come back."""
        self._return = Return(self._pool.lost) if self._membership.state == "serving" else None

    def interrupted(self) -> None:
        """The epoch is over."""
        self._return = None

    def tick(self) -> None:
        """Ask for the next ones, if it is time and those before are done with."""
        under_way, now = self._return, self._outside.now
        if under_way is None or under_way.asked or now < under_way.not_before or not self._restoration.idle:
            return
        under_way.pages = tuple(page.number for page in self._pool.lost_cached(self._batch))
        if not under_way.pages:
            if done := under_way.began - self._pool.lost:
                log.info("cached pages are restored or dropped", extra={"pages": done})
            self._return = None
            return
        under_way.asked, under_way.not_before = True, now + PAUSE_S
        keys = tuple(key for number in under_way.pages if (key := self._pool.pages[number].key) is not None)
        self._outside.ask(FindStripes("cached", self._membership.epoch, keys, self._stores.infos()))

    def found(self, epoch: int, found: StripesFound) -> None:
        """It is known where their parity is: those that have some are restored."""
        under_way = self._return
        if under_way is None or epoch != self._membership.epoch:
            return
        under_way.asked = False
        if found.trouble:
            log.warning("the stripe index can't be read: %s", found.trouble)
            under_way.not_before = self._outside.now + INDEX_RETRY_S
            return
        lost = [page for number in under_way.pages if (page := self._pool.pages[number]).missing]
        ways = [restorable(page, found.stripes, copies=self._copies) for page in lost]
        self._pool.forget([page.number for page, way in zip(lost, ways, strict=True) if way is None])
        self._restoration.add(way for way in ways if way is not None)
