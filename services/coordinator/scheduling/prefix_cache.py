"""Sealed pages found again by their key: the embedded engine's prefix cache over its pages. Pure.

A sealed page that no request holds stays here until its room is needed. Of what is given away, protection is told.
"""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Protocol

from services.coordinator.protection.host import IdlePages
from services.coordinator.scheduling.allocator import Allocator
from shared.types import PageKey


class Keeper(Protocol):
    """Who is told what becomes of sealed pages, and knows which of them are whole."""

    def is_whole(self, page: int) -> bool:
        """Whether a page's bytes are there on every rank."""
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
        self._by_key: dict[PageKey, int] = {}
        self._key: dict[int, PageKey] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    # -- counts ------------------------------------------------------------------------------------------------------

    @property
    def available(self) -> int:
        """Pages that can be allocated now: free and idle ones."""
        return self.allocator.free + len(self._idle)

    @property
    def pages(self) -> int:
        """All pages."""
        return self.allocator.count

    @property
    def in_use(self) -> int:
        """Pages in some request's table, or being read or written by a transfer."""
        return self.pages - self.available

    @property
    def sealed(self) -> int:
        """Pages that can be found by their key."""
        return len(self._key)

    def idle(self) -> IdlePages:
        """Sealed pages that nobody holds, those that are evicted first, first."""
        return self._idle.keys()

    def key(self, page: int) -> PageKey | None:
        """The key of a page; None: it is not sealed."""
        return self._key.get(page)

    # -- requests ----------------------------------------------------------------------------------------------------

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages to write to, each held once; None, and no change, if there are not enough."""
        if count > self.available:
            return None
        while count > self.allocator.free:
            self._unseal(next(iter(self._idle)))
        return [self.allocator.take() for _ in range(count)]

    def match(self, keys: Iterable[PageKey], *, whole: bool = True) -> list[int]:
        """Hold and return the pages of the longest run of `keys` that is here; `whole`: with all slices."""
        found = []
        for key in keys:
            page = self._by_key.get(key)
            if page is None or (whole and not self._keeper.is_whole(page)):
                break
            self._hold(page)
            found.append(page)
        return found

    def release(self, pages: Iterable[int]) -> None:
        """Give pages back. Sealed ones stay, the last of a request to be evicted first."""
        for page in reversed(list(pages)):
            self.allocator.release(page)
            self._let_go(page)

    def seal(self, page: int, key: PageKey) -> int:
        """Name a full page. Returns the page to use from now on: another one if that key is here already."""
        if (own := self._key.get(page)) is not None:
            if own != key:
                raise AssertionError(f"page {page} is sealed under another key")
            return page
        other = self._by_key.get(key)
        if other is not None and self._keeper.is_whole(other):
            self._hold(other)
            self.release([page])
            return other
        if other is not None:
            self._unseal(other)
        self._by_key[key] = page
        self._key[page] = key
        self._keeper.sealed(page, key)
        return page

    # -- protection --------------------------------------------------------------------------------------------------

    def pin(self, page: int) -> None:
        """See `Host.pin`."""
        self._idle.pop(page, None)
        self.allocator.pin(page)

    def unpin(self, page: int) -> None:
        """See `Host.unpin`."""
        self.allocator.unpin(page)
        self._let_go(page)

    def gone(self, pages: Iterable[int]) -> None:
        """These pages are not what their keys say: who holds one sees it by the key, and nobody finds them again."""
        for page in pages:
            if (key := self._key.pop(page, None)) is not None:
                del self._by_key[key]
                if page in self._idle:
                    self._unseal(page)

    def adopt(self, pages: Iterable[tuple[int, PageKey]]) -> None:
        """Sealed pages from before, held by nobody. For an empty cache."""
        for page, key in pages:
            self._by_key[key], self._key[page] = page, key
            self._idle[page] = None
        self.allocator.reserve(self._idle)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _hold(self, page: int) -> None:
        self.allocator.hold(page)
        self._idle.pop(page, None)

    def _let_go(self, page: int) -> None:
        """Nobody holds it any more, perhaps: then it is idle if it can be found again, otherwise free."""
        if not self.allocator.held(page):
            if page in self._key:
                self._keeper.unused(page)
            else:
                self._keeper.dropped((page,))
        if self.allocator.busy(page):
            return
        if page in self._key:
            self._idle[page] = None
        else:
            self.allocator.give(page)

    def _unseal(self, page: int) -> None:
        """Nobody finds it again; it is free once nobody holds it."""
        if (key := self._key.pop(page, None)) is not None:
            del self._by_key[key]
        if page in self._idle:
            del self._idle[page]
            self._keeper.dropped((page,))
            self.allocator.give(page)
        else:
            self._keeper.dropped((page,))

    def check(self, tables: Iterable[Iterable[int]]) -> None:
        """Raise AssertionError unless pages, keys and page tables agree."""
        self.allocator.check(tables, self._idle)
        assert {key: page for page, key in self._key.items()} == self._by_key, "a key names another page"
        assert self._idle.keys() <= self._key.keys(), "an idle page has no key"
