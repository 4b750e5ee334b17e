"""The gateway's Prometheus metrics; names follow vLLM's, with the prefix ghostserve."""

import itertools
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_LATENCIES = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)
_GAPS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """What is counted. `outcome` is stop, length, error (ended unfinished), aborted (client left), or refused."""

    def __init__(self, in_flight: Callable[[], float], serving: Callable[[], float]):
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self.requests = Counter(
            "ghostserve:requests", "HTTP requests by outcome", ["endpoint", "outcome"], registry=self._registry
        )
        self.responses = Counter(
            "ghostserve:http_responses", "HTTP responses by status", ["status"], registry=self._registry
        )
        self.errors = Counter(
            "ghostserve:request_errors", "Requests refused or ended unfinished, by error code", ["code"],
            registry=self._registry,
        )  # fmt: skip
        for code in ("queue_full", "stream_lost", "unavailable"):
            self.errors.labels(code)  # so that their rise from nothing is seen
        self.first_token = self._histogram("time_to_first_token_seconds", "From the request to its first token")
        self.token_gap = self._histogram("inter_token_latency_seconds", "Between token events of one choice", _GAPS)
        self.latency = self._histogram("e2e_request_latency_seconds", "From the request to the end of its answer")
        self.prompt_tokens = Counter("ghostserve:prompt_tokens", "Tokens of prompts", registry=self._registry)
        self.generation_tokens = Counter("ghostserve:generation_tokens", "Tokens generated", registry=self._registry)
        self.cached_tokens = Counter(
            "ghostserve:prompt_tokens_cached", "Prompt tokens found in the KV pool", registry=self._registry
        )
        Gauge("ghostserve:sequences_in_flight", "Sequences that wait for tokens", registry=self._registry).set_function(
            in_flight
        )
        Gauge("ghostserve:serving", "1 while /health answers 200", registry=self._registry).set_function(serving)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...] = _LATENCIES) -> "Histogram":
        made = Histogram(f"ghostserve:{name}", text, buckets)
        self._registry.register(made)
        return made

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class Histogram(Collector):
    """A histogram that one thread writes: prometheus_client's takes a lock several times, for each token."""

    def __init__(self, name: str, text: str, buckets: Sequence[float]):
        self._name = name
        self._text = text
        self._buckets = buckets
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._buckets, value)] += 1
        self._sum += value

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """What the registry asks for."""
        names = [*(str(float(bucket)) for bucket in self._buckets), "+Inf"]
        counts = itertools.accumulate(self._counts)
        yield HistogramMetricFamily(
            self._name, self._text, buckets=list(zip(names, counts, strict=True)), sum_value=self._sum
        )
