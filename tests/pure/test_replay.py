"""A recorded life of the coordinator lives again, event by event; what was changed, lost or is wrong in it is found."""

import itertools
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgpack
import pytest

from services.cli.main import main
from services.coordinator.events import Effect, Send
from services.coordinator.group import Group
from services.coordinator.recording.keyframe import freeze, thaw
from services.coordinator.recording.recorder import Recorder
from services.coordinator.recording.replay import Replayed, Until, lives, replay
from services.coordinator.recording.segments import Entry, externals
from services.coordinator.views.metrics import Metrics
from shared.errors import ProtocolError
from shared.messages import Batch, NextTokens, StepPlan, Tokens
from shared.tracing import NoTracing
from tests.pure.test_group_simulation import decoding, finish, mayhem, serving
from tests.pure.world import World

BOUND = 200_000


class Quiet:
    """Sees all events, tells nobody."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.outputs: list[Effect] = []

    def begins(self, entry: Entry, group: Group) -> None:
        self.entries.append(entry)

    def ended(self, entry: Entry, group: Group, outputs: Sequence[Effect]) -> None:
        self.outputs.extend(outputs)


def again(folder: Path, data: bytes, until: Until | None = None) -> tuple[Replayed, Quiet]:
    """Replay a life's only segment."""
    path = folder / "life.ghostrec"
    path.write_bytes(data)
    watcher = Quiet()
    return replay([path], watcher, until or Until()), watcher


def busy_life(seed: int, moves: int = 600) -> World:
    """A recorded world in which requests run, a rank dies, and another one moves."""
    world = World(seed, pages=64, protect_tail=seed % 2 == 1)
    world.record()
    decoding(world, spares=2)
    for number in range(moves):
        if number == moves // 3:
            world.kill(world.workers[str(world.group.membership.ranks[1])])
        if number == moves // 2:
            world.operate("replace", "rank:0")
        if number % 50 == 0:
            world.submit(shared_prefix=True, digest=True)
        world.move()
    return world


@pytest.mark.parametrize("seed", range(4))
def test_the_same_events_make_the_core_send_the_same_and_end_in_the_same_state(tmp_path: Path, seed: int) -> None:
    world = busy_life(seed)
    replayed, watcher = again(tmp_path, world.lives[0])
    assert replayed.failure == ""
    assert replayed.status == world.group.status()
    assert replayed.events == len(watcher.entries) > 200
    assert [entry.number for entry in watcher.entries] == list(range(1, len(watcher.entries) + 1))
    sent = [output.message for output in watcher.outputs if isinstance(output, Send)]
    told = [len(each.tokens) // 4 for each in sent if isinstance(each, Tokens | NextTokens)]
    assert sum(told) >= sum(map(len, world.received.values()))


@pytest.mark.parametrize("seed", range(8))
def test_a_core_that_was_written_and_read_again_goes_on_as_if_nothing_had_been(tmp_path: Path, seed: int) -> None:
    world = busy_life(seed, moves=world_moves(seed))
    copy = copied(world)
    assert copy.status() == world.group.status()
    copy.check()
    world.record()
    world.group = copy
    for _ in range(400):
        world.move()
        world.group.check()
    replayed, _ = again(tmp_path, world.lives[-1])
    assert replayed.failure == ""
    assert replayed.status == world.group.status()


def world_moves(seed: int) -> int:
    return 150 + 97 * seed


@pytest.mark.parametrize("seed", range(10))
def test_every_life_can_be_replayed_whatever_died_when(tmp_path: Path, seed: int) -> None:
    world = World(seed, parity=1 + seed % 2, protect_tail=seed % 4 >= 2)
    world.record()
    mayhem(world, silent_loss=seed % 4 == 3)
    for life in world.lives:
        replayed, _ = again(tmp_path, life)
        assert replayed.failure == ""
    assert replayed.status == world.group.status()


def copied(world: World) -> Group:
    group = world.group
    frozen = freeze(group, externals(group.metrics, group.tracing, world.settings))
    metrics = Metrics(lambda: copy.status())
    copy: Group = thaw(frozen, externals(metrics, NoTracing(), world.settings))
    return copy


@pytest.mark.parametrize(
    "nodes",
    [
        [["os:system"]],
        [["shared.stripe_index:asyncio.run"]],
        [["enum", "shared.stripe_index:StripeIndex", "redis://nowhere"]],
        [["external", "password"]],
        [["tuple", msgpack.ExtType(1, b"\x07\0\0\0")]],
        [["tuple", msgpack.ExtType(1, b"\0\0\0\0")]],
        [[]],
    ],
)
def test_a_keyframe_makes_nothing_but_the_cores_own_objects(nodes: list[object]) -> None:
    with pytest.raises(ProtocolError):
        thaw(msgpack.packb([{}, nodes]), {})


def parts(data: bytes) -> list[bytes]:
    """The objects of a segment, each as its bytes."""
    unpacker = msgpack.Unpacker(max_buffer_size=1 << 30, strict_map_key=False)
    unpacker.feed(data)
    ends = [0]
    while unpacker.tell() < len(data):
        unpacker.skip()
        ends.append(unpacker.tell())
    return [data[start:end] for start, end in itertools.pairwise(ends)]


def test_an_event_that_was_changed_is_found(tmp_path: Path) -> None:
    world = busy_life(1)
    objects = parts(bytes(world.lives[0]))
    event, seen, sent = msgpack.unpackb(objects[102])
    objects[102] = msgpack.packb([event[:-1] + bytes([event[-1] ^ 1]), seen, sent])
    with pytest.raises(ProtocolError, match="damaged at event 101"):
        again(tmp_path, b"".join(objects))
    del objects[102]
    with pytest.raises(ProtocolError, match="damaged at event 101"):
        again(tmp_path, b"".join(objects))


def test_damage_anywhere_is_found_or_does_no_harm(tmp_path: Path) -> None:
    world = World(4, pages=16)
    world.record()
    for _ in range(world.size):
        world.add_worker()
    world.add_store()
    serving(world)
    world.submit(length=5, max_tokens=4)
    finish(world)
    good, dice = bytes(world.lives[0]), random.Random(4)
    found = 0
    for _ in range(80):
        data = bytearray(good)
        place = dice.randrange(len(data))
        data[place] ^= 1 << dice.randrange(8)
        try:
            replayed, _ = again(tmp_path, data)
            found += bool(replayed.failure)
        except ProtocolError:
            found += 1
    assert found > 60  # all but what the header says for people


def test_the_first_event_at_which_the_core_does_something_else_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = busy_life(2)
    _, watcher = again(tmp_path, world.lives[0])
    steps = [0]

    def planned(entry: Entry, group: Group, outputs: Sequence[Effect]) -> None:
        if any(isinstance(output, Send) and isinstance(output.message, StepPlan) for output in outputs):
            steps.append(entry.number)

    monkeypatch.setattr(watcher, "ended", planned)
    replay([tmp_path / "life.ghostrec"], watcher, Until())
    monkeypatch.setattr("services.coordinator.scheduling.scheduler.Scheduler.plan", lambda self, limit=None: Batch())
    replayed, _ = again(tmp_path, world.lives[0])
    assert replayed.failure.startswith(f"event {steps[1]}, ")
    assert "something else was sent" in replayed.failure


def test_the_event_after_which_page_tables_disagree_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = busy_life(2)
    check = Group.check

    def broken(self: Group) -> None:
        check(self)
        assert self.outbox.now < world.now - 0.5, "a page leaks"

    monkeypatch.setattr(Group, "check", broken)
    replayed, watcher = again(tmp_path, world.lives[0])
    (*_, first) = (entry for entry in watcher.entries if entry.now < world.now - 0.5)
    assert replayed.failure.startswith(f"after event {first.number + 1}: a page leaks")


def test_what_was_written_in_part_at_the_end_is_left_out(tmp_path: Path) -> None:
    world = busy_life(3)
    objects = parts(bytes(world.lives[0]))
    data = bytes(world.lives[0])[:-3]
    replayed, _ = again(tmp_path, data)
    assert replayed.failure == ""
    assert replayed.events == len(objects) - 3
    with pytest.raises(ProtocolError, match="no recording"):
        again(tmp_path, data[: len(objects[0]) + 5])


def test_a_replay_ends_where_it_is_told_to(tmp_path: Path) -> None:
    world = busy_life(0)
    replayed, _ = again(tmp_path, world.lives[0], Until(event=100))
    assert replayed.events == 100
    replayed, watcher = again(tmp_path, world.lives[0], Until(now=101.0))
    assert 0 < replayed.events < 1000
    assert replayed.status.now <= 101.0
    assert watcher.entries[-1].now > 100.9


async def test_a_ring_of_segments_stays_within_its_bound_and_can_be_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.coordinator.recording.recorder.MIB", BOUND)
    world = World(5, pages=64)
    world.settings.record_dir, world.settings.record_mb = str(tmp_path / "ring"), 1
    recorder = Recorder(world.group, world.settings)
    world.watch = lambda event, outputs: recorder.saw(world.now, event, b"", outputs)
    decoding(world)
    (life,) = lives([tmp_path / "ring"])
    assert [path.stat().st_mode & 0o777 for path in life] == [0o600]
    while len(life) < 4 or life[0].name.endswith("0001.ghostrec"):
        for _ in range(200):
            world.move()
        if len(world.requests) - len(world.finished) < 4:
            world.submit(length=20)
        recorder.tick(world.now)
        await recorder.flushed()
        (life,) = lives([tmp_path / "ring"])
        assert sum(path.stat().st_size for path in life) <= BOUND
    await recorder.close()
    (life,) = lives([tmp_path / "ring"])
    replayed = replay(life, Quiet(), Until())
    assert replayed.failure == ""
    assert replayed.status == world.group.status()
    with pytest.raises(ProtocolError, match="are missing"):
        replay([life[0], life[-1]], Quiet(), Until())


def test_the_command_tells_the_story_and_fails_where_it_is_not_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = busy_life(3)
    path = tmp_path / "life.ghostrec"
    path.write_bytes(world.lives[0])
    command = [sys.executable, "-m", "services.cli", "replay", str(path)]
    environment = os.environ | {"PYTHONHASHSEED": "7"}  # no order of a set may matter
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for told in ("a rank is lost", "the epoch begins", "recovered", "all as it was recorded", "request=r1 "):
        assert told in ended.stdout
    assert main(["replay", str(path), "--events", "--until", "200"]) == 0
    assert "worker w1: StepDone(" in capsys.readouterr().out
    objects = parts(bytes(world.lives[0]))
    last = max(index for index, each in enumerate(objects[2:], 2) if msgpack.unpackb(each)[2])
    event, seen, sent = msgpack.unpackb(objects[last])
    objects[last] = msgpack.packb([event, seen, sent ^ 1])
    path.write_bytes(b"".join(objects))
    assert main(["replay", str(path)]) == 1
    assert "something else was sent" in capsys.readouterr().out
    assert main(["replay", str(tmp_path / "nothing")]) == 1
