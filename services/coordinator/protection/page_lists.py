"""What is kept of a pool's pages, in arrays that are made once: a page more costs no more than any other did.

A dictionary of a million entries is copied whole when it grows, which nobody who waits for a step has time for.
"""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from zlib import crc32

from shared.types import PageKey

SHARD_PAGES = 1024


class PageLists:
    """Lists of a pool's pages, 1 to `count`: each page is in one of them, or in none. All begin empty.

    They are rings through two arrays, in which the places after the last page are the lists' ends.
    """

    def __init__(self, pages: int, count: int):
        self.at = array("b", bytes(pages))
        """By page, the list that it is in; 0: none."""
        self._pages = pages
        self._after = array("i", range(pages + count + 1))
        self._before = array("i", self._after)
        self._counts = [0] * (count + 1)

    def __getitem__(self, number: int) -> "PageList":
        return PageList(number, self._pages + number, self.at, self._counts, self._after, self._before)

    def move(self, page: int, to: int) -> None:
        """A page comes last in the list `to`, out of the one that it was in; 0: it is in none from now on."""
        after, before, was = self._after, self._before, self.at[page]
        if was:
            following, last = after[page], before[page]
            after[last], before[following] = following, last
            self._counts[was] -= 1
        if to:
            end = self._pages + to
            last = before[end]
            after[last] = before[end] = page
            after[page], before[page] = end, last
            self._counts[to] += 1
        self.at[page] = to

    def fill(self, number: int) -> None:
        """All pages come into a list, in their order; none is in one."""
        pages, end = self._pages, self._pages + number
        self._after[:pages], self._before[:pages] = array("i", range(1, pages + 1)), array("i", range(-1, pages - 1))
        self._after[pages - 1] = self._before[0] = end
        self._after[end], self._before[end], self._counts[number] = 0, pages - 1, pages
        self.at[:] = array("b", [number]) * pages


@dataclass(frozen=True, slots=True)
class PageList:
    """One of them, as it is at any time: pages in the order in which they came."""

    _number: int
    _end: int
    _at: "array[int]"
    _counts: list[int]
    _after: "array[int]"
    _before: "array[int]"

    @property
    def first(self) -> int:
        """Who has been here longest. For a list that is not empty."""
        return self._after[self._end]

    def __len__(self) -> int:
        return self._counts[self._number]

    def __contains__(self, page: object) -> bool:
        return isinstance(page, int) and self._at[page] == self._number

    def __iter__(self) -> Iterator[int]:
        return self._walk(self._after)

    def __reversed__(self) -> Iterator[int]:
        return self._walk(self._before)

    def _walk(self, ways: "array[int]") -> Iterator[int]:
        page = ways[self._end]
        while page != self._end:
            yield page
            page = ways[page]


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
