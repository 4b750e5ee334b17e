"""The traces of requests: when each was where, told as spans once it is over. With tracing off, nothing.

A request's spans are below the one that its gateway named: queue, prefill, decode, and protect, which ends when all
of its sealed pages have their parity.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from services.coordinator.outbox import Outbox
from services.coordinator.protection.ledger import EXPOSED, Ledger
from services.coordinator.scheduling.scheduler import NewTokens, Sequence
from shared.tracing import Tracing
from shared.types import PageKey

MAX_PROTECTING = 1024
"""Ended requests whose protection is awaited; beyond, the oldest is given up."""


@dataclass(slots=True)
class _Request:
    """When a request came where; 0: not yet."""

    parent: str
    name: str
    submitted: float
    planned: float = 0.0
    first_token: float = 0.0
    keys: tuple[PageKey, ...] = ()


class Traces:
    """Follows sequences by number. Made anew with the scheduler, whose numbers they are."""

    def __init__(self, tracing: Tracing, ledger: Ledger, outbox: Outbox):
        self._tracing = tracing
        self._ledger = ledger
        self._outbox = outbox
        self._requests: dict[int, _Request] = {}
        self._protecting: OrderedDict[int, _Request] = OrderedDict()

    def submitted(self, sequence: Sequence) -> None:
        """A request is queued."""
        if self._tracing.on:
            request = sequence.request
            self._requests[sequence.number] = _Request(request.traceparent, request.request_id, self._outbox.now)

    def planned(self, running: Iterable[Sequence]) -> None:
        """A step is sent; those that run now have left the queue."""
        if self._tracing.on:
            for sequence in running:
                request = self._requests.get(sequence.number)
                if request is not None and not request.planned:
                    request.planned = self._outbox.now

    def delivered(self, output: NewTokens) -> None:
        """A step gave a sequence its next token."""
        if self._tracing.on and (request := self._requests.get(output.sequence.number)) is not None:
            request.first_token = request.first_token or self._outbox.now

    def ended(self, sequence: Sequence) -> None:
        """A request is over, finished or not."""
        if not self._tracing.on or (request := self._requests.pop(sequence.number, None)) is None:
            return
        now = self._outbox.now
        marks = [request.submitted, request.planned or now, request.first_token or now, now]
        tokens: dict[str, str | int] = {
            "ghostserve.prompt_tokens": sequence.prompt_tokens,
            "ghostserve.request": request.name,
        }
        for name, start, end in zip(("queue", "prefill", "decode"), marks, marks[1:], strict=False):
            self._tell(request, name, start, end, tokens)
        request.keys = tuple(sequence.keys)
        if request.keys:
            self._protecting[sequence.number] = request
        while len(self._protecting) > MAX_PROTECTING:
            self._protecting.popitem(last=False)
        self.protected()

    def protected(self) -> None:
        """Parity was acknowledged: ended requests of which no page is without any more are told."""
        for number, request in list(self._protecting.items()):
            if not any(self._exposed(key) for key in request.keys):
                del self._protecting[number]
                pages: dict[str, str | int] = {"ghostserve.pages": len(request.keys)}
                self._tell(request, "protect", request.planned, self._outbox.now, pages)

    def _exposed(self, key: PageKey) -> bool:
        page = self._ledger.find(key)
        return page is not None and page.parity in EXPOSED

    def _tell(self, request: _Request, name: str, start: float, end: float, attributes: dict[str, str | int]) -> None:
        self._tracing.span(name, parent=request.parent, start=start, attributes=attributes).end(at=end)
