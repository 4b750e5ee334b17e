"""What the coordinator shows of a group: its status, and in words what it waits for. Pure."""

from collections.abc import Iterable

from services.coordinator.membership import Membership
from services.coordinator.pages import Shadow
from services.coordinator.protection import Protection
from services.coordinator.scheduler import Scheduler
from shared.types import ClusterStatus, GroupConfig, ModelInfo, RecoveryRecord

_DETAILS = {
    "assigning": "ranks load their slices",
    "joining": "ranks connect",
    "restoring": "lost KV is decoded from parity",
    "serving": "all requests are served",
}


def cluster_status(
    config: GroupConfig,
    members: Membership,
    protection: Protection,
    scheduler: Scheduler | None,
    model: ModelInfo | None,
    recoveries: Iterable[RecoveryRecord],
) -> ClusterStatus:
    """The group's state now."""
    pool, stores = protection.pool, protection.stores.infos()
    pending = pool.count(Shadow.QUEUED) + pool.count(Shadow.PENDING)
    exposed = pending + pool.count(Shadow.UNPROTECTED)
    safe = members.state == "serving" and config.protection != "none" and stores and not exposed
    losses = config.size if config.protection == "replicate" else config.parity
    return ClusterStatus(
        group=config.group,
        state=members.state,
        detail=detail(members),
        epoch=members.epoch,
        served_name=config.served_name,
        model=model,
        max_model_len=scheduler.max_model_len if scheduler else 0,
        size=config.size,
        parity=config.parity,
        protection=config.protection,
        can_lose=losses if safe else 0,
        workers=members.statuses(),
        stores=stores,
        running=len(scheduler.running) if scheduler else 0,
        waiting=len(scheduler.waiting) if scheduler else 0,
        pages_total=len(pool.pages),
        pages_held=pool.held,
        pages_cached=pool.cached,
        stripes_protected=pool.count(Shadow.PROTECTED),
        stripes_pending=pending,
        stripes_unprotected=pool.count(Shadow.UNPROTECTED),
        unprotected_reason=protection.trouble if exposed else "",
        parity_bytes_stored=protection.parity_bytes,
        recoveries=tuple(recoveries),
    )


def detail(members: Membership) -> str:
    """What the group is doing, or waits for, in words."""
    if members.state != "forming":
        return _DETAILS[members.state]
    vacant, spares = members.ranks.count(None), len(members.spares())
    if vacant > spares:
        loading = sum(not member.ready for member in members.members.values())
        return f"waiting for {vacant - spares} more worker(s); {loading} loading"
    return "beginning a new epoch"
