"""What a hosted engine tells of its steps is what they took, and reaches the choice between the ways back."""

import math

import pytest

from services.coordinator.protection.rates import Rates, Work
from services.vllm import step_times
from services.vllm.step_times import StepTimes
from shared.messages import StepTime


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(step_times, "time", clock)
    return clock


def test_a_step_took_the_time_since_it_was_sent(clock: Clock) -> None:
    times = StepTimes()
    times.sent(1, {"a": 64, "b": 1}, {"a": 164, "b": 10})
    clock.now += 0.5
    times.came_back(1)
    assert times.take() == (StepTime(65, 64 * (100 + 164) // 2 + 9, 174, 0.5),)
    assert times.take() == ()


def test_a_step_that_was_sent_while_another_was_in_flight_took_the_time_since_that_was_done(clock: Clock) -> None:
    times = StepTimes()
    times.sent(1, {"a": 1}, {"a": 10})
    times.sent(2, {"a": 1}, {"a": 200})
    clock.now += 1.0
    times.came_back(1)
    clock.now += 0.25
    times.came_back(2)
    assert [each.seconds for each in times.take()] == [1.0, 0.25]


def test_steps_that_were_lost_or_empty_are_not_told(clock: Clock) -> None:
    times = StepTimes()
    times.sent(1, {"a": 1}, {"a": 10})
    times.lost()
    times.sent(2, {}, {})
    times.came_back(2)
    assert times.take() == ()


def test_no_more_is_kept_than_there_are_sizes(clock: Clock) -> None:
    times = StepTimes()
    for step in range(1000):
        times.sent(step, {"a": 1}, {"a": 1024 + step})
        clock.now += 0.01
        times.came_back(step)
    assert len(times.take()) == 1


@pytest.mark.parametrize(
    ("tokens", "seconds"), [(0, 1.0), (-5, 1.0), (5, 0.0), (5, -1.0), (5, math.nan), (5, math.inf)]
)
def test_what_no_step_can_take_teaches_nothing(tokens: int, seconds: float) -> None:
    rates = Rates()
    before = rates.recompute_seconds(0, 1000)
    rates.saw_step(Work(tokens, 0, 0), seconds)
    assert rates.recompute_seconds(0, 1000) == before
