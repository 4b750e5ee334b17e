"""Every message of the control channel. A peer opens with a hello; the coordinator answers Welcome or Goodbye.

What each carries is enough to act on: a worker keeps nothing between messages that could not be rebuilt from the next.
Messages about a group carry its epoch; a receiver ignores those that are not of its own.
"""

from dataclasses import dataclass

from shared.types import (
    ClusterStatus,
    Fault,
    FinishReason,
    GenerationRequest,
    GroupConfig,
    LogitRows,
    ModelInfo,
    OperatorAction,
    PageKey,
    SamplingParams,
    StoreInfo,
    TokenLogprob,
)

TOLD_TO_STOP = "it was told to stop"
"""The reason of who says Goodbye to the coordinator."""


@dataclass(frozen=True, slots=True)
class Message:
    """Base of all control messages."""


# -- hello: peer to coordinator, first frame -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WorkerHello(Message):
    """A worker offers its device. `host_id` is equal for workers that can share memory."""

    name: str
    host: str
    host_id: str
    pid: int
    device: str


@dataclass(frozen=True, slots=True)
class StoreHello(Message):
    """A parity store offers its memory."""

    store: StoreInfo


@dataclass(frozen=True, slots=True)
class GatewayHello(Message):
    """A gateway (or an operator's tool) wants to submit requests and to hear of the cluster's state."""

    name: str


@dataclass(frozen=True, slots=True)
class Welcome(Message):
    """The hello was accepted. To a worker: load this model; to all: the group's configuration and epoch."""

    config: GroupConfig
    epoch: int


@dataclass(frozen=True, slots=True)
class Goodbye(Message):
    """From the coordinator: the peer is not wanted (again), and why; it may not dial again if `final`.

    To the coordinator, from a worker or a store: it ends in order, as it was told to.
    """

    reason: str
    final: bool = False


# -- worker to coordinator -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Claim(Message):
    """What a worker kept when it lost the coordinator: its rank, and the sealed pages whose KV is whole there.

    Not sent alone: part of WorkerReady. `keys` are those of `pages`, in the same order.
    """

    epoch: int
    rank: int
    pages: bytes
    keys: tuple[PageKey, ...]


@dataclass(frozen=True, slots=True)
class WorkerReady(Message):
    """Model skeleton, pool and imports are done: from now on a spare, unless its claim is granted.

    `pages` is the size of its pool.
    """

    model: ModelInfo
    pages: int
    pages_address: str = ""
    """Where its pages can be read while its rank moves to a spare."""
    claim: Claim | None = None


@dataclass(frozen=True, slots=True)
class Heartbeat(Message):
    """Sent every heartbeat_s whatever the compute thread does; `step` is the last one finished.

    `progress` grows in an epoch with each thing that the compute thread begins, above all each collective that it
    enters: of two ranks that stand still, the one with less is waited for by the other.
    """

    epoch: int
    step: int
    in_flight: bool
    progress: int


@dataclass(frozen=True, slots=True)
class Rendezvous(Message):
    """Rank 0 has opened the meeting points of the epoch's two communicators."""

    epoch: int
    model_address: str
    exchange_address: str


@dataclass(frozen=True, slots=True)
class Joined(Message):
    """A rank has its weights and both communicators. Times: seconds since Assign was received."""

    epoch: int
    rank: int
    weights_s: float
    joined_s: float


@dataclass(frozen=True, slots=True)
class Sample(Message):
    """What a step drew for one sequence. Not sent alone: part of StepDone."""

    sequence: int
    token: int
    logprob: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class StepDone(Message):
    """A step's KV is written on this rank (and so its part in every collective done); what was drawn.

    Of its `seconds`, it spent `waited_s` waiting for others in collectives.
    """

    epoch: int
    step: int
    rank: int
    samples: tuple[Sample, ...]
    seconds: float
    waited_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RankFailed(Message):
    """This rank can't go on in this epoch: a collective was aborted, or its device failed (`fatal`).

    `cut_off`: because it can't reach rank 0's meeting point.
    """

    epoch: int
    rank: int
    reason: str
    fatal: bool
    cut_off: bool = False


@dataclass(frozen=True, slots=True)
class ProtectDone(Message):
    """Outcome of the stripes that this rank encoded: acknowledged by the stores, or not, and why.

    `full`: some of those that failed did so for want of room.
    """

    epoch: int
    rank: int
    protected: tuple[PageKey, ...]
    failed: tuple[PageKey, ...]
    reason: str
    parity_bytes: int
    seconds: float
    full: bool = False


@dataclass(frozen=True, slots=True)
class RestoreDone(Message):
    """How far a rank is that decodes in a RestorePlan; seconds and bytes are those since it last said so.

    `failed`: stripes that it could not decode, with the first reason.
    """

    epoch: int
    plan: int
    rank: int
    upto: int
    """It is done with so many of the plan's stripes, in their order."""
    failed: tuple[PageKey, ...]
    reason: str
    bytes_restored: int
    fetch_s: float
    """Waited for parity that was not there yet."""
    exchange_s: float
    decode_s: float
    seconds: float
    damaged: int = 0
    """How many of `failed` had bytes that differ from their recorded checksum."""


@dataclass(frozen=True, slots=True)
class DigestDone(Message):
    """The hash of one sequence's KV on this rank."""

    epoch: int
    digest: int
    rank: int
    value: str


@dataclass(frozen=True, slots=True)
class Prepared(Message):
    """The spare has the weights that a Prepare asked for."""

    move: int


@dataclass(frozen=True, slots=True)
class PagesCopied(Message):
    """These pages' slices are in the spare's pool; or none of them, for this reason."""

    move: int
    pages: bytes
    reason: str


# -- coordinator to worker -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Assign(Message):
    """Take `rank` in a new epoch: stop what is of older ones, load the slice if it is another rank's.

    Rank 0 answers with Rendezvous.
    """

    epoch: int
    rank: int
    size: int
    communicator: str


@dataclass(frozen=True, slots=True)
class StandBy(Message):
    """An epoch goes on without this worker: drop what is of older ones and be a spare.

    `hold`: have all ranks' slices of the weights at hand.
    """

    epoch: int
    hold: bool


@dataclass(frozen=True, slots=True)
class Prepare(Message):
    """To a spare: load the weights of `rank`, which is about to move there. Answered by Prepared."""

    move: int
    rank: int


@dataclass(frozen=True, slots=True)
class CopyPages(Message):
    """To a spare: read these pages from the worker at `address` into the own pool. Answered by PagesCopied.

    `keys` are the pages'; OPEN_KEY for one that is not sealed.
    """

    move: int
    address: str
    pages: bytes
    keys: tuple[PageKey, ...]


@dataclass(frozen=True, slots=True)
class Join(Message):
    """Connect the two communicators of the epoch, then answer Joined."""

    epoch: int
    model_address: str
    exchange_address: str


@dataclass(frozen=True, slots=True)
class SequenceStep(Message):
    """One sequence's part of a step: tokens at positions start.., its page table, and how to draw the next token.

    `history` holds the output tokens so far and `prompt` the prompt's, only where drawing needs them.
    """

    sequence: int
    tokens: bytes
    start: int
    prompt_tokens: int
    pages: bytes
    logits: LogitRows
    sampling: SamplingParams | None
    prompt_logprobs: int | None = None
    """N: also the logprob of each next prompt token, and of the N most likely ones; `next_token` follows the last."""
    next_token: int = -1
    prompt: bytes = b""
    history: bytes = b""
    seals: bytes = b""
    """Keys, 16 bytes each, of the pages that this step fills, from the one that position `start` is in."""


@dataclass(frozen=True, slots=True)
class StepPlan(Message):
    """One forward pass, the same on every rank."""

    epoch: int
    step: int
    sequences: tuple[SequenceStep, ...]


@dataclass(frozen=True, slots=True)
class ProtectPlan(Message):
    """Encode these sealed pages once step `after_step` is done. Same order on every rank, so exchanges pair up."""

    epoch: int
    after_step: int
    pages: bytes
    keys: tuple[PageKey, ...]
    stores: tuple[StoreInfo, ...]
    serial: int
    """Goes with every shard that is put for this plan; see ReleaseStripes."""
    tail: bool = False
    """The stripes are single tokens: `pages` are slots, page * page_tokens + offset."""


@dataclass(frozen=True, slots=True)
class ParityShard(Message):
    """Where one parity shard lies. Part of StripeRestore."""

    shard: int
    bulk_address: str
    checksum: int


@dataclass(frozen=True, slots=True)
class StripeRestore(Message):
    """How to rebuild one page on the ranks `lost`: survivors' slices, and as many of these parity shards as are lost.

    The others are there to be read where one is damaged.
    """

    page: int
    key: PageKey
    lost: tuple[int, ...]
    parity: tuple[ParityShard, ...]
    data_checksums: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RestorePlan(Message):
    """Rebuild these pages, in this order: the same plan on every rank. Those that decode answer RestoreDone, as they go."""

    epoch: int
    plan: int
    stripes: tuple[StripeRestore, ...]
    tail: bool = False
    """The stripes are single tokens, see ProtectPlan."""


@dataclass(frozen=True, slots=True)
class DigestPlan(Message):
    """Hash the KV of tokens 0..tokens-1 of the sequence that has these pages."""

    epoch: int
    digest: int
    pages: bytes
    tokens: int


# -- coordinator to parity store -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EpochNow(Message):
    """From now on, refuse writes of older epochs of this group."""

    group: str
    epoch: int


@dataclass(frozen=True, slots=True)
class ReleaseStripes(Message):
    """These pages are gone: free their shards and index entries.

    Shards come by another way than this, so each carries (epoch, serial) of the plan that it was put for: one that was
    asked for after this was sent has a greater pair, and stays, however late this arrives.
    """

    group: str
    keys: tuple[PageKey, ...]
    epoch: int
    serial: int


@dataclass(frozen=True, slots=True)
class KeepStripes(Message):
    """These are all the pages there are: free the shards of any other, as ReleaseStripes would.

    Sent to each store that comes, and when a coordinator has learnt what its predecessor left.
    """

    group: str
    keys: tuple[PageKey, ...]
    epoch: int
    serial: int


@dataclass(frozen=True, slots=True)
class FindShards(Message):
    """Which shards of these stripes are here? Asked where Redis does not answer. Answered by ShardsFound."""

    question: int
    group: str
    keys: tuple[PageKey, ...]


# -- parity store to coordinator -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HeldShard(Message):
    """A parity shard that the store has, as its index entry tells it. Part of ShardsFound."""

    key: PageKey
    shard: int
    checksum: int
    data_checksums: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ShardsFound(Message):
    """What of the stripes in FindShards, with this number, is here."""

    question: int
    shards: tuple[HeldShard, ...]


@dataclass(frozen=True, slots=True)
class ShardsLost(Message):
    """The store found these stripes damaged and dropped them: their parity is to be encoded anew."""

    group: str
    keys: tuple[PageKey, ...]


@dataclass(frozen=True, slots=True)
class StoreDrains(Message):
    """The store takes no shards any more and is to be emptied: parity of these stripes is wanted elsewhere."""

    group: str
    keys: tuple[PageKey, ...]


# -- operator's faults: gateway to coordinator, which hands it to the worker -----------------------------------------


@dataclass(frozen=True, slots=True)
class InjectFault(Message):
    """Break this worker. Of no effect unless each that it passes was started with allow_faults."""

    worker: str
    fault: Fault


# -- gateway to coordinator ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Submit(Message):
    """Generate this. Answered by Accepted or Refused.

    `fingerprint` is the model's that the prompt was made for. `generated`: the tokens received already of a request
    that was accepted before the channel was lost; only what follows them is sent. None: a new request.
    """

    request: GenerationRequest
    fingerprint: str = ""
    generated: bytes | None = None


@dataclass(frozen=True, slots=True)
class Apply(Message):
    """An operator wants this done to a worker. Answered by Applied, with this id."""

    request_id: str
    action: OperatorAction
    target: str


@dataclass(frozen=True, slots=True)
class Abort(Message):
    """Nobody waits for this request any more."""

    request_id: str


# -- coordinator to gateway ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Accepted(Message):
    """The request is queued; its tokens follow."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Applied(Message):
    """What an operator asked for is under way, or done: in words."""

    request_id: str
    message: str


@dataclass(frozen=True, slots=True)
class Refused(Message):
    """The request is not served: an HTTP status and OpenAI's error fields."""

    request_id: str
    status: int
    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True, slots=True)
class Tokens(Message):
    """The next tokens of a request. The last message has a finish reason; the drill's has the ranks' digests.

    A token that ends the sequence is not among `tokens`, so they may be empty. `prompt_logprobs` come with the first
    message: one entry for each prompt token but the first.
    """

    request_id: str
    tokens: bytes
    logprobs: tuple[TokenLogprob, ...]
    prompt_logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None
    cached_tokens: int
    kv_digests: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Failed(Message):
    """An accepted request can't be finished: ends its stream with an error."""

    request_id: str
    message: str


@dataclass(frozen=True, slots=True)
class StatusChanged(Message):
    """Sent on every change of state, and at least once a second."""

    status: ClusterStatus
