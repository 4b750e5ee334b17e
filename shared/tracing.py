"""Traces by OpenTelemetry, sent as OTLP over HTTP. Off unless the standard variables name an endpoint.

OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT turns it on; all other OTEL_* variables (service name,
headers, sampler, limits) are read by the library itself. Spans may be told after the fact, by the monotonic clock.
Only this module knows the library, which is an optional dependency.
"""

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Protocol

from shared.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span as OtelSpan

log = logging.getLogger(__name__)

Attributes = Mapping[str, str | int | float | bool]

_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_CLOSE_DEADLINE_S = 3.0


class Span(Protocol):
    """A part of a trace. `traceparent` names it to other services (W3C Trace Context)."""

    traceparent: str

    def child(self, name: str, start: float, end: float, attributes: Attributes | None = None) -> None:
        """Tell of a part of this span that is over. Times are of the monotonic clock."""

    def end(self, attributes: Attributes | None = None, *, at: float | None = None, error: str = "") -> None:
        """It is over, now or `at`; `error` says why it failed."""


class Tracing(Protocol):
    """Where spans go."""

    on: bool

    def span(
        self, name: str, *, parent: str = "", start: float | None = None, attributes: Attributes | None = None
    ) -> Span:
        """Begin a span, now or at `start`, below the one that the traceparent `parent` names, if it names one."""


def tracing(service: str) -> AbstractContextManager[Tracing]:
    """Tracing for this process, as the environment asks for; on leaving, what is told is sent.

    Raises ConfigError where it is asked for and its packages are missing.
    """
    return _started(service) if _wanted() else _off()


def traceparent_of(header: str) -> str:
    """The header where it is a valid traceparent, or nothing."""
    return header if _TRACEPARENT.fullmatch(header) else ""


def _wanted() -> bool:
    disabled = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    exporter = os.environ.get("OTEL_TRACES_EXPORTER", "otlp")
    return not disabled and exporter == "otlp" and any(os.environ.get(name) for name in _ENDPOINTS)


class NoSpan:
    """Tells nobody; hands on the traceparent that it was given."""

    def __init__(self, traceparent: str = ""):
        self.traceparent = traceparent

    def child(self, name: str, start: float, end: float, attributes: Attributes | None = None) -> None:
        """Nothing."""

    def end(self, attributes: Attributes | None = None, *, at: float | None = None, error: str = "") -> None:
        """Nothing."""


class NoTracing:
    """Tracing that is off."""

    on = False

    def span(
        self, name: str, *, parent: str = "", start: float | None = None, attributes: Attributes | None = None
    ) -> Span:
        """A span that tells nobody."""
        return NoSpan(parent)


@contextmanager
def _off() -> "Iterator[Tracing]":
    yield NoTracing()


@contextmanager
def _started(service: str) -> "Iterator[Tracing]":
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(
            f"OTEL_EXPORTER_OTLP_ENDPOINT asks for traces: pip install 'ghostserve[otel]' ({error})"
        ) from error
    named = Resource({"service.name": f"ghostserve-{service}", "service.version": version("ghostserve")})
    provider = TracerProvider(resource=named.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    try:
        yield _Otel(provider)
    finally:
        closing = threading.Thread(target=provider.shutdown, daemon=True)  # the library's own deadline does not hold
        closing.start()
        closing.join(_CLOSE_DEADLINE_S)
        if closing.is_alive():
            log.warning("the last spans could not be sent within %.0f s", _CLOSE_DEADLINE_S)


class _Otel:
    """Tracing by the OpenTelemetry SDK."""

    on = True

    def __init__(self, provider: "TracerProvider"):
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._tracer = provider.get_tracer("ghostserve")
        self._context = TraceContextTextMapPropagator()
        self._epoch_ns = time.time_ns() - time.monotonic_ns()

    def span(
        self, name: str, *, parent: str = "", start: float | None = None, attributes: Attributes | None = None
    ) -> Span:
        """See Tracing."""
        context = self._context.extract({"traceparent": parent}) if parent else None
        begun = self._tracer.start_span(name, context, attributes=attributes, start_time=self._wall_ns(start))
        carrier: dict[str, str] = {}
        from opentelemetry.trace import set_span_in_context

        self._context.inject(carrier, set_span_in_context(begun))
        return _OtelSpan(self, begun, carrier["traceparent"], self._wall_ns)

    def _wall_ns(self, at: float | None) -> int:
        return self._epoch_ns + (time.monotonic_ns() if at is None else int(at * 1e9))


class _OtelSpan:
    """See Span."""

    def __init__(self, tracing: _Otel, span: "OtelSpan", traceparent: str, wall_ns: Callable[[float | None], int]):
        self.traceparent = traceparent
        self._tracing = tracing
        self._span = span
        self._wall_ns = wall_ns

    def child(self, name: str, start: float, end: float, attributes: Attributes | None = None) -> None:
        """See Span."""
        self._tracing.span(name, parent=self.traceparent, start=start, attributes=attributes).end(at=end)

    def end(self, attributes: Attributes | None = None, *, at: float | None = None, error: str = "") -> None:
        """See Span."""
        from opentelemetry.trace import StatusCode

        for name, value in (attributes or {}).items():
            self._span.set_attribute(name, value)
        if error:
            self._span.set_status(StatusCode.ERROR, error)
        self._span.end(self._wall_ns(at))
