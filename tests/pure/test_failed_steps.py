"""What is blamed for steps that fail though no process is lost: a request, or a worker that fails alone."""

from collections.abc import Collection

from services.coordinator.scheduling.failed_steps import FailedSteps, Verdict

RANKS = 3
ALL = ("w0", "w1", "w2")


class Steps:
    """Steps one after the other, each of which fails or comes back."""

    def __init__(self, tries: int = 2) -> None:
        self.failed_steps = FailedSteps(tries)

    def fails(self, *requests: str, on: Collection[str] = ALL) -> Verdict:
        return self.failed_steps.failed(requests, on, ranks=RANKS)

    def comes_back(self, *requests: str) -> None:
        self.failed_steps.came_back(requests)


def test_a_step_is_tried_again_before_anybody_runs_apart() -> None:
    steps = Steps()
    assert steps.fails("good", "bad") == Verdict()
    assert steps.failed_steps.next(["good", "bad"], ["good", "bad"]) is None
    assert steps.fails("good", "bad") == Verdict()
    assert steps.failed_steps.next(["good", "bad"], ["good", "bad"]) == "good"


def test_who_fails_alone_ends_and_is_told_how_often_it_failed() -> None:
    steps = Steps()
    steps.fails("good", "bad")
    steps.fails("good", "bad")
    steps.comes_back("good")
    assert steps.failed_steps.next(["good", "bad"], ["good", "bad"]) == "bad"
    assert steps.fails("bad") == Verdict("bad", 3)
    assert not steps.failed_steps.doubted()


def test_a_suspect_that_can_not_run_yet_holds_up_no_other() -> None:
    steps = Steps(1)
    steps.fails("a", "b")
    assert steps.failed_steps.next(["a", "b"], ["b"]) == "b"


def test_a_worker_that_alone_fails_is_replaced_before_a_request_is_blamed_for_it() -> None:
    steps = Steps()
    for _ in range(2):
        assert steps.fails("only", on=["w1"]) == Verdict()
    assert steps.fails("only", on=["w1"]) == Verdict(worker="w1")
    assert steps.failed_steps.next(["only"], ["only"]) == "only"
    assert steps.fails("only", on=["w3"]) == Verdict("only", 4)


def test_a_worker_on_which_others_requests_run_is_not_replaced() -> None:
    steps = Steps()
    steps.fails("good", "bad", on=["w1"])
    steps.fails("good", "bad", on=["w1"])
    steps.comes_back("good")
    assert steps.fails("bad", on=["w1"]) == Verdict("bad", 3)


def test_what_ended_otherwise_is_forgotten() -> None:
    steps = Steps(1)
    steps.fails("a", "b")
    assert steps.failed_steps.next([], []) is None
    assert not steps.failed_steps.doubted()
    assert not steps.failed_steps._doubts
