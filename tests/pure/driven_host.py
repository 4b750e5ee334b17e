"""A host of protection whose runs begin, fill and end when a test says so. Which pages there are, subclasses know."""

import itertools
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from services.coordinator.membership.members import Held
from services.coordinator.protection.host import Host, Returned
from services.coordinator.protection.ledger import Ledger
from shared.types import PageKey

PAGE_TOKENS = 4


@dataclass(slots=True, eq=False)
class Table:
    """A run: the pages that it stands on, and the keys of those that it has filled or found."""

    number: int
    pages: list[int]
    keys: list[PageKey] = field(default_factory=list)
    computed: int = 0
    held: bool = False
    request_id: str = ""


class Driven(Host):
    """Runs over pages that are kept below. Nothing happens but what a test asks for."""

    def __init__(self, count: int, *, protect: bool = True, acks: int = 1):
        self.count = count
        self.ledger = Ledger(self, count, protect=protect, acks=acks)
        self.tables: list[Table] = []
        self.pins: Counter[int] = Counter()
        self._numbers = itertools.count()

    # -- runs --------------------------------------------------------------------------------------------------------

    def begin(self, pages: int, keys: Iterable[PageKey] = (), *, whole: bool = True) -> Table | None:
        """A run on the pages of `keys`, as far as they are here, and on so many open ones. None: no room."""
        keys = tuple(keys)
        found = self.match(keys, whole=whole)
        taken = self.allocate(pages)
        if taken is None:
            self.release(found)
            return None
        table = Table(next(self._numbers), found + taken, [*keys[: len(found)]], len(found) * PAGE_TOKENS)
        self.tables.append(table)
        return table

    def fill(self, table: Table, key: PageKey) -> int:
        """The first open page of a run is full. Returns the page that it stands on from now on."""
        place = len(table.keys)
        table.keys.append(key)
        table.computed = max(table.computed, len(table.keys) * PAGE_TOKENS)
        table.pages[place] = self.seal(table.pages[place], key)
        return table.pages[place]

    def end(self, table: Table) -> None:
        """A run is over."""
        self.tables.remove(table)
        self.release(table.pages)

    # -- pages -------------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def free(self) -> int:
        """Pages that are in no use, and have no key."""

    @abstractmethod
    def allocate(self, count: int) -> list[int] | None:
        """Pages to write to, each held once: free ones, then those longest idle. None: there are not enough."""

    @abstractmethod
    def match(self, keys: Iterable[PageKey], *, whole: bool = True) -> list[int]:
        """Hold the pages of these keys, up to the first that is not here; `whole`: or that lacks a slice."""

    @abstractmethod
    def release(self, pages: Iterable[int]) -> None:
        """Each is held once less; the last of them is idle first."""

    @abstractmethod
    def seal(self, page: int, key: PageKey) -> int:
        """A page is full. Returns the one to hold instead: another, if that has the key and is whole."""

    @abstractmethod
    def key(self, page: int) -> PageKey | None:
        """By which a page is found."""

    # -- the host ----------------------------------------------------------------------------------------------------

    def runs(self) -> list[Table]:
        return self.tables

    def pin(self, page: int) -> None:
        self.pins[page] += 1

    def unpin(self, page: int) -> None:
        self.pins[page] -= 1
        assert self.pins[page] >= 0, f"page {page} is unpinned once too often"

    def confirm(self, pages: list[int]) -> bool:
        return True

    def inventory(self, worker: str, held: Held) -> Mapping[int, PageKey]:
        return held.pages

    def returned(self, run: int, valid: int) -> Returned:
        table = next(each for each in self.tables if each.number == run)
        goal, kept = table.computed, -(-valid // PAGE_TOKENS)
        table.pages, rest = table.pages[:kept], table.pages[kept:]
        del table.keys[valid // PAGE_TOKENS :]
        table.computed, table.held = valid, False
        self.release(rest)
        return Returned(goal - valid, goal, goal - valid)

    def check(self) -> None:
        """Raise AssertionError unless each page is in one place, and the ledger agrees with all of it."""
        self.ledger.check()
        idle, used = set(self.idle()), {page for table in self.tables for page in table.pages}
        used |= {page for page, pins in self.pins.items() if pins}
        assert not idle & used, f"pages {sorted(idle & used)} are idle and in use"
        assert len(idle) + len(used) + self.free == self.count, "a page is lost, or in two places"
        sealed = {page: key for page in range(self.count) if (key := self.key(page)) is not None}
        assert sealed == {page.number: page.key for page in self.ledger.sealed_pages}, "the ledger has other pages"
        assert idle == sealed.keys() - used, "a sealed page in no use is not idle, or one that is open is"
