"""Steps that are planned while others are in flight: the same streams, whatever comes of those in front of them."""

import random
from collections import deque
from collections.abc import Iterator

import pytest

from services.coordinator.events import Effect, Event, Said, Send
from services.coordinator.scheduling.scheduler import NewTokens, Scheduler
from services.worker.engine.sequences import Sequences
from shared.errors import ProtocolError
from shared.messages import DRAWN, Batch, Sample, SequenceStart, StepDone, StepPlan
from shared.types import GenerationRequest, PageKey, SamplingParams, next_page_key, pack_ids, root_key, unpack_ids
from tests.pure.dictionary_host import EmbeddedPages
from tests.pure.world import World, next_token

PAGE_TOKENS = 4
EOS = 2
STOPS = tuple(range(8, 108))
"""One token in ten that the model says."""


class Ranks:
    """What all ranks have: KV, as the token ids of each page, and what they were told. Steps are computed in order."""

    def __init__(self) -> None:
        self.sequences = Sequences()
        self.kv: dict[int, list[int]] = {}

    def compute(self, batch: Batch) -> dict[int, int]:
        """A step; the tokens drawn."""
        drawn = {}
        for part in self.sequences.take(batch):
            pages, tokens = part.chunk.pages.tolist(), part.chunk.tokens.tolist()
            for position, token in enumerate(tokens, part.chunk.start):
                page = self.kv.setdefault(pages[position // PAGE_TOKENS], [-1] * PAGE_TOKENS)
                page[position % PAGE_TOKENS] = token
            seen = [self.kv[pages[at // PAGE_TOKENS]][at % PAGE_TOKENS] for at in range(part.chunk.end)]
            if part.sampling is not None:
                drawn[part.sequence] = next_token(tuple(seen))
                if part.sampling.needs_history:
                    assert [*part.prompt, *part.history] == seen
        self.sequences.drew(Sample(number, token) for number, token in drawn.items())
        return drawn


class Driven:
    """A scheduler, its ranks, and so many steps in flight at most."""

    def __init__(self, depth: int, *, pages: int = 64, step: int = 16, batch: int = 8):
        self.scheduler = Scheduler(
            EmbeddedPages(pages, protect=False).cache, page_tokens=PAGE_TOKENS, max_step_tokens=step, max_batch=batch,
            max_waiting=99, max_model_len=pages * PAGE_TOKENS, eos_token_ids=(EOS,),
        )  # fmt: skip
        self.depth = depth
        self.ranks = Ranks()
        self.batches: list[Batch] = []
        self.results: deque[dict[int, int]] = deque()
        self.sealed: dict[int, PageKey] = {}

    def add(self, name: str, prompt: list[int], max_tokens: int, *, stops: bool = False, history: bool = False) -> None:
        sampling = SamplingParams(temperature=0.0, presence_penalty=0.5 if history else 0.0)
        request = GenerationRequest(name, pack_ids(prompt), max_tokens, sampling, stop_token_ids=STOPS if stops else ())
        self.scheduler.add(request, root_key("m", ""))

    def plan(self) -> None:
        """As many steps as may be in flight, if there is anything to compute."""
        while self.scheduler.in_flight < self.depth and (batch := self.scheduler.plan()).sequences:
            self.batches.append(batch)
            self.results.append(self.ranks.compute(batch))

    def complete(self) -> Iterator[NewTokens]:
        """The oldest step comes back, if there is one."""
        if not self.results:
            return
        done = self.scheduler.complete(self.results.popleft())
        self.sealed.update(self.scheduler.take_sealed())
        for each in done.went_on:
            yield NewTokens(each, (each.tokens[-1],), (), None)
        for output in done.others:
            if output.finish:
                self.scheduler.remove(output.request)
            yield output

    def run(self) -> dict[str, list[int]]:
        """Until all have ended; what each was given."""
        streams: dict[str, list[int]] = {}
        while any(self.scheduler.requests()):
            self.plan()
            for output in self.complete():
                streams.setdefault(output.request.request_id, []).extend(output.tokens)
            self.scheduler.check()
        return streams


def stream(prompt: list[int], max_tokens: int, *, stops: bool) -> list[int]:
    """What the model says."""
    tokens = list(prompt)
    for _ in range(max_tokens):
        if (token := next_token(tuple(tokens))) in STOPS and stops:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def stopping_prompt(at: int) -> list[int]:
    """A prompt after which the model says a stop as its token number `at`, and none before."""
    return next(prompt for start in range(2000) if len(stream(prompt := [start + 8, 9, 10], 99, stops=True)) == at)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("seed", range(15))
def test_streams_are_the_same_whatever_is_in_flight(seed: int, depth: int) -> None:
    """With prefixes in common, little room, preemptions, stops, penalties, and clients that go away."""
    dice = random.Random(seed)
    driven = Driven(depth, pages=dice.choice((9, 16, 64)), step=dice.choice((3, 8, 32)), batch=dice.choice((2, 8)))
    wanted: dict[str, list[int]] = {}
    given: dict[str, list[int]] = {}
    gone: set[str] = set()
    for turn in range(3000):
        if turn < 150 and dice.random() < 0.2:
            prompt = [9] * dice.choice((0, 8)) + [dice.randrange(8, 1000) for _ in range(dice.randrange(1, 12))]
            name, most, stops = f"r{turn}", dice.randrange(1, 12), dice.random() < 0.5
            driven.add(name, prompt, most, stops=stops, history=dice.random() < 0.3)
            wanted[name], given[name] = stream(prompt, most, stops=stops), []
        if dice.random() < 0.6:
            driven.plan()
        if dice.random() < 0.6:
            for output in driven.complete():
                given[output.request.request_id].extend(output.tokens)
        if dice.random() < 0.02 and (live := [*driven.scheduler.requests()]):
            request = dice.choice(live)
            gone.add(request.request_id)
            driven.scheduler.remove(request)
        driven.scheduler.check()
    assert not [*driven.scheduler.requests()]
    assert driven.scheduler.cache.in_use == 0
    assert len(gone) < len(wanted)
    for name, tokens in wanted.items():
        assert given[name] == tokens[: len(given[name])] if name in gone else given[name] == tokens
    pages = driven.scheduler.cache.ledger.sealed_pages
    assert {page.number: page.key for page in pages} == {page.number: driven.sealed[page.number] for page in pages}


@pytest.mark.parametrize("seed", range(10))
def test_nobody_waits_longer_where_steps_are_planned_ahead(seed: int) -> None:
    """ceil(streams / tokens a step) + 1 steps."""
    dice = random.Random(seed)
    streams, most = dice.randrange(2, 40), dice.choice((2, 3, 7, 16, 64))
    driven = Driven(2, pages=2048, step=most, batch=streams)
    for number in range(streams):
        driven.add(f"r{number}", [dice.randrange(10, 99) for _ in range(dice.choice((1, 3, 90)))], max_tokens=100)
    last: dict[int, int] = {}
    running = driven.scheduler.running
    for step in range(90):
        before = set(running)
        driven.results.append(driven.ranks.compute(batch := driven.scheduler.plan()))
        last |= dict.fromkeys(set(running) - before, step) | dict.fromkeys(unpack_ids(batch.sequences), step)
        bound = -(-len(running) // most) + 1
        assert all(step - last[number] < bound for number in running), f"{bound} steps"
        if driven.scheduler.in_flight == 2:
            [*driven.complete()]


def test_the_next_token_is_planned_before_the_last_one_is_known() -> None:
    driven = Driven(2)
    driven.add("r", [9, 8], 4)
    driven.plan()
    first, second = driven.batches
    assert unpack_ids(first.tokens) == [9, 8]
    assert (unpack_ids(second.starts), unpack_ids(second.tokens)) == ([2], [DRAWN])
    assert driven.run() == {"r": stream([9, 8], 4, stops=False)}
    assert len(driven.batches) == 4, "no step is planned beyond the last token"


def test_what_was_computed_beyond_a_stop_counts_for_nothing() -> None:
    driven = Driven(2)
    driven.add("r", stopping_prompt(at=2), 50, stops=True)
    assert len(driven.run()["r"]) == 2
    assert len(driven.batches) == 4
    driven.plan()
    assert not [*driven.complete()]
    assert driven.scheduler.in_flight == 0
    assert driven.scheduler.generated_tokens == 2


def test_nor_does_it_where_the_request_stays_for_its_digest() -> None:
    driven = Driven(2)
    driven.add("r", stopping_prompt(at=0), 50, stops=True)
    driven.plan()
    completed = driven.scheduler.complete(driven.results.popleft())
    (output,) = completed.others
    driven.scheduler.complete(driven.results.popleft())
    request = output.request
    assert (output.finish, request.computed, request.goal, request.remaining) == ("stop", 3, 3, 0)


def test_a_page_that_a_drawn_token_fills_has_its_key_when_the_step_is_back() -> None:
    driven = Driven(2)
    driven.add("r", [9, 10, 11], 6)
    tokens = [9, 10, 11, *driven.run()["r"]]
    first = next_page_key(root_key("m", ""), tokens[:4])
    assert [*driven.sealed.values()] == [first, next_page_key(first, tokens[4:8])]


def test_who_is_preempted_while_steps_are_in_flight_begins_anew() -> None:
    driven = Driven(2, pages=5, step=32)
    prompts = {name: [start, 9, 10, 11] for name, start in (("a", 20), ("b", 30), ("c", 40))}
    for name, prompt in prompts.items():
        driven.add(name, prompt, 10)
    assert driven.run() == {name: stream(prompt, 10, stops=False) for name, prompt in prompts.items()}
    assert driven.scheduler.preemptions > 1


@pytest.mark.parametrize("depth", [1, 2])
def test_ranks_forget_the_last_one_that_ended_when_the_next_comes(depth: int) -> None:
    driven = Driven(depth)
    for name in ("a", "b", "c"):
        driven.add(name, [9, 10], 3)
        driven.run()
        driven.plan()  # nothing
        assert len(driven.ranks.sequences) == 1


def test_after_a_step_that_failed_those_behind_it_are_planned_anew() -> None:
    driven = Driven(2)
    driven.add("r", [9, 8], 5)
    driven.plan()
    [*driven.complete()]
    driven.plan()
    assert driven.scheduler.in_flight == 2
    driven.scheduler.rollback()
    driven.results.clear()
    assert driven.scheduler.in_flight == 0
    driven.plan()
    assert driven.batches[-2].anew
    assert [(unpack_ids(each.starts), len(each.begun)) for each in driven.batches[-2:]] == [([2], 1), ([3], 0)]
    assert driven.run()["r"] == stream([9, 8], 5, stops=False)[1:]


def test_a_rank_refuses_to_go_on_with_a_token_that_it_has_not_drawn() -> None:
    one, begun = pack_ids([1]), SequenceStart(1, 2, pack_ids([0]), SamplingParams(temperature=0.0))
    batch = Batch(one, pack_ids([0]), one, pack_ids([DRAWN]), draws=b"\1", begun=(begun,))
    with pytest.raises(ProtocolError, match="what sequence 1 drew, which is nothing"):
        Sequences().take(batch)


@pytest.mark.parametrize(
    ("wanted", "device", "expected"), [(1, "cuda:0", 1), (2, "cpu", 2), (0, "cpu", 1), (0, "cuda:0", 2)]
)
def test_ranks_have_the_next_step_before_one_is_done(wanted: int, device: str, expected: int) -> None:
    world = World(3, pages=64, steps_in_flight=wanted, device=device)
    sent, done, in_flight = {0}, {0}, set()

    def watch(event: Event, outputs: list[tuple[Effect, bytes]]) -> None:
        if isinstance(event, Said) and isinstance(event.message, StepDone):
            done.add(event.message.step)
        plans = (each.message for each, _ in outputs if isinstance(each, Send))
        sent.update(plan.step for plan in plans if isinstance(plan, StepPlan))
        in_flight.add(len(sent) - len(done))

    world.watch = watch
    for _ in range(world.size):
        world.add_worker()
    while world.group.membership.state != "serving":
        world.move()
    name = world.submit(length=5, max_tokens=30)
    while name not in world.finished:
        world.move()
    assert max(in_flight) == expected


def test_while_a_request_is_in_doubt_one_step_is_in_flight() -> None:
    """Of two that fail, each one's requests would be blamed for the other."""
    world = World(3, pages=64, steps_in_flight=2)
    seen: dict[bool, set[int]] = {False: set(), True: set()}

    def watch(event: Event, outputs: list[tuple[Effect, bytes]]) -> None:
        if world.group.engine is not None:
            seen[world.engine._failed_steps.doubted()].add(world.engine.scheduler.in_flight)

    world.watch = watch
    for _ in range(world.size):
        world.add_worker()
    while world.group.membership.state != "serving":
        world.move()
    names = [world.submit(length=12, max_tokens=20) for _ in range(3)]
    names.append(world.submit(length=9, poison=True))
    while not all(name in world.finished for name in names):
        world.move()
    assert (max(seen[False]), max(seen[True])) == (2, 1)
