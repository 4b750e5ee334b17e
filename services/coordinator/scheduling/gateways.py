"""The gateways: what they ask for, and what has to wait until the model is known."""

import logging

from services.coordinator.events import Peer
from services.coordinator.outbox import Outbox
from services.coordinator.protection.host import Host
from services.coordinator.protection.moves import Moves
from services.coordinator.scheduling.engine import EmbeddedEngine
from shared.config import CoordinatorSettings
from shared.errors import RequestRejected
from shared.messages import Abort, Applied, Apply, InjectFault, Message, Refused, Submit

log = logging.getLogger(__name__)


class Gateways:
    """Gateways by connection; each hears of every change."""

    def __init__(self, settings: CoordinatorSettings, outbox: Outbox):
        self.peers: dict[Peer, None] = {}
        self._outbox = outbox
        self._allow_faults = settings.allow_faults
        self._room = settings.max_waiting + settings.max_batch
        self._early: dict[str, tuple[Peer, Submit]] = {}  # resumed requests, until the model is known

    def left(self, peer: Peer, engine: Host | None) -> None:
        """A gateway is lost, and with it all who wait behind it."""
        self.peers.pop(peer, None)
        self._early = {name: waits for name, waits in self._early.items() if waits[0] != peer}
        if isinstance(engine, EmbeddedEngine):
            engine.requests.gateway_gone(peer)

    def said(self, peer: Peer, message: Message, engine: Host | None, moves: Moves | None) -> None:
        """A gateway's message; `engine` and `moves` once the model is known."""
        match message:
            case Submit() if isinstance(engine, EmbeddedEngine):
                engine.requests.submit(peer, message)
            case Submit(request=request) if engine is not None:
                text = f"requests go to {engine.status().kind}, by its own API"
                self._outbox.send(peer, Refused(request.request_id, 400, "hosted_engine", text))
            case Submit():
                self._submit_early(peer, message)
            case Abort(request_id=request_id) if isinstance(engine, EmbeddedEngine):
                engine.requests.abort(peer, request_id)
            case Abort(request_id=request_id):
                self._early.pop(request_id, None)
            case Apply():
                self._outbox.send(peer, self._apply(message, moves))
            case InjectFault(worker=name) if self._allow_faults and name in self._outbox.workers:
                log.warning("fault %s is injected", message.fault, extra={"worker": name})
                self._outbox.to_worker(name, message)
            case _:
                log.warning("a gateway sent %s", type(message).__name__)

    def _submit_early(self, peer: Peer, submit: Submit) -> None:
        """Only what an earlier coordinator had in work waits for a worker."""
        name = submit.request.request_id
        if submit.generated is None:
            self._outbox.send(peer, Refused(name, 503, "not_ready", "no worker has loaded the model yet"))
        elif len(self._early) >= self._room:
            self._outbox.send(peer, Refused(name, 503, "not_ready", "too many requests wait for a worker"))
        else:
            self._early[name] = peer, submit

    def submit_waiting(self, engine: EmbeddedEngine) -> None:
        """The model is known: what waited for it is submitted."""
        early, self._early = self._early, {}
        for peer, submit in early.values():
            engine.requests.submit(peer, submit)

    def _apply(self, message: Apply, moves: Moves | None) -> Applied | Refused:
        if moves is None:
            return Refused(message.request_id, 503, "not_ready", "no worker has loaded the model yet")
        try:
            told = moves.apply(message.action, message.target)
        except RequestRejected as error:
            return Refused(message.request_id, error.status, error.code, str(error), error.param)
        log.info("an operator's word: %s %s", message.action, message.target)
        self._outbox.changed = True
        return Applied(message.request_id, told)
