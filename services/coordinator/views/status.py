"""What the coordinator shows of a group: its status, and in words what it waits for. Pure."""

from collections.abc import Mapping
from dataclasses import replace

from services.coordinator.membership.members import Membership, Pace
from services.coordinator.protection.ledger import Shadow
from services.coordinator.protection.stores import Stores
from services.coordinator.scheduling.engine import Serving
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
    serving: Serving | None,
    paces: Mapping[str, Pace],
    now: float,
) -> ClusterStatus:
    """The group's state now. `serving` once the model is known."""
    told = ClusterStatus(
        group=config.group,
        state=members.state,
        detail=detail(members),
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
    return told if serving is None else _while_serving(told, config, members, serving)


def _while_serving(told: ClusterStatus, config: GroupConfig, members: Membership, serving: Serving) -> ClusterStatus:
    pool, scheduler, timeline, protection = serving.pool, serving.scheduler, serving.timeline, serving.protection
    pending = pool.count(Shadow.QUEUED) + pool.count(Shadow.PENDING)
    exposed = pending + pool.count(Shadow.UNPROTECTED)
    return replace(
        told,
        model=serving.model,
        max_model_len=scheduler.max_model_len,
        can_lose=can_lose(config, members, serving),
        running=len(scheduler.running),
        waiting=len(scheduler.waiting),
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
        handover=serving.handover.status(),
        recovering_since=timeline.current.started if timeline.current is not None else None,
        protection_lag_s=max(0.0, told.now - since) if (since := pool.exposed_since()) is not None else 0.0,
        unprotected_tokens=unprotected_tokens(config, serving),
        prompt_tokens=scheduler.prompt_tokens,
        generated_tokens=scheduler.generated_tokens,
        preemptions=scheduler.preemptions,
    )


def can_lose(config: GroupConfig, members: Membership, serving: Serving) -> int:
    """Ranks that may be lost now: none while pages are still lost, or those of running requests have no parity."""
    if members.state != "serving" or config.protection == "none" or not serving.protection.stores.infos():
        return 0
    if serving.pool.lost:
        return 0
    pages = serving.pool.pages
    held = (pages[number] for each in serving.scheduler.running for number in each.pages[: len(each.keys)])
    if any(page.shadow is not Shadow.PROTECTED for page in held):
        return 0
    return config.size if config.protection == "replicate" else config.parity


def reduced_protection(config: GroupConfig, stores: Stores) -> str:
    """Why the loss of one store would cost a stripe several shards; empty where it would not."""
    count = len(stores.open())
    if config.protection != "parity" or not 0 < count < config.parity:
        return ""
    return f"{config.parity} parity shards of each stripe lie in {count} store(s): a store's loss costs several at once"


def unprotected_tokens(config: GroupConfig, serving: Serving) -> int:
    """Tokens of running sequences that would be recomputed, were a rank lost now."""
    pages = serving.pool.pages
    exposed = 0
    for sequence in serving.scheduler.running:
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
