"""What goes into the coordinator's core, and what comes out: plain values, so that a recorded life can be run again.

A peer is a number that whoever accepts its connection gives it, never used twice. A question is what only Redis knows;
its answer comes as an event of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from services.coordinator.protection.costs import StoredStripe
from shared.messages import EngineHello, GatewayHello, Message, StoreHello, WorkerHello
from shared.types import PageKey, StoreInfo

Peer = int
Hello = WorkerHello | StoreHello | GatewayHello | EngineHello


# -- questions and their answers -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NextEpoch(Message):
    """An epoch newer than `current`, in Redis first. Answered by EpochIs."""

    current: int


@dataclass(frozen=True, slots=True)
class Keep(Message):
    """See that Redis knows the current epoch, and which workers are cordoned, also one that has lost its memory.

    Answered by EpochIs: the epoch that Redis has then, which can be a newer one.
    """

    current: int
    cordons: Mapping[str, int | None]


@dataclass(frozen=True, slots=True)
class FindStripes(Message):
    """Which of these stripes have parity in these stores, in their present life. Answered by StripesFound.

    `purpose` says who asks: to restore running sequences, to restore cached pages, or to see what is protected.
    """

    purpose: Literal["restore", "cached", "recognise"]
    epoch: int
    keys: tuple[PageKey, ...]
    stores: tuple[StoreInfo, ...]


@dataclass(frozen=True, slots=True)
class EpochIs(Message):
    """The group's epoch."""

    epoch: int


@dataclass(frozen=True, slots=True)
class StripesFound(Message):
    """What the index has of them; if it could not be read, why (`trouble`)."""

    stripes: Mapping[PageKey, StoredStripe]
    trouble: str = ""


Question = NextEpoch | Keep | FindStripes
Answer = EpochIs | StripesFound


# -- events ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed. Comes every TICK_S or so, whatever else happens."""


@dataclass(frozen=True, slots=True)
class Came:
    """A peer has connected, and said hello."""

    peer: Peer
    hello: Hello


@dataclass(frozen=True, slots=True)
class Said:
    """A peer's message."""

    peer: Peer
    message: Message


@dataclass(frozen=True, slots=True)
class Left:
    """A peer's channel is closed."""

    peer: Peer
    reason: str


@dataclass(frozen=True, slots=True)
class Answered:
    """The answer to the question of this number."""

    number: int
    answer: Answer


Event = Tick | Came | Said | Left | Answered


# -- what comes out --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    """One message for these peers; those that are gone meanwhile are left out."""

    peers: tuple[Peer, ...]
    message: Message


@dataclass(frozen=True, slots=True)
class Ask:
    """A question, by the number that its answer will have."""

    number: int
    question: Question


Effect = Send | Ask
