"""What is to blame for steps that fail though no process is lost: a request, or a worker that fails alone. Pure."""

from collections.abc import Collection
from dataclasses import dataclass, field

from shared.suspects import Suspects

_STEP = 0
"""Of several in flight, Suspects would have to know which; here there is one at a time."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A request that is to end, after so many failed steps; or a worker that is to be replaced; or neither yet."""

    request: str = ""
    times: int = 0
    worker: str = ""


@dataclass(slots=True)
class _Doubts:
    """What a request that is in failing steps has to say for itself."""

    others_ran: int
    """Steps that had come back when its own first failed."""
    raised_by: set[str] = field(default_factory=set)
    replaced: bool = False
    """The only worker that ever raised has been replaced for it."""


class FailedSteps:
    """A failed step is tried again, then its requests run apart (see Suspects), and the one that fails alone ends.

    But where one worker of several raised each time, and no other step has come back since, that worker may be what
    is broken: it is replaced once, before the request is blamed.
    """

    def __init__(self, tries: int):
        self._suspects = Suspects(tries)
        self._doubts: dict[str, _Doubts] = {}
        self._ran = 0

    def came_back(self, requests: Collection[str]) -> None:
        """A step is done. While any request is in doubt, its `requests` are to be told: they are innocent."""
        self._ran += 1
        self._suspects.sent(_STEP, requests)
        self._suspects.came_back(_STEP)
        for request in requests:
            self._doubts.pop(request, None)

    def failed(self, requests: Collection[str], workers: Collection[str], *, ranks: int) -> Verdict:
        """A step of these requests raised errors on these workers, of so many ranks."""
        for request in requests:
            doubts = self._doubts.setdefault(request, _Doubts(self._ran))
            doubts.raised_by.update(workers)
        self._suspects.sent(_STEP, requests)
        blamed = self._suspects.lost()
        if blamed is None:
            return Verdict()
        request, times = blamed
        doubts = self._doubts[request]
        lone = len(doubts.raised_by) == 1 < ranks and self._ran == doubts.others_ran
        if lone and not doubts.replaced:
            doubts.replaced = True
            self._suspects.again(request, times)
            return Verdict(worker=next(iter(doubts.raised_by)))
        del self._doubts[request]
        return Verdict(request, times)

    def doubted(self) -> bool:
        """Whether any request is in doubt."""
        return self._suspects.any()

    def next(self, requests: Collection[str], able: Collection[str]) -> str | None:
        """Which request is to run alone now, if one is; of those that there are, these are able to."""
        for request in [each for each in self._doubts if each not in requests]:
            del self._doubts[request]
        return self._suspects.next(requests, able)
