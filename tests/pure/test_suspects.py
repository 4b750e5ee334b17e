"""Who is blamed for steps that are lost again and again."""

from shared.suspects import Suspects


def lose(suspects: Suspects, step: int, *requests: str) -> tuple[str, int] | None:
    suspects.sent(step, requests)
    return suspects.lost()


def test_a_step_that_is_lost_once_makes_nobody_a_suspect() -> None:
    suspects = Suspects(2)
    assert lose(suspects, 1, "a", "b") is None
    assert suspects.next({"a", "b"}) is None


def test_only_a_request_that_is_lost_alone_as_well_is_to_blame() -> None:
    suspects = Suspects(2)
    for step in (1, 2):
        assert lose(suspects, step, "a", "bad", "b") is None
    assert suspects.next(["a", "bad", "b"]) == "a"
    suspects.sent(3, ["a"])
    suspects.came_back(3)
    assert suspects.next(["a", "bad", "b"]) == "bad"
    assert lose(suspects, 4, "bad") == ("bad", 3)
    assert suspects.next(["a", "b"]) == "b"
    suspects.sent(5, ["b"])
    suspects.came_back(5)
    assert suspects.next(["a", "b"]) is None


def test_a_step_that_comes_back_clears_its_requests() -> None:
    suspects = Suspects(2)
    for step in range(1, 9, 2):
        assert lose(suspects, step, "a") is None
        suspects.sent(step + 1, ["a"])
        suspects.came_back(step + 1)
    assert suspects.next({"a"}) is None


def test_of_two_steps_in_flight_only_the_first_one_failed() -> None:
    suspects = Suspects(1)
    suspects.sent(1, ["a"])
    suspects.sent(2, ["b"])
    assert suspects.lost() is None
    assert suspects.next({"a", "b"}) == "a"


def test_losses_with_no_step_in_flight_blame_nobody_and_those_that_ended_are_forgotten() -> None:
    suspects = Suspects(1)
    lose(suspects, 1, "a")
    assert suspects.lost() is None
    assert suspects.next({"b"}) is None
    assert suspects.next({"a", "b"}) is None
