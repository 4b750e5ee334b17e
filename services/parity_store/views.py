"""What the admin endpoint answers. The OpenAPI document is made from these."""

from dataclasses import dataclass

from services.parity_store.upkeep import Scrub


@dataclass(frozen=True, slots=True)
class ShardView:
    """One shard as the admin endpoint shows it."""

    group: str
    number: int
    k: int
    m: int
    epoch: int
    bytes: int
    checksum: str
    data_checksums: list[str]
    age_s: float
    readers: int


@dataclass(frozen=True, slots=True)
class StatusView:
    """What GET /admin/status answers."""

    store_id: str
    incarnation: str
    bulk_address: str
    connected: bool
    index: str
    uptime_s: float
    capacity_bytes: int
    used_bytes: int
    stripes: int
    shards: int
    index_queue: int
    epochs: dict[str, int]
    totals: dict[str, int]
    draining: bool
    scrub: Scrub


@dataclass(frozen=True, slots=True)
class StripeView:
    """A stripe's shards in this store."""

    page_key: str
    shards: list[ShardView]


@dataclass(frozen=True, slots=True)
class StripesView:
    """One page of GET /admin/stripes."""

    stripes: list[StripeView]
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class ReleasedView:
    """What DELETE of a stripe answers."""

    page_key: str
    released_shards: int


@dataclass(frozen=True, slots=True)
class DrainView:
    """What POST /admin/drain answers: how many shards are still here."""

    draining: bool
    shards: int


@dataclass(frozen=True, slots=True)
class CapacityView:
    """What PUT /admin/capacity answers."""

    capacity_bytes: int
    used_bytes: int
