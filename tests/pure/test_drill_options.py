"""A drill's flags, and the orders by which processes break themselves."""

import argparse
import asyncio
import os
from contextlib import nullcontext
from pathlib import Path
from typing import cast

import pytest

from services.cli.drill import Options, Stream, add_arguments, parse_options
from services.cli.drill.run import Strike
from services.cli.local import LocalCluster
from shared import faults
from shared.errors import ConfigError, DeadlineExceeded, GhostError


def parsed(*flags: str) -> Options:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parse_options(parser.parse_args(flags))


def test_targets_are_what_can_have_the_fault() -> None:
    assert parsed().targets == ("rank:1",)
    assert parsed("--target", "rank:0,spare,redis,rank:0").targets == ("rank:0", "spare", "redis")
    assert parsed("--fault", "garbage", "--target", "store:1", "--stores", "2").targets == ("store:1",)
    assert parsed("--fault", "corrupt:page", "--target", "rank:0", "--then", "rank:1,rank:2").then == (
        "rank:1",
        "rank:2",
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--target", "rank:3"), "rank:N with N from 0 to 2"),
        (("--target", "gpu"), "rank:N with N from 0 to 2"),
        (("--fault", "hang", "--target", "redis"), "--target 'redis': rank:N"),
        (("--fault", "full", "--target", "store:1"), "store:N with N from 0 to 0"),
        (("--then", "store:0"), "--then 'store:0': rank:N"),
        (("--cached", "--when", "prefill"), "no prefill"),
        (("--for", "0"), "more than 0 seconds"),
        (("--engine", "vllm", "--fault", "corrupt:page"), "of vLLM"),
        (("--engine", "vllm", "--target", "gateway"), "connected to itself"),
        (("--engine", "vllm", "--protect-tail"), "whole blocks"),
        (("--when", "token:64"), "prefill, decode, or token:N"),
    ],
)
def test_what_can_not_be_is_named(flags: tuple[str, ...], said: str) -> None:
    with pytest.raises(GhostError, match=said):
        parsed(*flags)


@pytest.mark.parametrize(
    ("flags", "ranks", "breaks"),
    [
        ((), 1, False),
        (("--target", "rank:0,rank:2,store:0"), 2, False),
        (("--fault", "slow"), 0, False),
        (("--fault", "corrupt:wire", "--then", "rank:0"), 1, False),
        (("--target", "gateway"), 0, True),
        (("--target", "all"), 0, True),
    ],
)
def test_it_is_known_what_a_fault_costs(flags: tuple[str, ...], ranks: int, breaks: bool) -> None:
    options = parsed(*flags)
    assert (options.loses_ranks, options.breaks_streams) == (ranks, breaks)


async def test_a_process_breaks_itself_when_told_to_and_only_by_its_own_user(tmp_path: Path) -> None:
    orders = tmp_path / "orders"
    orders.mkdir(mode=0o700)
    done: list[str] = []
    faults.obey(faults.folder(str(orders)), {"hang": lambda: done.append("hang")})
    try:
        await faults.tell(orders, os.getpid(), "hang")
        await faults.tell(orders, os.getpid(), "nothing that it knows")
        assert done == ["hang"]
        assert os.listdir(orders) == []
        orders.chmod(0o777)
        with pytest.raises(ConfigError, match="only you can write to"):
            faults.folder(str(orders))
    finally:
        asyncio.get_running_loop().remove_signal_handler(faults.SIGNAL)


async def test_a_process_that_does_not_listen_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "TAKEN_DEADLINE_S", 0.05)
    asyncio.get_running_loop().add_signal_handler(faults.SIGNAL, lambda: None)
    try:
        with pytest.raises(DeadlineExceeded, match="did not take the fault hang"):
            await faults.tell(tmp_path, os.getpid(), "hang")
    finally:
        asyncio.get_running_loop().remove_signal_handler(faults.SIGNAL)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("lost_at", "late"), [(2.0, False), (2.1, True)])
async def test_ranks_that_died_when_all_streams_had_ended_prove_nothing(lost_at: float, late: bool) -> None:
    cluster = cast(LocalCluster, None)
    strike = Strike(cluster, Options("empty", ("redis",), then=("rank:1",)), {}, 0.0, lost_at=lost_at)
    streams = [Stream(times=[1.0]), Stream(times=[1.0, 2.0]), Stream()]
    with pytest.raises(GhostError, match="ended before the fault came"):
        await strike.over(streams)
    strike.task = asyncio.create_task(asyncio.sleep(0))
    with pytest.raises(GhostError, match="ended before rank:1 died") if late else nullcontext():
        await strike.over(streams)
