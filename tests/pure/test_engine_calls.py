"""Calls of an engine core to its ranks: answered in any order, or cut short by an epoch's end."""

import threading

import pytest

from services.vllm.calls import Calls
from services.vllm.link import EngineFailed, Link
from services.vllm.messages import Answer


def lost(method: str) -> str:
    if method == "other":
        raise RuntimeError("try again")
    return f"lost {method}"


@pytest.fixture
def calls() -> Calls:
    calls = Calls(lost)
    calls.end(1)
    return calls


def test_a_call_to_all_ranks_ends_with_their_answers_in_order_of_rank(calls: Calls) -> None:
    told: list[int] = []
    future = calls.issue(1, "sizes", [0, 1, 2], False, told.append)
    for rank in (2, 0, 1):
        assert not future.done()
        calls.answered(rank, Answer(1, told[0], f"of {rank}"))
    assert future.result(0) == ["of 0", "of 1", "of 2"]


def test_a_call_to_one_rank_ends_with_its_answer(calls: Calls) -> None:
    told: list[int] = []
    future = calls.issue(1, "step", [1], True, told.append)
    calls.answered(1, Answer(1, told[0], "output"))
    assert future.result(0) == "output"


def test_an_error_of_any_rank_names_the_call_and_leaves_it_to_be_decided(calls: Calls) -> None:
    told: list[int] = []
    future = calls.issue(1, "step", [0], True, told.append)
    assert calls.answered(2, Answer(1, told[0], None, "boom")) == "step"
    assert not future.done()


def test_what_an_epoch_cut_short_ends_as_lost_once_it_is_released_and_not_before(calls: Calls) -> None:
    told: list[int] = []
    future = calls.issue(1, "step", [0], True, told.append)
    other = calls.issue(1, "other", [0], True, told.append)
    calls.end(2)
    calls.answered(0, Answer(1, told[0], "too late"))
    assert not future.done()
    calls.release()
    assert future.result(0) == "lost step"
    with pytest.raises(RuntimeError, match="try again"):
        other.result(0)


def test_a_call_for_an_epoch_that_is_over_is_not_sent(calls: Calls) -> None:
    calls.end(2)
    told: list[int] = []
    future = calls.issue(1, "step", [0], True, told.append)
    calls.release()
    assert told == []
    assert future.result(0) == "lost step"


def test_when_the_engine_fails_no_call_waits(calls: Calls) -> None:
    future = calls.issue(1, "step", [0], True, lambda number: None)
    calls.release(EngineFailed("gone"))
    with pytest.raises(EngineFailed):
        future.result(0)


def test_who_is_to_step_waits_until_the_newest_epoch_may() -> None:
    link = Link()
    link.quiesce(1)
    link.resume(1)
    assert link.wait_open() == 1
    link.quiesce(2)
    seen: list[int] = []
    asking = threading.Thread(target=lambda: seen.append(link.wait_open()))
    asking.start()
    link.resume(1)  # of an epoch that is over
    assert not seen
    link.resume(2)
    asking.join(5)
    assert seen == [2]


def test_who_waits_is_told_when_the_engine_fails() -> None:
    link = Link()
    link.fail("no ranks")
    with pytest.raises(EngineFailed, match="no ranks"):
        link.wait_open()
