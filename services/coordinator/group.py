"""The coordinator's core: events in, messages and questions out. It has no sockets, no clock, no tasks of its own.

Every event comes in by `handle`, which hands it to the part that it concerns; afterwards what can begin begins.
Workers, stores and gateways are there from the start, all else (`Serving`, `Epochs`) since the first worker has told
which model is served.
"""

import logging
from collections.abc import Mapping

from services.coordinator.detector import Detector
from services.coordinator.epochs import Epochs
from services.coordinator.events import (
    Answered,
    Came,
    EpochIs,
    Event,
    FindStripes,
    Keep,
    Left,
    NextEpoch,
    Output,
    Peer,
    Said,
    StripesFound,
    Tick,
)
from services.coordinator.gateways import Gateways
from services.coordinator.membership import Held, Membership
from services.coordinator.metrics import LossKind, Metrics
from services.coordinator.outside import Outside
from services.coordinator.serving import Serving
from services.coordinator.stores import Stores
from services.coordinator.views import cluster_status
from services.coordinator.workers import Workers
from shared.config import CoordinatorSettings
from shared.messages import (
    DigestDone,
    EpochNow,
    GatewayHello,
    Goodbye,
    Heartbeat,
    Joined,
    Message,
    PagesCopied,
    Prepared,
    ProtectDone,
    RankFailed,
    Rendezvous,
    RestoreDone,
    ShardsLost,
    StandBy,
    StatusChanged,
    StepDone,
    StoreDrains,
    StoreHello,
    Welcome,
    WorkerHello,
    WorkerReady,
)
from shared.tracing import NoTracing, Tracing
from shared.types import ClusterStatus, GroupConfig, StoreInfo

log = logging.getLogger(__name__)

STATUS_S = 0.5
NAME_HELD_BEATS = 5
"""A worker that has missed so many heartbeats may be replaced by another process of its name."""


class Group:
    """k ranks that together run one copy of the model, their spares, and the requests they work on.

    `epoch` and `cordons`: what Redis knows of the one before; `now`: when this coordinator started.
    """

    def __init__(
        self,
        config: GroupConfig,
        settings: CoordinatorSettings,
        epoch: int,
        now: float,
        tracing: Tracing | None = None,
        cordons: Mapping[str, int | None] | None = None,
    ):
        self.config = config
        self.membership = Membership(
            config.size,
            heartbeat_timeout_s=config.heartbeat_timeout_s,
            join_timeout_s=settings.join_timeout_s,
            epoch=epoch,
        )
        self.membership.cordons.update(cordons or {})
        self.outside = Outside(self.membership)
        self.outside.now = now
        self.detector = Detector(
            heartbeat_s=config.heartbeat_s,
            hang_timeout_s=settings.hang_timeout_s,
            replace_stragglers=settings.replace_stragglers,
        )
        self.workers = Workers(self.membership, self.detector, self.outside)
        self.stores = Stores(self.outside)
        self.gateways = Gateways(settings, self.outside)
        self.epochs: Epochs | None = None
        """Once the model is known."""
        self.metrics = Metrics(self.status)
        self._settings = settings
        self.tracing = tracing or NoTracing()
        self._born = now
        self._stores_by_peer: dict[Peer, StoreInfo] = {}
        self._status_sent = now

    @property
    def serving(self) -> Serving | None:
        """What there is once the model is known."""
        return self.epochs.serving if self.epochs is not None else None

    def handle(self, now: float, event: Event) -> None:
        """Deal with one event. What is to be sent and asked is in `take` then."""
        self.outside.now = now
        if self.serving is not None:
            self.serving.pool.now = now
        match event:
            case Tick():
                self._tick(now)
            case Said(peer, message):
                self._said(peer, message)
            case Came(peer, hello):
                self._came(peer, hello)
            case Left(peer, reason):
                self._left(peer, reason)
            case Answered(number, answer):
                self._answered(number, answer)
        if self.epochs is not None:
            self.epochs.go_on()
        if self.outside.changed:
            self._announce(now)

    def take(self) -> list[Output]:
        """What came out since the last time, in order."""
        return self.outside.take()

    # -- time --------------------------------------------------------------------------------------------------------

    def _tick(self, now: float) -> None:
        if away_s := self.detector.looked(now):
            log.warning("this process was away for %.1f s: nobody is blamed for it", away_s)
            self.membership.excuse(away_s)
            if self.serving is not None:
                self.serving.excuse(away_s)
        busy_since = self.serving.busy_since if self.serving is not None else None
        for name, kind, reason in list(self.detector.lost(self.membership, busy_since, now)):
            if kind != "straggler":
                self._give_up(name, reason, kind)
            elif self.serving is not None and self.serving.handover.move is None:
                log.warning("a rank straggles: it moves to a spare", extra={"worker": name, "reason": reason})
                self.serving.handover.apply("replace", f"worker:{name}")
        if self.epochs is not None:
            self.epochs.tick()
            self.epochs.serving.tick()
        if now - self._status_sent > STATUS_S:
            self.outside.changed = True

    def _announce(self, now: float) -> None:
        """Tell all gateways the state, and Redis what of it must not be forgotten."""
        self.outside.changed, self._status_sent = False, now
        if not self.outside.asks(Keep):
            self.outside.ask(Keep(self.membership.epoch, dict(self.membership.cordons)))
        self.outside.to_all(self.gateways.peers, StatusChanged(self.status()))

    # -- peers -------------------------------------------------------------------------------------------------------

    def _came(self, peer: Peer, hello: WorkerHello | StoreHello | GatewayHello) -> None:
        if isinstance(hello, WorkerHello) and (refusal := self._name_taken(hello)):
            self.outside.send(peer, Goodbye(refusal))
            return
        self.outside.send(peer, Welcome(self.config, self.membership.epoch))
        match hello:
            case WorkerHello(name=name):
                if name in self.membership.members:
                    self._give_up(name, "another process came under its name", "replaced")
                self.workers.came(peer, hello)
            case StoreHello(store=store):
                self._stores_by_peer[peer] = store
                self.stores.join(store, peer)
                self.outside.send(peer, EpochNow(self.config.group, self.membership.epoch))
                if self.serving is not None:
                    self.serving.protection.store_joined(peer)
                self.outside.changed = True
            case GatewayHello():
                self.gateways.peers[peer] = None
                self.outside.changed = True

    def _name_taken(self, hello: WorkerHello) -> str:
        """Why a worker can't have its name: another process has it, and beats. Empty if it can."""
        holder = self.membership.members.get(hello.name)
        if holder is None or (holder.pid, holder.host_id) == (hello.pid, hello.host_id):
            return ""
        silent_s = self.outside.now - holder.seen
        if holder.ready and silent_s > NAME_HELD_BEATS * self.config.heartbeat_s:
            return ""
        return f"another process is called {hello.name}: pid {holder.pid} on {holder.host} (GHOST_NAME)"

    def _said(self, peer: Peer, message: Message) -> None:
        if (name := self.workers.name(peer)) is not None:
            self._from_worker(name, message)
        elif peer in self.gateways.peers:
            self.gateways.said(peer, message, self.serving)
        elif (store := self._stores_by_peer.get(peer)) is not None:
            self._from_store(peer, store.store_id, message)

    def _left(self, peer: Peer, reason: str) -> None:
        if (name := self.workers.name(peer)) is not None:
            self._give_up(name, reason, "closed")
        elif peer in self.gateways.peers:
            self.gateways.left(peer, self.serving)
        elif peer in self._stores_by_peer:
            self._store_gone(peer, reason)

    def _give_up(self, name: str, reason: str, kind: LossKind) -> None:
        if self.epochs is not None:
            self.epochs.give_up(name, reason, kind)
        else:
            self.workers.lose(name, reason, kind)

    # -- workers -----------------------------------------------------------------------------------------------------

    def _from_worker(self, name: str, message: Message) -> None:
        """A worker's message; those of other epochs have no effect."""
        now, epoch = self.outside.now, self.membership.epoch
        self.membership.heard(name, now, message.step if isinstance(message, Heartbeat) else None)
        if isinstance(message, Heartbeat):
            self.detector.beat(name, message, now)
        elif isinstance(message, WorkerReady):
            self._ready(name, message)
        elif isinstance(message, Goodbye):
            self.membership.uncordon(name)  # whoever comes next under its name is another process
            self._give_up(name, message.reason, "stopped")
        if self.epochs is None:
            return
        serving = self.epochs.serving
        match message:
            case Rendezvous():
                self.epochs.rendezvous(message)
            case Joined():
                self.epochs.joined(name, message)
            case StepDone(epoch=of) if of == epoch:
                self.detector.step_done(name, message)
                serving.step_done(message)
            case ProtectDone(epoch=of) if of == epoch:
                serving.protect_done(message)
            case RestoreDone(epoch=of) if of == epoch:
                serving.restore_done(message)
            case DigestDone(epoch=of) if of == epoch:
                serving.requests.digest_done(message)
            case RankFailed(epoch=of) if of == epoch:
                self.epochs.failed(name, message)
            case Prepared():
                serving.handover.prepared(message)
            case PagesCopied():
                serving.copied(message)
            case _:
                pass

    def _ready(self, name: str, ready: WorkerReady) -> None:
        epochs = self.epochs = self.epochs or self._first_ready(ready)
        model, pages = epochs.serving.model, len(epochs.serving.pool.pages)
        if (ready.model.fingerprint, ready.pages) != (model.fingerprint, pages):
            reason = f"its model or pool ({ready.pages} pages) differs from the group's ({pages} pages)"
            self.outside.to_worker(name, Goodbye(reason, final=True))
            epochs.give_up(name, reason, "closed")
            return
        self.membership.members[name].pages_address = ready.pages_address
        held = Held.of(ready.claim, ranks=self.config.size, pages=pages) if ready.claim is not None else None
        late = held is not None and self.membership.state != "forming"
        self.membership.ready(name, self.outside.now, None if late else held)
        if late:  # its rank is another's by now
            self.outside.to_worker(name, StandBy(self.membership.epoch, hold=True))
        self.outside.changed = True

    def _first_ready(self, ready: WorkerReady) -> Epochs:
        """The first worker tells which model is served, and how large the pool is."""
        serving = Serving(
            self.config, self._settings, ready, self.membership, self.stores, self.outside, self.metrics, self.tracing
        )
        self.gateways.submit_waiting(serving)
        return Epochs(
            self.config, self.membership, self.workers, self.detector, self.stores, serving, self.outside,
            self.metrics, self._born,
        )  # fmt: skip

    # -- stores ------------------------------------------------------------------------------------------------------

    def _store_gone(self, peer: Peer, reason: str, *, told: bool = False) -> None:
        """A store is lost, or leaves because it was told to."""
        store_id = self._stores_by_peer.pop(peer).store_id
        if not self.stores.leave(store_id, peer):
            return
        level, ends = (logging.INFO, "leaves") if told else (logging.WARNING, "is lost")
        log.log(level, "parity store %s %s: %s", store_id, ends, reason)
        if self.serving is not None:
            self.serving.protection.store_gone()
        self.outside.changed = True

    def _from_store(self, peer: Peer, store_id: str, message: Message) -> None:
        match message:
            case Goodbye(reason=reason):
                self._store_gone(peer, reason, told=True)
                return
            case ShardsLost(keys=keys):
                self.metrics.checksum_failures.labels("store").inc(len(keys))
                log.warning("a store lost damaged stripes", extra={"store": store_id, "stripes": len(keys)})
            case StoreDrains():
                self.stores.drain(store_id)
            case _:
                log.warning("store %s sent %s", store_id, type(message).__name__)
                return
        if self.serving is not None:
            self.serving.protection.parity_gone(message)
        self.outside.changed = True

    # -- Redis -------------------------------------------------------------------------------------------------------

    def _answered(self, number: int, answer: EpochIs | StripesFound) -> None:
        question = self.outside.answered(number)
        if self.epochs is None:
            return
        match question, answer:
            case NextEpoch(), EpochIs(epoch=epoch):
                self.epochs.fenced(epoch)
            case Keep(), EpochIs(epoch=epoch):
                self.epochs.known(epoch)
            case FindStripes(purpose="restore", epoch=epoch), StripesFound():
                self.epochs.serving.restorable(epoch, answer)
            case FindStripes(purpose="cached", epoch=epoch), StripesFound():
                self.epochs.serving.cached.found(epoch, answer)
            case FindStripes(purpose="recognise"), StripesFound():
                self.epochs.serving.protection.looked_up(question, answer)

    # -- views -------------------------------------------------------------------------------------------------------

    def peers(self) -> dict[Peer, str]:
        """Who is behind each connection, in words."""
        workers = {peer: f"worker {name}" for name, peer in self.outside.workers.items()}
        stores = {peer: f"store {store.store_id}" for peer, store in self._stores_by_peer.items()}
        return workers | stores | {peer: f"gateway ({peer})" for peer in self.gateways.peers}

    def status(self) -> ClusterStatus:
        """The group's state when the last event was dealt with."""
        now = self.outside.now
        return cluster_status(self.config, self.membership, self.stores, self.serving, self.detector.paces(now), now)

    def check(self) -> None:
        """Raise AssertionError unless pages, page tables, ranks and members agree."""
        self.membership.check()
        if self.serving is not None:
            self.serving.check()
