"""What is made of the figures of vLLM: medians, ratios, goals, and its section of results.md."""

from tests.bench.vllm_tables import (
    PROTECTED,
    STOCK,
    UNPROTECTED,
    Figures,
    Kill,
    Memory,
    Speed,
    goals,
    kept,
    section,
    tables,
    written,
)

WHERE = {"processor": "a processor", "cores": 2, "memory_gib": 24, "load_before": 7.0}


def figures() -> Figures:
    told = Figures(WHERE, True, "0.32.0")
    told.speeds = [
        Speed("decode", 4, PROTECTED, [30.0, 10.0, 29.0]),
        Speed("decode", 4, UNPROTECTED, [29.0]),
        Speed("decode", 4, STOCK, [14.5]),
    ]
    told.kills = [Kill(PROTECTED, 4096, stall, True, {"detect_s": 0.1}) for stall in (0.5, 9.0, 0.4)]
    told.kills += [Kill(UNPROTECTED, 4096, 5.0, True), Kill(STOCK, 4096, 90.0, False)]
    told.memory = Memory(300, 100, 900, 1400)
    return told


def test_medians_are_compared_with_what_was_promised() -> None:
    by_name = {goal.name: goal for goal in goals(figures())}
    assert by_name["stall at 4,096 tokens, s"].figure == 0.5
    assert by_name["stall, times shorter than recomputing"].figure == 10
    assert by_name["stall, times shorter than restarting stock vLLM"].figure == 180
    assert by_name["decode, 4 stream(s): of no protection"].figure == 1.0
    assert by_name["decode, 4 stream(s): of stock vLLM, TP = 3"].figure == 2.0
    assert all(goal.met for goal in by_name.values())


def test_a_run_without_some_of_it_has_no_verdict_on_that() -> None:
    told = figures()
    told.kills = [Kill(PROTECTED, 4096, 0.5, True)]
    told.speeds, told.memory = told.speeds[:1], None
    assert [goal.name for goal in goals(told)] == ["stall at 4,096 tokens, s"]
    assert len(tables(told)) == 4


def test_the_section_is_made_anew_and_the_rest_stays() -> None:
    new = section(figures())
    assert "busy" in new
    once = written("# others\n\ntext\n", new)
    assert once.startswith("# others\n\ntext\n")
    assert written(once, new) == once
    assert kept(once).strip() == new.strip()
    assert kept("# others\n") == ""
