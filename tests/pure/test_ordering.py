"""The checker of order between streams: what it must find, and what it must not take for a hazard."""

import pytest

from tests.pure.ordering import Access, Ordering, joined, overlap


def write(order: Ordering, on: str, start: int = 0, end: int = 8) -> None:
    order.work(on, "kernel", [Access("pool", [(start, end)], True)])


def read(order: Ordering, on: str, start: int = 0, end: int = 8) -> None:
    order.work(on, "kernel", [Access("pool", [(start, end)], False)])


def test_a_read_on_another_stream_without_a_wait_is_found_whoever_is_first() -> None:
    for first, second in ((write, read), (read, write), (write, write)):
        order = Ordering()
        first(order, "model")
        second(order, "shadow")
        assert len(order.hazards()) == 1


def test_an_event_that_is_waited_for_orders_what_came_before_it_and_nothing_after() -> None:
    order = Ordering()
    write(order, "model")
    event = order.clock("model")
    write(order, "model", 8, 16)
    order.join("shadow", event)
    read(order, "shadow")
    assert not order.hazards()
    read(order, "shadow", 8, 16)
    assert len(order.hazards()) == 1


def test_order_is_carried_on_through_a_third() -> None:
    order = Ordering()
    write(order, "model")
    order.join("host", order.clock("model"))  # it waits for the stream
    order.join("shadow", order.clock("host"))  # it launches
    read(order, "shadow")
    assert not order.hazards()


def test_reads_one_stream_and_other_bytes_need_no_order() -> None:
    order = Ordering()
    read(order, "model")
    read(order, "shadow")
    write(order, "copies", 8, 16)
    write(order, "copies", 8, 16)
    assert not order.hazards()


@pytest.mark.parametrize(
    ("first", "second", "meets"),
    [
        ([(0, 4), (8, 12)], [(4, 8)], False),
        ([(0, 4), (8, 12)], [(3, 5)], True),
        ([(5, 6)], [(0, 9)], True),
        ([], [(0, 1)], False),
    ],
)
def test_ranges_meet_where_they_have_a_byte_in_common(
    first: list[tuple[int, int]], second: list[tuple[int, int]], meets: bool
) -> None:
    assert overlap(first, second) is meets
    assert overlap(second, first) is meets


def test_ranges_that_touch_become_one() -> None:
    assert joined([(8, 9), (0, 4), (2, 6), (6, 8)]) == [(0, 9)]
