"""Each recovery by phase, as records and as traces. Pure: the time is passed in."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from services.coordinator.protection.costs import Choice
from services.coordinator.protection.host import Returned
from shared.messages import RestoreDone
from shared.tracing import Tracing
from shared.types import RecoveryRecord, StreamRecovery

RECORDS_KEPT = 32
STREAMS_TOLD = 16
"""Streams that a record tells of, those that waited longest."""


@dataclass(slots=True)
class Recovery:
    """A recovery under way. Times are 0 until they are known."""

    started: float
    reason: str
    planned: bool = False
    lost: set[int] = field(default_factory=set)
    joined: float = 0.0
    detect_s: float = 0.0
    fence_s: float = 0.0
    weights_s: float = 0.0
    restored: float = 0.0
    """When the last running sequence had all pages back that can be restored."""
    restored_pages: int = 0
    tail_tokens: int = 0
    recomputed_tokens: int = 0
    kv_bytes: int = 0
    fetch_s: dict[int, float] = field(default_factory=dict)
    """Seconds by rank that decodes; likewise the two below."""
    exchange_s: dict[int, float] = field(default_factory=dict)
    decode_s: dict[int, float] = field(default_factory=dict)
    streams: dict[int, StreamRecovery] = field(default_factory=dict)
    """By number of the run."""
    awaiting: dict[int, int] = field(default_factory=dict)
    """Runs that have not the KV yet that they had, and how many tokens that were."""


class Timeline:
    """The recovery under way, if one, and the records of the last ones."""

    def __init__(self) -> None:
        self.records: list[RecoveryRecord] = []
        self.current: Recovery | None = None

    def interrupted(self, reason: str, epoch: int, now: float) -> Recovery:
        """An epoch ended. Losses until all that can be restored is belong to one recovery."""
        if self.current is None or self.current.restored:
            self._close(epoch, now)
            self.current = Recovery(now, reason)
        return self.current

    def explained(self, worker: str, why: str) -> None:
        """Why a worker was lost is better known now than when its recovery began."""

        def reason(told: str) -> str:
            rank, mark, _ = told.partition(f"({worker}): ")
            return rank + mark + why if mark else told

        if self.current is not None:
            self.current.reason = reason(self.current.reason)
        self.records = [replace(record, reason=reason(record.reason)) for record in self.records]

    def joined(self, now: float) -> None:
        """The ranks are connected."""
        if self.current is not None:
            self.current.joined = now

    def chosen(self, choice: Choice) -> None:
        """How a run comes back, or so much of it."""
        if self.current is not None:
            self.current.streams[choice.run.number] = StreamRecovery(
                request_id=choice.run.request_id,
                way=choice.way,
                restored_pages=choice.pages,
                recomputed_tokens=0,
                expected_restore_s=choice.restore_s,
                expected_recompute_s=choice.recompute_s,
                resumed_s=0.0,
            )

    def decoded(self, progress: RestoreDone) -> None:
        """A rank has decoded some pages, and took this long for it."""
        if self.current is not None:
            self.current.kv_bytes += progress.bytes_restored
            for spent, seconds in (
                (self.current.fetch_s, progress.fetch_s),
                (self.current.exchange_s, progress.exchange_s),
                (self.current.decode_s, progress.decode_s),
            ):
                spent[progress.rank] = spent.get(progress.rank, 0.0) + seconds

    def page_restored(self) -> None:
        """A page is whole again."""
        if self.current is not None:
            self.current.restored_pages += 1

    def tail_decoded(self, tokens: int) -> None:
        """So many tokens came back one by one."""
        if self.current is not None:
            self.current.tail_tokens += tokens

    def returned(self, run: int, returned: Returned, now: float) -> None:
        """A run takes part in steps again, of which the first ones recompute what it lacks."""
        recovery = self.current
        if recovery is None:
            return
        recovery.recomputed_tokens += returned.recomputed
        stream = recovery.streams.get(run)
        if stream is not None:
            if stream.way == "recompute" and not returned.recomputed:
                stream = replace(stream, way="restore")  # all of it was tail
            resumed_s = 0.0 if returned.remaining else now - recovery.started
            recovery.streams[run] = replace(stream, recomputed_tokens=returned.recomputed, resumed_s=resumed_s)
        if returned.remaining:
            recovery.awaiting[run] = returned.goal

    def restored(self, now: float) -> list[str]:
        """Every run has returned; what lacks KV is being recomputed. Returns their ways."""
        if self.current is None:
            return []
        self.current.restored = now
        return [stream.way for stream in self.current.streams.values()]

    def progressed(self, computed: Mapping[int, int], epoch: int, now: float) -> RecoveryRecord | None:
        """A step is done; `computed`: tokens with KV, by run. With the last run that has what it had: the record."""
        recovery = self.current
        if recovery is None:
            return None
        for number, goal in list(recovery.awaiting.items()):
            if computed.get(number, goal) >= goal:
                del recovery.awaiting[number]
                if (stream := recovery.streams.get(number)) is not None:
                    recovery.streams[number] = replace(stream, resumed_s=now - recovery.started)
        if recovery.awaiting or not recovery.restored:
            return None
        self._close(epoch, now)
        return self.records[-1]

    def _close(self, epoch: int, now: float) -> None:
        recovery, self.current = self.current, None
        if recovery is None or not recovery.restored:
            return
        slowest = sorted(recovery.streams.values(), key=lambda each: -each.resumed_s)
        record = RecoveryRecord(
            epoch=epoch,
            reason=recovery.reason,
            lost_ranks=tuple(sorted(recovery.lost)),
            started=recovery.started,
            regroup_s=recovery.joined - recovery.started - recovery.weights_s,
            weights_s=recovery.weights_s,
            restore_s=recovery.restored - recovery.joined,
            recompute_s=now - recovery.restored,
            ended=now,
            restored_pages=recovery.restored_pages,
            recomputed_tokens=recovery.recomputed_tokens,
            kv_bytes_restored=recovery.kv_bytes,
            sequences=len(recovery.streams),
            fetch_s=max(recovery.fetch_s.values(), default=0.0),
            exchange_s=max(recovery.exchange_s.values(), default=0.0),
            decode_s=max(recovery.decode_s.values(), default=0.0),
            streams=tuple(slowest[:STREAMS_TOLD]),
            tail_tokens=recovery.tail_tokens,
            planned=recovery.planned and not recovery.lost,
            detect_s=recovery.detect_s,
            fence_s=recovery.fence_s,
        )
        self.records = [*self.records, record][-RECORDS_KEPT:]


def tell_recovery(tracing: Tracing, record: RecoveryRecord) -> None:
    """One recovery, or planned move, as a trace: its phases in order, then resume, with the step that ends it."""
    if not tracing.on or record.ended is None:
        return
    at = record.started - record.detect_s
    told: dict[str, str | int] = {
        "ghostserve.epoch": record.epoch,
        "ghostserve.lost_ranks": ",".join(map(str, record.lost_ranks)),
        "ghostserve.reason": record.reason,
        "ghostserve.restored_pages": record.restored_pages,
        "ghostserve.recomputed_tokens": record.recomputed_tokens,
    }
    span = tracing.span("move" if record.planned else "recovery", start=at, attributes=told)
    for phase, seconds in record.phases():
        span.child(phase, at, at + seconds)
        at += seconds
    span.child("resume", at, max(at, record.ended), {"ghostserve.streams": record.sequences})
    span.end(at=max(at, record.ended))
