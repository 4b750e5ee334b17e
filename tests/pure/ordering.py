"""Who comes before whom on a device, by vector clocks: finds reads and writes of the same bytes that nothing orders.

A timeline is a thread of the host, or a stream. A thread's calls to a stream come after what the thread has done or
waited for; a stream's work comes one after the other; events, waits and messages carry what came before.
"""

import bisect
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise

Timeline = Hashable
Memory = Hashable
Clock = dict[Timeline, int]
Ranges = Sequence[tuple[int, int]]
"""Bytes [start, end), ascending, that don't touch."""


@dataclass(frozen=True, slots=True)
class Access:
    """Bytes of one piece of memory, read or written by one piece of work."""

    memory: Memory
    ranges: Ranges
    writes: bool


@dataclass(frozen=True, slots=True)
class Work:
    """One thing done on a timeline: its place in it, and all that comes before it."""

    label: str
    timeline: Timeline
    number: int
    before: Clock
    access: Sequence[Access]

    def follows(self, other: "Work") -> bool:
        """Whether `other` is done before this begins."""
        return self.before.get(other.timeline, 0) >= other.number


@dataclass(frozen=True, slots=True)
class Hazard:
    """Two pieces of work on the same bytes, of which one writes, in no order."""

    first: str
    second: str
    memory: Memory

    def __str__(self) -> str:
        return f"{self.first} | {self.second}"


class Ordering:
    """Keeps the clocks, and all work. Not for several threads at a time."""

    def __init__(self) -> None:
        self._clocks: dict[Timeline, Clock] = {}
        self._numbers: dict[Timeline, int] = {}
        self._work: list[Work] = []

    def clock(self, timeline: Timeline) -> Clock:
        """All that is done before what comes next on a timeline: for `join`."""
        return dict(self._clocks.get(timeline, {}))

    def join(self, timeline: Timeline, clock: Clock) -> None:
        """What comes next on the timeline comes after all that."""
        own = self._clocks.setdefault(timeline, {})
        for other, number in clock.items():
            own[other] = max(own.get(other, 0), number)

    def work(self, timeline: Timeline, label: str, access: Sequence[Access]) -> Work:
        """Something is done on a timeline, after all that came before on it."""
        number = self._numbers[timeline] = self._numbers.get(timeline, 0) + 1
        done = Work(label, timeline, number, self.clock(timeline), access)
        self._clocks.setdefault(timeline, {})[timeline] = number
        self._work.append(done)
        return done

    def hazards(self) -> list[Hazard]:
        """Each pair that nothing orders."""
        by_memory: dict[Memory, list[tuple[Work, Access]]] = {}
        found: list[Hazard] = []
        for work in self._work:
            for access in work.access:
                known = by_memory.setdefault(access.memory, [])
                for earlier, seen in known:
                    if (
                        (seen.writes or access.writes)
                        and earlier is not work
                        and not work.follows(earlier)
                        and not earlier.follows(work)
                        and overlap(seen.ranges, access.ranges)
                    ):
                        found.append(Hazard(_told(earlier, seen), _told(work, access), access.memory))
                known.append((work, access))
        return found


def _told(work: Work, access: Access) -> str:
    return f"{work.timeline}: {work.label} {'writes' if access.writes else 'reads'}"


def overlap(first: Ranges, second: Ranges) -> bool:
    """Whether two sets of ranges have a byte in common."""
    starts = [start for start, _ in second]
    for start, end in first:
        at = bisect.bisect_right(starts, start)
        if (at and second[at - 1][1] > start) or (at < len(second) and second[at][0] < end):
            return True
    return False


def joined(ranges: Ranges) -> list[tuple[int, int]]:
    """The same bytes, in ascending ranges that don't touch."""
    whole: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if whole and start <= whole[-1][1]:
            whole[-1] = whole[-1][0], max(whole[-1][1], end)
        else:
            whole.append((start, end))
    assert all(before[1] < after[0] for before, after in pairwise(whole))
    return whole
