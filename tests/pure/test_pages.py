"""The page pool: every page in one set, sealed pages found again, nothing dropped that somebody holds."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.coordinator.protection.ledger import PagePool, Shadow
from shared.types import next_page_key, root_key


def key(number: int) -> bytes:
    return next_page_key(root_key("m", ""), [number])


def sealed(pool: PagePool, number: int) -> int:
    pages = pool.allocate(1)
    assert pages is not None
    return pool.seal(pages[0], key(number))


def test_a_sealed_page_is_found_by_its_key_until_its_room_is_needed() -> None:
    pool = PagePool(2, protect=False)
    page = sealed(pool, 1)
    pool.release([page])
    assert pool.match([key(1)]) == [page]
    pool.release([page])
    taken = pool.allocate(2)
    assert taken is not None
    assert pool.match([key(1)]) == []


def test_the_first_pages_of_a_sequence_are_evicted_last() -> None:
    pool = PagePool(3, protect=False)
    pages = [sealed(pool, number) for number in range(3)]
    pool.release(pages)
    assert pool.allocate(1) == [pages[2]]
    assert pool.match([key(0), key(1)]) == pages[:2]


def test_a_page_that_the_shadow_reads_is_not_given_away() -> None:
    pool = PagePool(1, protect=True)
    page = sealed(pool, 1)
    assert [each.number for each in pool.start_protection(8, 8)] == [page]
    pool.release([page])
    assert pool.allocate(1) is None
    pool.end_protection([key(1)], 0, protected=True)
    assert pool.allocate(1) == [page]
    assert pool.take_released() == (key(1),)


def test_the_same_page_computed_twice_is_kept_once() -> None:
    pool = PagePool(2, protect=True)
    first, second = sealed(pool, 1), sealed(pool, 1)
    assert first == second
    assert pool.available == 1
    pool.check([[first], [first]])


def test_a_page_with_a_slice_missing_is_not_matched_before_it_is_restored() -> None:
    pool = PagePool(1, protect=True)
    page = sealed(pool, 1)
    pool.lose({2})
    assert pool.match([key(1)]) == []
    pool.restored(page, key(1))
    assert pool.match([key(1)]) == [page]
    assert pool.count(Shadow.PROTECTED) == 1


def test_pages_in_use_take_the_parity_of_cached_ones_the_oldest_first() -> None:
    pool = PagePool(6, protect=True)
    old, older, busy, idle = sealed(pool, 1), sealed(pool, 0), sealed(pool, 2), sealed(pool, 3)
    pool.start_protection(8, 8)
    pool.end_protection([key(0), key(1)], 0, protected=True)
    pool.end_protection([key(2), key(3)], 0, protected=False, reason="store full")
    pool.release([older])
    pool.release([old])
    pool.release([idle])
    assert pool.make_room([key(2), key(3)]) == (key(0),)  # one for the busy one; the idle one has no claim
    assert pool.make_room([key(3), key(9)]) == ()
    assert pool.count(Shadow.PROTECTED) == 1
    pool.protect_again(Shadow.UNPROTECTED, cached=1)
    assert pool.start_protection(8, 8)[0].number == busy
    assert pool.count(Shadow.PENDING) == 2
    pool.check([[busy]])


def test_failed_protection_has_a_reason_and_is_tried_again() -> None:
    pool = PagePool(1, protect=True)
    sealed(pool, 1)
    pool.start_protection(1, 1)
    pool.end_protection([key(1)], 0, protected=False, reason="store full")
    assert pool.count(Shadow.UNPROTECTED) == 1
    assert pool.unprotected_reason == "store full"
    pool.protect_again(Shadow.UNPROTECTED)
    assert len(pool.start_protection(1, 1)) == 1


def test_the_same_tokens_computed_anew_take_the_name_of_a_page_that_is_not_whole() -> None:
    pool = PagePool(2, protect=True)
    lost = sealed(pool, 1)
    pool.release([lost])
    pool.lose({2})
    pool.pin(lost)  # a restore of it is under way
    (new,) = pool.allocate(1) or []
    assert pool.seal(new, key(1)) == new
    pool.restored(lost, key(1))
    pool.check([[new]])
    pool.unpin(lost)
    pool.check([[new]])
    assert pool.lost == 0
    assert pool.match([key(1)]) == [new]


def test_a_pinned_page_is_not_given_away() -> None:
    pool = PagePool(1, protect=False)
    page = sealed(pool, 1)
    pool.release([page])
    pool.pin(page)
    assert pool.allocate(1) is None
    pool.unpin(page)
    assert pool.allocate(1) == [page]


def test_cached_pages_come_back_in_the_order_in_which_they_will_be_missed() -> None:
    pool = PagePool(4, protect=True)
    older, newer = sealed(pool, 1), sealed(pool, 2)
    pool.release([older])
    pool.release([newer])
    pool.lose({0})
    assert [page.number for page in pool.lost_cached(9)] == [newer, older]
    assert [page.number for page in pool.lost_cached(1)] == [newer]
    pool.forget([newer])
    assert pool.lost == 1
    assert pool.available == 4
    assert pool.take_released() == (key(2),)


def test_a_page_that_is_not_held_can_not_be_released() -> None:
    with pytest.raises(AssertionError, match="not held"):
        PagePool(1, protect=False).release([0])


class Pool(RuleBasedStateMachine):
    """Random sequences over a small pool; `check` after every rule."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(6, protect=True)
        self.tables: list[list[int]] = []
        self.pending: list[bytes] = []
        self.pinned: list[int] = []

    @rule(count=st.integers(1, 4))
    def allocate(self, count: int) -> None:
        available = self.pool.available
        pages = self.pool.allocate(count)
        assert (pages is None) == (count > available)
        if pages is not None:
            self.tables.append(pages)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def seal(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        index = data.draw(st.integers(0, len(table) - 1))
        if self.pool.pages[table[index]].key is None:
            table[index] = self.pool.seal(table[index], key(data.draw(st.integers(0, 9))))

    @rule(number=st.integers(0, 9))
    def match(self, number: int) -> None:
        if found := self.pool.match([key(number)]):
            self.tables.append(found)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.pool.release(self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1))))

    @rule(limit=st.integers(1, 3))
    def start(self, limit: int) -> None:
        self.pending += [page.key for page in self.pool.start_protection(limit, 4) if page.key]

    @precondition(lambda self: self.pending)
    @rule(good=st.booleans())
    def end(self, good: bool) -> None:
        self.pool.end_protection([self.pending.pop()], 0, protected=good, reason="x")

    @rule(ranks=st.sets(st.integers(0, 2), min_size=1))
    def lose(self, ranks: set[int]) -> None:
        """As after a lost rank: transfers end with the epoch."""
        self.pool.lose(ranks)
        while self.pinned:
            self.pool.unpin(self.pinned.pop())
        self.pool.protect_again(Shadow.PENDING, Shadow.UNPROTECTED)
        self.pending.clear()

    @precondition(lambda self: self.pool.lost)
    @rule(data=st.data(), way=st.sampled_from(["restored", "forget", "pin"]))
    def bring_back(self, data: st.DataObject, way: str) -> None:
        page = data.draw(st.sampled_from([page for page in self.pool.pages if page.missing]))
        if way == "pin":
            self.pool.pin(page.number)
            self.pinned.append(page.number)
        elif way == "forget":
            self.pool.forget([page.number])
        elif page.key is not None:
            self.pool.restored(page.number, page.key)

    @precondition(lambda self: self.pinned)
    @rule()
    def unpin(self) -> None:
        self.pool.unpin(self.pinned.pop())

    @invariant()
    def whole(self) -> None:
        self.pool.check(self.tables)


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_page_that_every_rank_copies_is_protected_by_the_last_acknowledgement() -> None:
    pool = PagePool(4, protect=True, acks=3)
    (page,) = pool.allocate(1) or []
    pool.seal(page, key(1))
    pool.start_protection(9, 9)
    for rank in (0, 1, 1):
        pool.end_protection([key(1)], rank, protected=True)
    assert pool.count(Shadow.PENDING) == 1
    pool.end_protection([key(1)], 2, protected=False, reason="full")
    assert pool.count(Shadow.UNPROTECTED) == 1
    pool.protect_again(Shadow.UNPROTECTED)
    pool.start_protection(9, 9)
    for rank in (0, 1, 2):
        assert pool.count(Shadow.PENDING) == 1
        pool.end_protection([key(1)], rank, protected=True)
    assert pool.count(Shadow.PROTECTED) == 1
