"""A recorded life of a coordinator with a hosted engine lives again, as with the embedded one."""

from pathlib import Path

import pytest

from tests.pure.hosted_world import HostedWorld
from tests.pure.test_hosted_simulation import finish, mayhem, started
from tests.pure.test_replay import again, copied


def lives_again(folder: Path, world: HostedWorld) -> None:
    for life in world.lives:
        replayed, _ = again(folder, life)
        assert replayed.failure == ""
    assert replayed.status == world.group.status()


@pytest.mark.parametrize("seed", range(8))
def test_every_life_can_be_replayed_whatever_died_when(tmp_path: Path, seed: int) -> None:
    world, engine = started(seed, recorded=True, parity=1 + seed % 2, pages=24)
    mayhem(world, engine)
    lives_again(tmp_path, world)


@pytest.mark.parametrize("seed", range(4))
def test_a_core_that_was_written_and_read_again_goes_on_as_if_nothing_had_been(tmp_path: Path, seed: int) -> None:
    world, engine = started(seed, pages=24)
    mayhem(world, engine)
    world.group = copied(world)
    world.group.check()
    world.record()
    mayhem(world, engine)
    finish(world)
    lives_again(tmp_path, world)
