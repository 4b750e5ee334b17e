"""Which pages are safe: of each sealed page its key, the state of its parity, and the ranks that lack their slice.

Pure. Pages are numbers that the engine gives; the ledger knows those that are sealed, and open ones of which a slice is
missing. Whatever the engine drops is forgotten, and its key is released for the stores to forget too.
"""

from collections.abc import Collection, Iterable, Iterator, KeysView, Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import islice

from services.coordinator.protection.host import Host, Run
from shared.types import PageKey


class Parity(Enum):
    """How far a page's parity is."""

    OPEN = "open"
    """Not sealed, or protection is off: there is nothing to protect."""
    QUEUED = "queued"
    PENDING = "pending"
    """At the ranks, and pinned."""
    PROTECTED = "protected"
    UNPROTECTED = "unprotected"
    """Tried and failed; the reason is in the ledger's `unprotected_reason`."""


EXPOSED = frozenset({Parity.QUEUED, Parity.PENDING, Parity.UNPROTECTED})
"""Sealed, and not protected."""
NO_RANKS: frozenset[int] = frozenset()


@dataclass(slots=True)
class Page:
    """One page. `missing`: the ranks whose slice of it is lost and not yet restored."""

    number: int
    key: PageKey | None
    parity: Parity = Parity.OPEN
    missing: frozenset[int] = NO_RANKS
    acked: frozenset[int] = NO_RANKS
    """Ranks whose shards of it the stores acknowledged since it was queued."""
    doubtful: bool = False
    """A store was lost while this page's parity was under way, or its slices: an acknowledgement proves nothing."""
    copied: bool = False
    """The successor of a rank that moves has that rank's slice."""


class Ledger:
    """The pages of one group. Keys of pages that are dropped collect until `take_released`."""

    def __init__(self, host: Host, *, protect: bool, acks: int = 1, alike: bool = False):
        """`acks`: ranks that put shards of a stripe: the one that encodes it, or each one its own copy.

        `alike`: all ranks hold equal bytes, which protects a page as long as one of them lives.
        """
        self.unprotected_reason = ""
        self.now = 0.0
        """The time, told by who drives the ledger."""
        self.setbacks = 0
        """How often a page that requests may stand on lost its protection."""
        self._host = host
        self._protect = protect
        self._acks = acks
        self._alike = alike
        self._pages: dict[int, Page] = {}
        self._by_key: dict[PageKey, Page] = {}
        self._by_parity: dict[Parity, dict[int, Page]] = {parity: {} for parity in Parity}
        self._exposed: dict[int, float] = {}  # since when, the oldest first
        self._lost: dict[int, Page] = {}
        self._released: list[PageKey] = []

    # -- what there is -----------------------------------------------------------------------------------------------

    def count(self, parity: Parity) -> int:
        """How many sealed pages are in a state of protection."""
        return len(self._by_parity[parity])

    @property
    def keys(self) -> KeysView[PageKey]:
        """The keys of all sealed pages."""
        return self._by_key.keys()

    @property
    def sealed_pages(self) -> Collection[Page]:
        """All sealed pages."""
        return self._by_key.values()

    def find(self, key: PageKey) -> Page | None:
        """The page of this key, if there is one."""
        return self._by_key.get(key)

    def key(self, number: int) -> PageKey | None:
        """The key of a page; None: it is not sealed."""
        page = self._pages.get(number)
        return page.key if page is not None else None

    def parity(self, number: int) -> Parity:
        """The state of a page's parity."""
        page = self._pages.get(number)
        return page.parity if page is not None else Parity.OPEN

    def missing(self, number: int) -> frozenset[int]:
        """The ranks that lack their slice of a page."""
        page = self._pages.get(number)
        return page.missing if page is not None else NO_RANKS

    def is_whole(self, number: int) -> bool:
        """Whether a page's bytes are there on every rank."""
        return number not in self._lost

    @property
    def lost(self) -> int:
        """Pages of which some rank's slice is missing."""
        return len(self._lost)

    def exposed_since(self) -> float | None:
        """Since when the oldest sealed page has been without protection; None if all have it."""
        return next(iter(self._exposed.values()), None)

    def valid_tokens(self, run: Run, page_tokens: int) -> int:
        """Tokens from a run's start whose KV is there on every rank."""
        for index, key in enumerate(run.keys):
            page = self._pages.get(run.pages[index])
            if page is None or page.missing or page.key != key:
                return index * page_tokens
        tail = run.pages[len(run.keys) :]
        if tail and self.missing(tail[0]):
            return len(run.keys) * page_tokens
        return run.computed

    def protected_run(self, run: Run, known: int = 0) -> int:
        """How many pages from a run's start are protected; the first `known` are, as long as there is no setback."""
        pages = run.pages
        for index in range(known, len(run.keys)):
            if self.parity(pages[index]) is not Parity.PROTECTED:
                return index
        return len(run.keys)

    # -- the engine --------------------------------------------------------------------------------------------------

    def sealed(self, number: int, key: PageKey) -> None:
        """A page is full. No other page has its key."""
        if key in self._by_key or self.key(number) is not None:
            raise AssertionError(f"page {number} or its key is sealed already")
        self._lost.pop(number, None)  # it may have been open when a slice of it was lost; it was written again since
        page = self._pages[number] = self._by_key[key] = Page(number, key)
        self._by_parity[Parity.OPEN][number] = page
        if self._alike:
            self._enter(page, Parity.PROTECTED)
        elif self._protect:
            self._enter(page, Parity.QUEUED)

    def dropped(self, number: int) -> None:
        """A page is given away or written again: nothing is known of it any more. Harmless if nothing was."""
        page = self._pages.pop(number, None)
        if page is None:
            return
        self._lost.pop(number, None)
        if page.key is not None:
            if page.parity is not Parity.OPEN and not self._alike:
                self._released.append(page.key)
            self._enter(page, Parity.OPEN)
            del self._by_parity[Parity.OPEN][number]
            del self._by_key[page.key]

    # -- protection --------------------------------------------------------------------------------------------------

    def start_protection(self, limit: int, in_flight: int) -> list[Page]:
        """Up to `limit` queued pages become pending, while at most `in_flight` are."""
        room = min(limit, in_flight - self.count(Parity.PENDING))
        started = list(islice(self._by_parity[Parity.QUEUED].values(), max(0, room)))
        for page in started:
            self._enter(page, Parity.PENDING)
        return started

    def end_protection(self, keys: Iterable[PageKey], rank: int, *, protected: bool, reason: str = "") -> None:
        """The stores acknowledged what `rank` put of these stripes, or they did not: then why."""
        for key in keys:
            page = self._by_key.get(key)
            if page is None:
                self._released.append(key)
            elif page.parity is Parity.PENDING and not protected:
                self._enter(page, Parity.UNPROTECTED)
            elif page.parity is Parity.PENDING:
                page.acked |= {rank}
                if len(page.acked) >= self._acks:
                    self._enter(page, Parity.QUEUED if page.doubtful else Parity.PROTECTED)
        if not protected:
            self.unprotected_reason = reason

    def protect_again(self, *states: Parity, idle: int | None = None) -> None:
        """Queue what is in these states: its attempt ended with its epoch, or failed and may now succeed.

        Pages in use come first; of those that no request stands on at most `idle` are queued.
        """
        found = [page for state in states for page in self._by_parity[state].values() if not page.missing]
        if not found or self._alike:
            return
        unused = self._host.idle()
        first = [page for page in found if page.number not in unused]
        rest = [page for page in found if page.number in unused]
        for page in (*first, *rest[:idle]):
            self._enter(page, Parity.QUEUED)

    def make_room(self, keys: Iterable[PageKey]) -> tuple[PageKey, ...]:
        """The stores had no room for these stripes: choose others, of pages in no use, to be forgotten.

        As many as of `keys` are in use, the oldest first. Parity of idle pages is worth the least: it is only needed
        if a request finds them again.
        """
        idle = self._host.idle()
        wanted = sum(page.number not in idle for key in keys if (page := self._by_key.get(key)) is not None)
        oldest = (page for number in idle if (page := self._pages.get(number)) is not None)
        given = list(islice((page for page in oldest if page.parity is Parity.PROTECTED), wanted))
        for page in given:
            self._enter(page, Parity.UNPROTECTED)
        return tuple(page.key for page in given if page.key is not None)

    def protection_lost(self) -> None:
        """The stores no longer have what they acknowledged: queue all of it."""
        if self._alike:
            return
        for page in list(self._by_key.values()):
            self._doubt(page)
            if page.parity is Parity.PROTECTED and page.missing:
                self._enter(page, Parity.UNPROTECTED)
        self.protect_again(Parity.PROTECTED)

    def shards_lost(self, keys: Iterable[PageKey]) -> None:
        """The stores gave up the parity of these stripes, and only of these: queue them. Unknown ones are released."""
        for key in keys:
            page = self._by_key.get(key)
            if page is None:
                self._released.append(key)
                continue
            self._doubt(page)
            if page.parity is Parity.PROTECTED:
                self._enter(page, Parity.UNPROTECTED if page.missing else Parity.QUEUED)

    def unprotected(self) -> list[PageKey]:
        """Keys of the pages whose protection failed, or of which it is not known yet."""
        return [page.key for page in self._by_parity[Parity.UNPROTECTED].values() if page.key is not None]

    def found_protected(self, keys: Iterable[PageKey]) -> None:
        """The stores turn out to have the parity of these stripes; of use for those that are unprotected."""
        for key in keys:
            page = self._by_key.get(key)
            if page is not None and page.parity is Parity.UNPROTECTED:
                self._enter(page, Parity.PROTECTED)

    def take_released(self) -> tuple[PageKey, ...]:
        """Keys of stripes that the stores may forget; those that are sealed again are left out."""
        released, self._released = self._released, []
        return tuple(key for key in released if key not in self._by_key)

    # -- loss and restoration ----------------------------------------------------------------------------------------

    def lose(self, ranks: Collection[int]) -> None:
        """The slices of these ranks are gone, of sealed pages and of those that running requests write."""
        if not ranks:
            return
        open_pages = {number for run in self._host.runs() for number in run.pages[len(run.keys) :]}
        for number in open_pages - self._pages.keys():
            self._pages[number] = Page(number, None)
        for page in list(self._pages.values()):
            page.missing |= frozenset(ranks)
            self._lost[page.number] = page
            if page.parity in (Parity.QUEUED, Parity.PENDING):
                self._enter(page, Parity.UNPROTECTED)

    def adopt(self, inventories: Mapping[int, Mapping[int, PageKey]], ranks: int) -> None:
        """Take over what ranks still have of an earlier coordinator's: rank -> page -> key. For an empty ledger.

        A page is missing on the ranks that do not have it under the same key; whether it is protected is not known
        yet, so it counts as unprotected.
        """
        for inventory in inventories.values():
            for number, key in inventory.items():
                if number in self._pages or key in self._by_key:
                    continue
                self.sealed(number, key)
                page = self._pages[number]
                page.missing = frozenset(range(ranks))
                self._lost[number] = page
                if self._protect and not self._alike:
                    self._enter(page, Parity.UNPROTECTED)
        self._host.adopt((page.number, key) for key, page in self._by_key.items())
        for rank, inventory in inventories.items():
            self.reclaim(rank, inventory)

    def reclaim(self, rank: int, inventory: Mapping[int, PageKey]) -> None:
        """A rank that was lost is back with these pages' slices: page -> key."""
        for number, key in inventory.items():
            page = self._pages.get(number)
            if page is not None and page.key == key:
                self._has(page, rank)

    def restored(self, number: int, key: PageKey) -> None:
        """All slices of this page are there again, if the key is still its.

        What is left of its parity may be too little for the next time: it is as protected as before, or encoded anew.
        """
        page = self._pages.get(number)
        if page is not None and page.key == key:
            self._whole(page)
            if page.parity is not Parity.PROTECTED or page.doubtful:
                self._enter(page, Parity.QUEUED if self._protect else Parity.OPEN)
            self._host.whole((number,))

    def tokens_restored(self, number: int, *, whole: bool) -> None:
        """What was written to a page is there again, token by token; its own parity is not known to be.

        Not `whole`: its last tokens are not back. A sealed page is open again then; other requests that stand on it
        see by the key that it is not theirs any more.
        """
        page = self._pages.get(number)
        if page is None:
            return
        if not whole or page.key is None:
            sealed = page.key is not None
            self.dropped(number)
            if sealed:
                self._host.gone((number,))
            return
        self._whole(page)
        if page.parity is Parity.PROTECTED:
            self._enter(page, Parity.UNPROTECTED)
        self._host.whole((number,))

    def forget(self, numbers: Iterable[int]) -> None:
        """Those of these pages that have a slice missing won't be restored, and lose their key: so the same tokens can
        be computed anew on another page.
        """
        lost = [number for number in numbers if (page := self._lost.get(number)) is not None and page.key is not None]
        for number in lost:
            missing = self._pages[number].missing
            self.dropped(number)
            page = self._pages[number] = self._lost[number] = Page(number, None)  # its bytes are no better than before
            page.missing = missing
        self._host.gone(lost)

    def lost_idle(self, limit: int) -> list[Page]:
        """Idle pages that have a slice missing, those in line to be given up last first."""
        lost = (self._lost[number] for number in reversed(self._host.idle()) if number in self._lost)
        return list(islice(lost, limit))

    # -- a rank that moves -------------------------------------------------------------------------------------------

    def wants_copy(self, number: int) -> bool:
        """Whether a sealed page of which nothing is missing is not copied yet."""
        page = self._pages.get(number)
        return page is not None and page.key is not None and not page.copied and not page.missing

    def uncopied(self) -> list[int]:
        """The pages that want to be copied, those in use first."""
        idle = self._host.idle()
        wanted = [page.number for page in self._by_key.values() if self.wants_copy(page.number)]
        return sorted(wanted, key=lambda number: number in idle)

    def copied(self, number: int) -> None:
        """A page was copied. It counts until the page is dropped."""
        if (page := self._pages.get(number)) is not None and page.key is not None:
            page.copied = True

    def moved(self, rank: int, open_pages: Collection[int]) -> None:
        """The new worker of `rank`, which was lost, has what was copied to it, and these open pages."""
        for page in list(self._lost.values()):
            if page.copied or page.number in open_pages:
                self._has(page, rank)

    def forget_copies(self) -> None:
        """No rank moves, or to another worker now."""
        for page in self._by_key.values():
            page.copied = False

    # -- inside ------------------------------------------------------------------------------------------------------

    def _has(self, page: Page, rank: int) -> None:
        page.missing -= {rank}
        if not page.missing:
            self._whole(page)

    def _whole(self, page: Page) -> None:
        page.missing = NO_RANKS
        self._lost.pop(page.number, None)
        if page.key is None:
            del self._pages[page.number]

    def _doubt(self, page: Page) -> None:
        page.doubtful = page.doubtful or page.parity is Parity.PENDING or bool(page.missing)

    def _enter(self, page: Page, parity: Parity) -> None:
        was, page.parity = page.parity, parity
        number = page.number
        del self._by_parity[was][number]
        self._by_parity[parity][number] = page
        if was is Parity.PROTECTED and (page.missing or parity is not Parity.OPEN) and number not in self._host.idle():
            self.setbacks += 1
        if parity not in EXPOSED:
            self._exposed.pop(number, None)
        elif was not in EXPOSED:
            self._exposed[number] = self.now
        if parity in (Parity.QUEUED, Parity.OPEN):
            page.doubtful, page.acked = False, NO_RANKS
        if parity is Parity.PENDING and was is not Parity.PENDING:
            self._host.pin(number)
        elif was is Parity.PENDING and parity is not Parity.PENDING:
            self._host.unpin(number)

    def check(self) -> None:
        """Raise AssertionError unless the ledger agrees with itself."""
        for number, page in self._pages.items():
            assert page.number == number, f"{page} is in the place of {number}"
            assert (page.key is None) or self._by_key.get(page.key) is page, f"{page} is not found by its key"
            assert page.key is not None or page.missing, f"{page} is open and whole: nothing is to be known of it"
            assert page.key is not None or page.parity is Parity.OPEN, f"{page} is open but {page.parity}"
            assert bool(page.missing) == (number in self._lost), f"{page}: the lost ones disagree"
            assert (page.parity in EXPOSED) == (number in self._exposed), f"{page}: the exposed ones disagree"
            assert page.key is None or self._by_parity[page.parity].get(number) is page, f"{page}: states disagree"
        assert len(self._by_key) == sum(map(len, self._by_parity.values())), "a page is in two states"
        assert self._lost.keys() <= self._pages.keys(), "a page is lost that is not known"
        assert list(self._exposed.values()) == sorted(self._exposed.values()), "the exposed are out of order"

    def __iter__(self) -> Iterator[Page]:
        """All pages that are known, sealed or with a slice missing."""
        return iter(self._pages.values())
