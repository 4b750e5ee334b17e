"""What the engine's steps took: the coordinator weighs computing again against restoring by it."""

import time
from collections.abc import Mapping
from dataclasses import replace

from shared.messages import StepTime


class StepTimes:
    """The last step of each size, until it is told. Sizes are powers of two: there are never many."""

    def __init__(self) -> None:
        self._sent: dict[int, tuple[float, StepTime]] = {}
        self._seen: dict[tuple[int, int], StepTime] = {}
        self._last = 0.0

    def sent(self, step: int, counts: Mapping[str, int], ends: Mapping[str, int]) -> None:
        """A step is about to be computed: of each request so many tokens, after which it has `ends` in its context."""
        pairs = sum(count * (2 * ends[request] - count) // 2 for request, count in counts.items())
        self._sent[step] = time.monotonic(), StepTime(sum(counts.values()), pairs, sum(ends.values()), 0.0)

    def came_back(self, step: int) -> None:
        """It is done. It began when it was sent, or where others were in flight when the one before it was done."""
        began, work = self._sent.pop(step)
        now = time.monotonic()
        if work.tokens:
            kind = work.tokens.bit_length(), work.context.bit_length()
            self._seen[kind] = replace(work, seconds=now - max(began, self._last))
        self._last = now

    def lost(self) -> None:
        """All that are in flight."""
        self._sent.clear()

    def take(self) -> tuple[StepTime, ...]:
        """What was seen since the last call."""
        seen, self._seen = self._seen, {}
        return tuple(seen.values())
