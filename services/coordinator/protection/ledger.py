"""Which pages are safe: of each sealed page its key, the state of its parity, and the ranks that lack their slice.

Pure. Pages are numbers that the engine gives; the ledger knows those that are sealed, and open ones of which a slice is
missing. Whatever the engine drops is forgotten, and its key is released for the stores to forget too. What every page
has lies in arrays as long as the pool; only what few have, or a loss brings, is in dictionaries.
"""

from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from itertools import islice

from services.coordinator.protection.host import Host, Run
from services.coordinator.protection.page_lists import KeyIndex, PageLists
from shared.types import PageKey


class Parity(IntEnum):
    """How far a page's parity is. All but OPEN are numbers of lists of pages."""

    OPEN = 0
    """Not sealed, or protection is off: there is nothing to protect."""
    QUEUED = 1
    PENDING = 2
    """At the ranks, and pinned."""
    PROTECTED = 3
    UNPROTECTED = 4
    """Tried and failed; the reason is in the ledger's `unprotected_reason`."""


OPEN, QUEUED, PENDING, PROTECTED, UNPROTECTED = PARITIES = tuple(Parity)
EXPOSED = frozenset({Parity.QUEUED, Parity.PENDING, Parity.UNPROTECTED})
"""Sealed, and not protected."""
NO_RANKS: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Page:
    """What is known of one page, for who looks at all of them. `missing`: the ranks whose slice of it is lost."""

    number: int
    key: PageKey | None
    parity: Parity
    missing: frozenset[int]


class Ledger:
    """The pages of one group. Keys of pages that are dropped collect until `take_released`."""

    def __init__(self, host: Host, pages: int, *, protect: bool, acks: int = 1, alike: bool = False):
        """`pages`: of the pool. `acks`: ranks that put shards of a stripe: the one that encodes it, or each one
        its own copy.

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
        self._keys: list[PageKey | None] = [None] * pages
        self._by_key = KeyIndex(pages)
        self._in = PageLists(pages, len(PARITIES) - 1)
        self._parity = self._in.at
        self._since = array("d", bytes(8 * pages))  # of those that are exposed
        self._exposed: dict[float, int] = {}  # how many are, since each time
        self._copied = array("b", bytes(pages))  # the successor of a rank that moves has that rank's slice
        self._missing: dict[int, frozenset[int]] = {}
        self._acked: dict[int, frozenset[int]] = {}
        """Of pending pages, ranks whose shards the stores acknowledged, while those of others are to come."""
        self._doubtful: set[int] = set()
        """A store was lost while their parity was under way, or their slices: an acknowledgement proves nothing."""
        self._released: list[PageKey] = []

    # -- what there is -----------------------------------------------------------------------------------------------

    def count(self, parity: Parity) -> int:
        """How many sealed pages are in a state of protection."""
        return len(self._in[parity])

    @property
    def keys(self) -> list[PageKey]:
        """The keys of all sealed pages."""
        return [key for key in self._keys if key is not None]

    @property
    def sealed_pages(self) -> list[Page]:
        """All sealed pages."""
        return [page for page in self if page.key is not None]

    def find(self, key: PageKey) -> int | None:
        """The page of this key, if there is one."""
        return self._by_key.get(key)

    def key(self, number: int) -> PageKey | None:
        """The key of a page; None: it is not sealed."""
        return self._keys[number]

    def parity(self, number: int) -> Parity:
        """The state of a page's parity."""
        return PARITIES[self._parity[number]]

    def missing(self, number: int) -> frozenset[int]:
        """The ranks that lack their slice of a page."""
        return self._missing.get(number, NO_RANKS)

    def is_whole(self, number: int) -> bool:
        """Whether a page's bytes are there on every rank."""
        return number not in self._missing

    @property
    def lost(self) -> int:
        """Pages of which some rank's slice is missing."""
        return len(self._missing)

    def lost_open(self) -> list[int]:
        """Those of them that are not sealed."""
        return [number for number in self._missing if self._keys[number] is None]

    def exposed_since(self) -> float | None:
        """Since when the oldest sealed page has been without protection; None if all have it."""
        return next(iter(self._exposed), None)

    def valid_tokens(self, run: Run, page_tokens: int) -> int:
        """Tokens from a run's start whose KV is there on every rank."""
        for index, key in enumerate(run.keys):
            page = run.pages[index]
            if page in self._missing or self._keys[page] != key:
                return index * page_tokens
        tail = run.pages[len(run.keys) :]
        if tail and self.missing(tail[0]):
            return len(run.keys) * page_tokens
        return run.computed

    def protected_run(self, run: Run, known: int = 0) -> int:
        """How many pages from a run's start are protected; the first `known` are, as long as there is no setback."""
        pages = run.pages
        for index in range(known, len(run.keys)):
            if self._parity[pages[index]] != PROTECTED:
                return index
        return len(run.keys)

    # -- the engine --------------------------------------------------------------------------------------------------

    def sealed(self, number: int, key: PageKey) -> None:
        """A page is full. No other page has its key."""
        if self._by_key.get(key) is not None or self._keys[number] is not None:
            raise AssertionError(f"page {number} or its key is sealed already")
        self._missing.pop(number, None)  # it may have been open when a slice was lost; it was written again since
        self._keys[number] = key
        self._by_key.put(key, number)
        if self._alike:
            self._enter(number, PROTECTED)
        elif self._protect:
            self._enter(number, QUEUED)

    def dropped(self, number: int) -> None:
        """A page is given away or written again: nothing is known of it any more. Harmless if nothing was."""
        key = self._keys[number]
        if key is not None:
            self._keys[number] = None
            self._by_key.remove(key)
            self._copied[number] = False
            if self._parity[number] and not self._alike:
                self._released.append(key)
            self._enter(number, OPEN)
        self._missing.pop(number, None)

    # -- protection --------------------------------------------------------------------------------------------------

    def start_protection(self, limit: int, in_flight: int) -> list[int]:
        """Up to `limit` queued pages become pending, while at most `in_flight` are."""
        room = min(limit, in_flight - self.count(PENDING))
        started = list(islice(self._in[QUEUED], max(0, room)))
        for number in started:
            self._enter(number, PENDING)
        return started

    def end_protection(self, keys: Iterable[PageKey], rank: int, *, protected: bool, reason: str = "") -> None:
        """The stores acknowledged what `rank` put of these stripes, or they did not: then why."""
        for key in keys:
            number = self._by_key.get(key)
            if number is None:
                self._released.append(key)
            elif self._parity[number] == PENDING and not protected:
                self._enter(number, UNPROTECTED)
            elif self._parity[number] == PENDING and (self._acks == 1 or self._all_acked(number, rank)):
                self._enter(number, QUEUED if number in self._doubtful else PROTECTED)
        if not protected:
            self.unprotected_reason = reason

    def protect_again(self, *states: Parity, idle: int | None = None) -> None:
        """Queue what is in these states: its attempt ended with its epoch, or failed and may now succeed.

        Pages in use come first; of those that no request stands on at most `idle` are queued.
        """
        found = [number for state in states for number in self._in[state] if number not in self._missing]
        if not found or self._alike:
            return
        unused = self._host.idle()
        first = [number for number in found if number not in unused]
        rest = [number for number in found if number in unused]
        for number in (*first, *rest[:idle]):
            self._enter(number, QUEUED)

    def make_room(self, keys: Iterable[PageKey]) -> tuple[PageKey, ...]:
        """The stores had no room for these stripes: choose others, of pages in no use, to be forgotten.

        As many as of `keys` are in use, the oldest first. Parity of idle pages is worth the least: it is only needed
        if a request finds them again.
        """
        idle = self._host.idle()
        wanted = sum(number not in idle for key in keys if (number := self._by_key.get(key)) is not None)
        given = list(islice((number for number in idle if self._parity[number] == PROTECTED), wanted))
        for number in given:
            self._enter(number, UNPROTECTED)
        return self._named(given)

    def protection_lost(self) -> None:
        """The stores no longer have what they acknowledged: queue all of it."""
        if self._alike:
            return
        self._doubtful.update(self._in[PENDING])
        for number in self._missing:
            self._doubt(number)
            if self._parity[number] == PROTECTED:
                self._enter(number, UNPROTECTED)
        self.protect_again(PROTECTED)

    def shards_lost(self, keys: Iterable[PageKey]) -> None:
        """The stores gave up the parity of these stripes, and only of these: queue them. Unknown ones are released."""
        for key in keys:
            number = self._by_key.get(key)
            if number is None:
                self._released.append(key)
                continue
            self._doubt(number)
            if self._parity[number] == PROTECTED:
                self._enter(number, UNPROTECTED if number in self._missing else QUEUED)

    def unprotected(self) -> tuple[PageKey, ...]:
        """Keys of the pages whose protection failed, or of which it is not known yet."""
        return self._named(self._in[UNPROTECTED])

    def found_protected(self, keys: Iterable[PageKey]) -> None:
        """The stores turn out to have the parity of these stripes; of use for those that are unprotected."""
        for key in keys:
            number = self._by_key.get(key)
            if number is not None and self._parity[number] == UNPROTECTED:
                self._enter(number, PROTECTED)

    def take_released(self) -> tuple[PageKey, ...]:
        """Keys of stripes that the stores may forget; those that are sealed again are left out."""
        released, self._released = self._released, []
        return tuple(key for key in released if self._by_key.get(key) is None)

    # -- loss and restoration ----------------------------------------------------------------------------------------

    def lose(self, ranks: Collection[int]) -> None:
        """The slices of these ranks are gone, of sealed pages and of those that running requests write."""
        if not ranks:
            return
        open_pages = (number for run in self._host.runs() for number in run.pages[len(run.keys) :])
        sealed = (number for number, key in enumerate(self._keys) if key is not None)
        before, gone = self._missing, frozenset(ranks)
        self._missing = dict.fromkeys((*sealed, *open_pages), gone)
        for number, missing in before.items():
            self._missing[number] = missing | gone
        for number in [*self._in[PENDING], *self._in[QUEUED]]:
            self._enter(number, UNPROTECTED)

    def adopt(self, inventories: Mapping[int, Mapping[int, PageKey]], ranks: int) -> None:
        """Take over what ranks still have of an earlier coordinator's: rank -> page -> key. For an empty ledger.

        A page is missing on the ranks that do not have it under the same key; whether it is protected is not known
        yet, so it counts as unprotected.
        """
        adopted: list[tuple[int, PageKey]] = []
        nobody = frozenset(range(ranks))
        for inventory in inventories.values():
            for number, key in inventory.items():
                if self._keys[number] is not None or self._by_key.get(key) is not None:
                    continue
                self.sealed(number, key)
                self._missing[number] = nobody
                if self._protect and not self._alike:
                    self._enter(number, UNPROTECTED)
                adopted.append((number, key))
        self._host.adopt(adopted)
        for rank, inventory in inventories.items():
            self.reclaim(rank, inventory)

    def reclaim(self, rank: int, inventory: Mapping[int, PageKey]) -> None:
        """A rank that was lost is back with these pages' slices: page -> key."""
        for number, key in inventory.items():
            if self._keys[number] == key:
                self._has(number, rank)

    def restored(self, number: int, key: PageKey) -> None:
        """All slices of this page are there again, if the key is still its.

        What is left of its parity may be too little for the next time: it is as protected as before, or encoded anew.
        """
        if self._keys[number] == key:
            self._missing.pop(number, None)
            if self._parity[number] != PROTECTED or number in self._doubtful:
                self._enter(number, QUEUED if self._protect else OPEN)
            self._host.whole((number,))

    def tokens_restored(self, number: int, *, whole: bool) -> None:
        """What was written to a page is there again, token by token; its own parity is not known to be.

        Not `whole`: its last tokens are not back. A sealed page is open again then; other requests that stand on it
        see by the key that it is not theirs any more.
        """
        if self._keys[number] is None:
            self._missing.pop(number, None)
        elif not whole:
            self.dropped(number)
            self._host.gone((number,))
        else:
            self._missing.pop(number, None)
            if self._parity[number] == PROTECTED:
                self._enter(number, UNPROTECTED)
            self._host.whole((number,))

    def forget(self, numbers: Iterable[int]) -> None:
        """Those of these pages that have a slice missing won't be restored, and lose their key: so the same tokens can
        be computed anew on another page.
        """
        lost = [number for number in numbers if number in self._missing and self._keys[number] is not None]
        for number in lost:
            missing = self._missing[number]
            self.dropped(number)
            self._missing[number] = missing  # its bytes are no better than before
        self._host.gone(lost)

    def lost_idle(self, limit: int) -> list[int]:
        """Idle pages that have a slice missing, those in line to be given up last first."""
        return list(islice((number for number in reversed(self._host.idle()) if number in self._missing), limit))

    # -- a rank that moves -------------------------------------------------------------------------------------------

    def wants_copy(self, number: int) -> bool:
        """Whether a sealed page of which nothing is missing is not copied yet."""
        return self._keys[number] is not None and not self._copied[number] and number not in self._missing

    def uncopied(self) -> list[int]:
        """The pages that want to be copied, those in use first."""
        idle = self._host.idle()
        wanted = [number for number in range(len(self._keys)) if self.wants_copy(number)]
        return sorted(wanted, key=lambda number: number in idle)

    def copied(self, number: int) -> None:
        """A page was copied. It counts until the page is dropped."""
        self._copied[number] = self._keys[number] is not None

    def moved(self, rank: int, open_pages: Collection[int]) -> None:
        """The new worker of `rank`, which was lost, has what was copied to it, and these open pages."""
        for number in list(self._missing):
            if self._copied[number] or number in open_pages:
                self._has(number, rank)

    def forget_copies(self) -> None:
        """No rank moves, or to another worker now."""
        self._copied = array("b", bytes(len(self._keys)))

    # -- inside ------------------------------------------------------------------------------------------------------

    def _named(self, numbers: Iterable[int]) -> tuple[PageKey, ...]:
        return tuple(key for number in numbers if (key := self._keys[number]) is not None)

    def _has(self, number: int, rank: int) -> None:
        if left := self.missing(number) - {rank}:
            self._missing[number] = left
        else:
            self._missing.pop(number, None)

    def _all_acked(self, number: int, rank: int) -> bool:
        """Whether this rank's acknowledgement is the last that is wanted."""
        acked = self._acked[number] = self._acked.get(number, NO_RANKS) | {rank}
        return len(acked) >= self._acks

    def _doubt(self, number: int) -> None:
        if self._keys[number] is not None and (self._parity[number] == PENDING or number in self._missing):
            self._doubtful.add(number)

    def _enter(self, number: int, parity: Parity) -> None:
        was = self._parity[number]
        self._in.move(number, parity)
        if was == PROTECTED and (parity is not OPEN or number in self._missing) and number not in self._host.idle():
            self.setbacks += 1
        if was not in EXPOSED and parity in EXPOSED:
            self._since[number] = self.now
            self._exposed[self.now] = self._exposed.get(self.now, 0) + 1
        elif was in EXPOSED and parity not in EXPOSED:
            since = self._since[number]
            self._exposed[since] -= 1
            if not self._exposed[since]:
                del self._exposed[since]
        if parity in (QUEUED, OPEN):
            self._doubtful.discard(number)
        if parity is PENDING:
            self._host.pin(number)
        elif was == PENDING:
            self._acked.pop(number, None)
            self._host.unpin(number)

    def check(self) -> None:
        """Raise AssertionError unless the ledger agrees with itself."""
        for page in self:
            assert (page.key is None) or self.find(page.key) == page.number, f"{page} is not found by its key"
            assert page.key is not None or page.missing, f"{page} is open and whole: nothing is to be known of it"
            assert page.key is not None or page.parity is OPEN, f"{page} is open but {page.parity.name}"
        assert all(self._missing.values()), "a page is lost of which nothing is missing"
        assert len(self.keys) == len(self._by_key), "a key is left of a page that is not sealed"
        for parity in PARITIES[1:]:
            pages = self._in[parity]
            assert [*pages] == [*reversed(pages)][::-1], "a list is broken"
            assert all(self._keys[page] is not None for page in pages), f"a page is {parity.name}, but not sealed"
        exposed = Counter(self._since[page.number] for page in self if page.parity in EXPOSED)
        assert list(self._exposed.items()) == sorted(exposed.items()), "the exposed disagree, or are out of order"
        assert self._acked.keys() <= set(self._in[PENDING]), "an acknowledgement of nothing that is under way"
        assert all(self._keys[page] is not None for page in self._doubtful), "there is doubt in a page that is open"

    def __iter__(self) -> Iterator[Page]:
        """All pages that are known, sealed or with a slice missing."""
        for number, key in enumerate(self._keys):
            if key is not None or number in self._missing:
                yield Page(number, key, self.parity(number), self.missing(number))
