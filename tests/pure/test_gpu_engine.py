"""What the engine core decides about GPUs: who is started on which, and when graphs are captured again."""

from concurrent.futures import Future
from typing import Any

import pytest

from services.vllm.places import Places
from services.vllm.recapture import IDLE_S, Graphs


class Broken:
    """GPUs that have failed, by number."""

    def __init__(self) -> None:
        self.why: dict[int, str] = {}

    def __call__(self, place: int) -> str:
        return self.why.get(place, "")


def test_a_rank_is_started_again_on_the_gpu_of_the_process_that_died() -> None:
    places = Places(4, Broken())
    assert [places.take((rank,)) for rank in range(3)] == [(0, 0), (1, 1), (2, 2)]
    places.give_back(1)
    assert places.take((1,)) == (1, 1)


def test_of_ranks_that_are_lost_together_each_is_loaded_once() -> None:
    places = Places(3, Broken())
    for rank in range(3):
        places.take((rank,))
    places.give_back(0)
    places.give_back(2)
    assert [places.take((0, 2)), places.take((0, 2))] == [(0, 0), (2, 2)]


def test_no_two_processes_share_a_gpu() -> None:
    places = Places(2, Broken())
    assert [places.take((rank,)) for rank in range(2)] == [(0, 0), (1, 1)]
    assert places.take((0,)) is None
    places.give_back(0)
    assert places.take((1,)) == (0, 1)  # its own is in use yet


def test_a_gpu_that_has_failed_is_not_used_again_and_named() -> None:
    broken = Broken()
    places = Places(3, broken)
    assert [places.take((rank,)) for rank in range(2)] == [(0, 0), (1, 1)]
    broken.why[0] = "Xid 79"
    assert places.give_back(0) == "Xid 79"
    assert places.take((0,)) == (2, 0)
    assert places.take((0,)) is None


class Engine:
    def __init__(self) -> None:
        self.idle = True
        self.asked: list[Future[Any]] = []
        self.graphs = Graphs(self.capture, lambda: self.idle)
        self.now = 0.0

    def capture(self) -> Future[Any]:
        self.asked.append(Future())
        return self.asked[-1]

    def pass_time(self, seconds: float = 2 * IDLE_S) -> int:
        """Returns how often it was asked to capture so far."""
        end = self.now + seconds
        while self.now < end:
            self.now += 0.05
            self.graphs.look(self.now)
        return len(self.asked)


def test_graphs_are_captured_again_once_no_request_has_run_for_a_while() -> None:
    engine = Engine()
    assert engine.pass_time() == 0
    engine.graphs.lost(True)
    engine.idle = False
    assert engine.pass_time(60.0) == 0
    engine.idle = True
    assert engine.pass_time(0.8 * IDLE_S) == 0
    assert engine.pass_time() == 1
    engine.asked[0].set_result([True, True])
    assert engine.pass_time(60.0) == 1


@pytest.mark.parametrize(("answer", "again"), [([None, None], True), ([False, False], False)])
def test_they_are_asked_again_where_it_was_not_the_time_and_not_where_they_failed(
    answer: list[Any], again: bool
) -> None:
    engine = Engine()
    engine.graphs.lost(True)
    engine.pass_time()
    engine.asked[0].set_result(answer)
    assert (engine.pass_time(10.0) == 2) is again


def test_a_capture_that_a_loss_cut_short_is_asked_again_in_the_next_epoch() -> None:
    engine = Engine()
    engine.graphs.lost(True)
    engine.pass_time()
    engine.graphs.lost(True)
    engine.asked[0].set_exception(RuntimeError("a rank was lost meanwhile"))
    assert engine.pass_time() == 2


def test_an_engine_that_has_no_graphs_is_not_asked() -> None:
    engine = Engine()
    engine.graphs.lost(False)
    assert engine.pass_time(10.0) == 0
