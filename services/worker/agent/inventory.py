"""What a rank can tell a new coordinator: which sealed pages' KV is whole in its pool."""

import threading
from collections.abc import Iterable

from shared.errors import CommunicatorAborted
from shared.messages import Claim
from shared.types import OPEN_KEY, PageKey, pack_ids

MAX_PAGES = 1 << 18
"""In one claim: far below the largest frame."""


class Inventory:
    """The rank, its epoch, and page -> key. Exact: a page is struck out before it is written, noted when it is whole.

    Pages stay known for as long as their bytes do, also where the coordinator has given them up. For any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._epoch = 0
        self._rank: int | None = None
        self._open = False
        self._keys: dict[int, PageKey] = {}
        self._next_rank: int | None = None
        self._next_keys: dict[int, PageKey] = {}

    def begin(self, epoch: int, rank: int) -> None:
        """An epoch begins. The pages of another rank are of no use in it, but those that were copied for this one."""
        with self._lock:
            if rank != self._rank:
                self._keys = self._next_keys if rank == self._next_rank else {}
            self._next_rank, self._next_keys = None, {}
            self._epoch, self._rank, self._open = epoch, rank, True

    def prepare(self, rank: int) -> None:
        """This spare may take a rank, whose pages will be copied to it."""
        with self._lock:
            self._next_rank, self._next_keys = rank, {}

    def copied(self, pages: Iterable[int], keys: Iterable[PageKey]) -> None:
        """Pages of the rank that is to be taken are copied, sealed ones and others."""
        with self._lock:
            for page, key in zip(pages, keys, strict=True):
                self._next_keys.pop(page, None)
                if key != OPEN_KEY:
                    self._next_keys[page] = key

    def strike(self, epoch: int, pages: Iterable[int]) -> None:
        """These pages are about to be written. Raises CommunicatorAborted if the epoch is over: then write nothing."""
        with self._lock:
            if epoch != self._epoch or not self._open:
                raise CommunicatorAborted(f"epoch {epoch} is over")
            for page in pages:
                self._keys.pop(page, None)

    def note(self, epoch: int, sealed: Iterable[tuple[int, PageKey]]) -> None:
        """These pages are whole. Of no effect if the epoch is over."""
        with self._lock:
            if epoch == self._epoch and self._open:
                self._keys.update(sealed)

    def claim(self) -> Claim | None:
        """What the rank has kept, if it is one; nothing is written from now on, until the next epoch begins."""
        with self._lock:
            self._open = False
            if self._rank is None:
                return None
            kept = list(self._keys.items())[-MAX_PAGES:]
            return Claim(self._epoch, self._rank, pack_ids(page for page, _ in kept), tuple(key for _, key in kept))

    def forget(self) -> None:
        """The coordinator has given this worker up: it is a spare."""
        with self._lock:
            self._rank, self._open, self._next_rank = None, False, None
            self._keys, self._next_keys = {}, {}
