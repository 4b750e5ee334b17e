"""Who is a rank of a hosted engine: an engine, its workers and the coordinator are scripted."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from services.vllm import alone, hosted
from services.vllm.hosted import Hosted
from services.vllm.link import Loss
from services.vllm.messages import Placed
from shared.messages import (
    EngineReady,
    EngineRuns,
    GivenUp,
    Message,
    PagesWhole,
    PinPages,
    Place,
    Quiesce,
    Resume,
    StepFailed,
)
from shared.types import pack_ids
from tests.pure.world import MODEL

SOON_S = 5.0


class Worker:
    def __init__(self, name: str, ranks: tuple[int, ...]):
        self.name = name
        self.ranks = ranks
        self.pid = 1
        self.device_failed = ""


class Scheduler:
    """What was asked of it."""

    def __init__(self, asked: "queue.Queue[tuple[Any, ...]]"):
        self._asked = asked

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def note(*args: Any, **kwargs: Any) -> Any:
            self._asked.put((name, *args, *kwargs.values()))
            return () if name == "stand_still" else None

        return note


class Engine:
    """Workers are ready at once, unless they are `stillborn`; ranks connect at once."""

    size = 3

    def __init__(self) -> None:
        self.decider: Hosted | None = None
        self.known = threading.Event()
        self.started: list[Worker] = []
        self.killed: list[Worker] = []
        self.failed = ""
        self.stillborn = False
        self.late = False
        self.take: Callable[[], object] = lambda: None
        self.asked: queue.Queue[tuple[Any, ...]] = queue.Queue()
        self.resumed: queue.Queue[Loss] = queue.Queue()
        self.placed: queue.Queue[list[Worker]] = queue.Queue()
        self.scheduler: Any = Scheduler(self.asked)

    def start(self, ranks: tuple[int, ...]) -> Worker:
        self.known.wait()
        assert self.decider is not None
        worker = Worker(f"w{len(self.started)}", ranks)
        self.started.append(worker)
        (self.decider.gone if self.stillborn else self.decider.built)(worker)
        return worker

    def place(self, epoch: int, ranks: list[Worker], hosted_epoch: int = 0) -> None:
        assert self.decider is not None
        self.take = lambda: [self.decider.placed(Placed(epoch, rank, 0.0)) for rank in range(self.size)]
        if not self.late:
            self.take()
        self.placed.put(ranks)

    def resume(self, loss: Loss) -> None:
        self.resumed.put(loss)

    def quiesce(self, epoch: int) -> None:
        self.epoch = epoch

    def rest(self) -> None:
        pass

    def fail(self, reason: str) -> None:
        self.failed = self.failed or reason

    def hosted_model(self) -> tuple[Any, int, int, int]:
        return MODEL, 8, 16, 512

    def alike(self) -> bool:
        return False

    def when_scheduled(self, attached: Callable[[], None]) -> None:
        attached()

    def tells(self, tell: Callable[[Message], None]) -> None:
        pass

    def host(self, member: Worker, name: str) -> None:
        pass

    def kill(self, member: Worker) -> None:
        self.killed.append(member)
        assert self.decider is not None
        self.decider.gone(member)


class Coordinator:
    """In place of Dial."""

    here: "Coordinator"

    def __init__(self, settings: object, kind: str, name: str, up: Any, heard: Any, down: Any):
        Coordinator.here = self
        self.up, self.heard, self.down = up, heard, down
        self.told: queue.Queue[Message] = queue.Queue()
        self.tell = self.told.put

    def close(self) -> None:
        pass

    def next(self, kind: type[Message]) -> Any:
        """The next message of this kind."""
        end = time.monotonic() + SOON_S
        while not isinstance(message := self.told.get(timeout=end - time.monotonic()), kind):
            pass
        return message


class Case:
    """A decider that has begun, and a coordinator that it has dialled."""

    def __init__(self, spares: int = 1, patience_s: float = 60.0):
        self.engine = Engine()
        self.decider = Hosted(self.engine, spares, "scripted", patience_s)  # type: ignore[arg-type]
        self.engine.decider = self.decider
        self.engine.known.set()
        self.engine.resumed.get(timeout=SOON_S)  # it starts by itself
        self.engine.placed.get(timeout=SOON_S)
        self.decider.may_spare()
        soon(lambda: hasattr(Coordinator, "here"), "it does not dial")
        self.coordinator = Coordinator.here
        self.coordinator.up()
        self.ready: EngineReady = self.coordinator.next(EngineReady)
        soon(lambda: len(self.engine.started) == 3 + spares, "no spare")

    @property
    def ranks(self) -> list[Worker]:
        return self.engine.started[:3]

    def name(self, worker: Worker) -> str:
        return f"{self.decider.name}.{worker.name}"

    def form(self, epoch: int, workers: list[Worker], **more: Any) -> Loss:
        """An epoch of the coordinator's, from its Quiesce to its Resume."""
        self.coordinator.heard(Quiesce(epoch - 1))
        assert self.coordinator.next(EngineRuns).epoch == epoch - 1
        self.coordinator.heard(Place(epoch, tuple(map(self.name, workers))))
        assert self.engine.placed.get(timeout=SOON_S) == workers
        self.coordinator.heard(Resume(epoch, more.get("gone", b""), more.get("withheld", b"")))
        return self.engine.resumed.get(timeout=SOON_S)


def soon(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.002)


@pytest.fixture(autouse=True)
def scripted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No coordinator is dialled, and nothing waits long."""
    monkeypatch.setattr(hosted, "Dial", Coordinator)
    monkeypatch.setattr(hosted, "LOST_S", 0.0)
    monkeypatch.setattr(alone, "TICK_S", 0.002)
    monkeypatch.setattr(alone, "SPARE_AFTER_S", 0.0)
    monkeypatch.setattr(alone, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(alone, "LONGEST_PAUSE_S", 0.002)
    yield
    if hasattr(Coordinator, "here"):
        del Coordinator.here


def test_the_coordinator_is_told_the_workers_by_rank_and_decides_when_steps_begin() -> None:
    case = Case()
    assert case.ready.workers == tuple(map(case.name, case.ranks))
    loss = case.form(7, case.ranks, gone=pack_ids([3]), withheld=pack_ids([5]))
    assert (loss.hosted_epoch, list(loss.gone), list(loss.withheld), loss.kept) == (7, [3], [5], True)


def test_a_rank_whose_device_failed_is_told_with_what_failed() -> None:
    case = Case()
    case.form(7, case.ranks)
    case.ranks[1].device_failed = "the device failed: Xid 79"
    case.decider.gone(case.ranks[1])
    told = StepFailed(7, "the device failed: Xid 79", (case.name(case.ranks[1]),), device_failed=True)
    assert case.coordinator.next(StepFailed) == told


def test_a_rank_that_dies_is_named_and_its_rank_is_given_to_who_the_coordinator_says() -> None:
    case = Case()
    case.form(7, case.ranks)
    case.decider.gone(case.ranks[1])
    assert case.coordinator.next(StepFailed) == StepFailed(7, "w1 died", (case.name(case.ranks[1]),))
    spare = case.engine.started[3]
    case.form(9, [case.ranks[0], spare, case.ranks[2]])
    soon(lambda: len(case.engine.started) == 5, "no further spare")


def test_a_further_spare_is_started_when_steps_go_on_and_not_while_a_loss_is_dealt_with() -> None:
    case = Case()
    case.form(7, case.ranks)
    case.decider.gone(case.ranks[1])
    case.coordinator.next(StepFailed)
    time.sleep(0.05)  # it would be started at the next tick
    assert len(case.engine.started) == 4
    case.form(9, [case.ranks[0], case.engine.started[3], case.ranks[2]])
    soon(lambda: len(case.engine.started) == 5, "no further spare")


def test_a_rank_that_dies_while_nobody_decides_is_told_as_lost_when_somebody_does() -> None:
    case = Case()
    case.form(7, case.ranks)
    case.coordinator.down()
    case.decider.gone(case.ranks[2])
    case.coordinator.up()
    assert case.coordinator.next(EngineReady).workers == (*map(case.name, case.ranks[:2]), "")


def test_blocks_are_not_told_as_whole_between_a_changed_place_and_its_resume() -> None:
    case = Case()
    case.form(7, case.ranks)
    case.decider.gone(case.ranks[0])
    case.coordinator.heard(Quiesce(7))
    case.coordinator.heard(Place(8, (case.name(case.engine.started[3]), *map(case.name, case.ranks[1:]))))
    case.engine.placed.get(timeout=SOON_S)
    while not case.engine.asked.empty():
        case.engine.asked.get()
    case.coordinator.down()
    case.coordinator.up()
    case.coordinator.next(EngineReady)
    asked = case.engine.asked.get(timeout=SOON_S)
    assert asked == ("tell_all", False)


def test_no_step_begins_before_all_ranks_have_said_that_they_are_placed() -> None:
    case = Case()
    case.form(7, case.ranks)
    case.engine.late = True
    case.coordinator.heard(Quiesce(7))
    case.coordinator.heard(Place(8, tuple(map(case.name, case.ranks))))
    case.coordinator.heard(Resume(8, b"", b""))
    case.coordinator.heard(PagesWhole(8, b""))
    while case.engine.asked.get(timeout=SOON_S)[0] != "back":
        pass
    assert case.engine.resumed.empty()
    case.engine.take()
    assert case.engine.resumed.get(timeout=SOON_S).hosted_epoch == 8


def test_workers_that_are_given_up_are_ended_a_spare_too() -> None:
    case = Case()
    case.form(7, case.ranks)
    spare = case.engine.started[3]
    case.coordinator.heard(GivenUp((case.name(case.ranks[1]), case.name(spare), "another engine's")))
    soon(lambda: case.engine.killed == [case.ranks[1], spare], "they live")
    assert case.coordinator.next(StepFailed).culprits == (case.name(case.ranks[1]),)
    soon(lambda: len(case.engine.started) == 5, "none is started for the rank")
    case.form(9, [case.ranks[0], case.engine.started[4], case.ranks[2]])
    soon(lambda: len(case.engine.started) == 6, "no further spare")


@pytest.mark.parametrize("spares", [0, 1])
def test_its_ranks_can_move_where_it_keeps_spares(spares: int) -> None:
    assert Case(spares=spares).ready.moves == bool(spares)


def test_the_worker_that_a_rank_moved_from_is_ended_and_a_spare_is_started() -> None:
    case = Case()
    case.form(7, case.ranks)
    spare = case.engine.started[3]
    case.form(9, [case.ranks[0], spare, case.ranks[2]])
    soon(lambda: case.engine.killed == [case.ranks[1]], "it lives")
    soon(lambda: len(case.engine.started) == 5, "no further spare")


def test_without_spares_a_worker_is_started_for_the_ranks_that_are_missing_and_only_one() -> None:
    case = Case(spares=0)
    case.form(7, case.ranks)
    case.decider.gone(case.ranks[1])
    soon(lambda: len(case.engine.started) == 4, "none is started")
    time.sleep(0.05)  # ticks pass: it is ready, and its rank is not given yet
    assert [worker.ranks for worker in case.engine.started[3:]] == [(1,)]


def test_an_exception_at_all_ranks_blames_none_of_them() -> None:
    case = Case()
    for epoch in (7, 9):
        case.form(epoch, case.ranks)
        for rank in case.ranks:
            case.decider.failed(rank, case.engine.epoch, "execute_model: ValueError", own=True)
        assert case.coordinator.next(StepFailed).culprits == ()


def test_a_rank_that_alone_raises_twice_in_a_row_is_given_to_another_process() -> None:
    case = Case()
    culprits = []
    for epoch in (7, 9):
        case.form(epoch, case.ranks)
        of = case.engine.epoch
        case.decider.failed(case.ranks[2], of, "execute_model: OutOfMemoryError", own=True)
        case.decider.failed(case.ranks[0], of, "execute_model: CommunicatorAborted", own=False)
        culprits.append(case.coordinator.next(StepFailed).culprits)
    assert culprits == [(), (case.name(case.ranks[2]),)]


def test_an_engine_whose_workers_die_before_they_are_ready_ends_instead_of_starting_for_ever() -> None:
    case = Case()
    case.form(7, case.ranks)
    case.engine.stillborn = True
    for rank in case.ranks[:2]:
        case.decider.gone(rank)
    soon(lambda: "died before they were ready" in case.engine.failed, "it starts workers for ever")
    case.decider.close()


def test_an_engine_that_nobody_decides_about_stands_still_for_so_long_and_no_longer() -> None:
    case = Case(patience_s=0.05)
    case.form(7, case.ranks)
    time.sleep(0.1)
    assert not case.engine.failed
    case.coordinator.down()
    case.decider.gone(case.ranks[0])
    soon(lambda: "stood still" in case.engine.failed, "it stands still for ever")


def test_the_coordinators_word_about_blocks_reaches_the_scheduler() -> None:
    case = Case()
    case.form(7, case.ranks)
    case.coordinator.heard(PinPages(pack_ids([1]), (b"k" * 16,)))
    case.coordinator.heard(PagesWhole(7, pack_ids([2])))
    asked = []
    while len(asked) < 2:
        if (word := case.engine.asked.get(timeout=SOON_S))[0] in ("pin", "back"):
            asked.append(word)
    assert asked == [("pin", [1], (b"k" * 16,)), ("back", [2], True)]


def test_an_engine_whose_decider_fails_ends_and_does_not_stand_still_for_ever() -> None:
    case = Case()
    case.form(7, case.ranks)
    case.engine.kill = lambda member: 1 / 0  # type: ignore[method-assign, assignment]
    case.coordinator.heard(GivenUp((case.name(case.ranks[0]),)))
    soon(lambda: "ZeroDivisionError" in case.engine.failed, "it stands still")
