"""vLLM's own schedulers with ours around them, without a server: lost steps roll back, and no token comes twice."""

import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

from tests.vllm.server import prompt

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def core(tiny_llama: Path) -> Any:
    """Makes a core."""
    from tests.vllm.scripted import Core

    return lambda **changes: Core(tiny_llama, **changes)


@pytest.mark.parametrize("depth", [1, 2])
def test_no_loss_no_difference(core: Any, depth: int) -> None:
    engine = core(depth=depth)
    for number in range(6):
        engine.ask(f"r{number}", prompt(number % 2, 64) + prompt(number, 70), 40)
    engine.run()
    assert set(engine.ended.values()) == {"length"}
    assert engine.mirror.sealed
    steps = engine.scheduler.load().steps
    assert {each.tokens > 100 for each in steps} == {True, False}
    assert all(0 < each.seconds < 60 and each.pairs >= each.tokens <= each.context for each in steps)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("window", [0, 70])
@pytest.mark.parametrize("seed", range(12))
def test_tokens_are_the_same_whatever_is_lost_when(core: Any, depth: int, window: int, seed: int) -> None:
    dice = random.Random(seed)
    engine = core(depth=depth, blocks=dice.choice([24, 40, 80]) * (2 if window else 1), window=window)
    names = (f"r{number}" for number in range(1000))
    for _ in range(4):
        for _ in range(dice.randrange(1, 6)):
            shared = prompt(dice.randrange(3), 32 * dice.randrange(4))
            engine.ask(next(names), shared + prompt(dice.randrange(99), dice.randrange(1, 150)), dice.randrange(1, 70))
        for _ in range(dice.randrange(5, 60)):
            engine.turn()
            _disturb(engine, dice)
    engine.run()


def _disturb(engine: Any, dice: random.Random) -> None:
    sealed = sorted(engine.mirror.sealed.keys())
    chance = dice.random()
    if chance < 0.08:
        gone = [block for block in sealed if dice.random() < 0.3]
        withheld = [block for block in sealed if block not in gone and _idle(engine, block) and dice.random() < 0.5]
        engine.lose(gone, withheld)
    elif chance < 0.14:
        engine.whole([block for block in getattr(engine, "withheld", {}) if dice.random() < 0.5])
    elif chance < 0.2:
        engine.pin([block for block in sealed if dice.random() < 0.2][:4])
    elif chance < 0.3:
        engine.unpin()
    elif chance < 0.33 and engine.scheduler.requests:
        from vllm.v1.request import RequestStatus

        name = dice.choice(sorted(engine.scheduler.requests))
        engine.scheduler.finish_requests([name], RequestStatus.FINISHED_ABORTED)
        engine.ended[name] = "abort"


def _idle(engine: Any, block: int) -> bool:
    return engine.scheduler.kv_cache_manager.block_pool.blocks[block].ref_cnt == 0


@pytest.mark.parametrize("depth", [1, 2])
def test_requests_that_make_every_step_fail_end_alone(core: Any, depth: int) -> None:
    engine = core(depth=depth)
    for number in range(6):
        engine.ask(f"r{number}", prompt(number, 100), 20)
    engine.failing |= {"r2", "r4"}
    engine.run()
    assert [engine.ended[f"r{number}"] for number in range(6)] == [
        "length",
        "length",
        "error",
        "length",
        "error",
        "length",
    ]


def test_a_suspect_that_can_not_run_yet_lets_the_others_go_on(core: Any) -> None:
    engine = core(blocks=12)
    engine.ask("small", prompt(1, 40), 60)
    engine.ask("large", prompt(2, 320), 4)
    for _ in range(3):
        engine.turn()
    for _ in range(2):
        engine.lose((), ())
        engine.scheduler._suspects.sent(10_000, ["large"])
    engine.run()
    assert set(engine.ended.values()) == {"length"}
