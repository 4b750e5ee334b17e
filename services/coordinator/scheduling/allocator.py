"""The pages of the embedded engine's KV pool: who holds which, equal on all ranks. Pure.

A page is free, or held by requests, or pinned while its bytes are read or written, or idle: in none of these, and kept
by the prefix cache until its room is needed.
"""

from array import array
from collections.abc import Iterable

from services.coordinator.protection.page_lists import PageLists

FREE, IDLE = 1, 2


class Allocator:
    """Counts of holders and pins, and the pages that are free or idle."""

    def __init__(self, count: int):
        self.count = count
        self._lists = PageLists(count, 2)
        self._lists.fill(FREE)
        self._free, self.idle = self._lists[FREE], self._lists[IDLE]
        self._holders = array("i", bytes(4 * count))
        self._pins = array("i", bytes(4 * count))

    @property
    def free(self) -> int:
        """Pages that can be taken."""
        return len(self._free)

    def take(self) -> int:
        """A free page, held once."""
        page = self._free.first
        self.hold(page)
        return page

    def give(self, page: int) -> None:
        """A page that nobody holds is free."""
        self._lists.move(page, FREE)

    def keep(self, page: int) -> None:
        """A page that nobody holds is idle: it has content that may be asked for."""
        self._lists.move(page, IDLE)

    def hold(self, page: int) -> None:
        """One more request stands on it."""
        self._lists.move(page, 0)
        self._holders[page] += 1

    def release(self, page: int) -> None:
        """One request less stands on it."""
        if self._holders[page] < 1:
            raise AssertionError(f"page {page} released but not held")
        self._holders[page] -= 1

    def pin(self, page: int) -> None:
        """A transfer begins to read or write its bytes."""
        self._lists.move(page, 0)
        self._pins[page] += 1

    def unpin(self, page: int) -> None:
        """The transfer has ended."""
        if self._pins[page] < 1:
            raise AssertionError(f"page {page} unpinned but not pinned")
        self._pins[page] -= 1

    def held(self, page: int) -> bool:
        """Whether a request stands on it."""
        return self._holders[page] > 0

    def busy(self, page: int) -> bool:
        """Whether it may be given to nobody: held, or pinned."""
        return self._holders[page] > 0 or self._pins[page] > 0

    @property
    def pinned(self) -> list[int]:
        """The pages that transfers read or write."""
        return [page for page, pins in enumerate(self._pins) if pins]

    def check(self, tables: Iterable[Iterable[int]]) -> None:
        """Raise AssertionError unless free + busy + idle = all, and holders equal the page tables given."""
        holders = [0] * self.count
        for table in tables:
            for page in table:
                holders[page] += 1
        assert holders == self._holders.tolist(), "holders differ from the page tables"
        for pages in (self._free, self.idle):
            assert len([*pages]) == len(pages) == len({*pages}), "a page is twice in a list"
        for page in range(self.count):
            places = (page in self._free) + (page in self.idle) + self.busy(page)
            assert places == 1, f"page {page} is in {places} sets"
