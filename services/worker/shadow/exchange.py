"""Pages between ranks: every rank sends its slices of a batch of pages to the ranks that need them, all at once.

Knows pages of bytes and a communicator, nothing of models, so that another engine's KV cache can stand there.
"""

import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from services.worker.communicator.base import Communicator
from services.worker.memory import Memory
from shared.errors import CommunicatorAborted
from shared.types import round_pages
from shared.types.keys import ROUND_BYTES


class PageBytes(Protocol):
    """A KV cache as pages of bytes."""

    page_bytes: int

    def page(self, page_id: int, /) -> Memory:
        """One page: writable, uint8 [page_bytes]; `wrote` says that it was changed."""
        ...

    def target(self, page_id: int, scratch: Memory, /) -> Memory:
        """Where to write all of a page anew, before `wrote`: the page itself, or `scratch` where it is in parts."""
        ...

    def wrote(self, page_id: int, content: Memory, /) -> None:
        """`content`, which `page` or `target` returned, was changed: it counts from now on."""
        ...

    def empty(self, count: int, /) -> Memory:
        """New memory for `count` pages where the cache is: uint8 [count, page_bytes]."""
        ...


class Exchange:
    """The exchange of one epoch. Used by one thread, the shadow; all ranks call `gather` with the same arguments."""

    def __init__(self, communicator: Communicator, pool: PageBytes, round_bytes: int = ROUND_BYTES):
        self.communicator = communicator
        self.pool = pool
        self.rank = communicator.rank
        self.size = communicator.size
        self.round_pages = round_pages(pool.page_bytes, round_bytes)
        """Pages a call may name."""
        self._staging: dict[int, Memory] = {}
        self._writing = threading.Lock()
        self._ended = False

    def gather(self, pages: Sequence[int], receivers: Sequence[Collection[int]]) -> dict[int, dict[int, Memory]]:
        """Bring slices of pages to the ranks in `receivers`, one collection a page; what receivers have is not sent.

        Returns, for each index whose page this rank receives, the slices by rank: of those that are no receivers. They
        are valid until the next call. At most `round_pages` pages.
        """
        send: list[list[Memory]] = [[] for _ in range(self.size)]
        wanted: list[list[int]] = [[] for _ in range(self.size)]
        for index, (page, to) in enumerate(zip(pages, receivers, strict=True)):
            if self.rank in to:
                for source in range(self.size):
                    if source not in to:
                        wanted[source].append(index)
            else:
                for target in to:
                    send[target].append(self.pool.page(page))
        inbox = [self._stage(source, len(indices)) for source, indices in enumerate(wanted)]
        self.communicator.all_to_all(send, [[each.reshape(-1)] if len(each) else [] for each in inbox])
        slices: dict[int, dict[int, Memory]] = {index: {} for index, to in enumerate(receivers) if self.rank in to}
        for source, indices in enumerate(wanted):
            for row, index in enumerate(indices):
                slices[index][source] = inbox[source][row]
        return slices

    def targets(self, pages: Sequence[int]) -> list[Memory]:
        """Where to write these pages anew, before the pool is told that they are; until the next call."""
        scratch = self._stage(self.rank, len(pages))
        return [self.pool.target(page, row) for page, row in zip(pages, scratch, strict=True)]

    def end(self) -> None:
        """The epoch is over, called from any thread: a wait for peers ends at once, and no page is written any more."""
        self.communicator.abort()
        with self._writing:
            self._ended = True

    @property
    def ended(self) -> bool:
        """Whether the epoch is over."""
        return self._ended

    @contextmanager
    def writing(self) -> Iterator[None]:
        """While a page is written. Raises CommunicatorAborted once the epoch is over: it may be another's page then."""
        with self._writing:
            if self._ended:
                raise CommunicatorAborted("the epoch is over")
            yield

    def _stage(self, source: int, count: int) -> Memory:
        """Reused memory for `count` pages from one rank: uint8 [count, page_bytes]."""
        held = self._staging.get(source)
        if held is None or len(held) < count:
            held = self._staging[source] = self.pool.empty(count)
        return held[:count]
