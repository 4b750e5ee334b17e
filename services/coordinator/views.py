"""What the coordinator shows of a group: its status, and in words what it waits for. Pure."""

from collections.abc import Mapping

from services.coordinator.membership import Membership, Pace
from services.coordinator.pages import Shadow
from services.coordinator.protection import Protection
from services.coordinator.scheduler import Scheduler
from services.coordinator.timeline import Timeline
from shared.types import ClusterStatus, GroupConfig, HandoverStatus, ModelInfo

_DETAILS = {
    "assigning": "ranks load their slices",
    "joining": "ranks connect",
    "restoring": "lost KV is decoded from parity; requests go on as theirs is back",
    "serving": "all requests are served",
}


def cluster_status(
    config: GroupConfig,
    members: Membership,
    protection: Protection,
    scheduler: Scheduler | None,
    model: ModelInfo | None,
    timeline: Timeline,
    paces: Mapping[str, Pace],
    handover: HandoverStatus | None,
    now: float,
) -> ClusterStatus:
    """The group's state now."""
    pool, stores = protection.pool, protection.stores.infos()
    pending = pool.count(Shadow.QUEUED) + pool.count(Shadow.PENDING)
    exposed = pending + pool.count(Shadow.UNPROTECTED)
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
        can_lose=can_lose(config, members, protection, scheduler),
        reduced_protection=reduced_protection(config, protection),
        workers=members.statuses(paces),
        stores=stores,
        running=len(scheduler.running) if scheduler else 0,
        waiting=len(scheduler.waiting) if scheduler else 0,
        pages_total=len(pool.pages),
        pages_held=pool.held,
        pages_cached=pool.cached,
        pages_lost=pool.lost,
        stripes_protected=pool.count(Shadow.PROTECTED),
        stripes_pending=pending,
        stripes_unprotected=pool.count(Shadow.UNPROTECTED),
        unprotected_reason=protection.trouble if exposed else "",
        parity_bytes_stored=protection.parity_bytes,
        recoveries=tuple(timeline.records),
        handover=handover,
        now=now,
        recovering_since=timeline.current.started if timeline.current is not None else None,
        protection_lag_s=max(0.0, now - since) if (since := pool.exposed_since()) is not None else 0.0,
        unprotected_tokens=unprotected_tokens(config, protection, scheduler) if scheduler else 0,
        prompt_tokens=scheduler.prompt_tokens if scheduler else 0,
        generated_tokens=scheduler.generated_tokens if scheduler else 0,
        preemptions=scheduler.preemptions if scheduler else 0,
    )


def can_lose(config: GroupConfig, members: Membership, protection: Protection, scheduler: Scheduler | None) -> int:
    """Ranks that may be lost now: none while pages are still lost, or those of running requests have no parity."""
    if members.state != "serving" or config.protection == "none" or not protection.stores.infos():
        return 0
    if protection.pool.lost:
        return 0
    pages = protection.pool.pages
    running = scheduler.running if scheduler is not None else ()
    held = (pages[number] for each in running for number in each.pages[: len(each.keys)])
    if any(page.shadow is not Shadow.PROTECTED for page in held):
        return 0
    return config.size if config.protection == "replicate" else config.parity


def reduced_protection(config: GroupConfig, protection: Protection) -> str:
    """Why the loss of one store would cost a stripe several shards; empty where it would not."""
    stores = len(protection.stores.open())
    if config.protection != "parity" or not 0 < stores < config.parity:
        return ""
    return (
        f"{config.parity} parity shards of each stripe lie in {stores} store(s): a store's loss costs several at once"
    )


def unprotected_tokens(config: GroupConfig, protection: Protection, scheduler: Scheduler) -> int:
    """Tokens of running sequences that would be recomputed, were a rank lost now."""
    pages = protection.pool.pages
    exposed = 0
    for sequence in scheduler.running:
        kept = 0
        while kept < len(sequence.keys) and pages[sequence.pages[kept]].shadow is Shadow.PROTECTED:
            kept += 1
        exposed += max(0, sequence.computed - kept * config.page_tokens)
    return exposed


def detail(members: Membership) -> str:
    """What the group is doing, or waits for, in words."""
    if members.state != "forming":
        return _DETAILS[members.state]
    vacant, spares = members.ranks.count(None), len(members.spares())
    if vacant > spares:
        loading = sum(not member.ready for member in members.members.values())
        return f"waiting for {vacant - spares} more worker(s); {loading} loading"
    return "beginning a new epoch"
