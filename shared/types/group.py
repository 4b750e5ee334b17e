"""What a group is, and what it serves."""

from dataclasses import dataclass
from typing import Literal

Protection = Literal["parity", "replicate", "none"]
"""parity: m parity shards a stripe. replicate: a raw copy of each rank's page, shard k + rank of its stripe; the usual
checkpoint, which parity is compared with. none: a loss is recomputed."""
GroupState = Literal["forming", "assigning", "joining", "restoring", "serving"]


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
    engine: Literal["embedded", "hosted"] = "embedded"
    """Who schedules: the coordinator, or an engine of its own that dials."""

    @property
    def shards(self) -> int:
        """Stored of a complete stripe; as many ranks may be lost at once."""
        return self.size if self.protection == "replicate" else self.parity

    @property
    def encoders(self) -> int:
        """Ranks that put shards of a stripe, each as many."""
        return self.size if self.protection == "replicate" else 1


@dataclass(frozen=True, slots=True)
class StoreInfo:
    """A parity store that is alive. A new incarnation has none of the bytes of the one before."""

    store_id: str
    incarnation: str
    bulk_address: str
    admin_url: str
    capacity_bytes: int
