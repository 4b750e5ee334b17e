"""Ranks that stop or hang are replaced, and a step that fails costs one request at most."""

import asyncio
import os
import signal
import time

import openai
import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

from tests.vllm.orders import CRASH, ON_ALL, ON_ONE, ONCE
from tests.vllm.protected import Protected
from tests.vllm.server import prompt, stream
from tests.vllm.streams import Breaks, run_streams, same

pytestmark = pytest.mark.timeout(300)

FOUND_S = 5.0
"""Ten heartbeats, or the test coordinator's hang_timeout_s: when a rank that stands still is given up."""
BUSY_S = 8.0
"""What a recovery takes at most where processors are wanted by others."""


async def test_a_stopped_rank_is_named_and_replaced(whole: Protected) -> None:
    server = whole.server
    before = await run_streams(server, 4)
    stopped = server.ranks()[2]
    stop = Breaks(8, lambda: server.kill(2, how=signal.SIGSTOP))
    after = await run_streams(server, 4, stop)
    same(after, before)
    assert max(seen.stall(stop.at) for seen in after) < FOUND_S + BUSY_S
    await whole.whole()
    assert stopped not in server.titles().values()
    assert f"(pid {stopped}) stays stopped: it is killed" in whole.log()


async def test_a_stopped_spare_is_replaced(whole: Protected) -> None:
    (spare,) = whole.server.spares()
    os.kill(spare, signal.SIGSTOP)
    async with asyncio.timeout(60):
        while spare in whole.server.titles().values():
            await asyncio.sleep(0.05)


async def test_a_rank_whose_compute_thread_hangs_is_named_and_replaced(whole: Protected) -> None:
    server = whole.server
    before = await run_streams(server, 4)
    hung = server.ranks()[1]
    known = (await whole.status())["now"]
    hang = Breaks(8, (whole.faults / "hang-1").touch)
    after = await run_streams(server, 4, hang)
    same(after, before)
    assert max(seen.stall(hang.at) for seen in after) < FOUND_S + BUSY_S
    (record, *_) = await whole.records(known)
    assert record["lost_ranks"] == [1]
    assert "stood still" in record["reason"]
    await whole.whole()
    assert hung not in server.titles().values()


@pytest.mark.parametrize("token", [ON_ALL, ON_ONE, CRASH])
async def test_a_request_that_makes_every_step_fail_ends_alone(whole: Protected, token: int) -> None:
    server = whole.server
    before = await run_streams(server, 4)
    log = len(whole.log())
    bad: list[asyncio.Task[object]] = []

    def send() -> None:
        bad.append(asyncio.create_task(stream(server, [*prompt(3, 20), token], 10)))

    after = await run_streams(server, 4, Breaks(8, send))
    same(after, before)
    with pytest.raises(openai.APIError):
        await bad[0]
    assert "it ends with an error" in whole.log()[log:]
    assert len((await stream(server, prompt(3, 20), 10)).tokens) == 10


async def test_a_step_that_fails_once_is_tried_again(whole: Protected) -> None:
    before = await run_streams(whole.server, 4)
    began = time.monotonic()
    seen, after = await asyncio.gather(stream(whole.server, [*prompt(3, 20), ONCE], 10), run_streams(whole.server, 4))
    same(after, before)
    assert len(seen.tokens) == 10
    assert time.monotonic() - began < 60
