"""What the choice between restoring and recomputing rests on: on machines from a CPU to an H100 it chooses right."""

import random
from dataclasses import dataclass

import pytest

from services.coordinator.protection.rates import STALE_S, Rates, Work

CHUNK = 512


@dataclass(frozen=True)
class Machine:
    """A simulated one: what its steps and its restores take, but for a noise of 5%."""

    step_s: float
    """Of a step, whatever it computes: a decode's latency."""
    prefill_tokens_s: float
    pairs_s: float
    """Pairs of a token and one that it attends to, a second."""
    link: float
    """Bytes a second, from store and ranks to the one that decodes."""
    start_s: float
    token_bytes: int
    """KV of a token, on one rank."""

    def step(self, *works: Work) -> float:
        tokens = sum(work.tokens for work in works)
        return self.step_s + tokens / self.prefill_tokens_s + sum(work.pairs for work in works) / self.pairs_s

    def recompute(self, tokens: int) -> float:
        return sum(self.step(Work.chunk(at, min(CHUNK, tokens - at))) for at in range(0, tokens, CHUNK))

    def restore(self, tokens: int) -> float:
        return self.start_s + tokens * self.token_bytes / self.link


SMALL, LARGE = 23_040, 40_960  # SmolLM2 of 3 ranks in float32; a 70B model of 8 ranks in bfloat16
MACHINES = {
    "CPU": Machine(0.05, 1e3, 3e7, 0.5e9, 0.05, SMALL),
    "CPU, slow link": Machine(0.05, 1e3, 3e7, 0.1e9, 0.05, SMALL),
    "small GPU": Machine(0.02, 1e4, 1e9, 5e9, 0.03, LARGE),
    "small GPU, slow link": Machine(0.02, 1e4, 1e9, 0.1e9, 0.03, LARGE),
    "H100": Machine(0.01, 1e5, 5e10, 50e9, 0.02, LARGE),
    "H100, 10 GB/s": Machine(0.01, 1e5, 5e10, 10e9, 0.02, LARGE),
    "H100, slow link": Machine(0.01, 1e5, 5e10, 1e9, 0.02, LARGE),
    "H100, slowest link": Machine(0.001, 1e5, 5e11, 0.1e9, 0.02, LARGE),
}


def noisy(dice: random.Random, seconds: float) -> float:
    return seconds * dice.uniform(0.95, 1.05)


def learnt(machine: Machine, *, rounds: int = 1, beside: float = 1.0) -> Rates:
    """What is known after some prompts were prefilled, protected, and decoded for long. No rank was lost yet.

    `beside`: what runs beside it makes protecting take up to so many times longer, most of the time.
    """
    dice, rates = random.Random(1), Rates(step_tokens=CHUNK)
    for tokens in (100, 3_000, 20_000) * rounds:
        for at in range(0, tokens, CHUNK):
            chunk = Work.chunk(at, min(CHUNK, tokens - at))
            rates.saw_step(chunk, noisy(dice, machine.step(chunk)))
            slowed = dice.choice((1.0, *(dice.uniform(1.0, beside) for _ in range(3))))
            rates.saw_protect(chunk.tokens * machine.token_bytes, slowed * noisy(dice, machine.restore(chunk.tokens)))
        for at in range(tokens, tokens + 2_000):
            work = Work.chunk(at, 1)
            rates.saw_step(work, noisy(dice, machine.step(work)))
    return rates


@pytest.mark.parametrize(("rounds", "beside"), [(1, 1.0), (10, 10.0)])
@pytest.mark.parametrize("name", MACHINES)
def test_before_the_first_loss_it_is_known_which_way_is_faster(name: str, rounds: int, beside: float) -> None:
    """At every context from 16 tokens to a million, unless both ways take the same to within a third."""
    machine = MACHINES[name]
    rates = learnt(machine, rounds=rounds, beside=beside)
    for tokens in (16 << power for power in range(17)):
        recompute_s, restore_s = machine.recompute(tokens), machine.restore(tokens)
        if max(recompute_s, restore_s) < 1.33 * min(recompute_s, restore_s):
            continue
        expected = rates.recompute_seconds(0, tokens), rates.restore_seconds(tokens * machine.token_bytes)
        assert (expected[0] < expected[1]) == (recompute_s < restore_s), f"{tokens} tokens: {expected}"


def crossover(machine: Machine, rates: Rates) -> tuple[int, int]:
    """The least context at which restoring is faster: really, and as it is expected."""
    contexts = [int(16 * 1.05**power) for power in range(250)]
    real = next(n for n in contexts if machine.restore(n) < machine.recompute(n))
    size = machine.token_bytes
    return real, next(n for n in contexts if rates.restore_seconds(n * size) < rates.recompute_seconds(0, n))


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("CPU", 1, 20),  # at once
        ("small GPU, slow link", 100_000, 1_000_000),  # where attention makes a token dear
        ("H100, 10 GB/s", 500, 2_000),
    ],
)
def test_the_crossover_is_where_the_machine_has_it(name: str, low: int, high: int) -> None:
    machine = MACHINES[name]
    real, expected = crossover(machine, learnt(machine))
    assert low <= real <= high
    assert real / 1.4 <= expected <= real * 1.4


def test_prefill_that_grows_with_the_context_is_told_beyond_what_was_seen() -> None:
    machine = MACHINES["CPU"]
    assert learnt(machine).recompute_seconds(0, 200_000) == pytest.approx(machine.recompute(200_000), rel=0.2)


def test_a_first_prefill_is_enough_to_go_by() -> None:
    machine = MACHINES["H100"]
    rates = Rates(step_tokens=CHUNK)
    rates.saw_step(Work.chunk(0, CHUNK), machine.step(Work.chunk(0, CHUNK)))
    assert rates.recompute_seconds(0, 5_000) == pytest.approx(machine.recompute(5_000), rel=0.3)


def test_thousands_of_decodes_leave_what_is_known_of_prefill() -> None:
    machine = MACHINES["small GPU"]
    rates = learnt(machine)
    before = rates.recompute_seconds(0, 10_000)
    for at in range(20_000):
        rates.saw_step(Work(8, 8.0 * (500 + at), 8.0 * (500 + at)), machine.step(Work(8, 8.0 * (500 + at), 0)))
    assert rates.recompute_seconds(0, 10_000) == pytest.approx(before, rel=0.15)


def test_a_restore_that_was_seen_counts_more_than_what_protection_took() -> None:
    rates = Rates()
    for _ in range(20):
        rates.saw_protect(1_000_000, 0.1)
    assert rates.restore_seconds(10_000_000) == pytest.approx(1.0, rel=0.05)
    rates.saw_restore(10_000_000, 0.5, now=1.0)
    assert rates.restore_seconds(10_000_000) == pytest.approx(0.5, rel=0.05)


def test_a_link_that_became_slow_is_noticed() -> None:
    rates = Rates()
    rates.saw_protect(1_000_000, 0.1)
    for _ in range(5):
        rates.saw_protect(1_000_000, 1.0)
    assert rates.restore_seconds(10_000_000) < 2.0  # that may be what runs beside
    for _ in range(200):
        rates.saw_protect(1_000_000, 1.0)
    assert rates.restore_seconds(10_000_000) > 9.0


def test_what_is_tried_is_never_much_worse_and_only_when_the_guess_is_old() -> None:
    rates = Rates()
    rates.saw_restore(1_000_000, 1.0, now=0.0)
    assert not rates.explores(1.4, 1.0, now=STALE_S - 1)
    assert rates.explores(1.4, 1.0, now=STALE_S + 1)
    assert not rates.explores(1.6, 1.0, now=STALE_S + 1)


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("context", [0, 10_000, 100_000, 1_000_000])
def test_a_chunk_takes_no_longer_than_it_may(name: str, context: int) -> None:
    machine, most_s = MACHINES[name], 0.5
    count = learnt(machine).chunk(context, CHUNK, most_s)
    taken = machine.step(Work.chunk(context, count))
    assert taken < 1.25 * most_s or count == 64
    assert count == CHUNK or machine.step(Work.chunk(context, 2 * count + 64)) > 0.75 * most_s
