"""The coordinator's Prometheus metrics: requests, the KV pool, protection, recoveries, and what each rank tells.

Names follow vLLM's where it has one, with the prefix ghostserve. Labels are bounded: ranks, phases, kinds; no request,
no worker. What can be read from the status is read when Prometheus asks; the rest is counted as it happens.
"""

from collections.abc import Callable, Iterator
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from shared.messages import ProtectDone, RestoreDone, StepDone
from shared.types import ClusterStatus, RecoveryRecord

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

LossKind = Literal["closed", "silent", "late", "hung", "cut off", "failed", "replaced", "stopped"]
"""Why a worker was given up: its channel closed, no heartbeat, not joined in time, no progress though it beats, no way
to its peers, its device failed or it can't load its weights, another process came under its name, or it was told to
stop."""

STATES = ("forming", "assigning", "joining", "restoring", "serving")
_PHASES_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_STEPS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SHADOW_S = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """What a group counts, and the view that Prometheus gets. `status` is asked for the rest."""

    def __init__(self, status: Callable[[], ClusterStatus]):
        registry = self._registry = CollectorRegistry()
        registry.register(_StatusCollector(status))
        ProcessCollector(registry=registry)
        self.rank_failures = Counter(
            "ghostserve:rank_failures", "Ranks lost, by why they were given up", ["reason"], registry=registry
        )
        self.recoveries = Counter("ghostserve:recoveries", "Recoveries that ended", registry=registry)
        self.recovery = Histogram(
            "ghostserve:recovery_duration_seconds", "Recoveries by phase", ["phase"], buckets=_PHASES_S,
            registry=registry,
        )  # fmt: skip
        self.moves = Histogram(
            "ghostserve:rank_move_stall_seconds", "How long requests waited for a rank that was moved",
            buckets=_PHASES_S, registry=registry,
        )  # fmt: skip
        self.recovered = Counter(
            "ghostserve:requests_recovered", "Requests that went on after a loss, with their KV or from the start",
            ["method"], registry=registry,
        )  # fmt: skip
        self.reconstructed = Counter(
            "ghostserve:kv_reconstructed_bytes", "KV decoded from survivors and parity", registry=registry
        )
        self.recomputed = Counter(
            "ghostserve:recomputed_tokens", "Tokens computed again after a loss", registry=registry
        )
        self.checksum_failures = Counter(
            "ghostserve:checksum_failures", "Stripes whose bytes were not those recorded, by where it was seen",
            ["where"], registry=registry,
        )  # fmt: skip
        self.failed_steps = Counter(
            "ghostserve:failed_steps", "Steps that raised an error, though no process was lost", registry=registry
        )
        self.failed_requests = Counter(
            "ghostserve:failed_requests", "Requests that ended because steps failed with them alone", registry=registry
        )
        self.step = Histogram(
            "ghostserve:rank_step_seconds", "Steps as each rank tells them", ["rank"], buckets=_STEPS_S,
            registry=registry,
        )  # fmt: skip
        self.protect = Histogram(
            "ghostserve:rank_protect_seconds", "From the exchange of a batch of pages to the stores' acknowledgement",
            ["rank"], buckets=_SHADOW_S, registry=registry,
        )  # fmt: skip
        self.stripes = Counter(
            "ghostserve:rank_stripes", "Stripes encoded by each rank, by outcome", ["rank", "outcome"],
            registry=registry,
        )  # fmt: skip
        self.restore = Histogram(
            "ghostserve:rank_restore_seconds", "A rank's part in a restore", ["rank"], buckets=_PHASES_S,
            registry=registry,
        )  # fmt: skip

        for kind in get_args(LossKind):
            self.rank_failures.labels(kind)
        for method in ("restore", "recompute"):
            self.recovered.labels(method)
        for where in ("restore", "store"):
            self.checksum_failures.labels(where)

    def step_done(self, done: StepDone) -> None:
        """A rank finished a step."""
        self.step.labels(done.rank).observe(done.seconds)

    def protect_done(self, done: ProtectDone) -> None:
        """A rank's batch of stripes has its outcome."""
        self.protect.labels(done.rank).observe(done.seconds)
        self.stripes.labels(done.rank, "protected").inc(len(done.protected))
        self.stripes.labels(done.rank, "failed").inc(len(done.failed))

    def restore_done(self, done: RestoreDone) -> None:
        """A rank's part in a restore is over."""
        self.restore.labels(done.rank).observe(done.seconds)
        self.reconstructed.inc(done.bytes_restored)
        self.checksum_failures.labels("restore").inc(done.damaged)

    def recovery_ended(self, record: RecoveryRecord) -> None:
        """A recovery's record is closed, or that of a planned move."""
        if record.planned:
            self.moves.observe((record.ended or record.started) - record.started)
            return
        self.recoveries.inc()
        for phase, seconds in record.phases():
            self.recovery.labels(phase).observe(seconds)
        self.recomputed.inc(record.recomputed_tokens)

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _StatusCollector(Collector):
    """What the status says, read when Prometheus asks."""

    def __init__(self, status: Callable[[], ClusterStatus]):
        self._status = status

    def describe(self) -> list[Metric]:
        """Nothing: the status is not asked before the group is there."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All of it, from one status."""
        status = self._status()
        yield _gauge("epoch", "The group's epoch", status.epoch)
        yield _by("group_state", "1 for the state that the group is in", "state",
                  {state: float(state == status.state) for state in STATES})  # fmt: skip
        yield _gauge("ranks", "Ranks that a worker holds", sum(each.rank is not None for each in status.workers))
        yield _gauge("ranks_wanted", "Ranks of the group (k)", status.size)
        yield _gauge("spares", "Workers ready to take a rank", sum(each.state == "spare" for each in status.workers))
        yield _gauge("stores", "Parity stores connected", len(status.stores))
        yield _gauge("stragglers", "Ranks that compute far longer than the others", sum(
            each.straggler for each in status.workers
        ))  # fmt: skip
        yield _by("rank_compute_seconds", "Computing in a step, without waiting for other ranks, averaged", "rank", {
            str(each.rank): each.compute_s for each in status.workers if each.rank is not None
        })  # fmt: skip
        yield _gauge("can_lose", "Ranks that can be lost now without recomputing sealed pages", status.can_lose)
        yield _gauge("num_requests_running", "Requests in work", status.running)
        yield _gauge("num_requests_waiting", "Requests that wait for room", status.waiting)
        yield _gauge("kv_cache_usage_perc", "Share of the KV pool in use, 1 is all of it",
                     status.pages_held / max(1, status.pages_total))  # fmt: skip
        yield _by("pages", "Pages of the KV pool", "state", {
            "held": status.pages_held,
            "cached": status.pages_cached,
            "free": status.pages_total - status.pages_held - status.pages_cached,
        })  # fmt: skip
        yield _by("stripes", "Sealed pages by protection", "state", {
            "protected": status.stripes_protected,
            "pending": status.stripes_pending,
            "unprotected": status.stripes_unprotected,
        })  # fmt: skip
        yield _gauge("kv_unprotected_tokens", "Tokens that would be recomputed, were a rank lost now",
                     status.unprotected_tokens)  # fmt: skip
        yield _gauge("protection_lag_seconds", "Age of the oldest sealed page that is not protected",
                     status.protection_lag_s)  # fmt: skip
        yield _counter("parity_bytes", "Parity acknowledged by the stores", status.parity_bytes_stored)
        yield _counter("computed_prompt_tokens", "Prompt tokens of requests that began", status.prompt_tokens)
        yield _counter("sampled_tokens", "Tokens drawn", status.generated_tokens)
        yield _counter("num_preemptions", "Requests put back for want of pages", status.preemptions)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"ghostserve:{name}", text, value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"ghostserve:{name}", text, value)


def _by(name: str, text: str, label: str, values: dict[str, float]) -> Metric:
    family = GaugeMetricFamily(f"ghostserve:{name}", text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family
