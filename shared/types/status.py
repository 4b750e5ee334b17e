"""How a cluster is, as the coordinator sees it."""

from dataclasses import dataclass
from typing import Literal

from shared.types.group import GroupState, ModelInfo, Protection, StoreInfo

EMBEDDED = "embedded"
"""The engine of a cluster that schedules by itself; others go by their own names."""

OperatorAction = Literal["drain", "replace", "resume"]
"""drain: move the rank to a spare, and take the worker no more; replace: move it; resume: it may be taken again."""
Fault = Literal["kill"]
"""A fault that a cluster started with allow_faults lets be injected: kill, the worker kills itself."""


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One worker as the coordinator sees it. `rank` is None for a spare."""

    name: str
    host: str
    pid: int
    device: str
    rank: int | None
    state: Literal["loading", "spare", "member", "draining", "cordoned"]
    """draining: a member whose rank is on its way to a spare. cordoned: a spare that is not to be taken."""
    compute_s: float = 0.0
    """Seconds that it computes in a step, without its waiting for others, averaged over the last ones; ranks only."""
    straggler: bool = False
    """It computes far longer than the other ranks, and has for some time."""


@dataclass(frozen=True, slots=True)
class HandoverStatus:
    """A rank that moves from a worker to a spare. `pages_left` is what is known to be copied still."""

    action: OperatorAction
    rank: int
    worker: str
    successor: str
    phase: str
    pages_left: int
    trouble: str


@dataclass(frozen=True, slots=True)
class StreamRecovery:
    """How one running sequence got its KV back. Times are seconds; `resumed_s` counts from the recovery's start."""

    request_id: str
    way: Literal["restore", "recompute", "kept"]
    """restore: its sealed pages from the stores, its tail recomputed. kept: nothing of it was lost."""
    restored_pages: int
    recomputed_tokens: int
    expected_restore_s: float
    """What both ways were expected to take, by the rates measured so far."""
    expected_recompute_s: float
    resumed_s: float


@dataclass(frozen=True, slots=True)
class RecoveryRecord:
    """The timeline of one recovery. Times are seconds; `started` is CLOCK_MONOTONIC of the coordinator's host."""

    epoch: int
    reason: str
    lost_ranks: tuple[int, ...]
    started: float
    regroup_s: float
    weights_s: float
    restore_s: float
    recompute_s: float
    ended: float | None
    restored_pages: int
    recomputed_tokens: int
    kv_bytes_restored: int
    sequences: int
    detect_s: float = 0.0
    """Before `started`: since the last sign of life of who was lost."""
    fence_s: float = 0.0
    """The part of `regroup_s` that the new epoch took to be in Redis."""
    fetch_s: float = 0.0
    """Of `restore_s`: waiting for the stores, the exchange between ranks, and decoding."""
    exchange_s: float = 0.0
    decode_s: float = 0.0
    streams: tuple[StreamRecovery, ...] = ()
    tail_tokens: int = 0
    """Tokens whose KV was restored one by one."""
    planned: bool = False
    """A rank was moved to a spare; from `started` to `ended` no step could begin."""

    def phases(self) -> tuple[tuple[str, float], ...]:
        """Names and seconds of its phases, in order, none counted twice."""
        return (
            ("detect", self.detect_s),
            ("fence", self.fence_s),
            ("regroup", self.regroup_s - self.fence_s),
            ("weights", self.weights_s),
            ("restore", self.restore_s),
            ("recompute", self.recompute_s),
        )


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """The state of a group and of the services around it, as the coordinator sees it."""

    group: str
    state: GroupState
    detail: str
    """In words, for `/health`: what it is waiting for, where it can't serve."""
    epoch: int
    served_name: str
    model: ModelInfo | None
    max_model_len: int
    size: int
    parity: int
    protection: Protection
    can_lose: int
    """How many ranks can be lost now, while the stores live, without recomputing sealed pages of requests."""
    reduced_protection: str
    """Why the loss of one store would cost a stripe more than one parity shard; empty where it would not."""
    workers: tuple[WorkerStatus, ...]
    stores: tuple[StoreInfo, ...]
    running: int
    waiting: int
    pages_total: int
    pages_held: int
    pages_cached: int
    pages_lost: int
    """Pages of which a lost rank's slice is not restored yet."""
    stripes_protected: int
    stripes_pending: int
    stripes_unprotected: int
    unprotected_reason: str
    """Why the last stripe that could not be protected was not; empty where all is well."""
    parity_bytes_stored: int
    recoveries: tuple[RecoveryRecord, ...]
    now: float = 0.0
    """The clock that the recoveries' times are of, when this was said."""
    recovering_since: float | None = None
    """When the recovery under way began, by the same clock."""
    protection_lag_s: float = 0.0
    """Age of the oldest sealed page that is not protected yet."""
    unprotected_tokens: int = 0
    """Tokens of requests in work that would be recomputed, were a rank lost now."""
    prompt_tokens: int = 0
    """Prompt tokens computed since the coordinator started."""
    generated_tokens: int = 0
    """Tokens generated since the coordinator started."""
    preemptions: int = 0
    """How often a request was put back for want of pages."""
    handover: HandoverStatus | None = None
    """The rank that moves to a spare, if one does."""
    engine: str = EMBEDDED
    """What schedules: the embedded engine, or a hosted one, in words."""
