"""When CUDA graphs are captured again after a recovery: while no request runs. Imports no vllm."""

import logging
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

log = logging.getLogger("vllm.ghostserve")

IDLE_S = 1.0
"""The engine has been without a request for so long."""


class Graphs:
    """Of an engine's ranks. Until they are captured steps run eager, with the same tokens, more slowly."""

    def __init__(self, capture: Callable[[], Future[Any]], idle: Callable[[], bool]):
        """`capture` asks all ranks, whose answers are a list: true, false (they stay eager), or None (not now)."""
        self._capture = capture
        self._idle = idle
        self._eager = False
        self._asked: Future[Any] | None = None
        self._idle_since: float | None = None

    def lost(self, had: bool) -> None:
        """The ranks are others now. `had`: they had graphs, or were to get them."""
        self._eager, self._asked, self._idle_since = had, None, None

    def look(self, now: float) -> None:
        """Ask for them, or hear of what was asked."""
        if not self._eager:
            return
        if self._asked is not None:
            if self._asked.done():
                self._heard(self._asked)
                self._asked, self._idle_since = None, None
        elif not self._idle():
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = now
        elif now - self._idle_since >= IDLE_S:
            log.info("no request runs: CUDA graphs are captured again")
            self._asked = self._capture()

    def _heard(self, asked: Future[Any]) -> None:
        if (error := asked.exception()) is not None:  # a lost rank is told by `lost`
            log.error("CUDA graphs could not be captured again: %s", error)
            self._eager = False
        elif None not in asked.result():
            self._eager = False
