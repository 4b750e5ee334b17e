"""Which GPU of this host a worker process is started on: one process each. Imports no vllm."""

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

log = logging.getLogger("vllm.ghostserve")


class Taken(NamedTuple):
    """A GPU, and the rank whose weights are loaded there."""

    place: int
    rank: int


class Places:
    """GPUs by number. `trouble`: why one can't be used any more, in words; empty if nothing is known against it."""

    def __init__(self, count: int, trouble: Callable[[int], str]):
        self._free = set(range(count))
        self._ranks: dict[int, int] = {}  # by place: for which rank the process there was started
        self._trouble = trouble

    def take(self, ranks: Sequence[int]) -> Taken | None:
        """A free one for one of these ranks, another one for each process; None: none is free.

        A rank's own is preferred: the process that was there has died, and its device is free.
        """
        if not self._free:
            return None
        rank = next((each for each in ranks if each not in self._ranks.values()), ranks[0])
        place = rank if rank in self._free else min(self._free)
        self._free.remove(place)
        self._ranks[place] = rank
        return Taken(place, rank)

    def give_back(self, place: int) -> str:
        """The process there has ended. Returns why the device is not used again, if it has failed itself."""
        self._ranks.pop(place, None)
        if why := self._trouble(place):
            log.error("GPU %d: %s. No worker is started there again", place, why)
        else:
            self._free.add(place)
        return why
