"""The traces of requests: when each was where, told as spans once it is over. With tracing off, nothing.

A request's spans are below the one that its gateway named: queue, prefill, decode, and protect, which ends when all
of its sealed pages have their parity.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from services.coordinator.outbox import Outbox
from services.coordinator.protection.ledger import EXPOSED, Ledger
from services.coordinator.scheduling.scheduler import NewTokens, Request
from shared.tracing import Tracing
from shared.types import PageKey

MAX_PROTECTING = 1024
"""Ended requests whose protection is awaited; beyond, the oldest is given up."""


@dataclass(slots=True)
class _Trace:
    """When a request came where; 0: not yet."""

    parent: str
    name: str
    submitted: float
    planned: float = 0.0
    first_token: float = 0.0
    keys: tuple[PageKey, ...] = ()


class Traces:
    """Follows requests by number. Made anew with the scheduler, whose numbers they are."""

    def __init__(self, tracing: Tracing, ledger: Ledger, outbox: Outbox):
        self._tracing = tracing
        self._ledger = ledger
        self._outbox = outbox
        self._requests: dict[int, _Trace] = {}
        self._protecting: OrderedDict[int, _Trace] = OrderedDict()

    @property
    def on(self) -> bool:
        """Whether anybody is told."""
        return self._tracing.on

    def submitted(self, request: Request) -> None:
        """A request is queued."""
        if self._tracing.on:
            params = request.params
            self._requests[request.number] = _Trace(params.traceparent, params.request_id, self._outbox.now)

    def planned(self, step: Iterable[Request]) -> None:
        """A step is sent; those in it have left the queue."""
        for request in step:
            trace = self._requests.get(request.number)
            if trace is not None and not trace.planned:
                trace.planned = self._outbox.now

    def delivered(self, output: NewTokens) -> None:
        """A step gave a request its next token."""
        if self._tracing.on and (trace := self._requests.get(output.request.number)) is not None:
            trace.first_token = trace.first_token or self._outbox.now

    def ended(self, request: Request) -> None:
        """A request is over, finished or not."""
        if not self._tracing.on or (trace := self._requests.pop(request.number, None)) is None:
            return
        now = self._outbox.now
        marks = [trace.submitted, trace.planned or now, trace.first_token or now, now]
        tokens: dict[str, str | int] = {
            "ghostserve.prompt_tokens": request.prompt_tokens,
            "ghostserve.request": trace.name,
        }
        for name, start, end in zip(("queue", "prefill", "decode"), marks, marks[1:], strict=False):
            self._tell(trace, name, start, end, tokens)
        trace.keys = tuple(request.keys)
        if trace.keys:
            self._protecting[request.number] = trace
        while len(self._protecting) > MAX_PROTECTING:
            self._protecting.popitem(last=False)
        self.protected()

    def protected(self) -> None:
        """Parity was acknowledged: ended requests of which no page is without any more are told."""
        for number, trace in list(self._protecting.items()):
            if not any(self._exposed(key) for key in trace.keys):
                del self._protecting[number]
                pages: dict[str, str | int] = {"ghostserve.pages": len(trace.keys)}
                self._tell(trace, "protect", trace.planned, self._outbox.now, pages)

    def _exposed(self, key: PageKey) -> bool:
        page = self._ledger.find(key)
        return page is not None and self._ledger.parity(page) in EXPOSED

    def _tell(self, trace: _Trace, name: str, start: float, end: float, attributes: dict[str, str | int]) -> None:
        self._tracing.span(name, parent=trace.parent, start=start, attributes=attributes).end(at=end)
