"""Bulk transport moves parity shards between a worker and a store, straight into their final buffers.

One request names many shards, then their bytes follow; many requests are in flight on one connection, and replies are
matched by id. What travels (this file, frames.py) and how it is asked and served (client.py, server.py) is the same for
every backend; a backend is a Stream and a Listener (tcp.py, ucx.py) and passes
tests/conformance/test_transport.py.

A connection begins with the cluster's token. There is no TLS: it would copy and encrypt every byte once more on both
sides, on the processors that the model runs on. The network between ranks and stores must be a private one.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from shared.errors import GhostError
from shared.types import PageKey

Outcome = GhostError | None
"""None: done. An error: this one shard was refused, and why; the rest of its batch is unaffected."""


@dataclass(frozen=True, slots=True)
class ShardLabel:
    """Everything that is said about one parity shard when it is stored; the encoding rank fills it."""

    page_key: PageKey  # the stripe's name
    number: int  # k .. k+m-1: its row in the stripe
    k: int
    m: int
    length: int  # bytes of this shard (and of every other shard of the stripe)
    checksum: int  # xxh3_64 of its bytes; the store compares after receipt
    data_checksums: tuple[int, ...]  # xxh3_64 of data shards 0..k-1, so that a restored page can be compared


@dataclass(frozen=True, slots=True)
class ShardRef:
    """A shard to be read: its stripe, its number, and the length the reader has room for."""

    page_key: PageKey
    number: int
    length: int


@dataclass(frozen=True, slots=True)
class PutShards:
    """Store these shards, written in this epoch of this group, for a plan of this serial (ProtectPlan says why)."""

    group: str
    epoch: int
    serial: int
    shards: tuple[ShardLabel, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(shard.length for shard in self.shards)


@dataclass(frozen=True, slots=True)
class GetShards:
    """Read these shards of this group."""

    group: str
    shards: tuple[ShardRef, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(shard.length for shard in self.shards)


@dataclass(frozen=True, slots=True)
class BulkLimits:
    """Bounds of one connection; both ends hold the other to them."""

    header_bytes: int = 4 << 20  # largest header frame
    shards: int = 4096  # in one request
    shard_bytes: int = 256 << 20  # one shard
    requests: int = 64  # that one connection may have unanswered
    in_flight_bytes: int = 256 << 20  # payload that a client has unanswered; a single larger request goes alone
    connections: int = 256  # of peers that have shown the token; further ones are closed
    strangers: int = 64  # that have not yet: of more, those who have taken longest are closed
    handshake_s: float = 5.0  # from connect to a valid hello
    stall_s: float = 20.0  # without progress in the middle of a frame: the connection is closed


DEFAULT_LIMITS = BulkLimits()


class Incoming(Protocol):
    """A put whose bytes are about to arrive."""

    @property
    def places(self) -> Sequence[memoryview | GhostError]:
        """For each shard the buffer that its bytes go to, or the error that refuses it (its bytes are dropped)."""
        ...

    async def commit(self) -> Sequence[Outcome]:
        """All bytes have arrived: make the shards count, and say for each what became of it."""
        ...

    def abandon(self) -> None:
        """The bytes will not all arrive, or commit was cancelled: give back what is not committed."""
        ...


class Outgoing(Protocol):
    """A get whose bytes are being sent."""

    @property
    def places(self) -> Sequence[memoryview | GhostError]:
        """For each shard its bytes, of the length asked for, held unchanged until release; or why there are none."""
        ...

    def release(self) -> None:
        """The bytes have been sent, or never will be."""
        ...


class BulkHandler(Protocol):
    """What a server does with requests. Must not block; a request that it can't serve at all is refused in places."""

    def put(self, request: PutShards) -> Incoming: ...

    def get(self, request: GetShards) -> Outgoing: ...


class Stream(ABC):
    """A connected, ordered pipe. Each buffer sent is received by exactly one receive or drop of the same size.

    A stream that raised, or one of whose calls was cancelled, is only good for close.
    """

    async def upgrade(self, stall_s: float) -> None:  # noqa: B027 - most backends have nothing to do
        """Both ends have shown the token, nothing else is in flight: set up what strangers must not touch.

        Raises as receive does, or ProtocolError.
        """

    @abstractmethod
    async def send(self, buffers: Sequence[memoryview], stall_s: float) -> None:
        """Send the buffers in order, with one sender at a time; they may change again once it returns.

        Raises PeerLost, or DeadlineExceeded after stall_s without progress.
        """

    @abstractmethod
    async def receive(self, into: Sequence[memoryview], stall_s: float | None) -> None:
        """Fill the buffers, with one receiver at a time. After close or cancellation they are not written any more.

        Raises PeerLost, or DeadlineExceeded after stall_s without progress (None: waits as long as the peer is there).
        """

    @abstractmethod
    async def drop(self, length: int, stall_s: float) -> None:
        """Receive one buffer of this length and forget it, in bounded memory. Raises as receive does."""

    @abstractmethod
    def close(self) -> None:
        """Close at once; waiting calls raise PeerLost. May be called again."""


class Listener(ABC):
    """A place where peers connect."""

    @property
    @abstractmethod
    def address(self) -> str:
        """What a peer passes to connect, for example tcp://127.0.0.1:4711."""

    @abstractmethod
    async def accept(self) -> Stream:
        """Return the next peer's stream."""

    @abstractmethod
    def close(self) -> None:
        """Stop accepting. Streams already given away stay open."""
