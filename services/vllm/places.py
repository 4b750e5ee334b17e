"""Which GPU of this host a worker process is started on: one process each. Imports no vllm."""

import logging
from collections.abc import Callable, Collection

log = logging.getLogger("vllm.ghostserve")


class Places:
    """GPUs by number. `trouble`: why one can't be used any more, in words; empty if nothing is known against it."""

    def __init__(self, count: int, trouble: Callable[[int], str]):
        self._free = set(range(count))
        self._trouble = trouble

    def take(self, ranks: Collection[int]) -> int | None:
        """A free one, for a process that is to be one of these ranks; None: there is none.

        A rank's own is preferred: the process that was there has died, and its device is free.
        """
        wanted = [each for each in ranks if each in self._free] or sorted(self._free)
        if not wanted:
            return None
        self._free.remove(wanted[0])
        return wanted[0]

    def give_back(self, place: int) -> str:
        """The process there has ended. Returns why the device is not used again, if it has failed itself."""
        if why := self._trouble(place):
            log.error("GPU %d: %s. No worker is started there again", place, why)
        else:
            self._free.add(place)
        return why
