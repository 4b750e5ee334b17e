"""The shard table: fencing, replacement, readers, release; every order of events keeps table and arena in step."""

import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.parity_store.arena import Arena
from services.parity_store.shards import Shard, ShardTable
from shared.errors import Fenced, ShardMissing, StoreFull
from shared.transport.base import ShardLabel

KEY, OTHER = b"k" * 16, b"o" * 16


def label(page_key: bytes = KEY, number: int = 3, length: int = 1000) -> ShardLabel:
    return ShardLabel(page_key, number, 3, 2, length, 0, (0, 0, 0))


@pytest.fixture
def table() -> ShardTable:
    return ShardTable(Arena(1 << 20, 64 << 10))


def held(table: ShardTable, page_key: bytes = KEY, number: int = 3, epoch: int = 1, fill: int = 0) -> Shard:
    shard = table.begin("g", epoch, label(page_key, number), 0.0)
    table.view(shard)[:] = bytes([fill]) * 1000
    table.finish(shard)
    table.settle(shard)
    return shard


def read(table: ShardTable, page_key: bytes = KEY, number: int = 3) -> int:
    shard = table.pin("g", page_key, number)
    try:
        return table.view(shard)[0]
    finally:
        table.unpin(shard)


def test_a_shard_can_be_read_once_its_bytes_are_there_and_not_before(table: ShardTable) -> None:
    shard = table.begin("g", 1, label(), 0.0)
    with pytest.raises(ShardMissing):
        table.pin("g", KEY, 3)
    table.finish(shard)
    assert table.pin("g", KEY, 3) is shard
    for group, key, number in (("h", KEY, 3), ("g", OTHER, 3), ("g", KEY, 4)):
        with pytest.raises(ShardMissing):
            table.pin(group, key, number)
    table.check()


def test_bytes_that_do_not_arrive_leave_nothing(table: ShardTable) -> None:
    table.abandon(table.begin("g", 1, label(), 0.0))
    table.check()
    assert table.count == 0
    kept = held(table)
    table.abandon(kept)  # too late: it is held
    assert read(table) == 0
    table.check()


def test_a_write_of_an_older_epoch_is_fenced_before_and_after_its_bytes(table: ShardTable) -> None:
    early = table.begin("g", 1, label(), 0.0)
    table.advance_epoch("g", 2)
    table.advance_epoch("g", 1)
    with pytest.raises(Fenced):
        table.begin("g", 1, label(), 0.0)
    with pytest.raises(Fenced):
        table.finish(early)
    table.abandon(early)
    table.begin("other group", 1, label(), 0.0)
    assert table.epochs == {"g": 2}
    table.check()


def test_shards_of_an_older_epoch_stay_readable(table: ShardTable) -> None:
    held(table, epoch=1, fill=7)
    table.advance_epoch("g", 5)
    assert read(table) == 7


def test_full_is_refused_and_room_returns_with_release(table: ShardTable) -> None:
    def fill() -> None:
        for number in range(10_000):
            held(table, number.to_bytes(16, "big"))

    with pytest.raises(StoreFull):
        fill()
    assert table.stripe_count == table.count > 900
    for shard in table.take_out("g", table.keys("g")):
        table.free(shard)
    assert table.count == 0
    held(table)
    table.check()


def test_a_replaced_shard_gives_its_room_back_once_the_index_names_the_new_one(table: ShardTable) -> None:
    held(table, fill=1)
    used = table._arena.used_bytes
    new = table.begin("g", 1, label(), 0.0)
    table.view(new)[:] = bytes([2]) * 1000
    table.finish(new)
    assert read(table) == 2
    assert table._arena.used_bytes == 2 * used
    table.settle(new)
    assert table._arena.used_bytes == used
    assert table.count == 1
    table.check()


def test_a_shard_that_the_index_refused_leaves_what_was_there_before(table: ShardTable) -> None:
    held(table, fill=1)
    new = table.begin("g", 1, label(), 0.0)
    table.view(new)[:] = bytes([2]) * 1000
    table.finish(new)
    table.revert(new)
    assert read(table) == 1
    only = table.begin("g", 1, label(OTHER), 0.0)
    table.finish(only)
    table.revert(only)
    with pytest.raises(ShardMissing):
        table.pin("g", OTHER, 3)
    assert table.count == 1
    table.check()


def test_a_reader_keeps_the_bytes_of_a_shard_that_is_released(table: ShardTable) -> None:
    held(table, fill=9)
    reader = table.pin("g", KEY, 3)
    (taken,) = table.take_out("g", [KEY, OTHER])
    table.free(taken)
    fresh = held(table, fill=1)
    assert fresh.block.offset != reader.block.offset
    assert bytes(table.view(reader)) == bytes([9]) * 1000
    table.check()
    table.unpin(reader)
    table.check()
    assert table._arena.used_bytes == fresh.block.size


def test_pages_of_stripes_are_listed_in_order(table: ShardTable) -> None:
    keys = [bytes([i]) * 16 for i in (9, 3, 7, 1, 5)]
    for key in keys:
        held(table, key)
    assert table.stripes(b"", 3) == [bytes([i]) * 16 for i in (1, 3, 5)]
    assert table.stripes(bytes([5]) * 16, 3) == [bytes([i]) * 16 for i in (7, 9)]
    assert [shard.label.number for shard in table.stripe(keys[0])] == [3]


@settings(max_examples=80)
@given(seed=st.integers(0, 1 << 32))
def test_any_order_of_events_keeps_table_and_arena_in_step(seed: int) -> None:
    """The index is a queue that answers in order, as IndexWriter's does; everything else happens in any order."""
    chooser = random.Random(seed)
    table = ShardTable(Arena(512 << 10, 64 << 10))
    keys = [bytes([i]) * 16 for i in range(3)]
    arriving: list[Shard] = []
    pinned: list[tuple[Shard, bytes]] = []
    index: deque[tuple[bool, list[Shard]]] = deque()
    fill = 0

    def answer_index() -> None:
        is_put, shards = index.popleft()
        refused = chooser.random() < 0.3
        for shard in shards:
            if not is_put:
                table.free(shard)
            elif refused:
                table.revert(shard)
            else:
                table.settle(shard)

    for _ in range(150):
        match chooser.randrange(7):
            case 0 | 1:
                try:
                    shard = table.begin("g", chooser.randrange(1, 3), label(chooser.choice(keys)), 0.0)
                except (Fenced, StoreFull):
                    continue
                fill = (fill + 1) % 256
                table.view(shard)[:] = bytes([fill]) * 1000
                arriving.append(shard)
            case 2 if arriving:
                shard = arriving.pop(chooser.randrange(len(arriving)))
                try:
                    table.finish(shard)
                except Fenced:
                    table.abandon(shard)
                    continue
                index.append((True, [shard]))
            case 3 if arriving and chooser.random() < 0.3:
                table.abandon(arriving.pop())
            case 4 if index:
                answer_index()
            case 5:
                try:
                    shard = table.pin("g", chooser.choice(keys), 3)
                except ShardMissing:
                    continue
                pinned.append((shard, bytes(table.view(shard))))
            case 6 if chooser.random() < 0.5:
                taken = table.take_out("g", table.keys("g") if chooser.random() < 0.2 else [chooser.choice(keys)])
                if taken:
                    index.append((False, taken))
        if pinned and chooser.random() < 0.2:
            shard, content = pinned.pop(chooser.randrange(len(pinned)))
            assert bytes(table.view(shard)) == content, "bytes changed under a reader"
            table.unpin(shard)
        table.check()

    for shard in arriving:
        table.abandon(shard)
    for shard, content in pinned:
        assert bytes(table.view(shard)) == content
        table.unpin(shard)
    while index:
        answer_index()
    for shard in table.take_out("g", table.keys("g")):
        table.free(shard)
    table.check()
    assert table._arena.used_bytes == 0
