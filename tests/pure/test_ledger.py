"""The ledger: what is sealed is protected in turn, what is lost is known, and its host is told what it has to know."""

from services.coordinator.protection.ledger import Parity
from shared.types import PageKey, next_page_key, root_key
from tests.pure.dictionary_host import DictionaryHost


def key(number: int) -> PageKey:
    return next_page_key(root_key("m", ""), [number])


def sealed(host: DictionaryHost, number: int) -> int:
    pages = host.allocate(1)
    assert pages is not None
    return host.seal(pages[0], key(number))


def protect(host: DictionaryHost, *numbers: int) -> None:
    host.ledger.start_protection(9, 9)
    host.ledger.end_protection(map(key, numbers), 0, protected=True)


def test_a_page_that_the_ranks_read_for_its_parity_is_not_given_away() -> None:
    host = DictionaryHost(1)
    page = sealed(host, 1)
    assert host.ledger.start_protection(8, 8) == [page]
    host.release([page])
    assert host.allocate(1) is None
    host.ledger.end_protection([key(1)], 0, protected=True)
    assert host.allocate(1) == [page]
    assert host.ledger.take_released() == (key(1),)


def test_a_page_with_a_slice_missing_is_not_found_before_it_is_restored() -> None:
    host = DictionaryHost(1)
    page = sealed(host, 1)
    protect(host, 1)
    host.ledger.lose({2})
    assert host.match([key(1)]) == []
    host.ledger.restored(page, key(1))
    assert host.match([key(1)]) == [page]
    assert host.ledger.count(Parity.PROTECTED) == 1


def test_pages_in_use_take_the_parity_of_idle_ones_the_oldest_first() -> None:
    host = DictionaryHost(6)
    ledger = host.ledger
    busy = host.begin(1)
    assert busy is not None
    old, older, in_use, idle = sealed(host, 1), sealed(host, 0), host.fill(busy, key(2)), sealed(host, 3)
    protect(host, 0, 1)
    ledger.end_protection([key(2), key(3)], 0, protected=False, reason="store full")
    for page in (older, old, idle):
        host.release([page])
    assert ledger.make_room([key(2), key(3)]) == (key(0),)  # one for the page in use; the idle one has no claim
    assert ledger.make_room([key(3), key(9)]) == ()
    assert ledger.count(Parity.PROTECTED) == 1
    ledger.protect_again(Parity.UNPROTECTED, idle=1)
    assert ledger.start_protection(8, 8)[0] == in_use
    assert ledger.count(Parity.PENDING) == 2
    host.check()


def test_failed_protection_has_a_reason_and_is_tried_again() -> None:
    host = DictionaryHost(1)
    sealed(host, 1)
    host.ledger.start_protection(1, 1)
    host.ledger.end_protection([key(1)], 0, protected=False, reason="store full")
    assert host.ledger.count(Parity.UNPROTECTED) == 1
    assert host.ledger.unprotected_reason == "store full"
    host.ledger.protect_again(Parity.UNPROTECTED)
    assert len(host.ledger.start_protection(1, 1)) == 1


def test_a_page_that_every_rank_copies_is_protected_by_the_last_acknowledgement() -> None:
    host = DictionaryHost(4, acks=3)
    ledger = host.ledger
    sealed(host, 1)
    ledger.start_protection(9, 9)
    for rank in (0, 1, 1):
        ledger.end_protection([key(1)], rank, protected=True)
    assert ledger.count(Parity.PENDING) == 1
    ledger.end_protection([key(1)], 2, protected=False, reason="full")
    assert ledger.count(Parity.UNPROTECTED) == 1
    ledger.protect_again(Parity.UNPROTECTED)
    ledger.start_protection(9, 9)
    for rank in (2, 1, 0):  # what came before it failed does not count
        assert ledger.count(Parity.PENDING) == 1
        ledger.end_protection([key(1)], rank, protected=True)
    assert ledger.count(Parity.PROTECTED) == 1


def test_idle_pages_come_back_in_the_order_in_which_they_will_be_missed() -> None:
    host = DictionaryHost(4)
    ledger = host.ledger
    older, newer = sealed(host, 1), sealed(host, 2)
    host.release([older])
    host.release([newer])
    ledger.lose({0})
    assert ledger.lost_idle(9) == [newer, older]
    assert ledger.lost_idle(1) == [newer]
    ledger.forget([newer])
    assert ledger.lost == 1
    assert host.free + len(host.idle()) == 4
    assert ledger.take_released() == (key(2),)
    host.check()


def test_an_acknowledgement_that_a_lost_store_may_have_given_is_not_believed() -> None:
    host = DictionaryHost(2)
    sealed(host, 1)
    host.ledger.start_protection(9, 9)
    host.ledger.protection_lost()
    host.ledger.end_protection([key(1)], 0, protected=True)
    assert host.ledger.count(Parity.QUEUED) == 1
    protect(host, 1)
    assert host.ledger.count(Parity.PROTECTED) == 1


def test_a_page_that_comes_back_from_what_is_left_of_its_stripe_is_encoded_anew() -> None:
    """One shard of several is enough for one lost rank; the next loss may need those that a store gave up."""
    host = DictionaryHost(2)
    page = sealed(host, 1)
    protect(host, 1)
    host.ledger.shards_lost([key(1)])
    host.ledger.lose({2})
    host.ledger.restored(page, key(1))
    assert host.ledger.count(Parity.QUEUED) == 1


def test_a_page_that_is_given_up_is_lost_for_those_who_stand_on_it_until_they_leave() -> None:
    host = DictionaryHost(2)
    table = host.begin(1)
    assert table is not None
    page = host.fill(table, key(1))
    host.ledger.lose({1})
    host.ledger.forget([page])
    assert host.key(page) is None
    assert not host.ledger.is_whole(page)
    assert host.ledger.valid_tokens(table, 4) == 0
    host.end(table)
    assert host.ledger.lost == 0
    host.check()


def test_the_oldest_page_without_protection_says_since_when() -> None:
    host = DictionaryHost(3)
    for number in range(3):
        host.ledger.now = float(number)
        sealed(host, number)
    assert host.ledger.exposed_since() == 0.0
    protect(host, 0)
    assert host.ledger.exposed_since() == 1.0
    host.ledger.end_protection([key(1), key(2)], 0, protected=False, reason="full")
    assert host.ledger.exposed_since() == 1.0  # no store has it: it does not begin anew
    host.ledger.protect_again(Parity.UNPROTECTED)
    protect(host, 1, 2)
    assert host.ledger.exposed_since() is None


def test_without_protection_nothing_is_queued_and_nothing_released() -> None:
    host = DictionaryHost(1, protect=False)
    page = sealed(host, 1)
    assert host.ledger.start_protection(9, 9) == []
    assert host.ledger.exposed_since() is None
    host.release([page])
    assert host.allocate(1) == [page]
    assert host.ledger.take_released() == ()
