"""The story of each recovery, by phase. Pure: the time is passed in."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from services.coordinator.protection.costs import Return
from services.coordinator.scheduling.scheduler import Sequence
from shared.messages import RestoreDone
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
    fetch_s: float = 0.0
    exchange_s: float = 0.0
    decode_s: float = 0.0
    streams: dict[int, StreamRecovery] = field(default_factory=dict)
    """By sequence number."""
    awaiting: dict[int, int] = field(default_factory=dict)
    """Sequences that have not the KV yet that they had, and how many tokens that were."""


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

    def joined(self, now: float) -> None:
        """The ranks are connected."""
        if self.current is not None:
            self.current.joined = now

    def chosen(self, returns: Iterable[Return]) -> None:
        """How each running sequence comes back."""
        if self.current is not None:
            for each in returns:
                self.current.streams[each.sequence.number] = StreamRecovery(
                    request_id=each.sequence.request.request_id,
                    way=each.way,
                    restored_pages=len(each.stripes),
                    recomputed_tokens=0,
                    expected_restore_s=each.restore_s,
                    expected_recompute_s=each.recompute_s,
                    resumed_s=0.0,
                )

    def decoded(self, pages: int, answers: Iterable[RestoreDone]) -> None:
        """A plan of so many pages is done. A phase took as long as on the rank where it took longest."""
        if self.current is not None:
            answers = list(answers)
            self.current.restored_pages += pages
            self.current.kv_bytes += sum(each.bytes_restored for each in answers)
            self.current.fetch_s += max(each.fetch_s for each in answers)
            self.current.exchange_s += max(each.exchange_s for each in answers)
            self.current.decode_s += max(each.decode_s for each in answers)

    def tail_decoded(self, tokens: int) -> None:
        """So many tokens came back one by one."""
        if self.current is not None:
            self.current.tail_tokens += tokens

    def returned(self, sequence: Sequence, recomputed_tokens: int, now: float) -> None:
        """A sequence takes part in steps again, of which the first ones recompute so many tokens."""
        recovery = self.current
        if recovery is None:
            return
        recovery.recomputed_tokens += recomputed_tokens
        stream = recovery.streams.get(sequence.number)
        if stream is not None:
            if stream.way == "recompute" and not recomputed_tokens:
                stream = replace(stream, way="restore")  # all of it was tail
            resumed_s = 0.0 if sequence.remaining else now - recovery.started
            recovery.streams[sequence.number] = replace(
                stream, recomputed_tokens=recomputed_tokens, resumed_s=resumed_s
            )
        if sequence.remaining:
            recovery.awaiting[sequence.number] = sequence.goal

    def restored(self, now: float) -> list[str]:
        """Every running sequence has returned; what lacks KV is being recomputed. Returns their ways."""
        if self.current is None:
            return []
        self.current.restored = now
        return [stream.way for stream in self.current.streams.values()]

    def progressed(self, running: Iterable[Sequence], epoch: int, now: float) -> bool:
        """A step is done. True when with it the last sequence has the KV that it had."""
        recovery = self.current
        if recovery is None:
            return False
        computed = {each.number: each.computed for each in running}
        for number, goal in list(recovery.awaiting.items()):
            if computed.get(number, goal) >= goal:
                del recovery.awaiting[number]
                if (stream := recovery.streams.get(number)) is not None:
                    recovery.streams[number] = replace(stream, resumed_s=now - recovery.started)
        if recovery.awaiting or not recovery.restored:
            return False
        self._close(epoch, now)
        return True

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
            fetch_s=recovery.fetch_s,
            exchange_s=recovery.exchange_s,
            decode_s=recovery.decode_s,
            streams=tuple(slowest[:STREAMS_TOLD]),
            tail_tokens=recovery.tail_tokens,
            planned=recovery.planned and not recovery.lost,
            detect_s=recovery.detect_s,
            fence_s=recovery.fence_s,
        )
        self.records = [*self.records, record][-RECORDS_KEPT:]
