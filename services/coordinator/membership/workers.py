"""The workers' connections: who is behind which, and that one that is given up is told so."""

import logging

from services.coordinator.events import Peer
from services.coordinator.membership.detector import Detector
from services.coordinator.membership.members import Member, Membership
from services.coordinator.outbox import Outbox
from services.coordinator.views.metrics import LossKind
from shared.messages import Goodbye, WorkerHello

log = logging.getLogger(__name__)


class Workers:
    """Workers by connection. One that is given up may go on talking: it is not heard any more."""

    def __init__(self, membership: Membership, detector: Detector, outbox: Outbox):
        self._membership = membership
        self._detector = detector
        self._outbox = outbox
        self._names: dict[Peer, str] = {}

    def came(self, peer: Peer, hello: WorkerHello) -> None:
        """A worker said hello, under a name that no other has."""
        member = Member(hello.name, hello.host, hello.host_id, hello.pid, hello.device, seen=self._outbox.now)
        self._membership.hello(member)
        self._names[peer] = hello.name
        self._outbox.workers[hello.name] = peer

    def name(self, peer: Peer) -> str | None:
        """The worker behind a connection, if it is not given up."""
        return self._names.get(peer)

    def lose(self, name: str, reason: str, kind: LossKind) -> tuple[int | None, float]:
        """A worker is lost. Returns the rank that it held, if one, and how long it had been silent."""
        peer = self._outbox.workers.pop(name)
        del self._names[peer]
        self._outbox.send(peer, Goodbye(reason))
        self._detector.gone(name)
        silent_s = self._outbox.now - self._membership.members[name].seen
        rank = self._membership.gone(name, reason)
        told = {"worker": name, "rank": rank, "kind": kind, "reason": reason}
        who, ends = "a spare" if rank is None else "a rank", "leaves" if kind == "stopped" else "is lost"
        log.log(logging.INFO if kind == "stopped" else logging.WARNING, "%s %s", who, ends, extra=told)
        self._outbox.changed = True
        return rank, silent_s
