"""The arena: no two blocks share a byte, all of it comes back, and full is said clearly."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.parity_store.arena import Arena, Block, size_class
from shared.errors import ConfigError, StoreFull

SLAB = 64 << 10


def test_a_block_keeps_its_bytes_until_it_is_freed() -> None:
    arena = Arena(4 * SLAB, SLAB)
    blocks = [arena.allocate(5000) for _ in range(20)]
    for i, block in enumerate(blocks):
        view = arena.view(block)
        assert view.nbytes == 5000
        view[:] = bytes([i]) * 5000
    assert all(bytes(arena.view(block)) == bytes([i]) * 5000 for i, block in enumerate(blocks))
    arena.check()


@settings(max_examples=60)
@given(seed=st.integers(0, 1 << 32))
def test_blocks_never_overlap_and_all_room_comes_back(seed: int) -> None:
    chooser = random.Random(seed)
    arena = Arena(16 * SLAB, SLAB)
    live: dict[Block, int] = {}
    for step in range(200):
        if live and chooser.random() < 0.45:
            block = chooser.choice(list(live))
            assert bytes(arena.view(block)) == bytes([live.pop(block)]) * block.length
            arena.free(block)
        else:
            length = chooser.choice([1, 500, 4096, 5000, 30_000, SLAB, SLAB + 1, 3 * SLAB])
            try:
                block = arena.allocate(length)
            except StoreFull:
                continue
            live[block] = step % 256
            arena.view(block)[:] = bytes([step % 256]) * length
        arena.check()
    for block, value in live.items():
        assert bytes(arena.view(block)) == bytes([value]) * block.length
        arena.free(block)
    arena.check()
    assert arena.used_bytes == 0
    arena.free(arena.allocate(16 * SLAB))  # no fragment is left over


def test_a_full_arena_refuses_and_takes_again_after_a_free() -> None:
    arena = Arena(2 * SLAB, SLAB)
    blocks = [arena.allocate(SLAB // 2) for _ in range(4)]
    for length in (1, SLAB // 2, SLAB, 2 * SLAB):
        with pytest.raises(StoreFull):
            arena.allocate(length)
    arena.free(blocks[1])
    assert arena.allocate(SLAB // 2).offset == blocks[1].offset
    arena.check()


def test_an_emptied_slab_serves_another_size() -> None:
    arena = Arena(SLAB, SLAB)
    small = [arena.allocate(600) for _ in range(10)]
    with pytest.raises(StoreFull):
        arena.allocate(SLAB)
    for block in small:
        arena.free(block)
    arena.free(arena.allocate(SLAB))
    arena.check()


def test_freeing_twice_is_a_bug_that_shows() -> None:
    arena = Arena(SLAB, SLAB)
    block = arena.allocate(100)
    arena.free(block)
    with pytest.raises(ValueError, match="not allocated"):
        arena.free(block)
    again = arena.allocate(100)
    assert again.offset == block.offset
    with pytest.raises(ValueError, match="not allocated"):
        arena.free(block)


def test_little_of_a_slot_is_wasted() -> None:
    assert size_class(120 << 10) == 120 << 10
    assert size_class(1) == 512
    for length in range(4096, 3_000_000, 9_973):
        assert length <= size_class(length) <= length * 9 / 8


def test_more_memory_than_can_be_addressed_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="memory"):
        Arena(1 << 60)


def test_capacity_grows_and_shrinks_without_touching_what_is_held() -> None:
    arena = Arena(2 * SLAB, SLAB)
    blocks = [arena.allocate(SLAB) for _ in range(2)]
    arena.view(blocks[0])[:] = b"a" * SLAB
    with pytest.raises(StoreFull):
        arena.allocate(1)
    arena.resize(3 * SLAB)
    blocks.append(arena.allocate(1))
    arena.resize(SLAB)
    arena.free(blocks.pop())
    arena.free(blocks.pop())
    with pytest.raises(StoreFull):  # the one slab that is left is in use
        arena.allocate(1)
    assert bytes(arena.view(blocks[0])) == b"a" * SLAB
    arena.check()
    for wrong in (0, SLAB - 1, arena.largest_bytes + SLAB):
        with pytest.raises(ConfigError):
            arena.resize(wrong)
