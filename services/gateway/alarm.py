"""A deadline on each of very many short waits, that costs no timer for each."""

import asyncio
from collections.abc import Callable


class Alarm:
    """Calls `ring` when a wait that has begun is not ended for `after_s`. One wait at a time.

    The timer outlives a wait, and looks when it fires whether another one is to be waited for: so most waits cost a
    look at the clock.
    """

    def __init__(self, after_s: float, ring: Callable[[], None]):
        self._after_s = after_s
        self._ring = ring
        self._loop = asyncio.get_running_loop()
        self._since: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """A wait begins."""
        self._since = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_later(self._after_s, self._look)

    def end(self) -> None:
        """It is over."""
        self._since = None

    def close(self) -> None:
        """No wait begins any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        self._timer = None
        if self._since is None:
            return
        left = self._since + self._after_s - self._loop.time()
        if left > 0:
            self._timer = self._loop.call_later(left, self._look)
        else:
            self._since = None
            self._ring()
