"""Sealed pages found again by their key: the embedded engine's prefix cache over its pages. Pure.

A sealed page that no request holds stays here until its room is needed. Of what is given away, protection is told,
whose ledger has the keys.
"""

from array import array
from collections import deque
from collections.abc import Iterable
from typing import Protocol

from services.coordinator.protection.host import IdlePages
from services.coordinator.protection.ledger import Ledger
from services.coordinator.scheduling.allocator import Allocator
from shared.types import PageKey

PAGES_RELEASED = 2048
"""Given back in a step at most, as long as nobody needs them: a long request's take more time than others have."""


class Keeper(Protocol):
    """Who is told what becomes of sealed pages, and keeps the ledger of them."""

    @property
    def ledger(self) -> Ledger:
        """Their keys, and which of them are whole."""
        ...

    def sealed(self, page: int, key: PageKey) -> None:
        """A page is full."""
        ...

    def unused(self, page: int) -> None:
        """No request stands on it any more; it may yet be found again."""
        ...

    def dropped(self, pages: Iterable[int]) -> None:
        """They are given away, or nobody's any more."""
        ...


class PrefixCache:
    """Pages by key."""

    def __init__(self, pages: int, keeper: Keeper):
        self.allocator = Allocator(pages)
        self._keeper = keeper
        self.ledger = keeper.ledger
        self._leaving: deque[array[int]] = deque()
        """Page tables that are released, from their ends on."""
        self._releases = PAGES_RELEASED
        """Pages that may yet be given back before the next step."""

    # -- counts ------------------------------------------------------------------------------------------------------

    @property
    def available(self) -> int:
        """Pages that can be allocated now: free and idle ones."""
        return self.allocator.free + len(self.allocator.idle)

    @property
    def pages(self) -> int:
        """All pages."""
        return self.allocator.count

    @property
    def in_use(self) -> int:
        """Pages in some request's table, or that of one that has just ended, or read or written by a transfer."""
        return self.pages - self.available

    def idle(self) -> IdlePages:
        """Sealed pages that nobody holds, those that are evicted first, first."""
        return self.allocator.idle

    # -- requests ----------------------------------------------------------------------------------------------------

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages to write to, each held once; None, and no change, if there are not enough."""
        while count > self.available and self._leaving:
            self._give_back(PAGES_RELEASED)
        if count > self.available:
            return None
        while count > self.allocator.free:
            self._unseal(self.allocator.idle.first)
        return [self.allocator.take() for _ in range(count)]

    def match(self, keys: Iterable[PageKey], *, whole: bool = True) -> list[int]:
        """Hold and return the pages of the longest run of `keys` that is here; `whole`: with all slices."""
        found = []
        for key in keys:
            page = self.ledger.find(key)
            if page is None or (whole and not self.ledger.is_whole(page)):
                break
            self.allocator.hold(page)
            found.append(page)
        return found

    def release(self, pages: Iterable[int]) -> None:
        """Give pages back, many of them in parts. Sealed ones stay, the last of a request to be evicted first."""
        self._leaving.append(array("i", pages))
        self._releases -= self._give_back(self._releases)

    def tidy(self, *, all_of_it: bool) -> None:
        """A step begins, or nobody waits for one: more of what was released is given back, or all of it."""
        while self._leaving and all_of_it:
            self._give_back(PAGES_RELEASED)
        self._releases = PAGES_RELEASED - self._give_back(PAGES_RELEASED)

    def seal(self, page: int, key: PageKey) -> int:
        """Name a full page. Returns the page to use from now on: another one if that key is here already."""
        if (own := self.ledger.key(page)) is not None:
            if own != key:
                raise AssertionError(f"page {page} is sealed under another key")
            return page
        other = self.ledger.find(key)
        if other is not None and self.ledger.is_whole(other):
            self.allocator.hold(other)
            self._release(page)
            return other
        if other is not None:
            self._unseal(other)
        self._keeper.sealed(page, key)
        return page

    # -- protection --------------------------------------------------------------------------------------------------

    def pin(self, page: int) -> None:
        """See `Host.pin`."""
        self.allocator.pin(page)

    def unpin(self, page: int) -> None:
        """See `Host.unpin`."""
        self.allocator.unpin(page)
        self._let_go(page)

    def gone(self, pages: Iterable[int]) -> None:
        """These pages are not what their keys say: who holds one sees it by the key, and nobody finds them again."""
        for page in pages:
            if page in self.allocator.idle:
                self._unseal(page)

    def adopt(self, pages: Iterable[tuple[int, PageKey]]) -> None:
        """Sealed pages from before, held by nobody. For an empty cache."""
        for page, _ in pages:
            self.allocator.keep(page)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _give_back(self, most: int) -> int:
        """Give back up to so many released pages, those released first. Returns how many it were."""
        left = most
        while left and self._leaving:
            table = self._leaving[0]
            part = table[-left:]
            del table[-left:]
            if not table:
                self._leaving.popleft()
            for page in reversed(part):
                self._release(page)
            left -= len(part)
        return most - left

    def _release(self, page: int) -> None:
        self.allocator.release(page)
        self._let_go(page)

    def _let_go(self, page: int) -> None:
        """Nobody holds it any more, perhaps: then it is idle if it can be found again, otherwise free."""
        if self.allocator.held(page):
            return
        sealed = self.ledger.key(page) is not None
        if sealed:
            self._keeper.unused(page)
        else:
            self._keeper.dropped((page,))
        if self.allocator.busy(page):
            return
        if sealed:
            self.allocator.keep(page)
        else:
            self.allocator.give(page)

    def _unseal(self, page: int) -> None:
        """Nobody finds it again; it is free once nobody holds it."""
        if page in self.allocator.idle:
            self.allocator.give(page)
        self._keeper.dropped((page,))

    def check(self, tables: Iterable[Iterable[int]]) -> None:
        """Raise AssertionError unless pages, keys and page tables agree."""
        self.allocator.check((*tables, *self._leaving))
        assert all(self.ledger.key(page) is not None for page in self.idle()), "an idle page has no key"
