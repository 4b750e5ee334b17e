"""The coordinator of a real cluster is killed in mid-stream and started again: streams go on, and the KV is kept.

What it saw until then, and what its successor saw, can be replayed.
"""

import asyncio
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import pytest

from services.cli.drill import Options, Stream, stream_all
from services.cli.local import LocalCluster
from services.coordinator.recording.replay import lives
from tests.cluster.conftest import quiet, whole
from tests.cluster.test_survival import conserved

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]

STREAMS = 4
BACK_S = 3.0
"""From the start of the new coordinator to the next token."""


@dataclass
class Strike:
    """Kills the coordinator, and workers with it, and starts a new one. Once."""

    cluster: LocalCluster
    ranks: tuple[int, ...] = ()
    at: float = 0.0
    status: dict[str, Any] = field(default_factory=dict)
    task: asyncio.Task[None] | None = None

    def now(self) -> None:
        if self.task is None:
            self.task = asyncio.get_running_loop().create_task(self._strike())

    async def _strike(self) -> None:
        os.kill(self.cluster.processes["coordinator"].pid, signal.SIGKILL)
        for worker in self.status["workers"]:
            if worker["rank"] in self.ranks:
                os.kill(worker["pid"], signal.SIGKILL)
        await self.cluster.processes["coordinator"].how_it_ended()
        self.at = time.monotonic()
        await self.cluster.respawn("coordinator")


async def struck(cluster: LocalCluster, when: str, prompt_tokens: int, salt: str, *ranks: int) -> tuple[Strike, float]:
    """Streams with no fault, then the same with a strike; in decode with prompts that are cached, and protected.

    Asserts that they are the same.

    Returns the strike and the time from the new coordinator's start to the first token after it.
    """
    status = await whole(cluster)
    prompts = [[3 + (7 * index + place) % 397 for place in range(prompt_tokens)] for index in range(STREAMS)]
    options = Options(max_tokens=48, streams=STREAMS)
    calm = await stream_all(cluster, prompts, options, f"{salt}-calm")
    await cluster.wait_protected(30)
    strike = Strike(cluster, ranks, status=status)

    def watch(index: int, stream: Stream) -> None:
        if when == "decode" and index == 0 and len(stream.tokens) >= 24:
            strike.now()

    async def background() -> None:
        if when == "prefill":
            await asyncio.sleep(min(each.first_token_s for each in calm) / 2)
            strike.now()

    again = f"{salt}-calm" if when == "decode" else f"{salt}-hit"
    hit = await stream_all(cluster, prompts, options, again, watch=watch, background=background)
    assert strike.task is not None
    await strike.task
    assert [each.tokens for each in hit] == [each.tokens for each in calm]
    assert [each.text for each in hit] == [each.text for each in calm]
    assert [each.digests for each in hit] == [each.digests for each in calm]
    back = min(at for each in hit for at in each.times if at > strike.at) - strike.at
    print(f"{when}: the next token {back:.2f} s after the coordinator's start")
    return strike, back


async def test_streams_in_decode_go_on_with_their_kv_when_the_coordinator_is_back(cluster: LocalCluster) -> None:
    strike, back = await struck(cluster, "decode", 300, "restart-decode")
    assert back < BACK_S
    status = await whole(cluster)
    assert {each["name"]: each["rank"] for each in status["workers"]} == {
        each["name"]: each["rank"] for each in strike.status["workers"]
    }
    (record,) = status["recoveries"]
    assert record["lost_ranks"] == []
    assert record["recomputed_tokens"] < STREAMS * 2 * 16
    await conserved(cluster)


async def test_streams_in_prefill_go_on_when_the_coordinator_is_back(cluster: LocalCluster) -> None:
    _, back = await struck(cluster, "prefill", 900, "restart-prefill")
    assert back < BACK_S + 2.0  # until the rest of the prefill is done, which the fault-free run needed too
    await conserved(cluster)


async def test_a_rank_that_dies_with_the_coordinator_is_restored(cluster: LocalCluster) -> None:
    strike, _ = await struck(cluster, "decode", 300, "restart-both", 1)
    status = await quiet(cluster)
    record = status["recoveries"][0]
    assert record["lost_ranks"] == [1]
    assert record["restored_pages"] >= STREAMS * (299 // 16)
    assert record["recomputed_tokens"] <= STREAMS * (300 % 16 + 48)
    assert strike.status["epoch"] < status["epoch"]
    await conserved(cluster)


async def test_the_lives_of_both_coordinators_can_be_replayed(cluster: LocalCluster) -> None:
    before = lives([cluster.recordings])
    await struck(cluster, "decode", 100, "restart-replay", 2)
    await quiet(cluster)
    (ended, began) = lives([cluster.recordings])[-2:]
    assert ended == before[-1]
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in (*ended, *began))
    for life, told in ((ended, b"queued"), (began, b"are back with")):
        command = [sys.executable, "-m", "services.cli", "replay", *map(str, life)]
        replay = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        story, _ = await asyncio.wait_for(replay.communicate(), 120)
        assert replay.returncode == 0, story.decode()
        assert told in story
        assert b"all as it was recorded" in story
