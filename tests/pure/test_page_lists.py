"""What is kept of a page: lists that agree with plain ones, and no more bytes, nor at once, than each page's share."""

import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from services.coordinator.protection.ledger import Parity
from services.coordinator.protection.page_lists import KeyIndex, PageLists
from shared.types import PageKey, next_page_key
from tests.pure.dictionary_host import EmbeddedPages

PAGES, LISTS = 6, 3
POOL = 20_000


@given(full=st.integers(0, LISTS), moves=st.lists(st.tuples(st.integers(0, PAGES - 1), st.integers(0, LISTS))))
def test_lists_of_pages_are_in_the_order_in_which_pages_came(full: int, moves: list[tuple[int, int]]) -> None:
    lists, plain = PageLists(PAGES, LISTS), [dict[int, None]() for _ in range(LISTS + 1)]
    if full:
        lists.fill(full)
        plain[full] = dict.fromkeys(range(PAGES))
    for page, to in moves:
        lists.move(page, to)
        for each in plain:
            each.pop(page, None)
        plain[to][page] = None
    for number, wanted in enumerate(plain[1:], 1):
        found = lists[number]
        assert (len(found), [*found], [*reversed(found)]) == (len(wanted), [*wanted], [*reversed(wanted)])
        assert [page in found for page in range(PAGES)] == [page in wanted for page in range(PAGES)]
        assert not wanted or found.first == next(iter(wanted))


def test_a_page_is_found_by_its_key_whatever_bytes_that_has() -> None:
    index = KeyIndex(POOL)
    keys: list[PageKey] = [page.to_bytes(8, order) + bytes(24) for page in range(9) for order in ("little", "big")][1:]
    for page, key in enumerate(keys):
        index.put(key, page)
    assert [index.get(key) for key in keys] == [*range(len(keys))]
    for key in keys[1:]:
        index.remove(key)
    assert (len(index), index.get(keys[0]), index.get(keys[1])) == (1, 0, None)


class Traced:
    """A pool of the embedded engine, all of whose pages are filled, protected and cached, and what that takes."""

    def __init__(self) -> None:
        tracemalloc.start()
        try:
            self.pages = EmbeddedPages(POOL)
            del self.pages.pins  # the test's own
            self.pages.pin = self.pages.cache.pin  # type: ignore[method-assign]
            self.pages.unpin = self.pages.cache.unpin  # type: ignore[method-assign]
            self.most_at_once = 0
            for number in range(POOL):
                before = tracemalloc.get_traced_memory()[0]
                tracemalloc.reset_peak()
                self._one(number)
                self.most_at_once = max(self.most_at_once, tracemalloc.get_traced_memory()[1] - before)
            self.bytes = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()

    def _one(self, number: int) -> None:
        cache, ledger = self.pages.cache, self.pages.ledger
        key = next_page_key(b"", [number])
        (page,) = cache.allocate(1) or []
        cache.seal(page, key)
        ledger.start_protection(1, 1)
        ledger.end_protection([key], 0, protected=True)
        cache.release([page])
        cache.tidy(all_of_it=False)


def test_a_cached_page_takes_a_quarter_of_a_kilobyte_at_most_and_none_takes_what_all_take() -> None:
    traced = Traced()
    assert traced.pages.ledger.count(Parity.PROTECTED) == len(traced.pages.idle()) == POOL
    assert traced.bytes / POOL < 250
    assert traced.most_at_once < POOL * 8  # a table of all pages was not made anew
