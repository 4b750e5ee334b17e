"""What GhostServe's coordinator is told of vLLM's blocks: which are sealed, given away, pinned or withheld.

All is called under the scheduler's lock. A block is sealed when the step that filled it has come back; it is told by
the hash that vLLM's prefix cache has it under, and the first one of a hash only. A block is dropped when it is handed
out again: vLLM tells which blocks a step got that it had not.
"""

from collections.abc import Callable, Iterable
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock

from shared.messages import Message, PagesDropped, PagesPinned, PagesSealed
from shared.types import MAX_KEY_BYTES, PageKey, pack_ids

_GROUP_BYTES = 4
"""At the end of a block's hash in vLLM: the number of its KV cache group."""
SPARE_BLOCKS = 0.1
"""Withheld blocks are given up when fewer than this share of all blocks are free."""


def key_of(block_hash: bytes) -> PageKey:
    """A page key: what fits of the hash of the tokens, and the KV cache group."""
    return block_hash[: min(len(block_hash), MAX_KEY_BYTES) - _GROUP_BYTES] + block_hash[-_GROUP_BYTES:]


class Blocks:
    """The blocks of one engine. `tell` sends to the coordinator."""

    def __init__(self, block_pool: Any, tell: Callable[[Message], None]):
        self._pool = block_pool
        self._tell = tell
        self._keys: dict[int, PageKey] = {}
        """Sealed blocks, as far as they are told."""
        self._taken: set[PageKey] = set()
        self._pinned: dict[int, int] = {}
        self._withheld: dict[int, tuple[bytes, int]] = {}
        """Block -> the hash that it had, and the tokens that this covers."""

    @property
    def sealed(self) -> dict[int, PageKey]:
        """All sealed blocks, withheld ones not among them."""
        return self._keys

    # -- steps -------------------------------------------------------------------------------------------------------

    def handed_out(self, blocks: Iterable[int], written: Iterable[int]) -> None:
        """A step got these blocks, and is about to write to some: what is not what it was told as any more is dropped.

        A block may be written again though it gets the same hash: a prompt's last token is always computed.
        """
        changed = {block for block in blocks if block in self._keys and not self._is_as_told(block)}
        self._drop(changed | (self._keys.keys() & set(written)))

    def filled(self, blocks: Iterable[KVCacheBlock]) -> None:
        """The step that filled these blocks has come back."""
        told: dict[int, PageKey] = {}
        for block in blocks:
            if block.is_null or block.block_hash is None or block.block_id in self._keys:
                continue
            key = key_of(block.block_hash)
            if key not in self._taken:
                self._taken.add(key)
                told[block.block_id] = self._keys[block.block_id] = key
        if told:
            self._tell(PagesSealed(pack_ids(told), tuple(told.values())))

    def touched(self, blocks: Iterable[int]) -> None:
        """Lost steps may have written to these blocks: nobody finds them again."""
        blocks = set(blocks)
        self._pool.evict_blocks(blocks)
        self._drop([block for block in blocks if block in self._keys])

    def reset(self) -> None:
        """The prefix cache was emptied: what is not under its hash any more is dropped."""
        self._drop([block for block in self._keys if not self._is_as_told(block)])

    def _is_as_told(self, block: int) -> bool:
        block_hash = self._pool.blocks[block].block_hash
        return block_hash is not None and key_of(block_hash) == self._keys[block]

    def _has(self, block: int, key: PageKey) -> bool:
        if block in self._withheld:
            return key_of(self._withheld[block][0]) == key
        return self._keys.get(block) == key and self._is_as_told(block)

    def _drop(self, blocks: Iterable[int]) -> None:
        dropped = list(blocks)
        for block in dropped:
            self._taken.discard(self._keys.pop(block))
        if dropped:
            self._tell(PagesDropped(pack_ids(dropped)))

    # -- what the coordinator asks -----------------------------------------------------------------------------------

    def pin(self, blocks: Iterable[int], keys: Iterable[PageKey]) -> None:
        """Keep those that still have their keys, or are withheld under them: they are to be encoded, or restored."""
        kept = [block for block, key in zip(blocks, keys, strict=True) if self._has(block, key)]
        self._pool.touch([self._pool.blocks[block] for block in kept])
        for block in kept:
            self._pinned[block] = self._pinned.get(block, 0) + 1
        self._tell(PagesPinned(pack_ids(kept)))

    def unpin(self, blocks: Iterable[int]) -> None:
        """They need not be kept any more."""
        for block in blocks:
            self._pool.free_blocks([self._pool.blocks[block]] * self._pinned.pop(block, 0))

    def resume(self, gone: Iterable[int], withheld: Iterable[int]) -> None:
        """A new epoch: pins of the one before end; `gone` blocks are forgotten, `withheld` ones kept from everybody."""
        self.unpin(list(self._pinned))
        self._pool.evict_blocks(set(gone))
        for block in gone:
            self._taken.discard(self._keys.pop(block, b""))
        wanted = set(withheld)
        self._free([block for block in self._withheld if block not in wanted])
        for block in wanted - self._withheld.keys():
            if block in self._keys and self._is_as_told(block):
                here = self._pool.blocks[block]
                self._withheld[block] = here.block_hash, here.block_hash_num_tokens
                self._pool.touch([self._pool.blocks[block]])
                del self._keys[block]  # its key stays taken
        self._pool.evict_blocks(set(self._withheld))

    def whole(self, blocks: Iterable[int]) -> None:
        """Withheld blocks are whole again: they are found by their hash."""
        for block in blocks:
            if block not in self._withheld:
                continue
            block_hash, tokens = self._withheld.pop(block)
            here = self._pool.blocks[block]
            self._pool._insert_block_hash(block_hash, here, num_tokens=tokens)
            self._keys[block] = key_of(block_hash)
            self._pool.free_blocks([here])

    def gone(self, blocks: Iterable[int]) -> None:
        """Withheld blocks won't come back."""
        self._free([block for block in blocks if block in self._withheld])

    def make_room(self) -> None:
        """Give up withheld blocks where requests may need the room, but for those that are being restored."""
        given = self._withheld.keys() - self._pinned
        if given and self._pool.get_num_free_blocks() < SPARE_BLOCKS * self._pool.num_gpu_blocks:
            self._tell(PagesDropped(pack_ids(given)))
            self._free(given)

    def _free(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self._taken.discard(key_of(self._withheld.pop(block)[0]))
            self._pool.free_blocks([self._pool.blocks[block]])

    def forget_all(self) -> None:
        """Nobody knows which blocks are whole: none is."""
        self._pool.evict_blocks(set(self._keys))
        self._taken.clear()
        self._taken.update(key_of(block_hash) for block_hash, _ in self._withheld.values())
        self._keys.clear()

    def tell_all(self) -> None:
        """The coordinator knows nothing: tell it of all sealed blocks."""
        for part in PagesSealed.parts(self._keys):
            self._tell(part)

    # -- views -------------------------------------------------------------------------------------------------------

    def in_use(self) -> tuple[int, int]:
        """Blocks that somebody holds, and those that only the prefix cache has."""
        free = self._pool.get_num_free_blocks()
        cached = sum(self._pool.blocks[block].ref_cnt == 0 for block in self._keys)
        return self._pool.num_gpu_blocks - 1 - free, cached  # the null block is nobody's
