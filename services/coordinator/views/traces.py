"""The traces of requests and recoveries: when each was where, told as spans once it is over. With tracing off, nothing.

A request's spans are below the one that its gateway named: queue, prefill, decode, and protect, which ends when all
of its sealed pages have their parity. A recovery is a trace of its own.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from services.coordinator.outbox import Outside
from services.coordinator.protection.ledger import EXPOSED, PagePool
from services.coordinator.scheduling.scheduler import Output, Sequence
from shared.tracing import Tracing
from shared.types import PageKey, RecoveryRecord

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

    def __init__(self, tracing: Tracing, pool: PagePool, outside: Outside):
        self._tracing = tracing
        self._pool = pool
        self._outside = outside
        self._requests: dict[int, _Request] = {}
        self._protecting: OrderedDict[int, _Request] = OrderedDict()

    def submitted(self, sequence: Sequence) -> None:
        """A request is queued."""
        if self._tracing.on:
            request = sequence.request
            self._requests[sequence.number] = _Request(request.traceparent, request.request_id, self._outside.now)

    def planned(self, running: Iterable[Sequence]) -> None:
        """A step is sent; those that run now have left the queue."""
        if self._tracing.on:
            for sequence in running:
                request = self._requests.get(sequence.number)
                if request is not None and not request.planned:
                    request.planned = self._outside.now

    def delivered(self, output: Output) -> None:
        """A step gave a sequence its next token."""
        if self._tracing.on and (request := self._requests.get(output.sequence.number)) is not None:
            request.first_token = request.first_token or self._outside.now

    def ended(self, sequence: Sequence) -> None:
        """A request is over, finished or not."""
        if not self._tracing.on or (request := self._requests.pop(sequence.number, None)) is None:
            return
        now = self._outside.now
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
            if not any(self._pool.shadow_of(key) in EXPOSED for key in request.keys):
                del self._protecting[number]
                pages: dict[str, str | int] = {"ghostserve.pages": len(request.keys)}
                self._tell(request, "protect", request.planned, self._outside.now, pages)

    def _tell(self, request: _Request, name: str, start: float, end: float, attributes: dict[str, str | int]) -> None:
        self._tracing.span(name, parent=request.parent, start=start, attributes=attributes).end(at=end)


def tell_recovery(tracing: Tracing, record: RecoveryRecord) -> None:
    """One recovery, or planned move, as a trace: its phases in order, then resume, with the step that ends it."""
    if not tracing.on or record.ended is None:
        return
    at = record.started - record.detect_s
    told: dict[str, str | int] = {
        "ghostserve.epoch": record.epoch,
        "ghostserve.lost_ranks": ",".join(map(str, record.lost_ranks)),
        "ghostserve.reason": record.reason,
        "ghostserve.restored_pages": record.restored_pages,
        "ghostserve.recomputed_tokens": record.recomputed_tokens,
    }
    span = tracing.span("move" if record.planned else "recovery", start=at, attributes=told)
    for phase, seconds in record.phases():
        span.child(phase, at, at + seconds)
        at += seconds
    span.child("resume", at, max(at, record.ended), {"ghostserve.streams": record.sequences})
    span.end(at=max(at, record.ended))
