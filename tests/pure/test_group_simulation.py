"""The whole coordinator under random faults at random moments: no token is wrong, lost or sent twice, no page leaks."""

import itertools
from collections.abc import Callable

import pytest

from services.coordinator.events import Came, Said
from services.coordinator.membership.epochs import BROKEN_GRACE_S
from services.coordinator.protection.ledger import Parity
from services.coordinator.scheduling.engine import EmbeddedEngine
from services.coordinator.scheduling.scheduler import Request
from shared.messages import (
    TOLD_TO_STOP,
    Applied,
    Goodbye,
    RankFailed,
    Refused,
    StepDone,
    StepRaised,
    StoreDrains,
    StoreHello,
    WorkerHello,
)
from shared.types import OperatorAction, StoreInfo
from tests.pure.world import TICK_S, World

MOVES = 100_000


def until(world: World, condition: Callable[[], bool], moves: int = MOVES) -> None:
    """Let messages through, and time pass, until the condition holds."""
    for _ in range(moves):
        if condition():
            return
        world.move()
    raise AssertionError(f"it did not come to that in {moves} moves: {world.group.status()}")


def serving(world: World) -> None:
    """Let messages through until the group serves."""
    until(world, lambda: world.group.membership.state == "serving")


def begin(world: World, spares: int = 1) -> None:
    """A group that serves, with so many spares and a store."""
    for _ in range(world.size + spares):
        world.add_worker()
    world.add_store()
    serving(world)


def finish(world: World) -> None:
    """No more faults: enough workers and a store, until every request has ended."""
    world.add_store()
    world.copy_failures = 0.0
    for name in list(world.group.membership.cordons):
        world.group.membership.uncordon(name)
    while len(world.workers) < world.size + 1:
        world.add_worker()
    until(world, lambda: len(world.finished) == len(world.requests))
    serving(world)
    until(world, lambda: not (world.move() or world.engine.cache.in_use or world.ledger.lost))
    world.flow()
    world.group.check()
    assert world.engine.cache.in_use == 0
    assert not list(world.engine.scheduler.requests())
    world.check_nothing_stale()


def mayhem(world: World, *, silent_loss: bool) -> None:
    """A few hundred moves, and faults of all kinds among them. `silent_loss`: the store's memory among what is lost."""
    dice = world.dice
    for _ in range(world.size + 1):
        world.add_worker()
    world.add_store()
    for _ in range(dice.randrange(200, 900)):
        what = dice.random()
        if what < 0.006 and world.workers:
            for worker in dice.sample(
                list(world.workers.values()), min(len(world.workers), dice.choice((1, 1, 1, 2, 3)))
            ):
                world.kill(worker)
        elif what < 0.015 and len(world.workers) < world.size + 2:
            world.add_worker()
        elif what < 0.03:
            poison = dice.random() < 0.1
            world.submit(shared_prefix=dice.random() < 0.5, digest=dice.random() < 0.5, poison=poison)
        elif what < 0.034:
            world.abort()
        elif what < 0.036:
            world.lose_store()
        elif what < 0.045:
            world.add_store()
        elif what < 0.05:
            world.abort_collective()
        elif what < 0.056 and world.client is not None:
            world.copy_failures = dice.choice((0.0, 0.0, 0.3))
            action = dice.choice(("drain", "replace", "replace", "resume"))
            world.operate(action, f"rank:{dice.randrange(world.size)}")
        elif what < 0.058:
            world.crash()
        elif what < 0.060 and world.workers:
            world.cut_off(dice.choice(list(world.workers.values())))
        elif what < 0.062:
            world.cut_gateway()
        elif what < 0.064:
            world.damage()
        elif what < 0.068 and silent_loss:
            world.parity_of.clear()  # a store loses its memory and tells nobody
        else:
            world.move()
        world.group.check()
        if not silent_loss:
            world.check_parity()
        world.settle()


@pytest.mark.parametrize("parity", [1, 2])
@pytest.mark.parametrize("seed", range(40))
def test_streams_are_right_whatever_dies_when(seed: int, parity: int, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(seed, parity=parity, protect_tail=seed % 8 >= 4)
    world.poisoned_ranks = range(seed % 3 == 0, world.size if seed % 2 else 2)
    world.room = 5 if seed % 5 == 2 else world.room
    monkeypatch.setattr("services.coordinator.scheduling.prefix_cache.PAGES_RELEASED", 2048 if seed % 3 else 1)
    monkeypatch.setattr("services.coordinator.protection.restoration.LOOKED_UP", 3 if seed % 2 else 4096)
    mayhem(world, silent_loss=seed % 4 == 3)
    finish(world)


def test_one_lost_rank_is_restored_from_parity_and_only_the_tail_recomputed() -> None:
    world = World(1, pages=64)
    half_way(world)
    sealed = world.group.status().stripes_protected
    world.kill(next(each for each in world.workers.values() if each.assign is not None and each.assign.rank == 1))
    finish(world)
    record = world.group.status().recoveries[-1]
    assert record.restored_pages == sealed > 0
    assert record.recomputed_tokens < world.page_tokens
    assert record.lost_ranks == (1,)


@pytest.mark.parametrize("over", [False, True])
def test_what_a_supervisor_says_of_a_dead_workers_device_is_why_its_rank_was_lost(over: bool) -> None:
    world = World(1, pages=64)
    half_way(world)
    lost = next(each for each in world.workers.values() if each.assign is not None and each.assign.rank == 1)
    world.kill(lost)
    if over:
        finish(world)
    wire = world._connects(WorkerHello(lost.name, "host", "host", 1, "cuda:1"))
    world.handle(Said(wire.peer, Goodbye("the device failed: Xid 79")))
    world._breaks(wire, "it has said so")
    finish(world)
    record = world.group.status().recoveries[-1]
    assert record.reason == f"rank 1 ({lost.name}): the device failed: Xid 79"
    assert record.lost_ranks == (1,)


@pytest.mark.parametrize("begun", [False, True])
def test_a_prompt_that_is_prefilled_is_no_part_of_a_recovery(begun: bool) -> None:
    """It ends when all have what they had: whoever decoded has its tail, first of all, and the prompt goes on."""
    world = World(1, pages=256)
    assert world.settings.max_step_tokens <= 8
    begin(world)
    name = world.submit(length=23, max_tokens=200)
    while len(world.received[name]) < 10:
        world.move()
    prompt = world.submit(length=700, max_tokens=2)
    engine = world.engine
    assert isinstance(engine, EmbeddedEngine)
    while begun and not any(each.prompt_tokens == 700 and each.computed > 40 for each in engine.runs()):
        world.move()
    world.kill(next(each for each in world.workers.values() if each.assign is not None and each.assign.rank == 1))
    while not world.group.status().recoveries:
        world.move()
    record = world.group.status().recoveries[-1]
    left = [each.remaining for each in engine.scheduler.requests() if each.prompt_tokens == 700]
    assert min(left) > 400, f"{left} tokens of the prompt are left"
    assert all(stream.resumed_s for stream in record.streams)
    assert not world.received[prompt]
    finish(world)


def test_each_stream_goes_on_when_its_own_pages_are_back() -> None:
    world = World(7, pages=200)
    begin(world)
    long = world.submit(length=160, max_tokens=60)
    short = world.submit(length=9, max_tokens=60)
    while not (world.received[long] and world.received[short]) or world.group.status().stripes_pending:
        world.move()
    had = len(world.received[short])
    world.kill(next(each for each in world.workers.values() if each.assign is not None and each.assign.rank == 1))
    while world.group.membership.state != "restoring":
        world.move()
    while world.group.membership.state == "restoring":
        world.move()
    ahead = len(world.received[short]) - had
    assert ahead > 3, "the short stream waited for the long one's pages"
    finish(world)
    record = world.group.status().recoveries[-1]
    streams = {stream.request_id: stream for stream in record.streams}
    assert streams[short].resumed_s < streams[long].resumed_s
    assert {stream.way for stream in record.streams} == {"restore"}
    assert streams[long].restored_pages >= 160 // world.page_tokens


@pytest.mark.parametrize("length", [2, 23])
@pytest.mark.parametrize("parity", [1, 2])
def test_with_tails_protected_nothing_is_recomputed(parity: int, length: int) -> None:
    world = World(11, pages=64, parity=parity, protect_tail=True)
    begin(world, spares=parity)
    name = world.submit(length=length, max_tokens=60, digest=True)
    for had in (1, 12, 13, 14, 15):
        while len(world.received[name]) < had:
            world.move()
        ledger = world.ledger
        while world.engine.cache.allocator.pinned or ledger.count(Parity.QUEUED) or ledger.count(Parity.PENDING):
            world.move()
        epoch = world.group.membership.epoch
        for rank in range(parity):
            world.kill(world.workers[str(world.group.membership.ranks[(had + rank) % world.size])])
        while len(world.workers) < world.size + parity:
            world.add_worker()
        while world.group.membership.epoch == epoch or world.group.membership.state != "serving":
            world.move()
    finish(world)
    records = world.group.status().recoveries
    assert len(records) == 5
    assert [record.recomputed_tokens for record in records] == [0] * 5
    assert sum(record.tail_tokens for record in records) > 0
    world.flow()  # as it does every two seconds
    while world.store_wire is not None and world.store_wire.sent:
        world.settle()
    kept = set(world.ledger.keys)
    assert all(key in kept for key in world.parity_of), "stripes of tails are left"


def stored(world: World, request: Request) -> int:
    """Tokens from a request's start whose parity the store has."""
    tails = world.engine.protection._tails
    assert tails is not None
    pages = list(itertools.takewhile(world.parity_of.__contains__, request.keys))
    run = tails.after(request, len(pages) * world.page_tokens)
    return len(pages) * world.page_tokens + len(
        list(itertools.takewhile(lambda token: token.key in world.parity_of, run))
    )


@pytest.mark.parametrize("missing", [0, 1])
@pytest.mark.parametrize("seed", range(4))
def test_of_a_page_that_has_just_sealed_only_tokens_without_a_stripe_are_recomputed(seed: int, missing: int) -> None:
    world = World(seed, pages=64, protect_tail=True)
    begin(world)
    name = world.submit(length=6, max_tokens=200, digest=True)
    while len(world.received[name]) < 3:
        world.move()
    (request,) = world.engine.scheduler.running.values()

    def sealed_alone() -> bool:
        """Whether its last page is full, has no parity of its own, and its tokens have, but for those `missing`."""
        full = request.computed == len(request.keys) * world.page_tokens
        have = stored(world, request)
        return full and request.keys[-1] not in world.parity_of and have == request.computed - missing

    until(world, sealed_alone)
    world.kill(world.workers[str(world.group.membership.ranks[seed % world.size])])
    finish(world)
    assert world.group.status().recoveries[-1].recomputed_tokens == missing


@pytest.mark.parametrize("parity", [1, 2])
def test_the_prefix_cache_comes_back_after_a_loss(parity: int) -> None:
    world = World(8, pages=64, parity=parity)
    begin(world, spares=parity)
    world.submit(length=40, max_tokens=5, shared_prefix=True)
    finish(world)
    cached = world.group.status().pages_cached
    for worker in [each for each in world.workers.values() if each.assign is not None][:parity]:
        world.kill(worker)
    serving(world)
    assert world.group.status().pages_lost == cached > 0
    assert world.group.status().can_lose == 0
    until(world, lambda: not world.ledger.lost)
    assert world.group.status().pages_cached == cached
    assert world.group.status().can_lose == parity
    world.check_slices()
    restored = world.restored
    world.submit(length=30, max_tokens=5, shared_prefix=True)
    finish(world)
    assert world.ledger.count(Parity.PROTECTED) > cached
    assert world.restored == restored == cached * parity


def test_when_the_group_serves_again_pages_of_a_request_that_has_ended_are_idle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They come back as all others do, which end with the last that is idle."""
    monkeypatch.setattr("services.coordinator.scheduling.prefix_cache.PAGES_RELEASED", 1)
    world = World(8, pages=64)
    begin(world)
    goes_on = world.submit(length=4, max_tokens=60)
    ends = world.submit(length=40, max_tokens=1)
    until(world, lambda: ends in world.finished)
    world.kill(next(each for each in world.workers.values() if each.assign is not None))
    (running,) = world.engine.scheduler.running.values()
    assert goes_on not in world.finished
    assert world.engine.cache.in_use > len(running.pages) + 3
    serving(world)
    assert world.engine.cache.in_use == len(running.pages)
    finish(world)


def test_a_page_being_restored_is_nobody_elses_when_its_request_ends() -> None:
    world = World(10, pages=12)
    begin(world)
    name = world.submit(length=30, max_tokens=10)
    while len(world.received[name]) < 3 or world.group.status().stripes_pending:
        world.move()
    world.kill(next(each for each in world.workers.values() if each.assign is not None and each.assign.rank == 1))
    while world.group.membership.state != "restoring":
        world.move()
    under_way = world.engine.cache.allocator.pinned
    assert under_way
    world.abort()
    world.submit(length=30, max_tokens=10)  # needs all the room that there is
    held = {page for each in world.engine.scheduler.requests() for page in each.pages}
    assert not set(held) & set(under_way)
    finish(world)


def test_cached_pages_that_no_store_has_are_dropped() -> None:
    world = World(9, pages=64)
    begin(world)
    world.submit(length=40, max_tokens=5)
    finish(world)
    world.parity_of.clear()
    world.kill(next(each for each in world.workers.values() if each.assign is not None))
    serving(world)
    until(world, lambda: not world.ledger.lost)
    assert world.group.status().pages_cached == 0


def decoding(world: World, *, spares: int = 1) -> str:
    """A group that serves, and a stream with protected pages that is far from its end. Returns its name."""
    begin(world, spares=spares)
    name = world.submit(length=23, max_tokens=200, digest=True)
    while len(world.received[name]) < 10 or world.group.status().stripes_pending:
        world.move()
    return name


def moved(world: World, rank: int, old: str) -> None:
    until(world, lambda: world.group.membership.ranks[rank] != old and world.group.membership.state == "serving")


def drained(world: World, rank: int) -> str:
    """A group that decodes, and of which a rank has moved to a spare. Returns the worker that had it."""
    decoding(world)
    old = str(world.group.membership.ranks[rank])
    world.operate("drain", f"rank:{rank}")
    moved(world, rank, old)
    return old


@pytest.mark.parametrize("action", ["drain", "replace"])
def test_a_rank_moves_to_a_spare_and_nothing_is_restored_or_recomputed(action: OperatorAction) -> None:
    world = World(20, pages=128)
    decoding(world)
    old = str(world.group.membership.ranks[1])
    answer = world.operate(action, "rank:1")
    assert isinstance(answer, Applied)
    assert isinstance(world.operate(action, "rank:2"), Refused)
    assert "draining" in [worker.state for worker in world.group.status().workers]
    moved(world, 1, old)
    states = {worker.name: worker.state for worker in world.group.status().workers}
    assert states[old] == ("cordoned" if action == "drain" else "spare")
    assert world.group.status().pages_lost == 0
    world.check_slices()
    finish(world)
    (record,) = world.group.status().recoveries
    assert record.planned
    assert record.restored_pages == record.recomputed_tokens == 0
    assert [stream.way for stream in record.streams] == ["kept"]
    assert world.restored == 0
    assert world.prepared_switches == 1 + 2  # the successor, and the two ranks that stay


def test_a_drained_worker_is_not_taken_before_it_is_resumed() -> None:
    world = World(21, pages=128)
    old = drained(world, 0)
    world.kill(world.workers[str(world.group.membership.ranks[2])])
    for _ in range(200):
        world.move()
    assert world.group.membership.state == "forming"
    world.operate("resume", "rank:0")
    serving(world)
    assert world.group.membership.ranks[2] == old
    finish(world)


@pytest.mark.parametrize("dies", ["old", "new", "other"])
@pytest.mark.parametrize("after", [3, 10, 20, 40])
def test_a_rank_that_moves_and_a_loss_on_the_way(dies: str, after: int) -> None:
    world = World(22 + after, pages=128)
    decoding(world, spares=3)
    old = str(world.group.membership.ranks[1])
    world.operate("replace", "rank:1")
    move = world.engine.protection.moves.move
    assert move is not None
    while not move.new:
        world.tick()
    for _ in range(after):
        world.move()
    world.kill(world.workers[{"old": old, "new": move.new, "other": str(world.group.membership.ranks[2])}[dies]])
    moved(world, 1, old)
    world.group.check()
    finish(world)


@pytest.mark.parametrize("lost", ["coordinator", "channel"])
def test_a_drained_worker_stays_cordoned_when_it_comes_again(lost: str) -> None:
    world = World(25, pages=128)
    old = drained(world, 1)
    until(world, lambda: world.last_cordons == {old: 1})
    if lost == "coordinator":
        world.crash()
    else:
        world.cut_off(world.workers[old])
    serving(world)
    until(world, lambda: old in world.group.membership.members and world.group.membership.members[old].ready)
    assert world.group.membership.spares() == []
    world.operate("resume", "rank:1")
    assert [spare.name for spare in world.group.membership.spares()] == [old]
    until(world, lambda: world.last_cordons == {})
    finish(world)


def test_a_drained_worker_that_was_stopped_and_started_again_is_a_spare() -> None:
    """As a container is that an operator drained and restarted: its new process has the old one's name."""
    world = World(25, pages=128)
    old = drained(world, 1)
    world.says(old, Goodbye(TOLD_TO_STOP))
    world.cut_off(world.workers[old])
    until(world, lambda: [spare.name for spare in world.group.membership.spares()] == [old])
    assert world.group.membership.cordons == {}
    finish(world)


def test_without_a_spare_a_rank_waits_to_move_and_the_group_serves() -> None:
    world = World(23, pages=128)
    name = decoding(world, spares=0)
    world.operate("drain", "rank:1")
    had = len(world.received[name])
    while len(world.received[name]) < had + 5:
        world.move()
    status = world.group.status()
    assert status.handover is not None
    assert status.handover.phase == "waiting"
    world.operate("resume", "rank:1")
    assert world.group.status().handover is None
    finish(world)


def test_what_can_not_move_is_refused() -> None:
    world = World(24)
    for _ in range(world.size + 1):
        world.add_worker()
    serving(world)
    spare = world.group.membership.spares()[0].name
    for action, target, status in (
        ("drain", "rank:7", 404),
        ("drain", "rank:x", 404),
        ("drain", "elephant", 404),
        ("replace", f"worker:{spare}", 409),
    ):
        answer = world.operate(action, target)  # type: ignore[arg-type]
        assert isinstance(answer, Refused)
        assert answer.status == status
    assert isinstance(world.operate("drain", f"worker:{spare}"), Applied)
    assert world.group.membership.spares() == []


def test_a_worker_and_a_store_that_are_told_to_stop_leave_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    world = World(28, pages=128)
    decoding(world)
    name = str(world.group.membership.ranks[1])
    world.says(name, Goodbye(TOLD_TO_STOP))
    world.store_says(Goodbye(TOLD_TO_STOP))
    assert world.group.membership.state == "forming"
    assert world.group.status().stores == ()
    world.kill(world.workers[name])
    world.lose_store()
    assert not [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert b'rank_failures_total{reason="stopped"} 1.0' in world.group.metrics.render()
    finish(world)


def test_a_rank_whose_device_failed_goes_to_a_spare_and_the_status_names_the_failure(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = World(28, pages=128)
    decoding(world)
    name = str(world.group.membership.ranks[1])
    world.says(name, Goodbye("the device failed: Xid 79, it has fallen off the bus"))
    world.kill(world.workers[name])
    finish(world)
    assert world.group.membership.ranks[1] != name
    assert "Xid 79" in world.group.status().recoveries[-1].reason
    assert any("Xid 79" in str(vars(record)) for record in caplog.records if record.levelname == "WARNING")
    assert b'rank_failures_total{reason="failed"} 1.0' in world.group.metrics.render()


def test_without_a_spare_it_says_what_it_waits_for_and_goes_on_when_one_comes() -> None:
    world = World(2)
    for _ in range(world.size):
        world.add_worker()
    serving(world)
    world.submit()
    world.move()
    world.kill(next(iter(world.workers.values())))
    while world.move():
        pass
    status = world.group.status()
    assert status.state == "forming"
    assert "waiting for 1 more worker" in status.detail
    finish(world)


def test_a_late_word_of_the_epoch_before_does_not_break_the_new_one() -> None:
    world = World(3)
    for _ in range(world.size + 1):
        world.add_worker()
    serving(world)
    survivor, victim = world.group.membership.ranks[:2]
    world.kill(world.workers[str(victim)])
    assert world.group.membership.state == "forming"
    world.says(str(survivor), RankFailed(1, 0, "its peer is gone", fatal=False))
    serving(world)
    for _ in range(int(2 * BROKEN_GRACE_S / TICK_S)):
        world.tick()
    assert world.group.membership.state == "serving"
    assert world.group.membership.epoch == 2


def test_a_newer_epoch_in_redis_is_overtaken() -> None:
    """Its answer was lost: what the group wrote in its own epoch would be refused for ever."""
    world = World(29, pages=64)
    decoding(world)
    world.last_epoch += 3
    until(world, lambda: world.group.membership.epoch > world.last_epoch - 1)
    serving(world)
    assert world.group.membership.epoch == world.last_epoch
    finish(world)


def test_an_epoch_that_is_broken_though_nobody_is_lost_is_formed_again() -> None:
    world = World(4)
    for _ in range(world.size):
        world.add_worker()
    serving(world)
    world.submit()
    world.says("w0", RankFailed(1, 0, "a collective failed", fatal=False))
    until(world, lambda: world.group.membership.epoch > 1)
    finish(world)
    assert world.group.membership.epoch == 2


@pytest.mark.parametrize("ranks", [(0, 1, 2), (1, 2), (1,)])
@pytest.mark.parametrize("seed", range(6))
def test_a_request_with_which_steps_fail_ends_and_all_others_go_on(seed: int, ranks: tuple[int, ...]) -> None:
    """Where they fail on all ranks alike no new epoch is needed for it, and in no case is a worker given up."""
    world = World(seed, pages=64)
    begin(world)
    members, epoch = list(world.group.membership.ranks), world.group.membership.epoch
    good = [world.submit(length=12, max_tokens=20) for _ in range(3)]
    until(world, lambda: all(len(world.received[name]) > 2 for name in good[:2]))
    world.poisoned_ranks = ranks
    bad = world.submit(length=9, poison=True)
    good.append(world.submit(length=5, max_tokens=8))
    finish(world)
    assert world.finished[bad] == "the request failed 3 times, and is not tried again"
    assert [world.finished[name] for name in good] == ["length"] * 4
    assert world.group.membership.ranks == members
    assert (world.group.membership.epoch == epoch) == (len(ranks) == world.size)


@pytest.mark.parametrize("seed", range(4))
def test_of_several_requests_with_which_steps_fail_each_one_ends(seed: int) -> None:
    world = World(seed, pages=64)
    for _ in range(world.size):
        world.add_worker()
    serving(world)
    bad = [world.submit(poison=True) for _ in range(5)]
    good = [world.submit(max_tokens=20) for _ in range(3)]
    finish(world)
    assert all("failed" in world.finished[name] for name in bad)
    assert all(world.finished[name] == "length" for name in good)


@pytest.mark.parametrize("seed", range(4))
def test_a_worker_on_which_every_step_fails_is_replaced_and_no_request_ends(seed: int) -> None:
    """It alone raises errors, whatever it computes, and nothing says that a request is to blame."""
    world = World(seed)
    for _ in range(world.size):
        world.add_worker()
    serving(world)
    broken = str(world.group.membership.ranks[1])
    world.broken_workers = {broken}
    world.add_worker()
    names = [world.submit(max_tokens=8) for _ in range(3)]
    until(world, lambda: broken not in world.group.membership.ranks)
    world.broken_workers = set()
    finish(world)
    assert [world.finished[name] for name in names] == ["length"] * 3


def test_a_rank_that_fails_in_a_step_which_another_has_finished_is_given_up() -> None:
    world = World(3)
    for _ in range(world.size + 1):
        world.add_worker()
    serving(world)
    world.submit(length=4, max_tokens=8)
    until(world, lambda: any(isinstance(each, StepDone) for each in world.workers["w2"].out))
    done = next(each for each in world.workers["w2"].out if isinstance(each, StepDone))
    world.workers["w2"].out.remove(done)
    world.workers["w2"].out.append(StepRaised(done.epoch, done.step, done.rank, "no memory to sample", 0))
    until(world, lambda: world.group.membership.ranks[done.rank] != "w2")
    finish(world)


def test_epochs_that_end_without_progress_are_spaced_out_and_the_status_says_why() -> None:
    world = World(6)
    for _ in range(world.size):
        world.add_worker()
    began, epochs = world.now, 0
    pauses = set()
    while world.now - began < 60.0:
        if world.group.membership.state in ("restoring", "serving"):
            epochs += 1
            world.says("w0", RankFailed(world.group.membership.epoch, 0, "the driver is gone", fatal=True))
        world.move()
        detail = world.group.status().detail
        if "without progress" in detail:
            assert "the driver is gone" in detail
            pauses.add(detail.partition(" epochs")[0])
    assert 5 <= epochs <= 14
    assert len(pauses) > 3
    world.submit(length=4, max_tokens=4)
    finish(world)
    assert world.group.membership.state == "serving"


def test_a_rank_that_is_cut_off_from_the_others_gives_its_place_to_a_spare() -> None:
    world = World(5)
    for _ in range(world.size + 1):
        world.add_worker()
    serving(world)
    world.submit()
    cut = str(world.group.membership.ranks[1])
    world.says(cut, RankFailed(1, 1, "rank 0 can't be reached", fatal=False, cut_off=True))
    until(world, lambda: world.group.membership.epoch > 1)
    assert cut not in world.group.membership.ranks
    finish(world)


def test_parity_that_a_store_lost_or_wants_to_be_rid_of_is_encoded_anew() -> None:
    world = World(5, pages=64)
    for _ in range(world.size):
        world.add_worker()
    world.add_store()
    serving(world)
    world.submit(length=23, max_tokens=40)
    finish(world)
    protected = world.group.status().stripes_protected
    for _ in range(3):
        world.damage()
    assert world.group.status().stripes_protected < protected
    while world.group.status().stripes_pending:
        world.move()
    assert world.group.status().stripes_protected == protected
    world.check_parity()
    world.store_says(StoreDrains(world.group.config.group, tuple(world.parity_of)))
    assert world.group.stores.open() == ()
    assert world.group.status().stripes_pending == protected  # and they stay so until there is another store


def test_in_a_full_store_pages_in_use_take_the_room_of_cached_ones() -> None:
    world = World(7, pages=64)
    world.room = 12
    for _ in range(world.size):
        world.add_worker()
    world.add_store()
    serving(world)
    world.submit(length=44, max_tokens=2)
    finish(world)
    assert world.group.status().stripes_protected == 11
    name = world.submit(length=23, max_tokens=200)
    while len(world.received[name]) < 20 or world.group.status().can_lose == 0:
        assert name not in world.finished, "pages in use stay without parity"
        world.move()
    status = world.group.status()
    assert status.stripes_protected == 12
    assert status.unprotected_reason == "no room"
    world.check_parity()


@pytest.mark.parametrize(("stores", "reduced"), [(1, True), (2, False)])
def test_fewer_stores_than_parity_shards_are_reported(stores: int, reduced: bool) -> None:
    world = World(8, parity=2)
    for _ in range(world.size):
        world.add_worker()
    world.add_store()
    serving(world)
    world.submit(length=23, max_tokens=4)
    finish(world)
    protected = world.group.status().stripes_protected
    if stores == 2:
        other = StoreInfo("other", "first", "tcp://nowhere:2", "http://nowhere:2", 1)
        world.handle(Came(1_000_000, StoreHello(other)))
        assert world.group.status().stripes_pending == protected  # encoded anew, now to different stores
    assert bool(world.group.status().reduced_protection) is reduced
    assert world.group.status().can_lose == 2


def test_a_store_keeps_what_it_holds_until_it_is_known_which_pages_there_are() -> None:
    world = World(6)
    stale, later = b"an earlier one's", b"one of this life"
    world.parity_of = {stale: [], later: []}
    world.written = {stale: (0, 99), later: (1, 99)}
    world.add_store()
    while world.move():
        pass
    assert set(world.parity_of) == {stale, later}
    for _ in range(world.size):
        world.add_worker()
    serving(world)
    while world.store_wire is not None and world.store_wire.sent:
        world.settle()
    assert set(world.parity_of) == {later}


def half_way(world: World, tokens: int = 10) -> str:
    """A request that has got so many tokens, all its pages protected."""
    begin(world)
    name = world.submit(length=23, max_tokens=40)
    while len(world.received[name]) < tokens or world.group.status().stripes_pending:
        world.move()
    assert name not in world.finished
    return name


def test_a_coordinator_that_is_back_takes_all_over_and_recomputes_the_tail_only() -> None:
    world = World(7, pages=64)
    half_way(world)
    before = world.group.status()
    world.crash()
    world.group.membership.return_grace_s = 60.0  # which nobody has to wait for
    serving(world)
    assert world.group.status().epoch == before.epoch + 1
    assert {worker.name: worker.rank for worker in world.group.status().workers} == {
        worker.name: worker.rank for worker in before.workers
    }
    finish(world)
    record = world.group.status().recoveries[-1]
    assert record.reason == "the coordinator was restarted"
    assert record.lost_ranks == ()
    assert record.recomputed_tokens <= world.page_tokens + 2  # a page that is full may not be known to ranks yet
    assert world.engine.protection.encoding.parity_bytes < len(world.parity_of)  # most were not encoded again


def test_a_rank_that_dies_with_the_coordinator_is_restored_from_parity() -> None:
    world = World(8, pages=64)
    half_way(world)
    sealed = world.group.status().stripes_protected
    world.crash()
    world.group.membership.return_grace_s = 0.1
    world.kill(next(each for each in world.workers.values() if each.assign is not None and each.assign.rank == 1))
    finish(world)
    record = world.group.status().recoveries[-1]
    assert record.lost_ranks == (1,)
    assert record.restored_pages >= sealed > 0
    assert record.recomputed_tokens < world.page_tokens


def test_a_worker_that_was_cut_off_returns_to_its_rank_if_no_other_has_taken_it() -> None:
    world = World(9, pages=64)
    for _ in range(world.size):
        world.add_worker()
    serving(world)
    name = world.submit(length=23, max_tokens=40)
    while len(world.received[name]) < 10:
        world.move()
    world.cut_off(world.workers["w1"])
    serving(world)
    finish(world)
    record = world.group.status().recoveries[0]
    assert record.restored_pages == 0
    assert record.recomputed_tokens <= world.page_tokens + 2  # a page that is full may not be known to ranks yet


def test_parity_that_is_lost_while_the_index_is_read_is_not_believed() -> None:
    world = World(10, pages=64)
    half_way(world)
    world.crash()
    world.slow_index = True
    serving(world)
    world.damage()
    world.slow_index = False
    until(world, lambda: not world.questions)
    world.check_parity()
    finish(world)
    world.check_parity()
    assert len(world.parity_of) == len(world.ledger.keys)


def test_a_rank_that_has_moved_keeps_its_pages_when_the_coordinator_is_back() -> None:
    world = World(11, pages=128)
    decoding(world)
    old = str(world.group.membership.ranks[1])
    assert isinstance(world.operate("replace", "rank:1"), Applied)
    moved(world, 1, old)
    world.crash()
    world.group.membership.return_grace_s = 60.0
    serving(world)
    assert world.group.membership.ranks[1] != old
    assert world.ledger.lost == 0
    assert world.ledger.sealed_pages
    finish(world)
    record = world.group.status().recoveries[0]
    assert record.restored_pages == 0
    assert record.recomputed_tokens < world.page_tokens
