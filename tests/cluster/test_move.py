"""A rank moves to a spare while streams go on: same text, same KV, and nobody waits longer than for a step."""

import asyncio
import statistics
from typing import Any

import aiohttp
import pytest

from services.cli.drill.options import Options
from services.cli.drill.streams import Stream, stream_all
from services.cli.local import LocalCluster
from services.cli.main import main
from tests.cluster.conftest import quiet, whole

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(200)]

PROMPTS = [[7] * 300, [11] * 40, [13] * 700]
OPTIONS = Options(max_tokens=160, streams=len(PROMPTS))


async def apply(cluster: LocalCluster, action: str, target: str) -> tuple[int, dict[str, Any]]:
    """An operator's word, and the gateway's answer."""
    url = cluster.base_url + "/v1/fault_tolerance/apply"
    async with (
        aiohttp.ClientSession() as session,
        session.post(url, json={"action": action, "target": target}) as response,
    ):
        return response.status, await response.json()


def holder(status: dict[str, Any], rank: int) -> str:
    return str(next(worker["name"] for worker in status["workers"] if worker["rank"] == rank))


@pytest.mark.parametrize("rank", [0, 1])
async def test_streams_go_on_unchanged_while_their_rank_moves(cluster: LocalCluster, rank: int) -> None:
    before = await whole(cluster)
    old = holder(before, rank)
    calm = await stream_all(cluster, PROMPTS, OPTIONS, f"calm-move-{rank}")
    asked: list[asyncio.Task[tuple[int, dict[str, Any]]]] = []

    def watch(index: int, stream: Stream) -> None:
        if len(stream.tokens) == 10 and not asked:
            asked.append(asyncio.get_running_loop().create_task(apply(cluster, "replace", f"rank:{rank}")))

    hit = await stream_all(cluster, PROMPTS, OPTIONS, f"hit-move-{rank}", watch=watch)
    code, answer = await asked[0]
    assert code == 202, answer
    assert [each.tokens for each in hit] == [each.tokens for each in calm]
    assert [each.digests for each in hit] == [each.digests for each in calm]
    status = await whole(cluster)
    assert holder(status, rank) != old
    assert old in [worker["name"] for worker in status["workers"] if worker["state"] == "spare"]
    record = status["recoveries"][-1]
    assert record["planned"]
    assert record["restored_pages"] == record["recomputed_tokens"] == 0
    gaps = [gap for each in calm for gap in each.gaps]
    print(f"held for {record['ended'] - record['started']:.4f} s, median gap {statistics.median(gaps):.4f} s, "
          f"longest gap {max(gap for each in hit for gap in each.gaps):.4f} s, without {max(gaps):.4f} s")  # fmt: skip
    assert not (await quiet(cluster))["stripes_unprotected"]


async def test_a_drained_worker_stays_out_until_it_is_resumed(
    cluster: LocalCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    old = holder(await whole(cluster), 2)
    assert await asyncio.to_thread(main, ["drain", "rank:2", "--url", cluster.base_url]) == 0
    assert "requests waited" in capsys.readouterr().out
    states = {worker["name"]: worker["state"] for worker in (await cluster.status())["workers"]}
    assert states[old] == "cordoned"
    code, answer = await apply(cluster, "drain", "rank:9")
    assert (code, answer["error"]["code"]) == (404, "not_found")
    code, _ = await apply(cluster, "explode", "rank:0")
    assert code == 400
    assert await asyncio.to_thread(main, ["resume", "rank:2", "--url", cluster.base_url]) == 0
    await whole(cluster)
    states = {worker["name"]: worker["state"] for worker in (await cluster.status())["workers"]}
    assert states[old] == "spare"
