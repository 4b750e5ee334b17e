"""The scheduler: decode first, prefill in chunks, prefixes reused, the youngest preempted, nothing lost."""

from services.coordinator.scheduling.scheduler import NewTokens, Scheduler
from shared.messages import Sample, SequenceStep
from shared.types import GenerationRequest, SamplingParams, pack_ids, root_key, unpack_ids
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
    request = GenerationRequest(f"r{number}", pack_ids(prompt), max_tokens, SamplingParams(), **more)  # type: ignore[arg-type]
    scheduler.add(request, root_key("m", ""))


def run(scheduler: Scheduler, token: int = 9) -> tuple[tuple[SequenceStep, ...], list[NewTokens]]:
    plan = scheduler.plan()
    outputs = scheduler.complete(tuple(Sample(part.sequence, token) for part in plan if part.sampling is not None))
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
        sizes.append((len(unpack_ids(plan[0].tokens)), plan[0].logits, len(outputs)))
    assert sizes == [(8, "none", 0), (8, "none", 0), (3, "last", 1)]


def test_decoding_sequences_go_before_a_prefill() -> None:
    scheduler = made()
    add(scheduler, [5, 6])
    run(scheduler)
    add(scheduler, list(range(10, 40)))
    plan, _ = run(scheduler)
    assert [(part.start, len(unpack_ids(part.tokens))) for part in plan] == [(2, 1), (0, 7)]


def test_a_prefix_is_computed_once() -> None:
    scheduler = made()
    add(scheduler, list(range(10, 19)), max_tokens=1)
    run(scheduler)
    run(scheduler)
    add(scheduler, [*range(10, 18), 99, 98], max_tokens=1)
    plan, outputs = run(scheduler)
    assert plan[0].start == 8
    assert outputs[0].request.cached_tokens == 8


def test_the_last_token_of_a_cached_prompt_is_computed_all_the_same() -> None:
    scheduler = made()
    for _ in range(2):
        add(scheduler, list(range(10, 18)), max_tokens=1)
        plan, outputs = run(scheduler)
    assert plan[0].start == 4
    assert outputs[0].tokens == (9,)


def test_another_salt_shares_nothing() -> None:
    scheduler = made()
    for salt in ("a", "b"):
        request = GenerationRequest(salt, pack_ids(range(10, 18)), 1, SamplingParams(), cache_salt=salt)
        scheduler.add(request, root_key("m", salt))
        plan, _ = run(scheduler)
        assert plan[0].start == 0


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
    plan = scheduler.plan()
    tokens = {plan[0].sequence: EOS, plan[1].sequence: 9, plan[2].sequence: 9, plan[3].sequence: EOS}
    outputs = scheduler.complete(tuple(Sample(number, token) for number, token in tokens.items()))
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
    assert scheduler.plan() == first


def test_truncated_tokens_are_computed_again_as_one_prefill() -> None:
    scheduler = made()
    add(scheduler, list(range(10, 16)), max_tokens=8)
    for _ in range(4):
        run(scheduler)
    sequence = scheduler.running[0]
    assert scheduler.truncate(sequence, 4) == sequence.goal - 1 - 4
    plan, outputs = run(scheduler)
    assert (plan[0].start, len(unpack_ids(plan[0].tokens)), plan[0].prompt_tokens) == (4, 6, 6)
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
            starts.append((plan[0].start, plan[0].logits, plan[0].next_token))
        assert starts == [(0, "all", 18), (8, "all", -1)]
