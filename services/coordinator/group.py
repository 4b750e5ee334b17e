"""The coordinator's core: events in, messages and questions out. It has no sockets, no clock, no tasks of its own.

Every event comes in by `handle`, which hands it to the part that it concerns; afterwards what can begin begins.
Workers, stores and gateways are there from the start; the engine, its protection and epochs since the first worker has
told which model is served.
"""

import logging
from collections.abc import Mapping

from services.coordinator.events import (
    Answered,
    Came,
    Effect,
    EpochIs,
    Event,
    FindStripes,
    Hello,
    Keep,
    Left,
    NextEpoch,
    Peer,
    Said,
    StripesFound,
    Tick,
)
from services.coordinator.hosted.engine import HostedEngine
from services.coordinator.membership.detector import Detector
from services.coordinator.membership.epochs import Epochs
from services.coordinator.membership.members import Held, Membership
from services.coordinator.membership.workers import Workers
from services.coordinator.outbox import Outbox
from services.coordinator.protection.moves import Moves
from services.coordinator.protection.protection import Protection
from services.coordinator.protection.stores import Stores
from services.coordinator.scheduling.engine import EmbeddedEngine
from services.coordinator.scheduling.gateways import Gateways
from services.coordinator.views.metrics import LossKind, Metrics
from services.coordinator.views.status import cluster_status
from shared.config import CoordinatorSettings
from shared.errors import ProtocolError
from shared.messages import (
    TOLD_TO_STOP,
    DigestDone,
    EngineHello,
    EngineReady,
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
    StepFailed,
    StepRaised,
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
        self.outbox = Outbox(self.membership)
        self.outbox.now = now
        self.detector = Detector(
            heartbeat_s=config.heartbeat_s,
            hang_timeout_s=settings.hang_timeout_s,
            replace_stragglers=settings.replace_stragglers,
        )
        self.workers = Workers(self.membership, self.detector, self.outbox)
        self.stores = Stores(self.outbox)
        self.gateways = Gateways(settings, self.outbox)
        self.engine: EmbeddedEngine | HostedEngine | None = None
        """Once the model is known, as are `epochs`."""
        self.epochs: Epochs | None = None
        self.metrics = Metrics(self.status)
        self._settings = settings
        self.tracing = tracing or NoTracing()
        self._born = now
        self._stores_by_peer: dict[Peer, StoreInfo] = {}
        self._hosted: dict[Peer, EngineHello] = {}
        self._status_sent = now

    @property
    def protection(self) -> Protection | None:
        """That of the engine's pages, once the model is known."""
        return self.engine.protection if self.engine is not None else None

    @property
    def _moves(self) -> Moves | None:
        return self.protection.moves if self.protection is not None else None

    def handle(self, now: float, event: Event) -> None:
        """Deal with one event. What is to be sent and asked is in `take` then."""
        self.outbox.now = now
        if self.protection is not None:
            self.protection.ledger.now = now
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
        if self.outbox.changed:
            self._announce(now)

    def take(self) -> list[Effect]:
        """What came out since the last time, in order."""
        return self.outbox.take()

    # -- time --------------------------------------------------------------------------------------------------------

    def _tick(self, now: float) -> None:
        if away_s := self.detector.looked(now):
            log.warning("this process was away for %.1f s: nobody is blamed for it", away_s)
            self.membership.excuse(away_s)
            if self.engine is not None:
                self.engine.excuse(away_s)
        busy_since = self.engine.busy_since() if self.engine is not None else None
        for name, kind, reason in list(self.detector.lost(self.membership, busy_since, now)):
            if kind != "straggler":
                self._give_up(name, reason, kind)
            elif (moves := self._moves) is not None and moves.possible and moves.move is None:
                log.warning("a rank straggles: it moves to a spare", extra={"worker": name, "reason": reason})
                moves.apply("replace", f"worker:{name}")
        if self.epochs is not None:
            self.epochs.tick()
        if self.protection is not None:
            self.protection.tick()
        if now - self._status_sent > STATUS_S:
            self.outbox.changed = True

    def _announce(self, now: float) -> None:
        """Tell all gateways the state, and Redis what of it must not be forgotten."""
        self.outbox.changed, self._status_sent = False, now
        if not self.outbox.asks(Keep):
            self.outbox.ask(Keep(self.membership.epoch, dict(self.membership.cordons)))
        self.outbox.to_all(self.gateways.peers, StatusChanged(self.status()))

    # -- peers -------------------------------------------------------------------------------------------------------

    def _came(self, peer: Peer, hello: Hello) -> None:
        if isinstance(hello, WorkerHello) and (refusal := self._name_taken(hello)):
            self.outbox.send(peer, Goodbye(refusal))
            return
        self.outbox.send(peer, Welcome(self.config, self.membership.epoch))
        match hello:
            case WorkerHello(name=name):
                if name in self.membership.members:
                    self._give_up(name, "another process came under its name", "replaced")
                self.workers.came(peer, hello)
            case StoreHello(store=store):
                self._stores_by_peer[peer] = store
                self.stores.join(store, peer)
                self.outbox.send(peer, EpochNow(self.config.group, self.membership.epoch))
                if self.protection is not None:
                    self.protection.encoding.store_joined(peer)
                self.outbox.changed = True
            case GatewayHello():
                self.gateways.peers[peer] = None
                self.outbox.changed = True
            case EngineHello():
                self._engine_came(peer, hello)

    def _name_taken(self, hello: WorkerHello) -> str:
        """Why a worker can't have its name: another process has it, and beats. Empty if it can."""
        holder = self.membership.members.get(hello.name)
        if holder is None or (holder.pid, holder.host_id) == (hello.pid, hello.host_id):
            return ""
        silent_s = self.outbox.now - holder.seen
        if holder.ready and silent_s > NAME_HELD_BEATS * self.config.heartbeat_s:
            return ""
        return f"another process is called {hello.name}: pid {holder.pid} on {holder.host} (GHOST_NAME)"

    def _said(self, peer: Peer, message: Message) -> None:
        if (name := self.workers.name(peer)) is not None:
            self._from_worker(name, message)
        elif peer in self.gateways.peers:
            self.gateways.said(peer, message, self.engine, self._moves)
        elif (hello := self._hosted.get(peer)) is not None:
            self._from_engine(peer, hello, message)
        elif (store := self._stores_by_peer.get(peer)) is not None:
            self._from_store(peer, store.store_id, message)

    def _left(self, peer: Peer, reason: str) -> None:
        if (name := self.workers.name(peer)) is not None:
            self._give_up(name, reason, "closed")
        elif peer in self.gateways.peers:
            self.gateways.left(peer, self.engine)
        elif peer in self._hosted:
            self._engine_gone(peer, reason)
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
        now, epoch = self.outbox.now, self.membership.epoch
        self.membership.heard(name, now, message.step if isinstance(message, Heartbeat) else None)
        if isinstance(message, Heartbeat):
            self.detector.beat(name, message, now)
        elif isinstance(message, WorkerReady):
            self._ready(name, message)
        elif isinstance(message, Goodbye):
            self.membership.uncordon(name)  # whoever comes next under its name is another process
            self._give_up(name, message.reason, "stopped" if message.reason == TOLD_TO_STOP else "failed")
            if self.protection is not None and message.reason != TOLD_TO_STOP:
                self.protection.timeline.explained(name, message.reason)  # its supervisor may say so after its death
        engine, epochs = self.engine, self.epochs
        if engine is None or epochs is None:
            return
        match message:
            case Rendezvous():
                epochs.rendezvous(message)
            case Joined():
                epochs.joined(name, message)
            case ProtectDone(epoch=of) if of == epoch:
                engine.protection.protect_done(message)
                engine.protected()
            case RestoreDone(epoch=of) if of == epoch:
                engine.protection.restore_done(message)
            case RankFailed(epoch=of) if of == epoch:
                epochs.failed(name, message)
            case Prepared():
                engine.protection.prepared(message)
            case PagesCopied():
                engine.protection.copied(message)
            case StepDone(epoch=of) if of == epoch:
                self.detector.step_done(name, message)
                epochs.brake.progressed()
                engine.rank_said(name, message)
            case StepRaised(epoch=of) if of == epoch:
                epochs.step_raised(name, message)
            case DigestDone(epoch=of) | Heartbeat(epoch=of) if of == epoch:
                if isinstance(message, Heartbeat) and message.step:
                    epochs.brake.progressed()
                engine.rank_said(name, message)
            case _:
                pass

    def _ready(self, name: str, ready: WorkerReady) -> None:
        if self.engine is None and self.config.engine == "embedded":
            self._begin(
                EmbeddedEngine(
                    self.config, self._settings, ready, self.membership, self.stores, self.outbox, self.metrics,
                    self.tracing,
                )
            )  # fmt: skip
        engine = self.engine
        if engine is not None and (ready.model.fingerprint, ready.pages) != (engine.model.fingerprint, engine.pages):
            reason = f"its model or pool ({ready.pages} pages) differs from the group's ({engine.pages} pages)"
            self.outbox.to_worker(name, Goodbye(reason, final=True))
            self._give_up(name, reason, "closed")
            return
        self.membership.members[name].pages_address = ready.pages_address
        held = Held.of(ready.claim, ranks=self.config.size, pages=ready.pages) if ready.claim is not None else None
        late = held is not None and self.membership.state != "forming"
        self.membership.ready(name, self.outbox.now, None if late else held)
        if late:  # its rank is another's by now
            self.outbox.to_worker(name, StandBy(self.membership.epoch, hold=True))
        self.outbox.changed = True

    # -- the engine --------------------------------------------------------------------------------------------------

    def _begin(self, engine: EmbeddedEngine | HostedEngine) -> None:
        """The model is known, and how large the pool is."""
        self.engine = engine
        self.epochs = Epochs(
            self.config, self.membership, self.workers, self.detector, self.stores, engine, engine.protection,
            self.outbox, self.metrics, self._born,
        )  # fmt: skip
        if isinstance(engine, EmbeddedEngine):
            self.gateways.submit_waiting(engine)

    def _engine_came(self, peer: Peer, hello: EngineHello) -> None:
        """A hosted engine dials: it is the only one from now on, and its workers are those that count."""
        if self.config.engine != "hosted":
            self.outbox.send(peer, Goodbye("this group's engine is embedded", final=True))
            return
        for other in [each for each in self._hosted if each != peer]:
            del self._hosted[other]
            self.outbox.send(other, Goodbye("another engine has come"))
        self._hosted[peer] = hello
        for name in [each for each in self.membership.members if not each.startswith(f"{hello.name}.")]:
            self._give_up(name, "its engine is gone", "closed")
        log.info("engine %s: %s", hello.name, hello.kind)

    def _from_engine(self, peer: Peer, hello: EngineHello, message: Message) -> None:
        engine = self.engine if isinstance(self.engine, HostedEngine) and self.engine.hello == hello else None
        match message:
            case EngineReady():
                self._engine_ready(peer, hello, message, engine)
            case Goodbye(reason=reason):
                self._engine_gone(peer, reason)
            case StepFailed() if self.epochs is not None and self.protection is not None:
                if message.epoch == self.membership.epoch:
                    self.epochs.step_failed(message)
                if message.device_failed:
                    for name in message.culprits:
                        self.protection.timeline.explained(name, message.reason)
            case _ if engine is not None:
                engine.said(message)

    def _engine_ready(self, peer: Peer, hello: EngineHello, ready: EngineReady, engine: HostedEngine | None) -> None:
        if len(ready.workers) != self.config.size:
            raise ProtocolError(f"an engine of {len(ready.workers)} ranks in a group of {self.config.size}")
        if min(ready.pages, ready.page_tokens, ready.step_tokens) < 1:
            raise ProtocolError("an engine without pages, or of pages or steps without tokens")
        if engine is None:
            engine = HostedEngine(
                self.config, self._settings, hello, ready, self.membership, self.stores, self.outbox, self.metrics,
                self.tracing,
            )  # fmt: skip
            self._begin(engine)
        engine.dialled(peer, ready)
        if self.epochs is not None and self.membership.state != "forming":
            self.epochs.broken("its engine has dialled anew")

    def _engine_gone(self, peer: Peer, reason: str) -> None:
        hello = self._hosted.pop(peer)
        log.warning("engine %s is gone: %s", hello.name, reason)
        if isinstance(self.engine, HostedEngine):
            self.engine.left()
        self.outbox.changed = True

    # -- stores ------------------------------------------------------------------------------------------------------

    def _store_gone(self, peer: Peer, reason: str, *, told: bool = False) -> None:
        """A store is lost, or leaves because it was told to."""
        store_id = self._stores_by_peer.pop(peer).store_id
        if not self.stores.leave(store_id, peer):
            return
        level, ends = (logging.INFO, "leaves") if told else (logging.WARNING, "is lost")
        log.log(level, "parity store %s %s: %s", store_id, ends, reason)
        if self.protection is not None:
            self.protection.encoding.store_gone()
        self.outbox.changed = True

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
        if self.protection is not None:
            self.protection.encoding.parity_gone(message)
        self.outbox.changed = True

    # -- Redis -------------------------------------------------------------------------------------------------------

    def _answered(self, number: int, answer: EpochIs | StripesFound) -> None:
        question = self.outbox.answered(number)
        if self.epochs is None or self.protection is None:
            return
        match question, answer:
            case NextEpoch(), EpochIs(epoch=epoch):
                self.epochs.fenced(epoch)
            case Keep(), EpochIs(epoch=epoch):
                self.epochs.known(epoch)
            case FindStripes(), StripesFound():
                self.protection.found(question, answer)

    # -- views -------------------------------------------------------------------------------------------------------

    def peers(self) -> dict[Peer, str]:
        """Who is behind each connection, in words."""
        workers = {peer: f"worker {name}" for name, peer in self.outbox.workers.items()}
        stores = {peer: f"store {store.store_id}" for peer, store in self._stores_by_peer.items()}
        engines = {peer: f"engine {hello.name}" for peer, hello in self._hosted.items()}
        return workers | stores | engines | {peer: f"gateway ({peer})" for peer in self.gateways.peers}

    def status(self) -> ClusterStatus:
        """The group's state when the last event was dealt with."""
        now = self.outbox.now
        return cluster_status(
            self.config, self.membership, self.stores, self.engine, self.protection, self.detector.paces(now), now,
            self.epochs.brake.why(now) if self.epochs is not None else "",
        )  # fmt: skip

    def check(self) -> None:
        """Raise AssertionError unless pages, page tables, ranks and members agree."""
        self.membership.check()
        if self.engine is not None:
            self.engine.check()
