"""The brake on crash loops: epochs that end without progress are spaced out. Pure."""

import logging

log = logging.getLogger(__name__)

FREE = 3
"""Epochs in a row that may end without progress before the brake is put on: losses may come together."""
FIRST_S = 0.5
LONGEST_S = 10.0
STOOD_S = 5.0
"""An epoch that lasted for so long is no part of a crash loop, though nothing was computed in it."""


class Brake:
    """Doubles the pause before each epoch that follows on others without a step that came back, up to a bound."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._barren = 0
        self._until = 0.0
        self._reason = ""

    def began(self, now: float) -> None:
        """An epoch begins."""
        self._began = now

    def progressed(self) -> None:
        """A step came back in it, or it was found out which request makes steps fail."""
        self._began, self._barren, self._until = None, 0, 0.0

    def ended(self, now: float, reason: str) -> None:
        """The epoch is over. Of no effect on one that made progress."""
        began, self._began = self._began, None
        if began is None:
            return
        self._barren = self._barren + 1 if now - began < STOOD_S else 0
        if self._barren > FREE:
            pause_s = min(LONGEST_S, FIRST_S * 2.0 ** (self._barren - FREE - 1))
            self._until, self._reason = now + pause_s, reason
            log.warning("%s; the next one begins in %.1f s", self._story(), pause_s)

    def holds(self, now: float) -> bool:
        """Whether the next epoch has to wait."""
        return now < self._until

    def why(self, now: float) -> str:
        """Why it has to wait, in words; empty while it has not."""
        return f"{self._story()}; the next one begins in {self._until - now:.1f} s" if self.holds(now) else ""

    def _story(self) -> str:
        return f"{self._barren} epochs have ended without progress, the last one so: {self._reason}"
