"""What there is once the model is known: the page pool, requests and steps, protection, restoration, moves of ranks.

`step` sends one step to all ranks, `step_done` takes its result; `advance` lets sequences go on that have come back
after a loss.
"""

import logging

from services.coordinator.events import StripesFound
from services.coordinator.membership.members import Membership
from services.coordinator.outbox import Outside
from services.coordinator.protection.background import CachedPages
from services.coordinator.protection.costs import Rates
from services.coordinator.protection.encoding import Protection
from services.coordinator.protection.ledger import PagePool
from services.coordinator.protection.moves import Handover
from services.coordinator.protection.restoration import Restoration
from services.coordinator.protection.stores import Stores
from services.coordinator.protection.tails import Tails
from services.coordinator.scheduling.requests import Requests
from services.coordinator.scheduling.scheduler import Scheduler
from services.coordinator.views.metrics import Metrics
from services.coordinator.views.timeline import Timeline
from services.coordinator.views.traces import Traces, tell_recovery
from shared.config import CoordinatorSettings
from shared.messages import PagesCopied, ProtectDone, RestoreDone, StepDone, StepPlan, WorkerReady
from shared.tracing import Tracing
from shared.types import GroupConfig, RecoveryRecord

log = logging.getLogger(__name__)

RESTORING_STEP_TOKENS = 64
"""Tokens a step while pages are restored: nobody whose pages are back waits long behind another's prefill."""


class Serving:
    """One model served by one group."""

    def __init__(
        self,
        config: GroupConfig,
        settings: CoordinatorSettings,
        ready: WorkerReady,
        membership: Membership,
        stores: Stores,
        outside: Outside,
        metrics: Metrics,
        tracing: Tracing,
    ):
        self.model = ready.model
        room = ready.pages * config.page_tokens
        limit = min(self.model.max_positions, room, settings.max_model_len or room)
        acks = config.size if config.protection == "replicate" else 1
        self.pool = PagePool(ready.pages, protect=config.protection != "none", acks=acks)
        self.pool.now = outside.now
        self.scheduler = Scheduler(
            self.pool,
            page_tokens=config.page_tokens,
            max_step_tokens=config.max_step_tokens,
            max_batch=config.max_batch,
            max_waiting=settings.max_waiting,
            max_model_len=limit,
            eos_token_ids=self.model.eos_token_ids,
        )
        tails = Tails(self.scheduler) if settings.protect_tail and config.protection == "parity" else None
        self.timeline = Timeline()
        self.rates = Rates()
        self.traces = Traces(tracing, self.pool, outside)
        self.protection = Protection(config, membership, self.pool, tails, stores, outside)
        self.requests = Requests(self.scheduler, self.model, config.size, outside, self.traces)
        self.restoration = Restoration(
            config, self.model, membership, self.scheduler, tails, stores, self.timeline, self.rates, outside,
            always=settings.restore == "always",
        )  # fmt: skip
        self.cached = CachedPages(
            config, self.model.page_bytes, membership, self.pool, stores, self.restoration, outside
        )
        self.handover = Handover(membership, self.pool, self.scheduler, self.model.page_bytes, outside)
        self._membership = membership
        self._outside = outside
        self._metrics = metrics
        self._tracing = tracing
        self._step_timeout_s = settings.step_timeout_s
        self._step = 0
        self._step_started = 0.0
        self._step_tokens = 0
        log.info("model %s, %d pages of %d tokens, sequences to %d", self.model.architecture, ready.pages,
                 config.page_tokens, limit)  # fmt: skip

    # -- steps -------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Schedule one step and send it to all ranks, if the ranks are there and none is in flight."""
        if not self._membership.stepping or self.scheduler.busy or self.handover.closing:
            return
        self.requests.ask_digests(self._membership.epoch)
        sequences = self.scheduler.plan(RESTORING_STEP_TOKENS if self._membership.state == "restoring" else None)
        if sequences:
            self._step += 1
            self.traces.planned(self.scheduler.running)
            self._step_started = self._outside.now
            self._step_tokens = sum(len(each.tokens) // 4 for each in sequences)
            self._outside.to_ranks(StepPlan(self._membership.epoch, self._step, sequences))

    def step_done(self, done: StepDone) -> None:
        """The first rank's answer counts: all ranks draw the same."""
        if done.step != self._step:
            return
        self._metrics.step_done(done)
        if not self.scheduler.busy:
            return
        self.rates.saw_prefill(self._step_tokens, done.seconds)
        for output in self.scheduler.complete(done.samples):
            self.requests.deliver(output)
        self.protection.step_done(self._step)
        self._progressed()

    @property
    def busy_since(self) -> float | None:
        """Since when a step has been in flight; None if none is."""
        return self._step_started if self._membership.stepping and self.scheduler.busy else None

    def stuck(self) -> str:
        """Why the step in flight is to be given up; empty while it is not."""
        since = self.busy_since
        if since is None or self._outside.now - since <= self._step_timeout_s:
            return ""
        return f"step {self._step} made no progress for {self._step_timeout_s:.0f} s"

    # -- other answers of ranks --------------------------------------------------------------------------------------

    def protect_done(self, done: ProtectDone) -> None:
        """A rank tells what became of the stripes that it encoded."""
        self._metrics.protect_done(done)
        self.protection.done(done)
        self.traces.protected()

    def restore_done(self, done: RestoreDone) -> None:
        """A rank's part in a restore is over."""
        self._metrics.restore_done(done)
        self.restoration.done(done)
        self.advance()

    def copied(self, message: PagesCopied) -> None:
        """The successor of a rank that moves has pages."""
        self.handover.copied(message, self._outside.now)

    # -- time --------------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """What waits for its time goes on."""
        now = self._outside.now
        if self._membership.stepping:
            self.protection.retry(now)
        if self._membership.state == "serving" and self.timeline.current is None:
            self.handover.tick(now)
        self.cached.tick()

    def excuse(self, away_s: float) -> None:
        """This process was away for so long: no step was late meanwhile."""
        self._step_started += away_s

    # -- loss and return ---------------------------------------------------------------------------------------------

    def interrupted(self) -> None:
        """The epoch is over: nothing in flight counts any more."""
        self.scheduler.rollback()
        self.requests.interrupted()
        self.restoration.interrupted()
        self.cached.interrupted()
        self.handover.interrupted()
        self.protection.interrupted()

    def restorable(self, epoch: int, found: StripesFound) -> None:
        """The index told which of the lost pages of running sequences can be restored in this epoch."""
        self.restoration.planned(epoch, found)
        self.advance()

    def advance(self) -> None:
        """Let sequences go on whose KV is back as far as it will be; with the last one, serve as usual again."""
        if not self._membership.stepping:
            return
        now = self._outside.now
        if self.restoration.settle(now) and self._membership.state == "restoring":
            self.restoration.measured(now)
            self._membership.restored()
            self.protection.resumed()
            for way in self.timeline.restored(now):
                self._metrics.recovered.labels(way).inc()
            log.info("serving", extra={"cached_pages_lost": self.pool.lost})
            if self.timeline.current is None:
                self.cached.begin()
            self._outside.changed = True
        self._progressed()

    def _progressed(self) -> None:
        """Close the recovery's record when every sequence has the KV it had; then the cache's turn has come."""
        if self.timeline.progressed(self.scheduler.running, self._membership.epoch, self._outside.now):
            self._recovered(self.timeline.records[-1])
            self.cached.begin()
            self._outside.changed = True

    def _recovered(self, record: RecoveryRecord) -> None:
        self._metrics.recovery_ended(record)
        tell_recovery(self._tracing, record)
        if record.planned:
            log.info("a rank was moved", extra={"stall_s": round((record.ended or 0.0) - record.started, 4)})
            return
        phases = {f"{phase}_s": round(seconds, 4) for phase, seconds in record.phases()}
        log.info("recovered", extra={"lost_ranks": record.lost_ranks, "streams": record.sequences} | phases)

    def check(self) -> None:
        """Raise AssertionError unless pages and page tables agree."""
        self.scheduler.check()
