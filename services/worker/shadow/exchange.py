"""Pages between ranks: every rank sends its slices of a batch of pages to the ranks that need them, all at once.

Knows pages of bytes and a communicator, nothing of models, so that another engine's KV cache can stand there.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np

from services.worker.communicator.base import Communicator
from services.worker.memory import Ids, Memory, Room, Rows
from shared.errors import CommunicatorAborted
from shared.types import round_pages
from shared.types.keys import ROUND_BYTES


class PageBytes(Protocol):
    """A KV cache as pages of bytes."""

    page_bytes: int

    def rows(self, pages: Ids, room: Room, /) -> Rows:
        """These pages, to be read: where they lie, or brought together in `room`."""
        ...

    def targets(self, pages: Ids, room: Room, /) -> Rows:
        """Where to write all of these pages anew, before `wrote`: the pages, or `room` where they are in parts."""
        ...

    def wrote(self, pages: Ids, content: Rows, /) -> None:
        """`content`, which `rows` or `targets` returned, was changed: it counts from now on."""
        ...

    def empty(self, count: int, /) -> Memory:
        """New memory for `count` pages where the cache is: uint8 [count, page_bytes]."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Came:
    """What `gather` brought here: from each rank, the slices of some of `count` pages. indices: ascending places."""

    count: int
    indices: Sequence[Ids]
    slices: Sequence[Memory]

    def of(self, rank: int, at: Ids) -> Rows:
        """A rank's slices of the pages at these places, all of which it has sent."""
        indices = self.indices[rank]
        return Rows(self.slices[rank], at if len(indices) == self.count else np.searchsorted(indices, at))


class Exchange:
    """The exchange of one epoch. Used by one thread, the shadow; all ranks call `gather` with the same arguments."""

    def __init__(self, communicator: Communicator, pool: PageBytes, round_bytes: int = ROUND_BYTES):
        self.communicator = communicator
        self.pool = pool
        self.rank = communicator.rank
        self.size = communicator.size
        self.round_pages = round_pages(pool.page_bytes, round_bytes)
        """Pages a call may name."""
        self._staging: dict[str, Memory] = {}
        self._writing = threading.Lock()
        self._ended = False

    def gather(self, pages: Ids, to: "np.ndarray[Any, np.dtype[np.bool_]]") -> Came:
        """Bring slices of pages to the ranks that `to` [pages, ranks] says; what those have of a page is not sent.

        Returns the slices of the pages that this rank receives, which are valid until the next call. At most
        `round_pages` pages.
        """
        mine = to[:, self.rank]
        send: list[list[Memory]] = [[] for _ in range(self.size)]
        for target in np.flatnonzero((to & ~mine[:, None]).any(axis=0)).tolist():
            at = np.flatnonzero(to[:, target] & ~mine)
            send[target] = self.pool.rows(pages[at], partial(self._stage, f"to {target}")).flat()
        missing = mine[:, None] & ~to
        counts, everything = missing.sum(axis=0).tolist(), np.flatnonzero(mine)
        wanted = [
            everything if count == len(everything) else np.flatnonzero(missing[:, source])
            for source, count in enumerate(counts)
        ]
        inbox, end, slices = self._stage("inbox", sum(counts)), 0, list[Memory]()
        for count in counts:
            slices.append(inbox[end : end + count])
            end += count
        self.communicator.all_to_all(
            send, [[each.reshape(-1)] if count else [] for each, count in zip(slices, counts, strict=True)]
        )
        return Came(len(pages), wanted, slices)

    def own(self, pages: Ids) -> Rows:
        """This rank's slices of pages, to be read until the next call."""
        return self.pool.rows(pages, partial(self._stage, "own"))

    def targets(self, pages: Ids) -> Rows:
        """Where to write these pages anew, before the pool is told that they are; until the next call."""
        return self.pool.targets(pages, partial(self._stage, "own"))

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

    def _stage(self, use: str, count: int) -> Memory:
        """Reused memory for `count` pages: uint8 [count, page_bytes]."""
        held = self._staging.get(use)
        if held is None or len(held) < count:
            held = self._staging[use] = self.pool.empty(count)
        return held[:count]
