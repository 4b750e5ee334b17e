"""What the coordinator shows of a group: its status, and in words what it waits for. Pure."""

from collections.abc import Mapping
from dataclasses import replace

from services.coordinator.membership.members import Membership, Pace
from services.coordinator.protection.host import EngineStatus, Host
from services.coordinator.protection.ledger import Parity
from services.coordinator.protection.protection import Protection
from services.coordinator.protection.stores import Stores
from shared.types import ClusterStatus, GroupConfig

_DETAILS = {
    "assigning": "ranks load their slices",
    "joining": "ranks connect",
    "restoring": "lost KV is decoded from parity; requests go on as theirs is back",
    "serving": "all requests are served",
}


def cluster_status(
    config: GroupConfig,
    members: Membership,
    stores: Stores,
    engine: Host | None,
    protection: Protection | None,
    paces: Mapping[str, Pace],
    now: float,
    held_back: str = "",
) -> ClusterStatus:
    """The group's state now. `engine` once the model is known; `held_back`: why no epoch begins though one could."""
    told = ClusterStatus(
        group=config.group,
        state=members.state,
        detail=held_back or detail(members),
        epoch=members.epoch,
        served_name=config.served_name,
        model=None,
        max_model_len=0,
        size=config.size,
        parity=config.parity,
        protection=config.protection,
        can_lose=0,
        reduced_protection=reduced_protection(config, stores),
        workers=members.statuses(paces),
        stores=stores.infos(),
        running=0,
        waiting=0,
        pages_total=0,
        pages_held=0,
        pages_cached=0,
        pages_lost=0,
        stripes_protected=0,
        stripes_pending=0,
        stripes_unprotected=0,
        unprotected_reason="",
        parity_bytes_stored=0,
        recoveries=(),
        now=now,
    )
    if engine is None or protection is None:
        return told
    return _of_engine(told, config, members, engine, protection)


def _of_engine(
    told: ClusterStatus, config: GroupConfig, members: Membership, engine: Host, protection: Protection
) -> ClusterStatus:
    shown, ledger, timeline = engine.status(), protection.ledger, protection.timeline
    pending = ledger.count(Parity.QUEUED) + ledger.count(Parity.PENDING)
    exposed = pending + ledger.count(Parity.UNPROTECTED)
    return replace(
        told,
        engine=shown.kind,
        model=shown.model,
        max_model_len=shown.max_model_len,
        can_lose=can_lose(config, members, protection, shown),
        running=shown.running,
        waiting=shown.waiting,
        pages_total=shown.pages_total,
        pages_held=shown.pages_held,
        pages_cached=shown.pages_cached,
        pages_lost=ledger.lost,
        stripes_protected=ledger.count(Parity.PROTECTED),
        stripes_pending=pending,
        stripes_unprotected=ledger.count(Parity.UNPROTECTED),
        unprotected_reason=protection.encoding.trouble if exposed else "",
        parity_bytes_stored=protection.encoding.parity_bytes,
        recoveries=tuple(timeline.records),
        handover=protection.moves.status(),
        recovering_since=timeline.current.started if timeline.current is not None else None,
        protection_lag_s=max(0.0, told.now - since) if (since := ledger.exposed_since()) is not None else 0.0,
        unprotected_tokens=shown.unprotected_tokens,
        prompt_tokens=shown.prompt_tokens,
        generated_tokens=shown.generated_tokens,
        preemptions=shown.preemptions,
    )


def can_lose(config: GroupConfig, members: Membership, protection: Protection, shown: EngineStatus) -> int:
    """Ranks that may be lost now: none while pages are still lost, or those of running requests have no parity."""
    if members.state != "serving" or protection.ledger.lost or not shown.runs_protected:
        return 0
    if not protection.restoration.redundancy.stored:
        return config.size - 1
    if config.protection == "none" or not protection.encoding.storable:
        return 0
    return config.shards


def reduced_protection(config: GroupConfig, stores: Stores) -> str:
    """Why the loss of one store would cost a stripe several shards; empty where it would not."""
    count = len(stores.open())
    if config.protection != "parity" or not 0 < count < config.parity:
        return ""
    return f"{config.parity} parity shards of each stripe lie in {count} store(s): a store's loss costs several at once"


def detail(members: Membership) -> str:
    """What the group is doing, or waits for, in words."""
    if members.state != "forming":
        return _DETAILS[members.state]
    vacant, spares = members.ranks.count(None), len(members.spares())
    if vacant > spares:
        loading = sum(not member.ready for member in members.members.values())
        return f"waiting for {vacant - spares} more worker(s); {loading} loading"
    return "beginning a new epoch"
