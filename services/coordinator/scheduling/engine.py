"""The embedded engine: requests, batches and page tables are here, the model is at the workers. A host of protection.

`step` sends steps to all ranks, `step_done` takes the result of the oldest in flight.
"""

import logging
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from services.coordinator.membership.members import Formation, Held, Membership
from services.coordinator.outbox import Outbox
from services.coordinator.protection.host import Blame, EngineStatus, Host, IdlePages, Returned
from services.coordinator.protection.protection import Protection
from services.coordinator.protection.rates import StepBound, Work
from services.coordinator.protection.stores import Stores
from services.coordinator.scheduling.failed_steps import FailedSteps
from services.coordinator.scheduling.prefix_cache import PrefixCache
from services.coordinator.scheduling.requests import Requests
from services.coordinator.scheduling.scheduler import Request, Scheduler
from services.coordinator.views.metrics import Metrics
from services.coordinator.views.traces import Traces
from shared.config import CoordinatorSettings
from shared.messages import Batch, DigestDone, Heartbeat, NotePages, StepDone, StepPlan, WorkerReady
from shared.tracing import Tracing
from shared.types import GroupConfig, PageKey, id_array, pack_ids, pack_keys

log = logging.getLogger(__name__)

RESTORING_STEP_TOKENS = 64
"""Tokens a step while pages are restored: nobody whose pages are back waits long behind another's prefill."""


@dataclass(frozen=True, slots=True)
class Sent:
    """A step in flight."""

    number: int
    work: Work


class EmbeddedEngine(Host):
    """One model served by one group, and its protection."""

    def __init__(
        self,
        config: GroupConfig,
        settings: CoordinatorSettings,
        ready: WorkerReady,
        membership: Membership,
        stores: Stores,
        outbox: Outbox,
        metrics: Metrics,
        tracing: Tracing,
    ):
        self.model = ready.model
        self.pages = ready.pages
        room = ready.pages * config.page_tokens
        limit = min(self.model.max_positions, room, settings.max_model_len or room)
        self.protection = Protection(
            config, settings, self, ready.pages, self.model.page_bytes, config.page_tokens, membership, stores, outbox,
            metrics, tracing, step_tokens=config.max_step_tokens,
        )  # fmt: skip
        self.cache = PrefixCache(ready.pages, self.protection)
        self.scheduler = Scheduler(
            self.cache,
            page_tokens=config.page_tokens,
            max_step_tokens=config.max_step_tokens,
            max_batch=config.max_batch,
            max_waiting=settings.max_waiting,
            max_model_len=limit,
            eos_token_ids=self.model.eos_token_ids,
            bound=StepBound(self.protection.rates, settings.max_step_s),
        )
        self.traces = Traces(tracing, self.protection.ledger, outbox)
        self.requests = Requests(self.scheduler, self.model, config.size, outbox, self.traces)
        self._failed_steps = FailedSteps(settings.step_tries)
        self._ranks = config.size
        self._membership = membership
        self._outbox = outbox
        self._metrics = metrics
        self._step_timeout_s = settings.step_timeout_s
        self._steps_wanted = settings.steps_in_flight
        self._steps_in_flight = 1
        """At most."""
        self._steps = 0
        self._in_flight: deque[Sent] = deque()
        """As the scheduler's, in order."""
        self._step_started = 0.0
        """When the oldest of them was sent, or the one before it came back."""
        self._all_planned = False
        """Whether nothing is left to plan before a step comes back."""
        log.info("model %s, %d pages of %d tokens, requests to %d", self.model.architecture, ready.pages,
                 config.page_tokens, limit)  # fmt: skip

    # -- steps -------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Schedule steps and send them to all ranks, as many as may be in flight, if the ranks are there."""
        if not self._membership.stepping or self.protection.moves.closing:
            return
        while self._may_plan():
            self.requests.ask_digests(self._membership.epoch)
            batch = self._plan(RESTORING_STEP_TOKENS if self._membership.state == "restoring" else None)
            if not batch.sequences:
                self._all_planned = bool(self._in_flight)
                return
            if self.traces.on:
                self.traces.planned(self.scheduler.of_step(-1))
            if not self._in_flight:
                self._step_started = self._outbox.now
            self._steps += 1
            self._in_flight.append(Sent(self._steps, _work(batch)))
            self._outbox.to_ranks(StepPlan(self._membership.epoch, self._steps, batch))

    def _may_plan(self) -> bool:
        """Whether one more step may be in flight. Who may be to blame for a step that failed runs alone in one."""
        if not self._in_flight:
            return True
        if len(self._in_flight) >= self._steps_in_flight or self._all_planned:
            return False
        return not self._failed_steps.doubted()

    def _plan(self, limit: int | None) -> Batch:
        """The next step: of all that can run, or, after steps that failed, of one request that may be to blame."""
        if self._failed_steps.doubted():
            known = {each.request_id for each in self.scheduler.requests()}
            able = {
                each.request_id: each for each in self.scheduler.running.values() if each.remaining and not each.held
            }
            if (suspect := self._failed_steps.next(known, able)) is not None:
                return self.scheduler.plan_alone(able[suspect], limit)
        return self.scheduler.plan(limit)

    def _in_step(self) -> list[str]:
        return [each.params.request_id for each in self.scheduler.of_step(0)]

    def _oldest(self, step: int) -> bool:
        """Whether this is the number of the step whose result comes next."""
        return bool(self._in_flight) and self._in_flight[0].number == step

    def _rollback(self) -> None:
        """Nothing in flight counts."""
        self._in_flight.clear()
        self.scheduler.rollback()

    def step_failed(self, step: int, workers: Collection[str], reason: str) -> Blame:
        """See `Host`. Who raised an error in a step that another rank has finished, alike in all, is broken itself."""
        if not self._oldest(step):
            return Blame(tuple(workers))
        verdict = self._failed_steps.failed(self._in_step(), workers, ranks=self._ranks)
        self._rollback()
        if verdict.request:
            log.error("it failed %d times, at last alone, and ends: %s", verdict.times, reason,
                      extra={"request": verdict.request})  # fmt: skip
            self._metrics.failed_requests.inc()
            self.requests.fail(verdict.request, f"the request failed {verdict.times} times, and is not tried again")
        return Blame((verdict.worker,) if verdict.worker else (), bool(verdict.request))

    def step_done(self, done: StepDone) -> None:
        """The first rank's answer counts: all ranks draw the same."""
        self._metrics.step_done(done)
        if not self._oldest(done.step):
            return
        self._failed_steps.came_back(self._in_step() if self._failed_steps.doubted() else ())
        step, self._step_started, self._all_planned = self._in_flight.popleft(), self._outbox.now, False
        self.protection.rates.saw_step(step.work, done.seconds)
        drawn = dict(zip(id_array(done.sequences), id_array(done.drawn), strict=True))
        completed = self.scheduler.complete(drawn, done.samples)
        if sealed := self.scheduler.take_sealed():
            pages, keys = zip(*sealed, strict=True)
            self._outbox.to_ranks(NotePages(done.epoch, pack_ids(pages), pack_keys(keys)))
        self.requests.deliver(completed)
        self.protection.step_done(step.number, self.scheduler.spans())
        self.protection.progressed()

    # -- the host: pages ---------------------------------------------------------------------------------------------

    def runs(self) -> Collection[Request]:
        """See `Host`."""
        return self.scheduler.running.values()

    def idle(self) -> IdlePages:
        """See `Host`."""
        return self.cache.idle()

    def pin(self, page: int) -> None:
        """See `Host`."""
        self.cache.pin(page)

    def unpin(self, page: int) -> None:
        """See `Host`."""
        self.cache.unpin(page)

    def confirm(self, pages: list[int]) -> bool:
        """They are: the page tables are here."""
        return True

    def whole(self, pages: Iterable[int]) -> None:
        """Nothing to do: the cache asks the ledger."""

    def gone(self, pages: Iterable[int]) -> None:
        """See `Host`."""
        self.cache.gone(pages)

    def inventory(self, worker: str, held: Held) -> Mapping[int, PageKey]:
        """See `Host`. Each worker tells its own."""
        return held.pages

    def adopt(self, pages: Iterable[tuple[int, PageKey]]) -> None:
        """See `Host`."""
        self.cache.adopt(pages)

    def returned(self, run: int, valid: int) -> Returned:
        """See `Host`."""
        request = self.scheduler.running[run]
        recomputed = self.scheduler.truncate(request, valid)
        upto = min(request.goal, valid + recomputed + 1)  # and the token of the lost step; a prefill just goes on then
        if valid % self.scheduler.page_tokens and recomputed:
            self.protection.rewound(request.pages[-1], valid % self.scheduler.page_tokens)
        return Returned(recomputed, upto, request.remaining if recomputed or request.decodes else 0)

    # -- the host: epochs --------------------------------------------------------------------------------------------

    @property
    def quiet(self) -> bool:
        """Whether no request waits for anything."""
        return not any(self.scheduler.requests())

    def protected(self) -> None:
        """Parity was acknowledged."""
        self.traces.protected()

    def rank_said(self, worker: str, message: StepDone | DigestDone | Heartbeat) -> None:
        """A rank's word on steps and requests of this epoch."""
        match message:
            case StepDone():
                self.step_done(message)
            case DigestDone():
                self.requests.digest_done(message)

    @property
    def ready(self) -> bool:
        """It is: the requests are here."""
        return True

    def still(self) -> bool:
        """See `Host`."""
        return not self._in_flight

    def busy_since(self) -> float | None:
        """See `Host`."""
        return self._step_started if self._membership.stepping and self._in_flight else None

    def stuck(self) -> str:
        """See `Host`."""
        since = self.busy_since()
        if since is None or self._outbox.now - since <= self._step_timeout_s:
            return ""
        return f"step {self._in_flight[0].number} made no progress for {self._step_timeout_s:.0f} s"

    def excuse(self, away_s: float) -> None:
        """See `Host`."""
        self._step_started += away_s

    def quiesce(self) -> None:
        """See `Host`."""
        self._rollback()
        self.requests.interrupted()

    def place(self, formation: Formation) -> None:
        """See `Host`. On CPUs, ranks need the cores that a second step in flight would take from them."""
        self._steps_in_flight = self._steps_wanted or (2 if self._membership.on_gpus() else 1)
        self.scheduler.lose()
        self.scheduler.readmit()

    def resume(self) -> None:
        """Each request goes on when it has returned. What has ended is to be seen among the idle pages."""
        self.cache.tidy(all_of_it=True)

    def go_on(self) -> None:
        """See `Host`."""
        self.step()

    # -- views -------------------------------------------------------------------------------------------------------

    def status(self) -> EngineStatus:
        """See `Host`."""
        size, running = self.scheduler.page_tokens, self.scheduler.running.values()
        exposed = [run.computed - self._protected(run) * size for run in running]
        return EngineStatus(
            kind="embedded",
            model=self.model,
            max_model_len=self.scheduler.max_model_len,
            running=len(running),
            waiting=len(self.scheduler.waiting),
            pages_total=self.pages,
            pages_held=self.cache.in_use,
            pages_cached=len(self.cache.idle()),
            runs_protected=all(run.protected == len(run.keys) for run in running),
            unprotected_tokens=sum(max(0, tokens) for tokens in exposed),
            prompt_tokens=self.scheduler.prompt_tokens,
            generated_tokens=self.scheduler.generated_tokens,
            preemptions=self.scheduler.preemptions,
        )

    def _protected(self, run: Request) -> int:
        """How many pages from a run's start are protected. Counted on from the last time, as long as none lost it."""
        ledger = self.protection.ledger
        known = run.protected if run.protected_at == ledger.setbacks else 0
        run.protected, run.protected_at = ledger.protected_run(run, known), ledger.setbacks
        return run.protected

    def check(self) -> None:
        """Raise AssertionError unless pages, page tables and the ledger agree."""
        for run in self.scheduler.running.values():
            known, counted = self._protected(run), self.protection.ledger.protected_run(run)
            assert known == counted, f"request {run.number}: {counted} pages are protected, not {known}"
        self.scheduler.check()
        self.protection.check()


def _work(batch: Batch) -> Work:
    starts, counts = np.frombuffer(batch.starts, "<i4").astype(float), np.frombuffer(batch.counts, "<i4")
    ends = starts + counts
    return Work(int(counts.sum()), float((counts * (starts + ends)).sum() / 2), float(ends.sum()))
