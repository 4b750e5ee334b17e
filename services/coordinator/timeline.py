"""The story of each recovery, by phase. Pure: the time is passed in."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from services.coordinator.scheduler import Sequence
from shared.types import RecoveryRecord

RECORDS_KEPT = 32


@dataclass(slots=True)
class Recovery:
    """A recovery under way. `awaiting` maps sequences to the tokens that must have KV again."""

    started: float
    reason: str
    lost: set[int] = field(default_factory=set)
    joined: float = 0.0
    detect_s: float = 0.0
    fence_s: float = 0.0
    weights_s: float = 0.0
    resumed: float = 0.0
    restored_pages: int = 0
    recomputed_tokens: int = 0
    kv_bytes: int = 0
    sequences: int = 0
    awaiting: dict[int, int] = field(default_factory=dict)


class Timeline:
    """The recovery under way, if one, and the records of the last ones."""

    def __init__(self) -> None:
        self.records: list[RecoveryRecord] = []
        self.current: Recovery | None = None

    def interrupted(self, reason: str, epoch: int, now: float) -> Recovery:
        """An epoch ended. Losses until the group serves again belong to one recovery."""
        if self.current is None or self.current.resumed:
            self._close(epoch, now)
            self.current = Recovery(now, reason)
        return self.current

    def resumed(self, sequences: Iterable[Sequence], recomputed_tokens: int, now: float) -> None:
        """The group serves; what lacks KV is being recomputed."""
        if self.current is not None:
            behind = {each.number: each.goal for each in sequences}
            self.current.resumed = now
            self.current.recomputed_tokens = recomputed_tokens
            self.current.sequences = len(behind)
            self.current.awaiting = behind

    def progressed(self, running: Iterable[Sequence], epoch: int, now: float) -> bool:
        """A step is done. True when with it the last sequence has the KV that it had."""
        recovery = self.current
        if recovery is None or not recovery.resumed:
            return False
        computed = {each.number: each.computed for each in running}
        recovery.awaiting = {
            number: goal for number, goal in recovery.awaiting.items() if computed.get(number, goal) < goal
        }
        if recovery.awaiting:
            return False
        self._close(epoch, now)
        return True

    def _close(self, epoch: int, now: float) -> None:
        recovery, self.current = self.current, None
        if recovery is None or not recovery.resumed:
            return
        record = RecoveryRecord(
            epoch=epoch,
            reason=recovery.reason,
            lost_ranks=tuple(sorted(recovery.lost)),
            started=recovery.started,
            regroup_s=recovery.joined - recovery.started - recovery.weights_s,
            weights_s=recovery.weights_s,
            restore_s=recovery.resumed - recovery.joined,
            recompute_s=now - recovery.resumed,
            ended=now,
            restored_pages=recovery.restored_pages,
            recomputed_tokens=recovery.recomputed_tokens,
            kv_bytes_restored=recovery.kv_bytes,
            sequences=recovery.sequences,
            detect_s=recovery.detect_s,
            fence_s=recovery.fence_s,
        )
        self.records = [*self.records, record][-RECORDS_KEPT:]
