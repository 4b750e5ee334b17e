"""What is kept of a pool's pages, in arrays that are made once: a page more costs no more than any other did.

A dictionary of a million entries is copied whole when it grows, which nobody who waits for a step has time for.
"""

from array import array
from collections.abc import Iterator
from zlib import crc32

from shared.types import PageKey

SHARD_PAGES = 1024


class PageList:
    """Pages in the order in which they came. A page is in one list at most of those that were made together.

    They are rings through two arrays, in which the places after the last page are the lists' ends.
    """

    __slots__ = ("_after", "_before", "_count", "_end", "_number", "_pages", "at")

    def __init__(self, number: int, pages: int, at: "array[int]", after: "array[int]", before: "array[int]"):
        self.at = at
        """By page, the number of the list that it is in; 0: in none."""
        self._number = number
        self._pages = pages
        self._after = after
        self._before = before
        self._end = pages + number - 1
        self._count = 0

    def fill(self) -> None:
        """All pages come, in their order. For lists that are empty."""
        pages, end = self._pages, self._end
        self._after[:pages], self._before[:pages] = array("i", range(1, pages + 1)), array("i", range(-1, pages - 1))
        self._after[pages - 1] = self._before[0] = end
        self._after[end], self._before[end], self._count = 0, pages - 1, pages
        self.at[:] = array("b", [self._number]) * pages

    def append(self, page: int) -> None:
        """It comes."""
        if self.at[page]:
            raise AssertionError(f"page {page} is in a list already")
        after, before, end = self._after, self._before, self._end
        last = before[end]
        after[last] = before[end] = page
        before[page], after[page] = last, end
        self.at[page] = self._number
        self._count += 1

    def remove(self, page: int) -> None:
        """It goes."""
        if self.at[page] != self._number:
            raise AssertionError(f"page {page} is not in this list")
        after, before = self._after, self._before
        following, last = after[page], before[page]
        after[last], before[following] = following, last
        self.at[page] = 0
        self._count -= 1

    def discard(self, page: int) -> None:
        """It goes, if it is here."""
        if self.at[page] == self._number:
            self.remove(page)

    def first(self) -> int:
        """Who has been here longest. For a list that is not empty."""
        return self._after[self._end]

    def __len__(self) -> int:
        return self._count

    def __contains__(self, page: object) -> bool:
        return isinstance(page, int) and self.at[page] == self._number

    def __iter__(self) -> Iterator[int]:
        return self._walk(self._after)

    def __reversed__(self) -> Iterator[int]:
        return self._walk(self._before)

    def _walk(self, ways: "array[int]") -> Iterator[int]:
        page = ways[self._end]
        while page != self._end:
            yield page
            page = ways[page]


def page_lists(pages: int, count: int) -> tuple[PageList, ...]:
    """Empty lists of a pool's pages, with the numbers 1 to `count`."""
    at, ends = array("b", bytes(pages)), range(pages, pages + count)
    after, before = (array("i", bytes(4 * pages)) + array("i", ends) for _ in range(2))
    return tuple(PageList(number, pages, at, after, before) for number in range(1, count + 1))


class KeyIndex:
    """Pages by key: a dictionary in parts, so that only one of them is copied when it grows."""

    __slots__ = ("_shards",)

    def __init__(self, pages: int):
        self._shards: list[dict[PageKey, int]] = [{} for _ in range(pages // SHARD_PAGES + 1)]

    def get(self, key: PageKey) -> int | None:
        """The page of this key, if there is one."""
        return self._shards[crc32(key) % len(self._shards)].get(key)

    def put(self, key: PageKey, page: int) -> None:
        """A page has a key that no other has."""
        self._shards[crc32(key) % len(self._shards)][key] = page

    def remove(self, key: PageKey) -> None:
        """No page has this key any more."""
        del self._shards[crc32(key) % len(self._shards)][key]

    def __len__(self) -> int:
        return sum(map(len, self._shards))
