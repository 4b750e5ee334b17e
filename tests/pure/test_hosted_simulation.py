"""An engine that schedules by itself, through random faults: no wrong token, no page that leaks, parity that counts."""

import pytest

from services.coordinator.events import Said
from services.coordinator.protection.ledger import Parity
from shared.messages import (
    EngineLoad,
    PagesCopied,
    PagesDropped,
    PagesPinned,
    PagesSealed,
    ProtectDone,
    Refused,
    StepFailed,
    StepTime,
    Submit,
)
from shared.messages import hosted as hosted_messages
from shared.types import GenerationRequest, SamplingParams, pack_ids, unpack_ids
from tests.pure.hosted_world import STEP_TOKENS, HostedWorld, SimEngine, key_of
from tests.pure.test_group_simulation import until
from tests.pure.world import MODEL, VOCABULARY


def serving(world: HostedWorld) -> None:
    until(world, lambda: world.group.membership.state == "serving" and not world.engine_process.quiesced)  # type: ignore[union-attr]


def started(seed: int = 1, *, recorded: bool = False, **more: int) -> tuple[HostedWorld, SimEngine]:
    world = HostedWorld(seed, **more)
    if recorded:
        world.record()
    world.add_store()
    engine = world.start_engine()
    serving(world)
    return world, engine


def decoding(world: HostedWorld, engine: SimEngine, made: int, *, length: int = 23, new: int = 100) -> None:
    """One request that has made so many tokens, and whose sealed pages are protected."""
    engine.submit([world.dice.randrange(8, VOCABULARY) for _ in range(length)], new)
    until(world, lambda: engine.made >= made)
    engine.paused = True
    until(world, lambda: not (world.group.status().stripes_pending or engine.out or engine.pins))
    engine.paused = False


def rank(world: HostedWorld, number: int) -> str:
    return str(world.group.membership.ranks[number])


def finish(world: HostedWorld) -> None:
    """No more faults: until all requests have ended, and nothing is lost, pinned or withheld."""
    engine = world.engine_process
    assert engine is not None
    world.add_store()
    while (
        sum(worker.assign is None for worker in world.workers.values())
        + sum(name in world.workers for name in engine.workers)
        < world.size + 1
    ):
        world.add_spare()
    until(world, lambda: not engine.requests, moves=60_000)
    serving(world)
    until(world, lambda: not (world.move() or world.ledger.lost or engine.pins or engine.withheld or engine.out))
    engine.check()
    world.check_slices()
    sealed = {page.number: page.key for page in world.ledger.sealed_pages}
    assert sealed == engine.keys
    world.group.protection.encoding.flow()  # type: ignore[union-attr]
    world._carry()
    world.check_nothing_stale()


def test_the_start_of_an_engine_is_no_recovery() -> None:
    world, _ = started()
    assert world.group.status().recoveries == ()


def test_a_lost_rank_is_restored_and_the_engine_recomputes_the_open_page_only() -> None:
    world, engine = started(pages=64)
    decoding(world, engine, 10)
    sealed = world.ledger.count(Parity.PROTECTED)
    world.kill(world.workers[rank(world, 1)])
    finish(world)
    record = world.group.status().recoveries[-1]
    assert record.restored_pages == sealed > 0
    assert record.recomputed_tokens <= world.page_tokens
    assert record.lost_ranks == (1,)


def test_what_the_engine_tells_of_its_steps_is_what_computing_again_is_expected_to_take() -> None:
    world, engine = started(pages=64)
    rates = world.group.protection.rates  # type: ignore[union-attr]
    steps = tuple(StepTime(tokens, 0, 0, 0.01 + tokens / 10_000) for tokens in (1, 8, 64, 512))
    engine.out.append(EngineLoad(1, 0, 0, 0, 0, 0, 0, steps))
    decoding(world, engine, 1)
    expected = 6_000 / STEP_TOKENS * 0.01 + 0.6
    assert rates.recompute_seconds(0, 6_000) == pytest.approx(expected, rel=0.05)


def test_what_protecting_took_tells_of_restoring_but_for_a_ranks_first_time() -> None:
    world, _ = started(pages=64, parity=2)
    rates = world.group.protection.rates  # type: ignore[union-attr]

    def told(seconds: float) -> float:
        """What restoring as much is expected to take, once a rank told of 1 MB of parity."""
        done = ProtectDone(world.group.membership.epoch, 1, (), (), "", 1_000_000, seconds)
        world.handle(Said(world.workers[rank(world, 1)].wire.peer, done))  # type: ignore[union-attr]
        return rates.restore_seconds(500_000)

    guess = rates.restore_seconds(500_000)
    assert told(10.0) == guess  # its connections were opened
    assert told(0.5) == pytest.approx(0.5)
    world.kill(world.workers[rank(world, 1)])
    finish(world)
    assert told(0.1) == pytest.approx(0.5)  # another worker
    assert told(0.1) == pytest.approx(0.1)


def test_without_parity_all_is_recomputed_and_the_tokens_are_the_same() -> None:
    world, engine = started(pages=64)
    decoding(world, engine, 10)
    world.parity_of.clear()
    world.kill(world.workers[rank(world, 0)])
    finish(world)
    record = world.group.status().recoveries[-1]
    assert record.restored_pages == 0
    assert record.recomputed_tokens >= 30


def test_idle_pages_that_were_lost_come_back_while_the_engine_steps() -> None:
    world, engine = started(pages=64)
    decoding(world, engine, 8, new=8)
    until(world, lambda: not engine.requests and not engine.pins and not engine.out)
    idle = dict(engine.keys)
    assert idle
    world.kill(world.workers[rank(world, 2)])
    until(world, lambda: not world.group.protection.ledger.is_whole(next(iter(idle))))  # type: ignore[union-attr]
    serving(world)
    assert engine.withheld == idle
    until(world, lambda: not engine.withheld)
    assert engine.keys == idle
    world.check_slices()


def test_a_page_that_is_restored_is_given_to_nobody_meanwhile() -> None:
    world, engine = started(pages=12)
    decoding(world, engine, 8, new=8)
    until(world, lambda: not engine.requests and not engine.pins and not engine.out)
    world.kill(world.workers[rank(world, 2)])
    until(world, lambda: bool(engine.withheld))
    until(world, lambda: bool(engine.withheld.keys() & engine.pins))
    pinned = engine.withheld.keys() & engine.pins
    taken = set(iter(engine.allocate, None))
    assert taken
    assert not taken & pinned
    for block in taken:
        engine.release(block)
    until(world, lambda: not engine.withheld)
    assert pinned <= engine.keys.keys()
    world.check_slices()


def test_a_rank_moves_to_a_spare_and_no_page_is_lost() -> None:
    world, engine = started(pages=64)
    decoding(world, engine, 10)
    old = rank(world, 1)
    world.operate("replace", "rank:1")
    until(world, lambda: rank(world, 1) != old)
    finish(world)
    record = world.group.status().recoveries[-1]
    assert (record.planned, record.restored_pages) == (True, 0)
    assert record.recomputed_tokens <= world.page_tokens


def test_a_page_that_was_given_away_while_it_was_copied_is_copied_again() -> None:
    world, engine = started(pages=64)
    decoding(world, engine, 10)
    world.operate("replace", "rank:1")
    (spare,) = (each for each in world.workers.values() if each.assign is None)
    until(world, lambda: any(isinstance(message, PagesCopied) for message in spare.out))
    (page,) = unpack_ids(next(message.pages for message in spare.out if isinstance(message, PagesCopied)))
    assert engine.wire is not None
    world.handle(Said(engine.wire.peer, PagesDropped(pack_ids([page]))))
    world.handle(Said(engine.wire.peer, PagesSealed(pack_ids([page]), (key_of([1]),))))
    world.says(spare.name, spare.out.popleft())
    assert world.ledger.wants_copy(page)


def test_a_move_in_an_engine_that_keeps_no_spare_is_refused() -> None:
    world = HostedWorld(1)
    world.moves = False
    world.start_engine()
    serving(world)
    refused = world.operate("replace", "rank:1")
    assert isinstance(refused, Refused)
    assert (refused.status, refused.code) == (409, "no_spare")


def test_an_engine_that_stood_still_for_a_rank_that_does_not_move_steps_again() -> None:
    world, engine = started(pages=64)
    decoding(world, engine, 10)
    world.operate("replace", "rank:1")
    until(world, lambda: engine.quiesced)
    assert world.group.protection is not None
    move = world.group.protection.moves.move
    assert move is not None
    world.kill(world.workers[move.new])
    engine.submit([9] * 5, 3)
    until(world, lambda: not engine.requests)


def test_a_step_that_failed_is_taken_back_and_nothing_is_restored() -> None:
    world, engine = started(pages=64)
    decoding(world, engine, 10)
    engine.step(lost=True)
    engine.out.append(StepFailed(engine.epoch, "out of memory"))
    epoch = engine.epoch
    until(world, lambda: world.group.membership.epoch > epoch)
    finish(world)
    record = world.group.status().recoveries[-1]
    assert (record.restored_pages, record.lost_ranks) == (0, ())


def test_who_is_to_blame_for_a_failed_step_is_replaced() -> None:
    world, engine = started(pages=64)
    decoding(world, engine, 10)
    old = rank(world, 1)
    engine.step(lost=True)
    engine.out.append(StepFailed(engine.epoch, "no answer", (old,)))
    until(world, lambda: world.group.membership.ranks[1] not in (old, None))
    finish(world)
    assert old not in world.workers


def test_the_engine_is_told_of_workers_that_are_lost_for_those_that_are_stopped_hear_nothing() -> None:
    world, engine = started()
    lost = {rank(world, 2), next(name for name in world.workers if name not in engine.workers)}
    for name in lost:
        world.group.epochs.give_up(name, "no heartbeat", "silent")  # type: ignore[union-attr]
    world.add_spare()
    until(world, lambda: engine.given_up == lost)
    finish(world)
    assert engine.given_up == lost


def test_a_coordinator_that_is_back_learns_all_from_the_engine_and_nothing_is_recomputed() -> None:
    world, engine = started(pages=64)
    decoding(world, engine, 10)
    sealed = dict(engine.keys)
    world.crash()
    finish(world)
    assert sealed.keys() <= {page.number for page in world.ledger.sealed_pages} | engine.keys.keys()
    assert world.restored == 0


def test_pages_that_were_pinned_when_the_last_store_left_are_protected_by_the_next_one() -> None:
    world, engine = started(pages=64)
    engine.submit([world.dice.randrange(8, VOCABULARY) for _ in range(23)], 2)
    until(world, lambda: any(isinstance(message, PagesPinned) for message in engine.out))
    world.lose_store()
    until(world, lambda: not engine.out)
    world.add_store()
    until(world, lambda: not (engine.requests or engine.pins or engine.out or world.group.status().stripes_pending))
    assert world.ledger.count(Parity.PROTECTED) == len(engine.keys) > 0


def test_where_ranks_hold_the_same_all_lost_pages_are_copied_from_the_one_rank_that_is_left() -> None:
    world, engine = started(pages=64, alike=True)
    decoding(world, engine, 10)
    sealed = dict(engine.keys)
    assert world.ledger.count(Parity.PROTECTED) == len(sealed) > 0
    for number in (0, 2):
        world.kill(world.workers[rank(world, number)])
    finish(world)
    record = world.group.status().recoveries[-1]
    assert (record.restored_pages, record.lost_ranks) == (len(sealed), (0, 2))
    assert not world.written


def test_an_engine_that_has_not_heard_who_took_a_rank_vouches_for_no_page_on_it() -> None:
    world, engine = started(pages=64)
    decoding(world, engine, 10)
    world.parity_of.clear()
    world.kill(world.workers[rank(world, 0)])
    until(world, lambda: world.group.membership.state == "assigning")
    assert engine.wire is not None
    engine.wire.sent.clear()  # Place is lost with the connection
    world.cut_engine()
    world.engine_process = None  # it does not dial yet
    until(world, lambda: world.group.membership.state == "serving")
    world.engine_process = engine
    finish(world)


def test_another_engine_takes_the_place_of_one_that_is_gone() -> None:
    world, engine = started(pages=64)
    decoding(world, engine, 10)
    for worker in list(world.workers.values()):
        world.kill(worker)
    world.cut_engine()
    again = world.start_engine()
    serving(world)
    assert not world.ledger.sealed_pages
    decoding(world, again, 10)
    finish(world)


def test_requests_of_gateways_are_sent_to_the_engines_own_api() -> None:
    world, _ = started()
    assert world.client is not None
    request = GenerationRequest("r", pack_ids([9]), 1, SamplingParams())
    world.handle(Said(world.client.peer, Submit(request, MODEL.fingerprint)))
    refused = [message for message in world.client.sent if isinstance(message, Refused)]
    assert [each.code for each in refused] == ["hosted_engine"]


def mayhem(world: HostedWorld, engine: SimEngine) -> None:
    """Whatever can die does, while requests come and go."""
    dice = world.dice
    for _ in range(dice.randrange(200, 800)):
        what = dice.random()
        ranks = [world.workers[name] for name in engine.workers if name in world.workers]
        if what < 0.006 and ranks:
            for worker in dice.sample(ranks, min(len(ranks), dice.choice((1, 1, 1, 2, 3)))):
                world.kill(worker)
        elif what < 0.016 and len(world.workers) < world.size + 2:
            world.add_spare()
        elif what < 0.035 and len(engine.requests) < 5:
            shared = [9] * 12 if dice.random() < 0.5 else []
            prompt = shared + [dice.randrange(8, VOCABULARY) for _ in range(dice.randrange(1, 20))]
            engine.submit(prompt, dice.randrange(1, 24))
        elif what < 0.038 and engine.requests and not engine.quiesced:
            engine.end(dice.choice(engine.requests))
        elif what < 0.040:
            world.lose_store()
        elif what < 0.047:
            world.add_store()
        elif what < 0.049:
            world.damage()
        elif what < 0.051 and engine.can_step:
            engine.step(lost=True)
            engine.out.append(StepFailed(engine.epoch, "failed"))
        elif what < 0.053:
            world.crash()
        elif what < 0.055:
            world.cut_engine()
        elif what < 0.058 and world.client is not None:
            world.copy_failures = dice.choice((0.0, 0.5))
            world.operate(dice.choice(("replace", "drain")), f"rank:{dice.randrange(world.size)}")
        else:
            world.move()
        world.group.check()
        engine.check()
        if not engine.alike:
            world.check_parity()
        world.settle()


@pytest.mark.parametrize("parity", [1, 2])
@pytest.mark.parametrize("seed", range(40))
def test_a_hosted_engine_survives_whatever_dies_when(seed: int, parity: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.coordinator.protection.restoration.LOOKED_UP", 2 if seed % 2 else 4096)
    world, engine = started(seed, parity=parity, pages=24)
    mayhem(world, engine)
    finish(world)


@pytest.mark.parametrize("seed", range(8))
def test_it_survives_too_where_what_the_engine_tells_comes_in_parts(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosted_messages, "ENTRIES_AT_ONCE", 3)
    world, engine = started(seed, pages=24)
    mayhem(world, engine)
    finish(world)


@pytest.mark.parametrize("seed", range(20))
def test_where_ranks_hold_the_same_a_page_comes_back_while_one_lives_and_no_store_is_asked(seed: int) -> None:
    world, engine = started(seed, pages=24, alike=True)
    mayhem(world, engine)
    finish(world)
    assert not world.written
    assert not world.group.status().parity_bytes_stored
