"""The KV of all sequences on one rank, in pages: page p is one contiguous range of bytes.

A page holds `page_tokens` consecutive tokens of one sequence, for all layers and the rank's KV heads, so that it can be
moved, encoded and decoded as bytes by code that knows nothing of models.
"""

import contextlib
import mmap
from typing import Any

import numpy as np
import torch
import xxhash

from services.worker.memory import Bytes, Ids, Memory, Room, Rows, on_device

_HUGE_PAGE = 2 << 20


def page_bytes(layers: int, page_tokens: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """What a page takes: keys and values of its tokens in all layers, of one rank's `kv_heads`."""
    return layers * 2 * page_tokens * kv_heads * head_dim * dtype.itemsize


class KVPool:
    """`pages` pages of KV.

    kv: [pages, layers, 2, page_tokens, kv_heads, head_dim], keys at [:, :, 0] and values at [:, :, 1]; kv_heads are
    the rank's own. The memory is 64-byte aligned and touched ahead of time, so that no step pays for page faults.
    """

    def __init__(
        self,
        *,
        pages: int,
        layers: int,
        page_tokens: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        if min(pages, layers, page_tokens, kv_heads, head_dim) < 1:
            raise ValueError("a pool has at least one page, layer, token, head and dimension")
        self.pages = pages
        self.layers = layers
        self.page_tokens = page_tokens
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.dtype = dtype
        self.device = torch.device(device)
        self._block_values = page_tokens * kv_heads * head_dim  # keys, or values, of one layer in one page
        values = pages * layers * 2 * self._block_values
        flat = _zeros(values * dtype.itemsize, self.device).view(dtype)
        self.kv = flat.view(pages, layers, 2, page_tokens, kv_heads, head_dim)
        # blocks: [pages * layers * 2, values of a block], row (page * layers + layer) * 2, and the next one for values
        self.blocks = flat.view(pages * layers * 2, self._block_values)
        # slots: [pages * layers * 2 * page_tokens, kv_heads, head_dim], one row a token
        self.slots = flat.view(-1, kv_heads, head_dim)
        self.page_bytes = page_bytes(layers, page_tokens, kv_heads, head_dim, dtype)
        self._bytes = flat.view(torch.uint8).view(pages, self.page_bytes)
        self._host: Bytes | None = self._bytes.numpy() if self.device.type == "cpu" else None

    def rows(self, pages: Ids, room: Room) -> Rows:
        """Pages as writable bytes, without a copy."""
        if len(pages) and not (pages.min() >= 0 and pages.max() < self.pages):
            raise IndexError(f"pages {pages.min()} to {pages.max()} of {self.pages}")
        return Rows(self.bytes, pages)

    def targets(self, pages: Ids, room: Room) -> Rows:
        """The pages themselves."""
        return self.rows(pages, room)

    def wrote(self, pages: Ids, content: Rows) -> None:
        """Nothing to do: what `rows` returns is the pool itself."""

    def empty(self, count: int) -> Memory:
        """New memory for `count` pages on the pool's device: uint8 [count, page_bytes]."""
        if self._host is None:
            return torch.empty(count, self.page_bytes, dtype=torch.uint8, device=self.device)
        return np.empty((count, self.page_bytes), dtype=np.uint8)

    @property
    def bytes(self) -> Memory:
        """All pages, uint8 [pages, page_bytes]."""
        return self._bytes if self._host is None else self._host

    @property
    def tokens(self) -> "TokenSlots":
        """The same KV token by token."""
        return TokenSlots(self)

    def digest(self, pages: np.ndarray[Any, np.dtype[np.int32]], tokens: int) -> str:
        """xxh3-128 (hex) over the KV of tokens 0 .. tokens - 1 of a sequence, whichever pages hold them.

        pages: int32 page table of at least ceil(tokens / page_tokens) entries. Of the last page, valid tokens count.
        """
        state = xxhash.xxh3_128()
        for index in range(-(-tokens // self.page_tokens)):
            valid = min(self.page_tokens, tokens - index * self.page_tokens)
            content = self.kv[int(pages[index]), :, :, :valid].contiguous().cpu()
            state.update(content.view(-1).view(torch.uint8).numpy().data)
        return state.hexdigest()


class TokenSlots:
    """The KV of single tokens of a pool as pages of bytes: token `slot` is at slot % page_tokens of its page."""

    def __init__(self, pool: KVPool) -> None:
        self._pool = pool
        self._parts = pool.layers * 2
        self.page_bytes = pool.page_bytes // pool.page_tokens

    def rows(self, slots: Ids, room: Room) -> Rows:
        """Tokens' KV in all layers, each put together: copies."""
        cache, index = self._cache(slots)
        if isinstance(cache, torch.Tensor):
            content: Memory = torch.index_select(cache, 0, on_device(index, cache.device))
        else:
            content = np.take(cache, index, axis=0)
        return Rows.all(content.reshape(len(slots), self.page_bytes))

    def targets(self, slots: Ids, room: Room) -> Rows:
        """`room`: a token's KV is in many places."""
        return Rows.all(room(len(slots)))

    def wrote(self, slots: Ids, content: Rows) -> None:
        """Put tokens' KV back to where their layers have it."""
        if not len(slots):
            return
        cache, index = self._cache(slots)
        (flat,) = content.flat() if content.consecutive else Rows.all(content.memory[content.index]).flat()
        parts = flat.reshape(len(index), -1)
        if isinstance(cache, torch.Tensor):
            cache.index_copy_(0, on_device(index, cache.device), torch.as_tensor(parts))
        else:
            cache[index] = parts

    def empty(self, count: int) -> Memory:
        """New memory for `count` tokens on the pool's device: uint8 [count, page_bytes]."""
        return self._pool.empty(-(-count // self._pool.page_tokens)).reshape(-1, self.page_bytes)[:count]

    def _cache(self, slots: Ids) -> tuple[Memory, Ids]:
        """The pool as one row a token and layer's keys or values; which of them make up these tokens, in order."""
        pool = self._pool
        pages, offsets = np.divmod(slots, pool.page_tokens)
        index = (pages[:, None] * self._parts + np.arange(self._parts)) * pool.page_tokens + offsets[:, None]
        return pool.bytes.reshape(pool.pages * self._parts * pool.page_tokens, -1), index.reshape(-1)


def _zeros(size: int, device: torch.device) -> torch.Tensor:
    """uint8 [size], zeroed (which touches every page of memory), aligned, and in huge pages where the kernel has them.

    Gathering reads 2 KiB here and 2 KiB there: with small pages each is a miss of the address cache as well.
    """
    if device.type != "cpu":
        return torch.zeros(size, dtype=torch.uint8, device=device)
    memory = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without transparent huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    offset = -whole.data_ptr() % _HUGE_PAGE
    return whole[offset : offset + size].zero_()
