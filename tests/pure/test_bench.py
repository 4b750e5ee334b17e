"""The bench's pure parts: traces, what is made of figures, what a kill came to in words."""

import statistics

from tests.bench import recovery, serving
from tests.bench.outcome import TOKENS, Outcome, in_words


def test_every_mode_gets_the_same_trace_and_failures() -> None:
    assert serving.trace(50) == serving.trace(50)
    assert serving.failures(4, 60.0, 3) == serving.failures(4, 60.0, 3)


def test_failures_are_spread_over_the_trace_and_as_many_as_asked_for() -> None:
    plan = serving.failures(5, 50.0, 3)
    assert [int(at // 10) for at, _ in plan] == [0, 1, 2, 3, 4]
    assert {rank for _, rank in plan} <= {0, 1, 2}
    assert serving.failures(0, 50.0, 3) == []


def test_arrivals_come_once_a_unit_of_time_with_the_lengths_that_are_documented() -> None:
    arrivals = serving.trace(2000)
    assert 0.95 < arrivals[-1].at / len(arrivals) < 1.05
    assert 0.95 < statistics.median(arrival.prompt for arrival in arrivals) / serving.PROMPTS.median < 1.05
    assert 0.9 < statistics.median(arrival.tokens for arrival in arrivals) / serving.ANSWERS.median < 1.1


def test_the_crossover_is_where_the_two_lines_meet() -> None:
    lines = [recovery.Growth("none", 0.0, 1.0), recovery.Growth("parity", 0.2, 0.2)]
    assert abs(recovery.crossover(lines) - 250.0) < 1e-6


def test_a_stream_that_ends_early_or_with_an_error_is_not_whole() -> None:
    cut = Outcome("a", streamed_before=21, streamed_after=3)
    failed = Outcome("b", streamed_before=21, streamed_after=TOKENS - 21, stream_error="aborted")
    whole = Outcome("c", streamed_before=21, streamed_after=TOKENS - 21)
    assert [each.whole for each in (cut, failed, whole)] == [False, False, True]
    assert in_words([cut, whole])[1][1:] == ["breaks off: 24 of 64 tokens", "goes on to its end: 64 of 64 tokens"]
