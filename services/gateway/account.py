"""The account of one request: what became of it, in metrics, as a span, and as one line of the log."""

import asyncio
import logging
import time
from dataclasses import replace
from types import TracebackType

from aiohttp import web

from services.gateway.intake import Job
from services.gateway.metrics import Metrics
from shared.errors import RequestRejected
from shared.logs import request_id
from shared.tracing import Tracing, traceparent_of

log = logging.getLogger(__name__)


class Account:
    """Use as a context manager around a request's whole life. `outcome` is set by who knows how the answer ended."""

    def __init__(self, request: web.Request, metrics: Metrics, tracing: Tracing):
        self.started = time.monotonic()
        self.outcome = "error"
        self._path = request.path
        self._metrics = metrics
        self._told: dict[str, str | int] = {}
        self._span = tracing.span(
            f"{request.method} {request.path}",
            parent=traceparent_of(request.headers.get("traceparent", "")),
            attributes={"http.request.method": request.method, "url.path": request.path},
        )

    def __enter__(self) -> "Account":
        self._outer = request_id.set("")
        return self

    def begins(self, job: Job) -> Job:
        """The request is known now. Returns it with the span that the coordinator's are below."""
        request_id.set(job.reply_id)
        self._told = {
            "ghostserve.request": job.reply_id,
            "ghostserve.choices": len(job.sequences),
            "ghostserve.prompt_tokens": sum(len(prompt.ids) for prompt in job.prompts),
        }
        sequences = tuple(replace(each, traceparent=self._span.traceparent) for each in job.sequences)
        return replace(job, sequences=sequences)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, RequestRejected | web.HTTPException):
            self.outcome = "refused"
        elif isinstance(error, ConnectionError | asyncio.CancelledError):
            self.outcome = "aborted"
        seconds = time.monotonic() - self.started
        self._metrics.requests.labels(self._path, self.outcome).inc()
        self._metrics.latency.observe(seconds)
        failed = f"{kind.__name__}: {error}" if kind is not None else "ended unfinished"
        self._span.end(
            {**self._told, "ghostserve.outcome": self.outcome},
            error="" if self.outcome in ("stop", "length") else failed,
        )
        told = {name.rpartition(".")[2]: value for name, value in self._told.items() if name != "ghostserve.request"}
        extra = {"path": self._path, "outcome": self.outcome, "seconds": round(seconds, 3), **told}
        log.info("request ended", extra=extra | ({"why": str(error)} if error is not None else {}))
        request_id.reset(self._outer)
