"""Which page holds what: the page tables' side of the KV pool, equal on all ranks. Pure: no clock, no socket.

Every page is in exactly one of three sets: free, held (by sequences, or while a transfer reads or writes its bytes),
or cached (sealed, nobody holds it, found again by its key until the room is needed).
"""

from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import islice

from shared.types import PageKey


class Shadow(Enum):
    """A page's protection."""

    OPEN = "open"
    """Not sealed, or protection is off: nothing to protect."""
    QUEUED = "queued"
    PENDING = "pending"
    PROTECTED = "protected"
    UNPROTECTED = "unprotected"
    """Tried and failed; the reason is in the pool's `unprotected_reason`."""


EXPOSED = frozenset({Shadow.QUEUED, Shadow.PENDING, Shadow.UNPROTECTED})
"""Sealed, and not protected."""


@dataclass(slots=True)
class Page:
    """One page of the pool. `missing` are the ranks whose slice of it is lost and not yet restored."""

    number: int
    holders: int = 0
    key: PageKey | None = None
    shadow: Shadow = Shadow.OPEN
    missing: set[int] = field(default_factory=set)
    acked: set[int] = field(default_factory=set)
    """Ranks whose shards of it the stores acknowledged since it was queued."""
    since: float = 0.0
    """When it was sealed, or lost its protection; of use while it is not protected."""
    doubtful: bool = False
    """A store was lost while this page's parity was under way, or its slices: an acknowledgement proves nothing."""
    copied: bool = False
    """The successor of a rank that moves has that rank's slice."""
    pins: int = 0
    """Transfers under way that read or write its bytes: it is held meanwhile, though no sequence may hold it."""


class PagePool:
    """All pages of a group. Keys of pages that are dropped collect until `take_released`, for the stores to forget."""

    def __init__(self, count: int, *, protect: bool, acks: int = 1):
        """`acks`: ranks that put shards of a stripe: the one that encodes it, or each one its own copy."""
        self.pages = [Page(number) for number in range(count)]
        self._released: list[PageKey] = []
        self.unprotected_reason = ""
        self.now = 0.0
        """The time, told by who drives the pool."""
        self._protect = protect
        self._acks = acks
        self._free: deque[int] = deque(range(count))
        self._by_key: dict[PageKey, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._queued: OrderedDict[int, None] = OrderedDict()
        self._lost: set[int] = set()
        self._by_shadow = dict.fromkeys(Shadow, 0)
        self._by_shadow[Shadow.OPEN] = count

    # -- counts ------------------------------------------------------------------------------------------------------

    @property
    def available(self) -> int:
        """Pages that can be allocated now: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def cached(self) -> int:
        """Pages that nobody holds and that can be found by their key."""
        return len(self._cached)

    @property
    def held(self) -> int:
        """Pages in some sequence's table, or being read by the shadow."""
        return len(self.pages) - len(self._free) - len(self._cached)

    def shadow_of(self, key: PageKey) -> Shadow | None:
        """The state of the page of this key; None if there is none any more."""
        number = self._by_key.get(key)
        return None if number is None else self.pages[number].shadow

    @property
    def lost(self) -> int:
        """Pages of which some rank's slice is missing."""
        return len(self._lost)

    @property
    def keys(self) -> tuple[PageKey, ...]:
        """The keys of all sealed pages."""
        return tuple(self._by_key)

    def count(self, shadow: Shadow) -> int:
        """How many pages are in a state of protection."""
        return self._by_shadow[shadow]

    def exposed_since(self) -> float | None:
        """Since when the oldest sealed page has been without protection; None if all have it."""
        if not sum(self._by_shadow[shadow] for shadow in EXPOSED):
            return None
        return min(page.since for page in self.pages if page.shadow in EXPOSED)

    # -- sequences ---------------------------------------------------------------------------------------------------

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages to write to, each held once; None, and no change, if there are not enough."""
        if count > self.available:
            return None
        while count > len(self._free):
            self._evict(next(iter(self._cached)))
        taken = [self._free.popleft() for _ in range(count)]
        for page in taken:
            self.pages[page].holders = 1
        return taken

    def match(self, keys: Iterable[PageKey], *, whole: bool = True) -> list[int]:
        """Hold and return the pages of the longest run of `keys` that is in the pool; `whole`: with all slices."""
        found = []
        for key in keys:
            number = self._by_key.get(key)
            if number is None or (whole and self.pages[number].missing):
                break
            self.pages[number].holders += 1
            self._cached.pop(number, None)
            found.append(number)
        return found

    def release(self, pages: Iterable[int]) -> None:
        """Give pages back. Sealed ones stay cached, the last of a sequence to be evicted first."""
        for number in reversed(list(pages)):
            page = self.pages[number]
            if page.holders < 1:
                raise AssertionError(f"page {number} released but not held")
            page.holders -= 1
            if page.holders == 0:
                self._let_go(page)

    def seal(self, number: int, key: PageKey) -> int:
        """Name a full page. Returns the page to use from now on: another one if that key is in the pool already."""
        page = self.pages[number]
        if page.key == key:
            return number
        if page.key is not None:
            raise AssertionError(f"page {number} is sealed under another key")
        other = self._by_key.get(key)
        if other is not None and self.pages[other].missing:
            self.forget([other])
        elif other is not None:
            self.pages[other].holders += 1
            self._cached.pop(other, None)
            self.release([number])
            return other
        page.key = key
        self._by_key[key] = number
        if self._protect:
            self._enter(page, Shadow.QUEUED)
        return number

    # -- protection --------------------------------------------------------------------------------------------------

    def start_protection(self, limit: int, in_flight: int) -> list[Page]:
        """Up to `limit` queued pages become pending, while at most `in_flight` are."""
        started: list[Page] = []
        while self._queued and len(started) < limit and self._by_shadow[Shadow.PENDING] < in_flight:
            page = self.pages[next(iter(self._queued))]
            self._cached.pop(page.number, None)
            self._enter(page, Shadow.PENDING)
            started.append(page)
        return started

    def end_protection(self, keys: Iterable[PageKey], rank: int, *, protected: bool, reason: str = "") -> None:
        """The stores acknowledged what `rank` put of these stripes, or they did not: then why."""
        for key in keys:
            number = self._by_key.get(key)
            if number is None:
                self._released.append(key)
                continue
            page = self.pages[number]
            if page.shadow is not Shadow.PENDING:
                continue
            if not protected:
                self._enter(page, Shadow.UNPROTECTED)
                continue
            page.acked.add(rank)
            if len(page.acked) >= self._acks:
                self._enter(page, Shadow.QUEUED if page.doubtful else Shadow.PROTECTED)
        if not protected:
            self.unprotected_reason = reason

    def protect_again(self, *states: Shadow, cached: int | None = None) -> None:
        """Queue what is in these states: its attempt ended with its epoch, or failed and may now succeed.

        Pages in use come first; of those that are only cached at most `cached` are queued.
        """
        found = [page for page in self.pages if page.shadow in states and not page.missing]
        idle = [page for page in found if not page.holders]
        for page in (*(page for page in found if page.holders), *idle[:cached]):
            self._enter(page, Shadow.QUEUED)

    def make_room(self, keys: Iterable[PageKey]) -> tuple[PageKey, ...]:
        """The stores had no room for these stripes: choose others, of pages that are only cached, to be forgotten.

        As many as of `keys` are in use, the oldest first. Parity of cached pages is worth the least: it is only needed
        if a request finds them again.
        """
        numbers = [self._by_key[key] for key in keys if key in self._by_key]
        wanted = sum(self.pages[number].holders > 0 for number in numbers)
        oldest = (self.pages[number] for number in self._cached)
        given = list(islice((page for page in oldest if page.shadow is Shadow.PROTECTED), wanted))
        for page in given:
            self._enter(page, Shadow.UNPROTECTED)
        return tuple(page.key for page in given if page.key is not None)

    def protection_lost(self) -> None:
        """The stores no longer have what they acknowledged: queue all of it."""
        for page in self.pages:
            page.doubtful = page.doubtful or page.shadow is Shadow.PENDING or bool(page.missing)
            if page.shadow is Shadow.PROTECTED and page.missing:
                self._enter(page, Shadow.UNPROTECTED)
        self.protect_again(Shadow.PROTECTED)

    def shards_lost(self, keys: Iterable[PageKey]) -> None:
        """The stores gave up the parity of these stripes, and only of these: queue them. Unknown ones are released."""
        for key in keys:
            number = self._by_key.get(key)
            if number is None:
                self._released.append(key)
                continue
            page = self.pages[number]
            page.doubtful = page.doubtful or page.shadow is Shadow.PENDING or bool(page.missing)
            if page.shadow is Shadow.PROTECTED:
                self._enter(page, Shadow.UNPROTECTED if page.missing else Shadow.QUEUED)

    def unprotected(self) -> list[PageKey]:
        """Keys of the pages whose protection failed, or of which it is not known yet."""
        return [page.key for page in self.pages if page.shadow is Shadow.UNPROTECTED and page.key is not None]

    def found_protected(self, keys: Iterable[PageKey]) -> None:
        """The stores turn out to have the parity of these stripes; of use for those that are unprotected."""
        for key in keys:
            number = self._by_key.get(key)
            if number is not None and self.pages[number].shadow is Shadow.UNPROTECTED:
                self._enter(self.pages[number], Shadow.PROTECTED)

    def take_released(self) -> tuple[PageKey, ...]:
        """Keys of stripes that the stores may forget; those that are in the pool again are left out."""
        released, self._released = self._released, []
        return tuple(key for key in released if key not in self._by_key)

    # -- loss and recovery -------------------------------------------------------------------------------------------

    def lose(self, ranks: Collection[int]) -> None:
        """The slices of these ranks are gone. Their pages can't be matched before they are restored."""
        for page in self.pages:
            if page.holders or page.key is not None:
                page.missing.update(ranks)
                if not page.missing:
                    continue
                self._lost.add(page.number)
                if page.shadow in (Shadow.QUEUED, Shadow.PENDING):
                    self._enter(page, Shadow.UNPROTECTED)

    def adopt(self, inventories: Mapping[int, Mapping[int, PageKey]], ranks: int) -> None:
        """Take over, as cached pages, what ranks still have of an earlier coordinator's: rank -> page -> key.

        For an empty pool. A page is missing on the ranks that do not have it under the same key; whether it is
        protected is not known yet, so it counts as unprotected.
        """
        for inventory in inventories.values():
            for number, key in inventory.items():
                page = self.pages[number]
                if page.key is None and key not in self._by_key:
                    page.key = key
                    page.missing.update(range(ranks))
                    self._by_key[key] = number
                    self._cached[number] = None
                    self._lost.add(number)
                    if self._protect:
                        self._enter(page, Shadow.UNPROTECTED)
        self._free = deque(number for number in self._free if number not in self._cached)
        for rank, inventory in inventories.items():
            self.reclaim(rank, inventory)

    def reclaim(self, rank: int, inventory: Mapping[int, PageKey]) -> None:
        """A rank that was lost is back with these pages' slices: page -> key."""
        for number, key in inventory.items():
            page = self.pages[number]
            if page.key == key:
                page.missing.discard(rank)
                if not page.missing:
                    self._lost.discard(number)

    def restored(self, number: int, key: PageKey) -> None:
        """All slices of this page are there again, decoded from parity: so it is protected, if the key is still its."""
        page = self.pages[number]
        if page.key == key:
            self._whole(page)
            self._enter(page, Shadow.QUEUED if page.doubtful else Shadow.PROTECTED)

    def mend(self, number: int, *, whole: bool) -> None:
        """What was written to a page is there again, token by token; its own parity is not known to be.

        Not `whole`: its last tokens are not back. A sealed page is open again then; other sequences that hold it see by
        the key that it is not theirs any more.
        """
        page = self.pages[number]
        if not whole:
            self._unseal(page)
        self._whole(page)
        if page.shadow is Shadow.PROTECTED:
            self._enter(page, Shadow.UNPROTECTED)

    def forget(self, pages: Iterable[int]) -> None:
        """Those of these pages that have a slice missing won't be restored, and lose their key: so the same tokens can
        be computed anew on another page. Sequences that hold one see by the key that it is not theirs any more.
        """
        for number in pages:
            page = self.pages[number]
            if page.missing:
                self._unseal(page)
                if number in self._cached:
                    del self._cached[number]
                    self._let_go(page)

    def lost_cached(self, limit: int) -> list[Page]:
        """Cached pages that have a slice missing, those in line to be evicted last first."""
        lost = (self.pages[number] for number in reversed(self._cached) if number in self._lost)
        return list(islice(lost, limit))

    # -- a rank that moves -------------------------------------------------------------------------------------------

    def wants_copy(self, number: int) -> bool:
        """Whether a sealed page of which nothing is missing is not copied yet."""
        page = self.pages[number]
        return page.key is not None and not page.copied and not page.missing

    def uncopied(self) -> list[int]:
        """The pages that want to be copied, those that sequences hold first."""
        wanted = [page for page in self.pages if self.wants_copy(page.number)]
        return [page.number for page in sorted(wanted, key=lambda page: not page.holders)]

    def copied(self, number: int) -> None:
        """A page was copied. It counts until the page is given away."""
        if self.pages[number].key is not None:
            self.pages[number].copied = True

    def regain(self, rank: int, tail: Collection[int]) -> None:
        """The new worker of `rank`, which was lost, has what was copied to it, and the unsealed pages `tail`."""
        for page in self.pages:
            if page.copied or page.number in tail:
                page.missing.discard(rank)
                if not page.missing:
                    self._lost.discard(page.number)

    def forget_copies(self) -> None:
        """No rank moves, or to another worker now."""
        for page in self.pages:
            page.copied = False

    # -- transfers ---------------------------------------------------------------------------------------------------

    def pin(self, number: int) -> None:
        """A transfer begins to read or write this page: it won't be given to anybody else until `unpin`."""
        self._cached.pop(number, None)
        self.pages[number].pins += 1

    def unpin(self, number: int) -> None:
        """The transfer has ended."""
        page = self.pages[number]
        page.pins -= 1
        if not page.holders:
            self._let_go(page)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _let_go(self, page: Page) -> None:
        """No sequence holds it: it is cached if it can be found again, otherwise free, once no transfer needs it."""
        if page.pins or page.shadow is Shadow.PENDING:
            return
        if page.key is None:
            self._whole(page)
            self._free.append(page.number)
        else:
            self._cached[page.number] = None

    def _whole(self, page: Page) -> None:
        page.missing.clear()
        self._lost.discard(page.number)

    def _evict(self, number: int) -> None:
        del self._cached[number]
        self._unseal(self.pages[number])
        self._let_go(self.pages[number])

    def _unseal(self, page: Page) -> None:
        if page.key is None:
            return
        del self._by_key[page.key]
        if page.shadow is not Shadow.OPEN:
            self._released.append(page.key)
        page.key = None
        page.copied = False
        self._enter(page, Shadow.OPEN)

    def _enter(self, page: Page, shadow: Shadow) -> None:
        was, page.shadow = page.shadow, shadow
        self._by_shadow[was] -= 1
        self._by_shadow[shadow] += 1
        if shadow in EXPOSED and was not in EXPOSED:
            page.since = self.now
        if was is Shadow.PENDING and shadow is not Shadow.PENDING and not page.holders:
            self._let_go(page)
        if shadow in (Shadow.QUEUED, Shadow.OPEN):
            page.doubtful = False
            page.acked.clear()
        if shadow is Shadow.QUEUED:
            self._queued[page.number] = None
        else:
            self._queued.pop(page.number, None)

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless free + held + cached = all, and holders equal the page tables given."""
        holders = [0] * len(self.pages)
        for table in tables:
            for number in table:
                holders[number] += 1
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a page is free twice"
        assert not free & cached, f"pages both free and cached: {sorted(free & cached)}"
        for page in self.pages:
            assert page.holders == holders[page.number], f"{page}: {holders[page.number]} tables name it"
            held = page.holders > 0 or page.pins > 0 or page.shadow is Shadow.PENDING
            places = (page.number in free) + (page.number in cached) + held
            assert places == 1, f"{page} is in {places} sets"
            assert (page.key is None) or self._by_key.get(page.key) == page.number, f"{page} is not found by its key"
            assert page.key is not None or page.shadow is Shadow.OPEN, f"{page} is unsealed but {page.shadow}"
            assert bool(page.missing) == (page.number in self._lost), f"{page}: the lost ones disagree"
            assert page.number not in free or not page.missing, f"{page} is free, yet has a slice missing"
            assert (page.shadow is Shadow.QUEUED) == (page.number in self._queued), f"{page}: queue disagrees"
        for shadow, count in self._by_shadow.items():
            assert sum(page.shadow is shadow for page in self.pages) == count, f"count of {shadow} is off"
