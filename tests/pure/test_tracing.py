"""Traces reach a real OTLP receiver, below the caller's span; without an endpoint nothing is told."""

import itertools
import socket
import time

import pytest

from services.coordinator.protection.ledger import Parity
from services.coordinator.views.timeline import tell_recovery
from shared.tracing import NoTracing, traceparent_of, tracing
from shared.types import RecoveryRecord
from tests.otlp import receiving
from tests.pure.test_group_simulation import finish, serving, until
from tests.pure.world import World

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


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


def test_requests_and_a_recovery_of_a_group_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with receiving() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
        with tracing("coordinator") as traces:
            world = World(3, tracing=traces)
            for _ in range(world.size + 1):
                world.add_worker()
            world.add_store()
            serving(world)
            world.submit(length=30, max_tokens=20)
            until(world, lambda: world.ledger.count(Parity.PROTECTED))
            world.kill(next(each for each in world.workers.values() if each.assign is not None))
            finish(world)
            told = world.group.status().recoveries
        spans = receiver.spans["ghostserve-coordinator"]
    by_name = {span.name: span for span in spans}
    assert by_name.keys() >= {"queue", "prefill", "decode", "protect", "recovery", "fence", "recompute", "resume"}
    assert by_name["prefill"].end_time_unix_nano == by_name["decode"].start_time_unix_nano
    lost = {each.key: each.value for each in by_name["recovery"].attributes}
    assert lost["ghostserve.lost_ranks"].string_value == ",".join(map(str, told[0].lost_ranks))


def test_a_receiver_that_never_answers_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.tracing._CLOSE_DEADLINE_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
        began = time.monotonic()
        with tracing("gateway") as traces:
            traces.span("x").end()
        assert time.monotonic() - began < 5
