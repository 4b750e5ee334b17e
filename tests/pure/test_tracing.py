"""Traces reach a real OTLP receiver, below the caller's span; without an endpoint nothing is told."""

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from services.coordinator.traces import tell_recovery
from shared.tracing import NoTracing, traceparent_of, tracing
from shared.types import RecoveryRecord

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Receiver:
    """An OTLP/HTTP endpoint. `spans` by service, in the order in which they came."""

    def __init__(self) -> None:
        self.spans: dict[str, list[Span]] = {}
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    import gzip

                    body = gzip.decompress(body)
                receiver.take(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def take(self, request: ExportTraceServiceRequest) -> None:
        for resource in request.resource_spans:
            names = {each.key: each.value.string_value for each in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.spans.setdefault(names["service.name"], []).extend(scope.spans)


@contextmanager
def receiving() -> Iterator[Receiver]:
    receiver = Receiver()
    thread = Thread(target=receiver.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield receiver
    finally:
        receiver.server.shutdown()
        thread.join()
        receiver.server.server_close()


def test_a_span_is_below_the_callers_and_its_children_below_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with receiving() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
        with tracing("gateway") as traces:
            now = time.monotonic()
            span = traces.span("POST /v1/completions", parent=PARENT, start=now - 2.0)
            span.child("queue", now - 2.0, now - 1.5, {"ghostserve.prompt_tokens": 3})
            span.end({"ghostserve.outcome": "stop"}, at=now)
        child, root = receiver.spans["ghostserve-gateway"]
    assert root.trace_id.hex() == child.trace_id.hex() == PARENT.split("-")[1]
    assert root.parent_span_id.hex() == PARENT.split("-")[2]
    assert child.parent_span_id == root.span_id
    assert span.traceparent.split("-")[2] == root.span_id.hex()
    assert (root.end_time_unix_nano - root.start_time_unix_nano) / 1e9 == pytest.approx(2.0, abs=1e-3)
    assert (child.end_time_unix_nano - child.start_time_unix_nano) / 1e9 == pytest.approx(0.5, abs=1e-3)
    assert abs(root.end_time_unix_nano / 1e9 - time.time()) < 60


def test_a_recovery_is_a_trace_of_its_phases_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    record = RecoveryRecord(
        epoch=2, reason="rank 1: gone", lost_ranks=(1,), started=time.monotonic() - 1, regroup_s=0.03, weights_s=0.02,
        restore_s=0.1, recompute_s=0.2, ended=time.monotonic(), restored_pages=9, recomputed_tokens=4,
        kv_bytes_restored=1, sequences=2, detect_s=0.05, fence_s=0.01,
    )  # fmt: skip
    with receiving() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", receiver.url + "/v1/traces")
        with tracing("coordinator") as traces:
            tell_recovery(traces, record)
        *phases, root = receiver.spans["ghostserve-coordinator"]
    assert root.name == "recovery"
    names = ["detect", "fence", "regroup", "weights", "restore", "recompute", "resume"]
    assert [each.name for each in phases] == names
    assert all(each.parent_span_id == root.span_id for each in phases)
    for before, after in itertools.pairwise(phases):
        assert after.start_time_unix_nano == pytest.approx(before.end_time_unix_nano, abs=2000)


@pytest.mark.parametrize(
    "variables",
    [{}, {"OTEL_SDK_DISABLED": "true"}, {"OTEL_TRACES_EXPORTER": "none"}],
    ids=["unset", "disabled", "none"],
)
def test_off_tells_nobody_and_hands_the_context_on(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    if variables:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with tracing("gateway") as traces:
        assert isinstance(traces, NoTracing)
        assert traces.span("x", parent=PARENT).traceparent == PARENT


@pytest.mark.parametrize("header", ["", "x", PARENT + "-01", PARENT.upper(), PARENT.replace("0af7", "zzzz"),
                                    "00-" + "0" * 32 + "-b7ad6b7169203331-01"])  # fmt: skip
def test_a_traceparent_that_is_none_is_dropped(header: str) -> None:
    assert traceparent_of(header) == ""
    assert traceparent_of(PARENT) == PARENT
