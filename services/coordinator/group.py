"""One group at work: events in, steps, protection and recovery out. The pure cores decide; this sends what they say.

A failure goes down through `_broken`, `_form` and `Restoration.plan`, and comes back through `_advance` to `step`.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

from services.coordinator.detector import Detector
from services.coordinator.handover import Handover
from services.coordinator.journal import Journal
from services.coordinator.membership import Formation, Held, Member, Membership
from services.coordinator.metrics import LossKind, Metrics
from services.coordinator.pages import PagePool
from services.coordinator.protection import Protection
from services.coordinator.recovery import Rates
from services.coordinator.requests import Requests
from services.coordinator.restoration import Restoration
from services.coordinator.scheduler import Scheduler
from services.coordinator.stores import Stores
from services.coordinator.tails import Tails
from services.coordinator.timeline import Recovery, Timeline
from services.coordinator.traces import Traces, tell_recovery
from services.coordinator.views import cluster_status
from shared import logs
from shared.channel import Channel
from shared.config import CoordinatorSettings
from shared.errors import PeerLost, RequestRejected
from shared.messages import (
    Abort,
    Applied,
    Apply,
    Assign,
    DigestDone,
    EpochNow,
    Goodbye,
    Heartbeat,
    InjectFault,
    Join,
    Joined,
    Message,
    PagesCopied,
    Prepared,
    ProtectDone,
    RankFailed,
    Refused,
    Rendezvous,
    RestoreDone,
    ShardsLost,
    StandBy,
    StatusChanged,
    StepDone,
    StepPlan,
    StoreDrains,
    Submit,
    WorkerReady,
)
from shared.stripe_index import StripeIndex
from shared.tracing import NoTracing, Tracing
from shared.types import (
    ClusterStatus,
    GroupConfig,
    ModelInfo,
    OperatorAction,
    RecoveryRecord,
    StoreInfo,
)

log = logging.getLogger(__name__)

TICK_S = 0.05
STATUS_S = 0.5
RESTORING_STEP_TOKENS = 64
"""Tokens a step while pages are restored: nobody whose pages are back waits long behind another's prefill."""
BROKEN_GRACE_S = 1.0
"""After a rank's collective failed: how long to wait for news of who is lost, before all ranks join anew."""


class Group:
    """k ranks that together run one copy of the model, their spares, and the requests they work on."""

    def __init__(
        self,
        config: GroupConfig,
        settings: CoordinatorSettings,
        index: StripeIndex,
        epoch: int,
        clock: Callable[[], float] = time.monotonic,
        tracing: Tracing | None = None,
    ):
        self.config = config
        self.membership = Membership(
            config.size,
            heartbeat_timeout_s=config.heartbeat_timeout_s,
            join_timeout_s=settings.join_timeout_s,
            epoch=epoch,
        )
        self.stores = Stores(index, config.group)
        self.detector = Detector(
            heartbeat_s=config.heartbeat_s,
            hang_timeout_s=settings.hang_timeout_s,
            replace_stragglers=settings.replace_stragglers,
        )
        self.gateways: set[Channel] = set()
        self.model: ModelInfo | None = None
        self.protection = Protection(
            config, self.membership, PagePool(0, protect=False), self.stores, self._to_ranks, self._spawn
        )
        self.scheduler: Scheduler | None = None
        self.requests: Requests | None = None
        self.restoration: Restoration | None = None
        self.handover: Handover | None = None
        self.rates = Rates()
        self.metrics = Metrics(self.status)
        self.tracing = tracing or NoTracing()
        self.traces = Traces(self.tracing, self.protection.pool, clock)
        self._clock = clock
        self._settings = settings
        self._journal = Journal(index, config.group)
        self._workers: dict[str, Channel] = {}
        self._early: dict[str, tuple[Channel, Submit]] = {}  # resumed requests, until the model is known
        self._born = clock()
        self._step = 0
        self._step_started = 0.0
        self._step_tokens = 0
        self._timeline = Timeline()
        self._broken_since: float | None = None
        self._cut_off: set[int] = set()  # ranks that can't reach rank 0, in this epoch
        self._status_sent = 0.0
        self._tasks: asyncio.TaskGroup | None = None
        self._spawned: set[asyncio.Task[None]] = set()
        self._forming = False

    @property
    def pool(self) -> PagePool:
        """The page tables' side of all ranks' KV; empty until the first worker has told its size."""
        return self.protection.pool

    # -- life --------------------------------------------------------------------------------------------------------

    async def run(self, stop: asyncio.Event) -> None:
        """Watch over the group until `stop` is set. Messages come in through the handlers below meanwhile."""
        async with asyncio.TaskGroup() as self._tasks:
            while not stop.is_set():
                self._tick(self._clock())
                await asyncio.sleep(TICK_S)
            for task in self._spawned:
                task.cancel()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        if self._tasks is None:
            work.close()
            raise PeerLost("the coordinator is stopping")
        task = self._tasks.create_task(work)
        self._spawned.add(task)
        task.add_done_callback(self._spawned.discard)

    def _tick(self, now: float) -> None:
        self.pool.now = now
        if away_s := self.detector.looked(now):
            log.warning("this process was away for %.1f s: nobody is blamed for it", away_s)
            self.membership.excuse(away_s)
            self._step_started += away_s
        busy = self.membership.stepping and self.scheduler is not None and self.scheduler.busy
        for name, kind, reason in list(self.detector.lost(self.membership, self._step_started if busy else None, now)):
            if kind != "straggler":
                self.worker_gone(name, reason, kind=kind)
            elif self.handover is not None and self.handover.move is None:
                log.warning("a rank straggles: it moves to a spare", extra={"worker": name, "reason": reason})
                self.handover.apply("replace", f"worker:{name}")
        if self.membership.stepping and self.scheduler is not None:
            if self.scheduler.busy and now - self._step_started > self._settings.step_timeout_s:
                self._broken(f"step {self._step} made no progress for {self._settings.step_timeout_s:.0f} s")
            self.protection.retry(now)
            if self.membership.state == "serving" and self.handover is not None and self._timeline.current is None:
                self.handover.tick(now)
                self._hand_over()
        self._try_form()
        if self._broken_since is not None and now - self._broken_since > BROKEN_GRACE_S:
            self._collective_failed(now)
        if now - self._status_sent > STATUS_S:
            self.announce()
            self._spawn(self._journal.keep(self.membership.epoch))

    # -- workers -----------------------------------------------------------------------------------------------------

    def worker_joins(self, member: Member, channel: Channel) -> None:
        """A worker said hello."""
        if member.name in self.membership.members:
            self.worker_gone(member.name, "another process came under its name", kind="replaced")
        self.membership.hello(member)
        self._workers[member.name] = channel

    def worker_gone(self, name: str, reason: str, channel: Channel | None = None, *, kind: LossKind = "closed") -> None:
        """A worker is lost: its channel closed, or it was given up. `channel`: only if that is still its channel."""
        known = self._workers.get(name)
        if known is None or (channel is not None and known is not channel):
            return
        del self._workers[name]
        self.detector.gone(name)
        if not known.closed:
            known.send(Goodbye(reason))
        silent_s = self._clock() - self.membership.members[name].seen
        rank = self.membership.gone(name, reason)
        if self.handover is not None:
            self.handover.gone(name)
        told = {"worker": name, "rank": rank, "kind": kind, "reason": reason}
        log.warning("a spare is lost" if rank is None else "a rank is lost", extra=told)
        if rank is not None:
            self.metrics.rank_failures.labels(kind).inc()
            recovery = self._interrupt(f"rank {rank} ({name}): {reason}")
            recovery.lost.add(rank)
            recovery.detect_s = max(recovery.detect_s, silent_s)
            self._try_form()
        self.announce()

    def from_worker(self, name: str, message: Message) -> None:
        """Handle a worker's message; those of other epochs have no effect."""
        now = self.pool.now = self._clock()
        if name not in self.membership.members:
            return
        self.membership.heard(name, now, message.step if isinstance(message, Heartbeat) else None)
        if isinstance(message, Heartbeat):
            self.detector.beat(name, message, now)
        elif isinstance(message, StepDone) and message.epoch == self.membership.epoch:
            self.detector.step_done(name, message)
        epoch = self.membership.epoch
        match message:
            case WorkerReady():
                self._worker_ready(name, message)
            case Rendezvous() if self.membership.rendezvous(message.epoch):
                self._to_ranks(Join(epoch, message.model_address, message.exchange_address))
            case Joined(epoch=of):
                if of == epoch and (recovery := self._timeline.current) is not None:
                    recovery.weights_s = max(recovery.weights_s, message.weights_s)
                if self.membership.joined(of, name):
                    self._timeline.joined(now)
                    self._advance()
            case StepDone(epoch=of, step=step) if of == epoch and step == self._step:
                self.metrics.step_done(message)
                self._step_done(message)
            case ProtectDone(epoch=of) if of == epoch:
                self.metrics.protect_done(message)
                self.protection.done(message)
                self.traces.protected()
                self.step()
            case RestoreDone(epoch=of) if of == epoch and self.restoration is not None:
                self.metrics.restore_done(message)
                self.restoration.done(message)
                self._advance()
            case Prepared() if self.handover is not None:
                self.handover.prepared(message)
            case PagesCopied() if self.handover is not None:
                self.handover.copied(message, now)
                self._hand_over()
                self.step()
            case DigestDone(epoch=of) if of == epoch and self.requests is not None:
                self.requests.digest_done(message)
                self.step()
            case RankFailed(epoch=of) if of == epoch:
                if message.fatal:
                    self.worker_gone(name, message.reason, kind="failed")
                elif self.membership.state != "forming":
                    log.info("rank %d: %s", message.rank, message.reason)
                    self.detector.failed(name)
                    self._broken_since = now if self._broken_since is None else self._broken_since
                    if message.cut_off:
                        self._cut_off.add(message.rank)
            case _:
                pass

    def _worker_ready(self, name: str, ready: WorkerReady) -> None:
        if self.model is None:
            self._take_model(ready)
        assert self.model is not None
        if (ready.model.fingerprint, ready.pages) != (self.model.fingerprint, len(self.pool.pages)):
            reason = f"its model or pool ({ready.pages} pages) differs from the group's ({len(self.pool.pages)} pages)"
            self._workers[name].send(Goodbye(reason, final=True))
            self.worker_gone(name, reason)
            return
        self.membership.members[name].pages_address = ready.pages_address
        pages = len(self.pool.pages)
        held = Held.of(ready.claim, ranks=self.config.size, pages=pages) if ready.claim is not None else None
        late = held is not None and self.membership.state != "forming"
        self.membership.ready(name, self._clock(), None if late else held)
        if late:  # its rank is another's by now
            self._to_worker(name, StandBy(self.membership.epoch, hold=True))
        self._try_form()
        self.announce()

    def _take_model(self, ready: WorkerReady) -> None:
        model, config = ready.model, self.config
        room = ready.pages * config.page_tokens
        limit = min(model.max_positions, room, self._settings.max_model_len or room)
        self.model = model
        acks = config.size if config.protection == "replicate" else 1
        self.protection.pool = PagePool(ready.pages, protect=config.protection != "none", acks=acks)
        self.scheduler = Scheduler(
            self.pool,
            page_tokens=config.page_tokens,
            max_step_tokens=config.max_step_tokens,
            max_batch=config.max_batch,
            max_waiting=self._settings.max_waiting,
            max_model_len=limit,
            eos_token_ids=model.eos_token_ids,
        )
        self.traces = Traces(self.tracing, self.pool, self._clock)
        self.requests = Requests(self.scheduler, model, config.size, self._to_ranks, self.traces)
        self.restoration = Restoration(
            config,
            model,
            self.membership,
            self.scheduler,
            self.stores,
            self._timeline,
            self.rates,
            self._to_ranks,
            always=self._settings.restore == "always",
        )
        if self._settings.protect_tail and config.protection == "parity":
            self.protection.tails = self.restoration.tails = Tails(self.scheduler)
        self.handover = Handover(self.membership, self.pool, self.scheduler, model.page_bytes, self._to_worker)
        early, self._early = self._early, {}
        for gateway, submit in early.values():
            self.requests.submit(gateway, submit)
        log.info("model %s, %d pages of %d tokens, sequences to %d", model.architecture, ready.pages,
                 config.page_tokens, limit)  # fmt: skip

    def _to_worker(self, name: str, message: Message) -> None:
        if (channel := self._workers.get(name)) is not None and not channel.closed:
            channel.send(message)

    def _to_ranks(self, message: Message) -> None:
        for name in self.membership.ranks:
            if name is not None:
                self._to_worker(name, message)

    # -- recovery ----------------------------------------------------------------------------------------------------

    def _interrupt(self, reason: str) -> Recovery:
        """The epoch is over: nothing in flight counts any more."""
        self._broken_since = None
        self._cut_off.clear()
        if self.scheduler is not None and self.requests is not None and self.restoration is not None:
            self.scheduler.rollback()
            self.requests.interrupted()
            self.restoration.interrupted()
        if self.handover is not None:
            self.handover.interrupted()
        self.protection.interrupted()
        return self._timeline.interrupted(reason, self.membership.epoch, self._clock())

    def _collective_failed(self, now: float) -> None:
        """Ranks could not go on, and nobody is known to be lost: one is cut off from the others, or all try again."""
        joining = self.membership.state in ("assigning", "joining")
        if lost := self.membership.cut_off(self._cut_off):
            for name in lost:
                self.worker_gone(name, "its host and those of other ranks can't reach each other", kind="cut off")
        elif (failing := self.detector.cut_off(now, joining=joining)) is not None:
            self.worker_gone(failing, "it can't work with its peers, though it beats", kind="cut off")
        else:
            self._broken("a collective failed, and nobody is known to be lost")

    def _broken(self, reason: str) -> None:
        """The epoch can't go on, though nobody is known to be lost: form again."""
        log.warning("the epoch is broken: %s", reason)
        self._interrupt(reason)
        self.membership.restart(reason)
        self._try_form()

    def _try_form(self) -> None:
        if self.membership.can_form(self._clock()) and not self._forming:
            self._forming = True
            self._spawn(self._form())

    async def _form(self) -> None:
        """Begin a new epoch, in Redis first."""
        began = self._clock()
        try:
            epoch = 0
            while epoch <= self.membership.newest_epoch:
                epoch = await self._journal.next_epoch(self.membership.newest_epoch)
        finally:
            self._forming = False
        if self._timeline.current is not None:
            self._timeline.current.fence_s += self._clock() - began
        if not self.membership.can_form(self._clock()):
            self.membership.epoch = epoch
            return
        formation = self.membership.form(epoch, self._clock())
        logs.epoch_is(epoch)
        self.detector.epoch_begins()
        self._take_over(formation)
        self.stores.send(EpochNow(self.config.group, epoch))
        if not self.protection.begun:
            self.protection.begin()
        for rank, name in enumerate(formation.ranks):
            if not self._workers[name].closed:
                self._workers[name].send(Assign(epoch, rank, self.config.size, self._communicator()))
        for member in self.membership.members.values():
            if member.ready and member.rank is None:
                self._to_worker(member.name, StandBy(epoch, hold=not member.cordoned))
        log.info("the epoch begins: %s", ", ".join(formation.ranks))
        self.announce()
        if self.restoration is not None:
            await self.restoration.plan(epoch)
            self._advance()

    def _take_over(self, formation: Formation) -> None:
        """Lost slices are missing from now on, but for those that the workers that returned have."""
        if not self.protection.begun:
            returned = {rank: held.pages for rank, held in formation.returned.items()}
            self.pool.adopt(returned, self.config.size)
            if self.scheduler is not None:
                self.scheduler.readmit()
            if returned:
                recovery = self._timeline.interrupted("the coordinator was restarted", formation.epoch, self._born)
                recovery.lost.update(formation.fresh - returned.keys())
                log.info("ranks %s are back with %d pages", sorted(returned), self.pool.cached)
            return
        self.pool.lose(formation.fresh)
        if self.scheduler is not None:
            self.scheduler.lose()
            self.scheduler.readmit()
        for rank, held in formation.returned.items():
            self.pool.reclaim(rank, held.pages)
        if self.handover is not None:
            self.handover.formed(formation)

    def _communicator(self) -> str:
        if self.config.communicator != "auto":
            return self.config.communicator
        devices = {
            member.device.split(":")[0] for member in self.membership.members.values() if member.rank is not None
        }
        if devices == {"cuda"}:
            return "nccl"
        return "shm" if self.membership.one_host() else "gloo"

    def _hand_over(self) -> None:
        """Between two steps: the last pages of a rank that moves are copied, then the epoch ends for the next one."""
        if self.handover is None or not self.handover.closing or self.scheduler is None or self.scheduler.busy:
            return
        self.handover.close()
        move = self.handover.switch()
        if move is not None:
            recovery = self._interrupt(f"rank {move.rank} moves from {move.old} to {move.new}")
            recovery.planned, recovery.started = True, move.held_since
            self._try_form()

    def _advance(self) -> None:
        """Let sequences go on whose KV is back as far as it will be; with the last one, serve as usual again."""
        if not self.membership.stepping or self.restoration is None:
            return
        now = self._clock()
        if self.restoration.settle(now) and self.membership.state == "restoring":
            self.restoration.measured(now)
            self.membership.restored()
            self.protection.resumed()
            for way in self._timeline.restored(now):
                self.metrics.recovered.labels(way).inc()
            log.info("serving", extra={"cached_pages_lost": self.pool.lost})
            if self._timeline.current is None:
                self._spawn(self.restoration.restore_cached(self.membership.epoch))
            self.announce()
        self.step()
        self._progressed()

    def _progressed(self) -> None:
        """Close the recovery's record when every sequence has the KV it had; then the cache's turn has come."""
        assert self.scheduler is not None
        assert self.restoration is not None
        if self._timeline.progressed(self.scheduler.running, self.membership.epoch, self._clock()):
            self._recovered(self._timeline.records[-1])
            self._spawn(self.restoration.restore_cached(self.membership.epoch))
            self.announce()

    def _recovered(self, record: RecoveryRecord) -> None:
        self.metrics.recovery_ended(record)
        tell_recovery(self.tracing, record)
        if record.planned:
            log.info("a rank was moved", extra={"stall_s": round((record.ended or 0.0) - record.started, 4)})
            return
        phases = {f"{phase}_s": round(seconds, 4) for phase, seconds in record.phases()}
        log.info("recovered", extra={"lost_ranks": record.lost_ranks, "streams": record.sequences} | phases)

    # -- steps -------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Schedule one step and send it to all ranks, if the ranks are there and none is in flight."""
        if not self.membership.stepping or self.scheduler is None or self.scheduler.busy:
            return
        if self.handover is not None and self.handover.closing:
            return
        assert self.requests is not None
        self.requests.ask_digests(self.membership.epoch)
        sequences = self.scheduler.plan(RESTORING_STEP_TOKENS if self.membership.state == "restoring" else None)
        if sequences:
            self._step += 1
            self.traces.planned(self.scheduler.running)
            self._step_started = self._clock()
            self._step_tokens = sum(len(each.tokens) // 4 for each in sequences)
            self._to_ranks(StepPlan(self.membership.epoch, self._step, sequences))

    def _step_done(self, done: StepDone) -> None:
        """The first rank's answer counts: all ranks draw the same."""
        if self.scheduler is None or self.requests is None or not self.scheduler.busy:
            return
        self.rates.saw_prefill(self._step_tokens, done.seconds)
        for output in self.scheduler.complete(done.samples):
            self.requests.deliver(output)
        self.protection.step_done(self._step)
        self._hand_over()
        self.step()
        self._progressed()

    # -- gateways ----------------------------------------------------------------------------------------------------

    def gateway_joins(self, gateway: Channel) -> None:
        """A gateway said hello; from now on it hears of every change."""
        self.gateways.add(gateway)
        self.announce()

    def gateway_gone(self, gateway: Channel) -> None:
        """A gateway is lost, and with it all who wait behind it."""
        self.gateways.discard(gateway)
        if self.requests is not None:
            self.requests.gateway_gone(gateway)
        self._early = {name: waits for name, waits in self._early.items() if waits[0] is not gateway}
        self.step()

    def from_gateway(self, gateway: Channel, message: Message) -> None:
        """Handle a gateway's message."""
        match message:
            case Submit() if self.requests is not None:
                self.requests.submit(gateway, message)
            case Submit(request=request, generated=None):
                gateway.send(Refused(request.request_id, 503, "not_ready", "no worker has loaded the model yet"))
            case Submit(request=request) if len(self._early) >= self._settings.max_waiting + self._settings.max_batch:
                gateway.send(Refused(request.request_id, 503, "not_ready", "too many requests wait for a worker"))
            case Submit(request=request):
                self._early[request.request_id] = gateway, message
            case Abort(request_id=request_id) if self.requests is not None:
                self.requests.abort(gateway, request_id)
            case Apply(request_id=request_id, action=action, target=target):
                gateway.send(self._apply(request_id, action, target))
            case Abort(request_id=request_id):
                self._early.pop(request_id, None)
            case InjectFault(worker=name) if self._settings.allow_faults and name in self._workers:
                log.warning("fault %s is injected", message.fault, extra={"worker": name})
                self._workers[name].send(message)
            case _:
                log.warning("a gateway sent %s", type(message).__name__)
        self.step()

    def _apply(self, request_id: str, action: OperatorAction, target: str) -> Applied | Refused:
        if self.handover is None:
            return Refused(request_id, 503, "not_ready", "no worker has loaded the model yet")
        try:
            told = self.handover.apply(action, target)
        except RequestRejected as error:
            return Refused(request_id, error.status, error.code, str(error), error.param)
        log.info("an operator's word: %s %s", action, target)
        self._try_form()
        self.announce()
        return Applied(request_id, told)

    # -- stores ------------------------------------------------------------------------------------------------------

    def store_joins(self, store: StoreInfo, channel: Channel) -> None:
        """A parity store offers its memory."""
        self.protection.store_joins(store, channel)
        self.announce()

    def store_gone(self, store_id: str, channel: Channel) -> None:
        """A parity store is lost, and with it the parity that it held."""
        if self.protection.store_gone(store_id, channel):
            self.announce()

    def from_store(self, store_id: str, message: Message) -> None:
        """Handle a store's message."""
        if isinstance(message, ShardsLost):
            self.metrics.checksum_failures.labels("store").inc(len(message.keys))
        if isinstance(message, ShardsLost | StoreDrains):
            self.protection.from_store(store_id, message)
            self.announce()
        else:
            log.warning("store %s sent %s", store_id, type(message).__name__)

    # -- views -------------------------------------------------------------------------------------------------------

    def announce(self) -> None:
        """Tell all gateways the state."""
        self._status_sent = self._clock()
        message = StatusChanged(self.status())
        for gateway in self.gateways:
            if not gateway.closed:
                gateway.send(message)

    def status(self) -> ClusterStatus:
        """The group's state now."""
        now = self._clock()
        return cluster_status(
            self.config,
            self.membership,
            self.protection,
            self.scheduler,
            self.model,
            self._timeline,
            self.detector.paces(now),
            self.handover.status() if self.handover is not None else None,
            now,
        )

    def check(self) -> None:
        """Raise AssertionError unless pages, page tables, ranks and members agree."""
        self.membership.check()
        if self.scheduler is not None:
            self.scheduler.check()
