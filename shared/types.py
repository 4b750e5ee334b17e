"""The values that services hand to each other, all frozen. Arrays of ids travel as little-endian int32 bytes."""

import array
import hashlib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

PageKey = bytes
"""A page's name, 16 bytes: the chain hash of all token ids of its sequence up to the page's end."""

FinishReason = Literal["stop", "length"]
Protection = Literal["parity", "replicate", "none"]
"""parity: m parity shards a stripe. replicate: a raw copy of each rank's page, shard k + rank of its stripe; the usual
checkpoint, which parity is compared with. none: a loss is recomputed."""
OperatorAction = Literal["drain", "replace", "resume"]
"""drain: move the rank to a spare, and take the worker no more; replace: move it; resume: it may be taken again."""
LogitRows = Literal["none", "last", "all"]
Fault = Literal["kill"]
"""A fault that a cluster started with allow_faults lets be injected: kill, the worker kills itself."""
GroupState = Literal["forming", "assigning", "joining", "restoring", "serving"]

PAGE_KEY_BYTES = 16
OPEN_KEY: PageKey = bytes(PAGE_KEY_BYTES)
"""In place of the key of a page that is not sealed."""
ROUND_BYTES = 8 << 20


def round_pages(page_bytes: int) -> int:
    """Pages that the ranks exchange in one round; memory for what arrives is (k - 1) times that at most."""
    return max(1, ROUND_BYTES // page_bytes)


def pack_ids(ids: Iterable[int]) -> bytes:
    """Token or page ids as little-endian int32 bytes."""
    packed = array.array("i", ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_ids(data: bytes) -> list[int]:
    """The inverse of `pack_ids`. Raises ValueError if the length is not a multiple of four."""
    unpacked = array.array("i")
    unpacked.frombytes(data)
    if sys.byteorder == "big":
        unpacked.byteswap()
    return unpacked.tolist()


def pack_keys(keys: Iterable[PageKey]) -> bytes:
    """Page keys as bytes, PAGE_KEY_BYTES each."""
    return b"".join(keys)


def unpack_keys(data: bytes) -> list[PageKey]:
    """The inverse of `pack_keys`. Raises ValueError if the length is not a multiple of PAGE_KEY_BYTES."""
    if len(data) % PAGE_KEY_BYTES:
        raise ValueError(f"{len(data)} bytes are not a whole number of page keys")
    return [data[start : start + PAGE_KEY_BYTES] for start in range(0, len(data), PAGE_KEY_BYTES)]


def root_key(model_fingerprint: str, cache_salt: str) -> PageKey:
    """The parent of every sequence's first page key: differs by model and by cache salt."""
    text = f"{len(model_fingerprint)}:{model_fingerprint}{cache_salt}"
    return hashlib.blake2b(text.encode(), digest_size=PAGE_KEY_BYTES).digest()


def next_page_key(parent: PageKey, tokens: Sequence[int]) -> PageKey:
    """The key of the page that holds `tokens` and follows the page named `parent`."""
    return hashlib.blake2b(parent + pack_ids(tokens), digest_size=PAGE_KEY_BYTES).digest()


def encoding_rank(key: PageKey, size: int) -> int:
    """The rank that encodes the stripe `key`: a hash spreads stripes evenly over the group."""
    return int.from_bytes(key[:8], "little") % size


def place_shards(key: PageKey, shards: int, stores: Sequence[str]) -> list[str]:
    """The stores for parity shards 0..shards-1 of a stripe, by rendezvous hashing over the stores alive.

    Different shards go to different stores as far as there are enough; then stores are used again in the same order.
    """
    ranked = sorted(stores, key=lambda store: hashlib.blake2b(key + store.encode(), digest_size=8).digest())
    return [ranked[shard % len(ranked)] for shard in range(shards)]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one sequence's tokens are drawn; keyed by (seed, position), so that every rank draws the same."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    """None: no logprobs. N: the sampled token's and the N most likely ones' logprobs."""

    @property
    def needs_history(self) -> bool:
        """Whether drawing depends on the tokens before, not on the logits alone."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sequence to generate. The gateway makes one for each choice of each prompt."""

    request_id: str
    prompt: bytes
    max_tokens: int
    """0: only the prompt is computed, for its logprobs."""
    sampling: SamplingParams
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    cache_salt: str = ""
    prompt_logprobs: int | None = None
    traceparent: str = ""
    """W3C Trace Context of the gateway's span of this request."""
    kv_digest: bool = False
    """Ask each rank for a hash of the sequence's KV when it ends (the drill compares them)."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token that was chosen, with its logprob and the most likely alternatives as (token id, logprob)."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What others need to know of the model that a group serves. Filled by the workers."""

    model_dir: str
    fingerprint: str
    architecture: str
    dtype: str
    vocab_size: int
    max_positions: int
    layers: int
    kv_heads: int
    head_dim: int
    eos_token_ids: tuple[int, ...]
    page_bytes: int
    """Bytes of one page on one rank."""


@dataclass(frozen=True, slots=True)
class GroupConfig:
    """What every member of a group must agree on. The coordinator's settings decide it."""

    group: str
    model: str
    served_name: str
    dtype: str
    size: int
    parity: int
    protection: Protection
    page_tokens: int
    kv_bytes: int
    """Size of each rank's pool."""
    max_step_tokens: int
    max_batch: int
    communicator: Literal["auto", "shm", "gloo", "nccl"]
    heartbeat_s: float
    heartbeat_timeout_s: float
    collective_timeout_s: float
    logits_bytes: int = 64 << 20
    """What a rank's logits may take at a time."""


@dataclass(frozen=True, slots=True)
class StoreInfo:
    """A parity store that is alive. A new incarnation has none of the bytes of the one before."""

    store_id: str
    incarnation: str
    bulk_address: str
    admin_url: str
    capacity_bytes: int


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
