"""The core's way out: what it sends and asks collects here until the event is dealt with. The event's time comes in."""

from collections.abc import Iterable

from services.coordinator.events import Ask, Effect, Peer, Question, Send
from services.coordinator.membership.members import Membership
from shared.messages import Message


class Outbox:
    """Messages and questions for peers and Redis. `now` is the time of the event that is being dealt with."""

    def __init__(self, membership: Membership):
        self.now = 0.0
        self.workers: dict[str, Peer] = {}
        """By name, those that are not given up."""
        self.changed = False
        """Whether gateways are to be told the state when the event is dealt with."""
        self._membership = membership
        self._out: list[Effect] = []
        self._asked: dict[int, Question] = {}
        self._numbers = 0

    def take(self) -> list[Effect]:
        """What is to be sent and asked since the last time, in order."""
        out, self._out = self._out, []
        return out

    # -- messages ----------------------------------------------------------------------------------------------------

    def send(self, peer: Peer, message: Message) -> None:
        """To one peer."""
        self._out.append(Send((peer,), message))

    def to_all(self, peers: Iterable[Peer], message: Message) -> None:
        """To each of these peers."""
        if to := tuple(peers):
            self._out.append(Send(to, message))

    def to_worker(self, name: str, message: Message) -> None:
        """To a worker, if it is there."""
        if (peer := self.workers.get(name)) is not None:
            self.send(peer, message)

    def to_ranks(self, message: Message) -> None:
        """To the worker of every rank."""
        ranks = self._membership.ranks
        self.to_all((self.workers[name] for name in ranks if name is not None and name in self.workers), message)

    # -- questions ---------------------------------------------------------------------------------------------------

    def ask(self, question: Question) -> None:
        """Ask; the answer comes as an event."""
        self._numbers += 1
        self._asked[self._numbers] = question
        self._out.append(Ask(self._numbers, question))

    def asks(self, kind: type[Question]) -> bool:
        """Whether an answer to such a question is awaited."""
        return any(isinstance(question, kind) for question in self._asked.values())

    def answered(self, number: int) -> Question:
        """The question of this number, whose answer is there."""
        return self._asked.pop(number)
