"""Two processes of one name: who is there stays, and who comes after it is told so."""

import os

import pytest

from services.coordinator.app import group_config
from services.coordinator.events import Came, Event, Left, Said, Send
from services.coordinator.group import NAME_HELD_BEATS, Group
from services.worker.agent.supervisor import _Host
from shared.config import CoordinatorSettings, WorkerSettings
from shared.messages import Goodbye, Heartbeat, Message, Welcome, WorkerHello, WorkerReady
from tests.pure.world import MODEL

FIRST = WorkerHello("w", "host", "host", 1, "cpu")
SECOND = WorkerHello("w", "host", "host", 2, "cpu")


class Desk:
    """A group, and what it says to each peer."""

    def __init__(self) -> None:
        self.settings = CoordinatorSettings()
        self.group = Group(group_config(self.settings), self.settings, 0, 0.0)
        self.now = 0.0

    def tell(self, event: Event) -> dict[int, list[type[Message]]]:
        self.group.handle(self.now, event)
        said: dict[int, list[type[Message]]] = {}
        for output in self.group.take():
            if isinstance(output, Send):
                for peer in output.peers:
                    said.setdefault(peer, []).append(type(output.message))
        return said


@pytest.fixture
def desk() -> Desk:
    desk = Desk()
    assert desk.tell(Came(1, FIRST))[1] == [Welcome]
    return desk


def test_a_worker_that_beats_keeps_its_name(desk: Desk) -> None:
    assert desk.tell(Came(2, SECOND))[2] == [Goodbye]  # the first is loading
    desk.tell(Said(1, WorkerReady(MODEL, 100, "nowhere")))
    desk.tell(Said(1, Heartbeat(0, 0, False, 0)))
    assert desk.tell(Came(3, SECOND)) == {3: [Goodbye]}
    desk.tell(Left(3, "it went"))
    assert list(desk.group.membership.members) == ["w"]
    assert desk.group.membership.members["w"].pid == 1


def test_a_worker_that_is_silent_or_gone_is_followed_by_the_next_of_its_name(desk: Desk) -> None:
    desk.tell(Said(1, WorkerReady(MODEL, 100, "nowhere")))
    desk.now += (NAME_HELD_BEATS + 1) * desk.settings.heartbeat_s
    assert desk.tell(Came(2, SECOND))[2][0] is Welcome
    desk.tell(Left(2, "it went"))
    assert desk.tell(Came(3, FIRST))[3][0] is Welcome


def test_a_worker_that_dials_again_is_itself(desk: Desk) -> None:
    assert desk.tell(Came(2, FIRST))[2][0] is Welcome


def test_supervisors_on_one_host_call_their_workers_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GHOST_NAME", raising=False)
    names = {_Host(WorkerSettings())._prefix for _ in range(3)}
    assert len(names) == 3
    assert all(name.startswith(os.uname().nodename) for name in names)
    assert _Host(WorkerSettings(name="mine"))._prefix == "mine"
