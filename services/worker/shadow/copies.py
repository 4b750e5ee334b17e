"""Pages from worker to worker, for a rank that moves: its worker serves them, the spare reads them into its own pool.

On the bulk transport a page has its number for a key; its "shard" 0 are its bytes, 1 their checksum, since they are
those of no stripe. The coordinator sees to it that what is read is not written meanwhile.
"""

from collections.abc import Callable, Sequence

import numpy as np

from kernels.codec import checksum
from services.worker.device import Fence
from services.worker.memory import Bytes, to_host, write
from services.worker.shadow.exchange import PageBytes
from services.worker.shadow.stores import StoreClients
from shared.errors import GhostError, ShardMissing
from shared.messages import CopyPages, PagesCopied
from shared.transport.base import GetShards, Outcome, PutShards, ShardRef
from shared.types import PAGE_KEY_BYTES, unpack_ids

_CONTENT, _CHECKSUM = 0, 1
_CHECKSUM_BYTES = 8


def _refs(page: int, page_bytes: int) -> list[ShardRef]:
    name = page.to_bytes(PAGE_KEY_BYTES, "big")
    return [ShardRef(name, _CONTENT, page_bytes), ShardRef(name, _CHECKSUM, _CHECKSUM_BYTES)]


class PageServer:
    """Gives this worker's pages to who knows the token (a BulkHandler)."""

    def __init__(self, pool: Callable[[], PageBytes], pages: int, restored: Fence):
        """`pool`: that of the rank that this worker is by now. `restored`: behind it is what the shadow has written."""
        self._pool = pool
        self._restored = restored
        self._pages = pages

    def put(self, request: PutShards) -> "_Refusal":
        """Nobody writes here."""
        return _Refusal(len(request.shards))

    def get(self, request: GetShards) -> "_Views":
        """Pages as they are now. ShardMissing is in the places of what is no page of this pool."""
        self._restored.wait()
        pool, read = self._pool(), dict[int, Bytes]()
        return _Views([self._place(ref, pool, read) for ref in request.shards])

    def _place(self, ref: ShardRef, pool: PageBytes, read: dict[int, Bytes]) -> memoryview | GhostError:
        """`read`: what was read of pages before. A page in parts is brought together once, and is what it was then."""
        page = int.from_bytes(ref.page_key, "big")
        if page < self._pages and ref in (wanted := _refs(page, pool.page_bytes)):
            if page not in read:
                (content,) = pool.rows(np.array([page]), pool.empty)
                read[page] = to_host(content)
            if ref == wanted[_CONTENT]:
                return read[page].data
            return memoryview(checksum(read[page]).to_bytes(_CHECKSUM_BYTES, "big"))
        return ShardMissing(f"page {page} of {ref.length} bytes: this pool has no such")


class _Views:
    """A read in progress (an Outgoing)."""

    def __init__(self, places: Sequence[memoryview | GhostError]):
        self.places = places

    def release(self) -> None:
        """The coordinator knows what is being read: nothing is pinned here."""


class _Refusal:
    """A write that is refused (an Incoming)."""

    def __init__(self, count: int):
        self.places: Sequence[memoryview | GhostError] = [ShardMissing("pages are not written here")] * count

    async def commit(self) -> Sequence[Outcome]:
        return [place if isinstance(place, GhostError) else None for place in self.places]

    def abandon(self) -> None:
        """Nothing was begun."""


async def copy_pages(message: CopyPages, pool: PageBytes, sources: StoreClients, group: str) -> PagesCopied:
    """Read pages of another worker into the own pool, all or none. When it is cancelled, nothing is written."""
    pages = unpack_ids(message.pages)
    content = np.empty((len(pages), pool.page_bytes), dtype=np.uint8)
    sums = np.empty((len(pages), _CHECKSUM_BYTES), dtype=np.uint8)
    refs = tuple(ref for page in pages for ref in _refs(page, pool.page_bytes))
    into = [buffer.data for row in range(len(pages)) for buffer in (content[row], sums[row])]
    outcomes = await sources.get(message.address, GetShards(group, refs), into)
    reason = next((f"{type(each).__name__}: {each}" for each in outcomes if each is not None), "")
    if not reason:
        reason = _write(pages, content, sums, pool)
    return PagesCopied(message.move, message.pages, reason)


def _write(pages: Sequence[int], content: Bytes, sums: Bytes, pool: PageBytes) -> str:
    for page, row, recorded in zip(pages, content, sums, strict=True):
        if checksum(row) != int.from_bytes(recorded.tobytes(), "big"):
            return f"page {page} arrived damaged"
    index = np.array(pages)
    targets = pool.targets(index, lambda _: content)
    if targets.memory is not content:
        for place, row in zip(targets, content, strict=True):
            write(place, row)
    pool.wrote(index, targets)
    return ""
