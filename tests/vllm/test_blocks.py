"""Which of vLLM's blocks are kept for the coordinator, and which are given up where room is short."""

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

from shared.messages import Message, PagesDropped, PagesPinned
from shared.types import unpack_ids

pytestmark = pytest.mark.filterwarnings("ignore")
COUNT = 20


class Pool:
    """vLLM's block pool with four idle blocks under their hashes, which were lost and are withheld."""

    def __init__(self) -> None:
        from vllm.v1.core.block_pool import BlockPool  # here, where its warnings are none of ours

        from services.vllm.blocks import Blocks

        self.pool = BlockPool(COUNT, enable_caching=True, hash_block_size=4)
        self.told: list[Message] = []
        self.blocks = Blocks(self.pool, self.told.append)
        filled = self.pool.get_new_blocks(4)
        for block in filled:
            self.pool._insert_block_hash(bytes([block.block_id]) * 32 + bytes(4), block, num_tokens=4)  # type: ignore[arg-type]
        self.blocks.filled(filled)
        self.keys = dict(self.blocks.sealed)
        self.pool.free_blocks(filled)
        self.blocks.resume([], list(self.keys))

    def said(self, kind: type[PagesDropped] | type[PagesPinned]) -> list[list[int]]:
        return [sorted(unpack_ids(message.pages)) for message in self.told if isinstance(message, kind)]

    def others(self) -> None:
        """Requests take so many blocks that withheld ones are given up."""
        self.pool.get_new_blocks(self.pool.get_num_free_blocks() - 1)
        self.blocks.make_room()


def test_a_withheld_block_is_kept_while_it_is_restored_and_found_again() -> None:
    pool = Pool()
    first, second, *rest = pool.keys
    pool.blocks.pin([first, second], [pool.keys[first], b"another key than it has"])
    assert pool.said(PagesPinned) == [[first]]
    pool.others()
    assert pool.said(PagesDropped) == [sorted([second, *rest])]
    taken = {block.block_id for block in pool.pool.get_new_blocks(pool.pool.get_num_free_blocks())}
    assert first not in taken
    pool.blocks.whole([first])
    pool.blocks.unpin([first])
    assert pool.blocks.sealed == {first: pool.keys[first]}
    block = pool.pool.blocks[first]
    assert block.ref_cnt == 0
    assert block.block_hash == bytes([first]) * 32 + bytes(4)


def test_a_withheld_block_that_does_not_come_back_is_free_when_its_pin_ends() -> None:
    pool = Pool()
    first = next(iter(pool.keys))
    pool.blocks.pin([first], [pool.keys[first]])
    pool.blocks.gone([first])
    assert pool.pool.blocks[first].ref_cnt == 1
    pool.blocks.unpin([first])
    assert pool.pool.blocks[first].ref_cnt == 0
    assert not pool.blocks.sealed
