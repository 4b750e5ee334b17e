"""The embedded engine's pages: each in one set, sealed ones found again, none given away that somebody holds."""

from unittest.mock import patch

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.coordinator.protection.ledger import Parity
from shared.types import PageKey, next_page_key, root_key
from tests.pure.dictionary_host import EmbeddedPages


def key(number: int) -> PageKey:
    return next_page_key(root_key("m", ""), [number])


def sealed(pages: EmbeddedPages, number: int) -> int:
    taken = pages.cache.allocate(1)
    assert taken is not None
    return pages.cache.seal(taken[0], key(number))


def test_a_sealed_page_is_found_by_its_key_until_its_room_is_needed() -> None:
    pages = EmbeddedPages(2, protect=False)
    cache = pages.cache
    page = sealed(pages, 1)
    cache.release([page])
    assert cache.match([key(1)]) == [page]
    cache.release([page])
    taken = cache.allocate(2)
    assert taken is not None
    assert cache.match([key(1)]) == []


def test_the_first_pages_of_a_request_are_evicted_last() -> None:
    pages = EmbeddedPages(3, protect=False)
    taken = [sealed(pages, number) for number in range(3)]
    pages.cache.release(taken)
    assert pages.cache.allocate(1) == [taken[2]]
    assert pages.cache.match([key(0), key(1)]) == taken[:2]


def test_the_same_page_computed_twice_is_kept_once() -> None:
    pages = EmbeddedPages(2)
    first, second = sealed(pages, 1), sealed(pages, 1)
    assert first == second
    assert pages.cache.available == 1
    pages.cache.check([[first], [first]])


def test_the_same_tokens_computed_anew_take_the_name_of_a_page_that_is_not_whole() -> None:
    pages = EmbeddedPages(2)
    cache, ledger = pages.cache, pages.ledger
    lost = sealed(pages, 1)
    cache.release([lost])
    ledger.lose({2})
    cache.pin(lost)  # a restore of it is under way
    (new,) = cache.allocate(1) or []
    assert cache.seal(new, key(1)) == new
    ledger.restored(lost, key(1))
    cache.check([[new]])
    cache.unpin(lost)
    cache.check([[new]])
    assert ledger.lost == 0
    assert cache.match([key(1)]) == [new]


def test_a_page_under_a_transfer_is_not_given_away() -> None:
    pages = EmbeddedPages(1, protect=False)
    page = sealed(pages, 1)
    pages.cache.release([page])
    pages.cache.pin(page)
    assert pages.cache.allocate(1) is None
    pages.cache.unpin(page)
    assert pages.cache.allocate(1) == [page]


def test_a_page_that_is_given_up_is_free_once_nobody_needs_it() -> None:
    pages = EmbeddedPages(2)
    held, idle = sealed(pages, 1), sealed(pages, 2)
    pages.cache.release([idle])
    pages.ledger.lose({1})
    pages.ledger.forget([held, idle])
    assert pages.cache.match([key(1)]) == pages.cache.match([key(2)]) == []
    assert pages.cache.available == 1
    pages.cache.release([held])
    assert pages.cache.available == pages.cache.allocator.free == 2


def test_a_page_that_is_not_held_can_not_be_released() -> None:
    with pytest.raises(AssertionError, match="not held"):
        EmbeddedPages(1, protect=False).cache.release([0])


def test_a_page_that_is_not_pinned_can_not_be_unpinned() -> None:
    with pytest.raises(AssertionError, match="not pinned"):
        EmbeddedPages(1, protect=False).cache.unpin(0)


class Pages(RuleBasedStateMachine):
    """Random sequences over a small pool; `check` after every rule."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = patch("services.coordinator.scheduling.prefix_cache.PAGES_RELEASED", 2)
        self.parts.start()
        self.pages = EmbeddedPages(6)
        self.cache, self.ledger = self.pages.cache, self.pages.ledger
        self.tables: list[list[int]] = []
        self.pending: list[PageKey] = []
        self.pinned: list[int] = []

    def teardown(self) -> None:
        self.parts.stop()

    @rule(all_of_it=st.booleans())
    def a_step_begins(self, all_of_it: bool) -> None:
        self.cache.tidy(all_of_it=all_of_it)

    @rule(count=st.integers(1, 4))
    def allocate(self, count: int) -> None:
        taken = self.cache.allocate(count)
        if taken is None:
            assert count > self.cache.available
            self.cache.check(self.tables)
            used = {page for table in self.tables for page in table} | {*self.cache.allocator.pinned}
            assert self.cache.in_use == len(used), "a page that was released was withheld"
        if taken is not None:
            self.tables.append(taken)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def seal(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        index = data.draw(st.integers(0, len(table) - 1))
        if self.ledger.key(table[index]) is None and self.ledger.is_whole(table[index]):
            table[index] = self.cache.seal(table[index], key(data.draw(st.integers(0, 9))))

    @rule(number=st.integers(0, 9))
    def match(self, number: int) -> None:
        if found := self.cache.match([key(number)]):
            self.tables.append(found)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.cache.release(self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1))))

    @rule(limit=st.integers(1, 3))
    def start(self, limit: int) -> None:
        started = self.ledger.start_protection(limit, 4)
        self.pending += [key for page in started if (key := self.ledger.key(page)) is not None]

    @precondition(lambda self: self.pending)
    @rule(good=st.booleans())
    def end(self, good: bool) -> None:
        self.ledger.end_protection([self.pending.pop()], 0, protected=good, reason="x")

    @rule(ranks=st.sets(st.integers(0, 2), min_size=1))
    def lose(self, ranks: set[int]) -> None:
        """As after a lost rank: transfers end with the epoch."""
        self.ledger.lose(ranks)
        while self.pinned:
            self.pages.unpin(self.pinned.pop())
        self.ledger.protect_again(Parity.PENDING, Parity.UNPROTECTED)
        self.pending.clear()

    @precondition(lambda self: self.ledger.lost)
    @rule(data=st.data(), way=st.sampled_from(["restored", "forget", "pin"]))
    def bring_back(self, data: st.DataObject, way: str) -> None:
        page = data.draw(st.sampled_from([page for page in self.ledger if page.missing]))
        if way == "pin":
            self.pages.pin(page.number)
            self.pinned.append(page.number)
        elif way == "forget":
            self.ledger.forget([page.number])
        elif page.key is not None:
            self.ledger.restored(page.number, page.key)

    @precondition(lambda self: self.pinned)
    @rule()
    def unpin(self) -> None:
        self.pages.unpin(self.pinned.pop())

    @invariant()
    def all_agrees(self) -> None:
        self.cache.check(self.tables)
        self.ledger.check()


TestPages = Pages.TestCase
TestPages.settings = settings(max_examples=60, stateful_step_count=40)
