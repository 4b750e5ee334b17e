"""The end of an epoch, and the beginning of the next one.

A failure goes down through `give_up` or `broken`, `_interrupt`, `go_on`, `fenced` and `_form`, as far as the question
what can be restored; the answer and the ranks that join bring it back through `Protection.advance` to the engine.
"""

import logging

from services.coordinator.events import NextEpoch
from services.coordinator.membership.brake import Brake
from services.coordinator.membership.detector import Detector
from services.coordinator.membership.members import Formation, Membership
from services.coordinator.membership.workers import Workers
from services.coordinator.outbox import Outbox
from services.coordinator.protection.host import Host
from services.coordinator.protection.protection import Protection
from services.coordinator.protection.stores import Stores
from services.coordinator.views.metrics import LossKind, Metrics
from services.coordinator.views.timeline import Recovery
from shared import logs
from shared.messages import Assign, EpochNow, Join, Joined, RankFailed, Rendezvous, StandBy, StepFailed, StepRaised
from shared.types import GroupConfig

log = logging.getLogger(__name__)

BROKEN_GRACE_S = 1.0
"""After a rank's collective failed: how long to wait for news of who is lost, before all ranks join anew."""
RAISED_GRACE_S = 0.2
"""After a step raised an error on a rank: how long the others have to say that it did there too, or to be lost."""


class Epochs:
    """The epochs of one group, since the model is known. `born`: when this coordinator started."""

    def __init__(
        self,
        config: GroupConfig,
        membership: Membership,
        workers: Workers,
        detector: Detector,
        stores: Stores,
        engine: Host,
        protection: Protection,
        outbox: Outbox,
        metrics: Metrics,
        born: float,
    ):
        self._engine = engine
        self._protection = protection
        self._config = config
        self._membership = membership
        self._workers = workers
        self._detector = detector
        self._stores = stores
        self._outbox = outbox
        self._metrics = metrics
        self._born = born
        self._fencing: float | None = None  # since when an epoch is asked for
        self._broken_since: float | None = None
        self._cut_off: set[int] = set()  # ranks that can't reach rank 0, in this epoch
        self._raised: dict[str, StepRaised] = {}  # by worker, of the step in flight
        self._raised_since = 0.0
        self.brake = Brake()

    # -- an epoch ends -----------------------------------------------------------------------------------------------

    def give_up(self, name: str, reason: str, kind: LossKind) -> None:
        """A worker is lost; if it held a rank, the epoch is over."""
        rank, silent_s = self._workers.lose(name, reason, kind)
        self._protection.moves.gone(name)
        if rank is not None:
            self._metrics.rank_failures.labels(kind).inc()
            recovery = self._interrupt(f"rank {rank} ({name}): {reason}")
            recovery.lost.add(rank)
            recovery.detect_s = max(recovery.detect_s, silent_s)

    def failed(self, name: str, message: RankFailed) -> None:
        """A rank can't go on in this epoch."""
        if message.fatal:
            self.give_up(name, message.reason, "failed")
        elif self._membership.state != "forming":
            log.info("rank %d: %s", message.rank, message.reason)
            self._detector.failed(name)
            self._broken_since = self._outbox.now if self._broken_since is None else self._broken_since
            if message.cut_off:
                self._cut_off.add(message.rank)

    def step_raised(self, name: str, message: StepRaised) -> None:
        """A step raised an error on a rank. Where it did so on all, at the same place, the epoch goes on."""
        if not self._membership.stepping:
            return
        self._raised_since = self._raised_since if self._raised else self._outbox.now
        self._raised[name] = message
        places = {(each.step, each.collectives) for each in self._raised.values()}
        if len(self._raised) == self._config.size and len(places) == 1:
            self._one_failed(goes_on=True)

    def _one_failed(self, *, goes_on: bool) -> None:
        """A step has failed, and no process is lost: all but what is to blame try again, in a new epoch if need be."""
        raised, self._raised = self._raised, {}
        first = next(iter(raised.values()))
        log.warning("step %d failed on %d rank(s): %s", first.step, len(raised), first.reason)
        self._metrics.failed_steps.inc()
        blame = self._engine.step_failed(first.step, raised.keys(), first.reason)
        if blame.ended:
            self.brake.progressed()
        for name in blame.workers:
            self.give_up(name, first.reason, "failed")
        if not goes_on and self._membership.state != "forming":
            self.broken(f"step {first.step} failed: {first.reason}")

    def step_failed(self, message: StepFailed) -> None:
        """A hosted engine could not finish a step: its workers that are to blame are lost, or all form again."""
        for name in message.culprits:
            if name in self._membership.members:
                self.give_up(name, message.reason, "failed")
        if self._membership.state != "forming":
            self.broken(message.reason)

    def tick(self) -> None:
        """Give up an epoch in which nothing moves, or in which ranks can't work together."""
        if stuck := self._engine.stuck():
            self.broken(stuck)
        if self._broken_since is not None and self._outbox.now - self._broken_since > BROKEN_GRACE_S:
            self._collective_failed()
        if self._raised and self._outbox.now - self._raised_since > RAISED_GRACE_S:
            self._one_failed(goes_on=False)

    def _collective_failed(self) -> None:
        """Ranks could not go on, and nobody is known to be lost: one is cut off from the others, or all try again."""
        joining = self._membership.state in ("assigning", "joining")
        if lost := self._membership.cut_off(self._cut_off):
            for name in lost:
                self.give_up(name, "its host and those of other ranks can't reach each other", "cut off")
        elif (failing := self._detector.cut_off(self._outbox.now, joining=joining)) is not None:
            self.give_up(failing, "it can't work with its peers, though it beats", "cut off")
        else:
            self.broken("a collective failed, and nobody is known to be lost")

    def broken(self, reason: str) -> None:
        """The epoch can't go on, though nobody is known to be lost: form again."""
        log.warning("the epoch is broken: %s", reason)
        self._interrupt(reason)
        self._membership.restart(reason)

    def known(self, epoch: int) -> None:
        """What Redis has. A newer epoch than this group's, of an advance whose answer was lost, fences it off."""
        if self._fencing is None and epoch > self._membership.epoch:
            self.broken(f"Redis is at epoch {epoch} already")

    def _hand_over(self) -> None:
        """Between two steps: the last pages of a rank that moves are copied, then the epoch ends for the next one."""
        moves = self._protection.moves
        if not moves.closing or not self._engine.still():
            return
        moves.close()
        if (move := moves.switch()) is not None:
            self.brake.progressed()
            recovery = self._interrupt(f"rank {move.rank} moves from {move.old} to {move.new}")
            recovery.planned, recovery.started = True, move.held_since

    def _interrupt(self, reason: str) -> Recovery:
        """The epoch is over: nothing in flight counts any more."""
        self._broken_since = None
        self._cut_off.clear()
        self._raised.clear()
        self.brake.ended(self._outbox.now, reason)
        self._engine.quiesce()
        self._protection.interrupted()
        return self._protection.timeline.interrupted(reason, self._membership.epoch, self._outbox.now)

    # -- the next one begins -----------------------------------------------------------------------------------------

    def go_on(self) -> None:
        """After each event: what can begin begins, a move, an epoch or a step."""
        self._hand_over()
        now = self._outbox.now
        may_begin = self._engine.ready and not self.brake.holds(now) and self._membership.can_form(now)
        if self._fencing is None and may_begin:
            self._fencing = now
            self._outbox.ask(NextEpoch(self._membership.newest_epoch))
        self._engine.go_on()

    def fenced(self, epoch: int) -> None:
        """Redis knows the new epoch: whatever is of an older one is refused from now on."""
        now, newest = self._outbox.now, self._membership.newest_epoch
        if epoch <= newest:  # a worker came meanwhile that was in a newer one
            self._outbox.ask(NextEpoch(newest))
            return
        began, self._fencing = self._fencing, None
        if (recovery := self._protection.timeline.current) is not None and began is not None:
            recovery.fence_s += now - began
        if self._engine.ready and self._membership.can_form(now):
            self._form(self._membership.form(epoch, now))
        else:
            self._membership.epoch = epoch

    def _form(self, formation: Formation) -> None:
        epoch, members = formation.epoch, self._membership.members.values()
        logs.epoch_is(epoch)
        self._detector.epoch_begins()
        self.brake.began(self._outbox.now)
        self._protection.formed(formation, self._born)
        self._engine.place(formation)
        self._stores.send(EpochNow(self._config.group, epoch))
        if not self._protection.encoding.begun:
            self._protection.encoding.begin()
        for rank, name in enumerate(formation.ranks):
            self._outbox.to_worker(name, Assign(epoch, rank, self._config.size, self._communicator()))
        for member in members:
            if member.ready and member.rank is None:
                self._outbox.to_worker(member.name, StandBy(epoch, hold=not member.cordoned))
        log.info("the epoch begins: %s", ", ".join(formation.ranks))
        self._outbox.changed = True
        self._protection.restoration.plan()

    def _communicator(self) -> str:
        if self._config.communicator != "auto":
            return self._config.communicator
        if self._membership.on_gpus():
            return "nccl"
        return "shm" if self._membership.one_host() else "gloo"

    def rendezvous(self, message: Rendezvous) -> None:
        """Rank 0 has opened the meeting points: the ranks connect."""
        if self._membership.rendezvous(message.epoch):
            join = Join(message.epoch, message.model_address, message.exchange_address)
            self._outbox.to_ranks(join)
            log.debug("the ranks connect")

    def joined(self, name: str, message: Joined) -> None:
        """A rank is connected; with the last one, sequences that lack nothing go on."""
        timeline = self._protection.timeline
        if message.epoch == self._membership.epoch and (recovery := timeline.current) is not None:
            recovery.weights_s = max(recovery.weights_s, message.weights_s)
        if self._membership.joined(message.epoch, name):
            timeline.joined(self._outbox.now)
            log.debug("the ranks are connected")
            self._protection.advance()
