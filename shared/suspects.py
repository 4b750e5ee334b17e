"""Which requests are to blame for steps that are lost again and again. Pure.

A lost step is tried again with all its requests. One that was in `tries` lost steps in a row, with none that came back
between them, is a suspect: suspects run alone, one after the other, until a step of theirs comes back. One that is
lost once more when it ran alone is to blame.
"""

from collections.abc import Collection


class Suspects:
    """Counts lost steps by request, and knows those in flight."""

    def __init__(self, tries: int):
        self._tries = tries
        self._flying: dict[int, tuple[str, ...]] = {}
        self._lost: dict[str, int] = {}
        """Request -> steps lost in a row, while it was in them."""

    def sent(self, step: int, requests: Collection[str]) -> None:
        """A step is in flight."""
        if requests:
            self._flying[step] = tuple(requests)

    def came_back(self, step: int) -> None:
        """A step's output is there: its requests are innocent."""
        for request in self._flying.pop(step, ()):
            self._lost.pop(request, None)

    def dropped(self) -> None:
        """The steps in flight are lost, and it is known why: no request is blamed."""
        self._flying.clear()

    def lost(self) -> tuple[str, int] | None:
        """The steps in flight are lost, of which the first one failed. Returns who is to blame, and its lost steps."""
        failed = self._flying.get(min(self._flying, default=0), ())
        self._flying.clear()
        for request in failed:
            self._lost[request] = self._lost.get(request, 0) + 1
        if len(failed) == 1 and self._lost[failed[0]] > self._tries:
            return failed[0], self._lost.pop(failed[0])
        return None

    def again(self, request: str, lost: int) -> None:
        """One that was said to be to blame, after so many lost steps, is to run alone once more."""
        self._lost[request] = lost

    def any(self) -> bool:
        """Whether a step was lost that has not been made good yet."""
        return bool(self._lost)

    def next(self, requests: Collection[str], able: Collection[str] | None = None) -> str | None:
        """Which of the requests that there are is to run alone now, if one is. `able`: those that can, if not all."""
        for request in [each for each in self._lost if each not in requests]:
            del self._lost[request]  # it has ended otherwise
        able = requests if able is None else able
        return next((name for name, lost in self._lost.items() if lost >= self._tries and name in able), None)
