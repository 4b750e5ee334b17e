"""Pages and their parity: encoding, restoring, moving, and what stores hold."""

import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from shared.messages.base import Message
from shared.types import PageKey, StoreInfo, pack_ids


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
class Prepared(Message):
    """The spare has the weights that a Prepare asked for."""

    move: int


@dataclass(frozen=True, slots=True)
class PagesCopied(Message):
    """These pages' slices are in the spare's pool; or none of them, for this reason."""

    move: int
    pages: bytes
    reason: str


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
    """Where one parity shard lies, for the coordinator. Part of StripeRestore."""

    shard: int
    bulk_address: str
    checksum: int


@dataclass(frozen=True, slots=True)
class StripeRestore(Message):
    """How to rebuild one page on the ranks `lost`: survivors' slices, and as many of these parity shards as are lost.

    The others are there to be read where one is damaged. None at all: every rank holds the same bytes, so any
    survivor's are copied.
    """

    page: int
    key: PageKey
    lost: tuple[int, ...]
    parity: tuple[ParityShard, ...]
    data_checksums: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StripeKind(Message):
    """What many stripes of a RestorePlan have alike: who lacks them, and the numbers and stores of their shards."""

    lost: tuple[int, ...]
    shards: tuple[int, ...]
    addresses: tuple[str, ...]

    @property
    def sums(self) -> int:
        """Checksums that go with each stripe: of its shards, then of the lost slices; none where nothing is stored."""
        return len(self.shards) + len(self.lost) if self.shards else 0


@dataclass(frozen=True, slots=True)
class RestorePlan(Message):
    """Rebuild these pages in this order: the same plan on every rank. Who decodes answers RestoreDone as it goes.

    Columns, since there are thousands: `pages` as ids, `of_kind` as little-endian uint16, `sums` as uint64, for each
    stripe as many as its kind says. See StripeRestore for what a stripe is.
    """

    epoch: int
    plan: int
    pages: bytes
    keys: tuple[PageKey, ...]
    kinds: tuple[StripeKind, ...]
    of_kind: bytes
    sums: bytes
    tail: bool = False
    """The stripes are single tokens, see ProtectPlan."""

    @classmethod
    def of(cls, epoch: int, plan: int, stripes: Sequence[StripeRestore], tail: bool = False) -> "RestorePlan":
        """The plan of these stripes."""
        kinds: dict[tuple[tuple[int, ...], tuple[int, ...], tuple[str, ...]], int] = {}
        of_kind, sums = array("H"), array("Q")
        for each in stripes:
            shards = tuple([shard.shard for shard in each.parity])
            addresses = tuple([shard.bulk_address for shard in each.parity])
            of_kind.append(kinds.setdefault((each.lost, shards, addresses), len(kinds)))
            if shards:
                sums.extend([shard.checksum for shard in each.parity])
                sums.extend([each.data_checksums[rank] for rank in each.lost])
        if sys.byteorder == "big":
            of_kind.byteswap()
            sums.byteswap()
        pages, keys = pack_ids([each.page for each in stripes]), tuple([each.key for each in stripes])
        return cls(
            epoch,
            plan,
            pages,
            keys,
            tuple(StripeKind(*each) for each in kinds),
            of_kind.tobytes(),
            sums.tobytes(),
            tail,
        )


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
    """These are all the pages there are with keys past `after` up to `upto`: free the shards of any other such key.

    As ReleaseStripes would. An `upto` of b"" is no end. Sent to each store that comes, and when a coordinator has
    learnt what its predecessor left, in as many messages as it takes.
    """

    group: str
    keys: tuple[PageKey, ...]
    epoch: int
    serial: int
    after: bytes = b""
    upto: bytes = b""


@dataclass(frozen=True, slots=True)
class FindShards(Message):
    """Which shards of these stripes are here? Asked where Redis does not answer. Answered by ShardsFound."""

    question: int
    group: str
    keys: tuple[PageKey, ...]


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
