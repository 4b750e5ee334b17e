"""Who is there: hellos, heartbeats, and how an epoch's ranks are placed and meet."""

from dataclasses import dataclass

from shared.messages.base import Message
from shared.types import (
    GroupConfig,
    ModelInfo,
    PageKey,
    StoreInfo,
)


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

    To the coordinator, from a worker or a store: it ends in order, as it was told to (TOLD_TO_STOP), or because it can
    be of no use: its device failed, its weights can't be loaded.
    """

    reason: str
    final: bool = False


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
class RankFailed(Message):
    """This rank can't go on in this epoch: a collective was aborted, or its device failed (`fatal`); see StepRaised.

    `cut_off`: because it can't reach rank 0's meeting point.
    """

    epoch: int
    rank: int
    reason: str
    fatal: bool
    cut_off: bool = False


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
class Join(Message):
    """Connect the two communicators of the epoch, then answer Joined."""

    epoch: int
    model_address: str
    exchange_address: str


@dataclass(frozen=True, slots=True)
class EpochNow(Message):
    """From now on, refuse writes of older epochs of this group."""

    group: str
    epoch: int
