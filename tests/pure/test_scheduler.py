"""The scheduler: decode first, prefill in chunks, prefixes reused, the youngest preempted, nothing lost."""

import random
from collections.abc import Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

import pytest

from services.coordinator.protection.rates import Rates, StepBound
from services.coordinator.scheduling.scheduler import NewTokens, Scheduler
from services.worker.engine.batch import SequenceStep
from services.worker.engine.sequences import Sequences
from shared.types import GenerationRequest, SamplingParams, next_page_key, pack_ids, root_key, unpack_ids
from tests.pure.dictionary_host import EmbeddedPages

EOS = 2


def made(pages: int = 16, *, step: int = 8, batch: int = 4, waiting: int = 8) -> Scheduler:
    return Scheduler(
        EmbeddedPages(pages, protect=False).cache,
        page_tokens=4,
        max_step_tokens=step,
        max_batch=batch,
        max_waiting=waiting,
        max_model_len=pages * 4,
        eos_token_ids=(EOS,),
    )


def add(scheduler: Scheduler, prompt: list[int], max_tokens: int = 4, **more: object) -> None:
    number = len(scheduler.waiting) + len(scheduler.running)
    known = {"sampling": SamplingParams()} | more
    request = GenerationRequest(f"r{number}", pack_ids(prompt), max_tokens, **known)  # type: ignore[arg-type]
    scheduler.add(request, root_key("m", ""))


class Ranks:
    """What the ranks of an epoch are told, step by step."""

    def __init__(self) -> None:
        self.sequences = Sequences()

    def plan(self, scheduler: Scheduler, limit: int | None = None) -> tuple[SequenceStep, ...]:
        """The next step, as a rank sees it."""
        steps = self.sequences.take(scheduler.plan(limit))
        for each in steps:
            request = scheduler.running[each.sequence]
            assert each.chunk.pages.tolist() == request.pages.tolist(), "a rank has another page table"
            end = each.chunk.end
            assert each.chunk.tokens.tolist() == request.tokens[each.chunk.start : end].tolist()
            if each.sampling is not None and each.sampling.needs_history:
                assert each.history.tolist() == request.tokens[request.prompt_tokens :].tolist()
                assert each.prompt.tolist() == request.tokens[: request.prompt_tokens].tolist()
        return steps


RANKS: WeakKeyDictionary[Scheduler, Ranks] = WeakKeyDictionary()


def planned(scheduler: Scheduler, limit: int | None = None) -> tuple[SequenceStep, ...]:
    return RANKS.setdefault(scheduler, Ranks()).plan(scheduler, limit)


def completed(scheduler: Scheduler, tokens: dict[int, int]) -> list[NewTokens]:
    """The step's result, as one list in the order of the requests."""
    if not scheduler.in_flight:
        return []
    done = scheduler.complete(tokens)
    went_on = [NewTokens(each, (each.tokens[-1],), (), None) for each in done.went_on]
    return sorted((*went_on, *done.others), key=lambda output: output.request.number)


def run(
    scheduler: Scheduler, token: int = 9, limit: int | None = None
) -> tuple[tuple[SequenceStep, ...], list[NewTokens]]:
    plan = planned(scheduler, limit)
    outputs = completed(scheduler, {part.sequence: token for part in plan if part.sampling is not None})
    for output in outputs:
        if output.finish:
            scheduler.remove(output.request)
    scheduler.check()
    return plan, outputs


def test_a_long_prompt_is_computed_in_chunks_and_sampled_after_the_last() -> None:
    scheduler = made()
    add(scheduler, list(range(10, 29)))
    sizes = []
    for _ in range(3):
        plan, outputs = run(scheduler)
        sizes.append((len(plan[0].chunk.tokens), plan[0].chunk.logits, len(outputs)))
    assert sizes == [(8, "none", 0), (8, "none", 0), (3, "last", 1)]


class Cut(StepBound):
    """From token 8 on, three tokens are as much as a step can bear."""

    def __init__(self) -> None:
        super().__init__(Rates(), 1.0)

    def fits(self, start: int, most: int) -> int:
        return most if start < 8 else 3


def test_a_chunk_is_as_long_as_the_time_of_a_step_allows_and_then_no_other_begins() -> None:
    scheduler = Scheduler(
        EmbeddedPages(64, protect=False).cache, page_tokens=4, max_step_tokens=8, max_batch=4, max_waiting=8,
        max_model_len=256, eos_token_ids=(EOS,), bound=Cut(),
    )  # fmt: skip
    add(scheduler, list(range(10, 30)))
    add(scheduler, list(range(40, 60)))
    sizes = [[(part.sequence, len(part.chunk.tokens)) for part in run(scheduler)[0]] for _ in range(3)]
    assert sizes == [[(0, 8)], [(0, 3)], [(0, 3)]]


def test_who_makes_up_for_what_was_lost_prefills_before_a_prompt() -> None:
    scheduler = made(64)
    add(scheduler, list(range(10, 90)))
    add(scheduler, [5, 6, 7, 8, 9, 5])
    while not any(each.number == 1 and each.decodes for each in scheduler.running.values()):
        run(scheduler)
    add(scheduler, list(range(10, 60)))
    first, second = scheduler.running[0], scheduler.running[1]
    scheduler.rollback()  # an epoch ends
    scheduler.truncate(first, 0)
    scheduler.truncate(second, 0)
    plan, _ = run(scheduler)
    assert {part.sequence: len(part.chunk.tokens) for part in plan} == {0: 1, 1: 7}


def test_decoding_sequences_go_before_a_prefill() -> None:
    scheduler = made()
    add(scheduler, [5, 6])
    run(scheduler)
    add(scheduler, list(range(10, 40)))
    plan, _ = run(scheduler)
    assert [(part.chunk.start, len(part.chunk.tokens)) for part in plan] == [(2, 1), (0, 7)]


@pytest.mark.parametrize("seed", range(20))
def test_nobody_waits_longer_than_all_tokens_of_all_streams_take_and_a_step(seed: int) -> None:
    """ceil(streams / tokens a step) + 1 steps, while some prefill, some decode, and some have not come yet."""
    dice = random.Random(seed)
    streams, most = dice.randrange(2, 40), dice.choice((2, 3, 7, 16, 64))
    limit = dice.choice((None, 2, 5))
    scheduler = made(2048, step=most, batch=streams, waiting=streams)
    for _ in range(streams):
        add(scheduler, [dice.randrange(10, 99) for _ in range(dice.choice((1, 3, 90)))], max_tokens=100)
    last: dict[int, int] = {}
    for step in range(150):
        before = set(scheduler.running)
        plan, _ = run(scheduler, limit=limit)
        last |= dict.fromkeys(set(scheduler.running) - before, step) | {part.sequence: step for part in plan}
        bound = -(-len(scheduler.running) // min(most, limit or most)) + 1
        assert all(step - last[number] < bound for number in scheduler.running), f"{bound} steps"


def test_newcomers_and_prompts_go_on_while_more_decode_than_a_step_has_tokens() -> None:
    scheduler = made(1024, step=8, batch=40, waiting=40)
    for _ in range(20):
        add(scheduler, [5], max_tokens=200)
    add(scheduler, list(range(10, 40)))
    for _ in range(60):
        run(scheduler)
    assert not scheduler.waiting
    assert all(len(each.tokens) > each.prompt_tokens for each in scheduler.running.values())


def test_ranks_are_told_a_sequence_once_and_then_only_what_is_new() -> None:
    scheduler = made(64)
    add(scheduler, list(range(10, 16)), max_tokens=20)
    batches = []
    for _ in range(6):
        batch = scheduler.plan()
        completed(scheduler, {0: 9})
        sealed = [key for _, key in scheduler.take_sealed()]
        batches.append((len(batch.begun), unpack_ids(batch.pages), len(unpack_ids(batch.tokens)), len(sealed)))
    (request,) = scheduler.running.values()
    third = request.pages[2]
    assert batches == [
        (1, [], 6, 1), (0, [], 1, 0), (0, [], 1, 1), (0, [0, 2, third], 1, 0), (0, [], 1, 0), (0, [], 1, 0)
    ]  # fmt: skip


def test_an_epoch_begins_with_whole_sequences() -> None:
    scheduler = made(64)
    add(scheduler, list(range(10, 16)), max_tokens=20, sampling=SamplingParams(presence_penalty=1.0))
    for _ in range(3):
        run(scheduler)
    scheduler.plan()
    scheduler.rollback()
    RANKS[scheduler] = Ranks()  # other processes, perhaps
    plan, _ = run(scheduler)
    assert (plan[0].chunk.start, plan[0].chunk.end) == (8, 9)
    assert plan[0].history.tolist() == [9, 9, 9]


def test_ranks_forget_what_has_ended_or_was_preempted() -> None:
    scheduler = made(pages=4, step=32)
    add(scheduler, [5, 6, 7, 8], max_tokens=8)
    add(scheduler, [15, 16, 17, 18], max_tokens=8)
    for _ in range(60):
        run(scheduler)
        assert len(RANKS[scheduler].sequences) <= len(scheduler.running) + 1
    assert scheduler.preemptions > 0


def test_each_page_of_a_request_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[tuple[int, ...]] = []

    def counted(parent: bytes, tokens: Sequence[int]) -> bytes:
        hashed.append(tuple(tokens))
        return next_page_key(parent, tokens)

    monkeypatch.setattr("services.coordinator.scheduling.scheduler.next_page_key", counted)
    scheduler = made(pages=8, step=64)
    add(scheduler, list(range(10, 30)), max_tokens=11)
    run(scheduler)
    add(scheduler, list(range(10, 38)), max_tokens=1)  # waits for room
    for _ in range(30):
        run(scheduler)
    assert not scheduler.running
    assert not scheduler.waiting
    assert len(hashed) == 7 + 7


def test_a_long_prefix_is_found_over_several_steps_while_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.coordinator.scheduling.scheduler.PAGES_MATCHED", 3)
    scheduler = made(pages=64, step=64)
    add(scheduler, list(range(10, 60)), max_tokens=1)
    run(scheduler)
    add(scheduler, [5], max_tokens=60)
    run(scheduler)
    add(scheduler, list(range(10, 62)), max_tokens=2)
    steps = [[(part.sequence, part.chunk.start) for part in run(scheduler)[0]] for _ in range(5)]
    assert steps == [[(1, 1)], [(1, 2)], [(1, 3)], [(1, 4), (2, 48)], [(1, 5), (2, 52)]]


def test_a_newcomer_that_keeps_what_it_found_never_stands_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.coordinator.scheduling.scheduler.PAGES_MATCHED", 2)
    for seed in range(12):
        dice = random.Random(seed)
        scheduler = made(pages=14, step=dice.choice((4, 40)), batch=4, waiting=99)
        ended = 0
        for step in range(1500):
            if step < 60 and dice.random() < 0.5:
                add(scheduler, list(range(10, 11 + dice.randrange(40))), max_tokens=dice.randrange(1, 14))
            if step == 40:
                scheduler.rollback()
                scheduler.lose()
                for each in list(scheduler.running.values()):
                    scheduler.truncate(each, dice.randrange(each.computed + 1))
                RANKS[scheduler] = Ranks()
            ended += sum(output.finish is not None for output in run(scheduler)[1])
        assert ended > 10
        assert not list(scheduler.requests())


def test_a_long_requests_pages_are_given_back_over_several_steps_while_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("services.coordinator.scheduling.prefix_cache.PAGES_RELEASED", 3)
    scheduler = made(pages=64, step=64)
    add(scheduler, [5], max_tokens=60)
    add(scheduler, list(range(10, 50)), max_tokens=1)
    run(scheduler)
    held = []
    for _ in range(5):
        held.append(scheduler.cache.in_use)
        run(scheduler)
    assert held == [1 + 10 - 3, 1 + 4, 1 + 1, 1, 2]
    assert next(iter(scheduler.cache.idle())) == scheduler.running[0].pages[0] + 10  # its last page is evicted first


def test_released_pages_go_at_once_to_who_needs_them_and_all_when_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.coordinator.scheduling.prefix_cache.PAGES_RELEASED", 2)
    scheduler = made(pages=12, step=64)
    add(scheduler, [5, 6, 7], max_tokens=2)
    add(scheduler, list(range(10, 50)), max_tokens=1)
    run(scheduler)
    assert scheduler.cache.available < 8
    taken = scheduler.cache.allocate(8)
    assert taken is not None
    scheduler.cache.release(taken)
    run(scheduler)
    assert not scheduler.running
    assert scheduler.cache.in_use > 1
    scheduler.plan()
    assert scheduler.cache.in_use == 0


def test_a_prefix_is_computed_once() -> None:
    scheduler = made()
    add(scheduler, list(range(10, 19)), max_tokens=1)
    run(scheduler)
    run(scheduler)
    add(scheduler, [*range(10, 18), 99, 98], max_tokens=1)
    plan, outputs = run(scheduler)
    assert plan[0].chunk.start == 8
    assert outputs[0].request.cached_tokens == 8


def test_the_last_token_of_a_cached_prompt_is_computed_all_the_same() -> None:
    scheduler = made()
    for _ in range(2):
        add(scheduler, list(range(10, 18)), max_tokens=1)
        plan, outputs = run(scheduler)
    assert plan[0].chunk.start == 4
    assert outputs[0].tokens == (9,)


def test_another_salt_shares_nothing() -> None:
    scheduler = made()
    for salt in ("a", "b"):
        request = GenerationRequest(salt, pack_ids(range(10, 18)), 1, SamplingParams(), cache_salt=salt)
        scheduler.add(request, root_key("m", salt))
        plan, _ = run(scheduler)
        assert plan[0].chunk.start == 0


def test_the_youngest_is_preempted_when_pages_run_out_and_finishes_later() -> None:
    scheduler = made(pages=4, step=32)
    add(scheduler, [5, 6, 7, 8], max_tokens=8)
    add(scheduler, [15, 16, 17, 18], max_tokens=8)
    finished: list[str] = []
    for _ in range(60):
        _, outputs = run(scheduler)
        finished += [output.request.request_id for output in outputs if output.finish]
    assert finished == ["r0", "r1"]
    assert scheduler.preemptions > 0


def test_sequences_end_at_eos_at_a_stop_token_and_at_their_limit() -> None:
    scheduler = made()
    add(scheduler, [5])
    add(scheduler, [6], stop_token_ids=(9,))
    add(scheduler, [7], max_tokens=1)
    add(scheduler, [8], ignore_eos=True, max_tokens=1)
    plan = planned(scheduler)
    tokens = {plan[0].sequence: EOS, plan[1].sequence: 9, plan[2].sequence: 9, plan[3].sequence: EOS}
    outputs = completed(scheduler, tokens)
    assert [(output.tokens, output.finish) for output in outputs] == [
        ((), "stop"),
        ((), "stop"),
        ((9,), "length"),
        ((EOS,), "length"),
    ]


def test_after_a_rollback_the_same_step_is_planned_again() -> None:
    scheduler = made()
    add(scheduler, list(range(10, 15)))
    first = scheduler.plan()
    scheduler.rollback()
    assert scheduler.plan() == replace(first, anew=True)


def test_truncated_tokens_are_computed_again_as_one_prefill() -> None:
    scheduler = made()
    add(scheduler, list(range(10, 16)), max_tokens=8)
    for _ in range(4):
        run(scheduler)
    (sequence,) = scheduler.running.values()
    scheduler.rollback()
    assert scheduler.truncate(sequence, 4) == sequence.goal - 1 - 4
    plan, outputs = run(scheduler)
    assert (plan[0].chunk.start, len(plan[0].chunk.tokens), plan[0].chunk.prompt_tokens) == (4, 6, 6)
    assert len(outputs[0].tokens) == 1


def test_a_full_queue_says_so() -> None:
    scheduler = made(batch=1, waiting=2)
    for _ in range(3):
        assert not scheduler.full
        add(scheduler, [5])
    assert scheduler.full


def test_prompt_logprobs_are_asked_for_every_prompt_row_and_not_taken_from_the_cache() -> None:
    scheduler = made()
    for _ in range(2):
        add(scheduler, list(range(10, 22)), max_tokens=1, prompt_logprobs=1)
        starts = []
        while scheduler.running or scheduler.waiting:
            plan, _ = run(scheduler)
            starts.append((plan[0].chunk.start, plan[0].chunk.logits, plan[0].next_token))
        assert starts == [(0, "all", 18), (8, "all", -1)]
