"""A rank of vLLM moves to a spare under streams: nothing is restored, and at most a block of each is computed again."""

import asyncio
import os
import signal
from collections.abc import Coroutine
from itertools import pairwise
from typing import Any

import aiohttp
import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

import psutil

from tests.vllm.protected import Protected
from tests.vllm.server import Seen, Server, prompt, stream

pytestmark = pytest.mark.timeout(300)

BLOCK = 32
STREAMS, PROMPT, TOKENS = 4, 300, 160
CACHED = 3
"""Long prompts whose blocks are cached: with these, a rank's pages are more than is copied at once."""


async def ask(whole: Protected, action: str, target: str) -> tuple[int, dict[str, Any]]:
    """An operator's word, and the answer to it."""
    url = f"{whole.cluster.base_url}/v1/fault_tolerance/apply"
    async with (
        aiohttp.ClientSession() as session,
        session.post(url, json={"action": action, "target": target}) as response,
    ):
        return response.status, await response.json()


class Decoding:
    """Streams that are being read. `salt`: they find no block of streams with another one.

    What is to happen in them is ordered with "slow": then they last for longer than any of it takes.
    """

    def __init__(self, server: Server, salt: str):
        self._seen = [0] * STREAMS
        self._more = asyncio.Event()
        self.all = asyncio.gather(*(self._read(server, number, salt) for number in range(STREAMS)))

    def _read(self, server: Server, number: int, salt: str) -> Coroutine[Any, Any, Seen]:
        def saw(tokens: int) -> None:
            self._seen[number] = tokens
            self._more.set()

        return stream(server, prompt(70 + number, PROMPT), TOKENS, saw, extra_body={"cache_salt": salt})

    async def more(self, tokens: int) -> None:
        """Wait until so many further tokens of each have come."""
        goals = [seen + tokens for seen in self._seen]
        while any(seen < goal for seen, goal in zip(self._seen, goals, strict=True)):
            self._more.clear()
            more = asyncio.ensure_future(self._more.wait())
            await asyncio.wait((more, self.all), return_when=asyncio.FIRST_COMPLETED)
            assert not self.all.done(), "the streams ended before what was to happen in them"


async def filled(whole: Protected) -> float:
    """Have many blocks cached, and protected. Returns the time, by the cluster's clock."""
    for each in range(CACHED):
        await stream(whole.server, prompt(200 + each, 3900), 1)
    await whole.protected()
    return float((await whole.status())["now"])


async def copying(whole: Protected) -> None:
    """Wait until pages are being copied, and steps are not held."""
    await whole.until(lambda status: (status["handover"] or {}).get("phase") == "copying", "nothing is copied")


def same(after: list[Seen], before: list[Seen]) -> None:
    assert [seen.tokens for seen in after] == [seen.tokens for seen in before]
    assert all(len(seen.tokens) == TOKENS for seen in after)


def longest_gap(streams: list[Seen]) -> float:
    return max(after - before for seen in streams for before, after in pairwise(seen.times))


@pytest.mark.parametrize(("action", "rank"), [("replace", 1), ("drain", 0)])
async def test_streams_go_on_unchanged_while_their_rank_moves(whole: Protected, action: str, rank: int) -> None:
    server = whole.server
    before = await Decoding(server, "before").all
    since = await filled(whole)
    pids, (spare,) = server.ranks(), server.spares()
    old = psutil.Process(pids[rank])
    with whole.ordered("slow"):
        streams = Decoding(server, f"moved-{since}")
        await streams.more(8)
        code, answer = await ask(whole, action, f"rank:{rank}")
        assert code == 202, answer
        (record,) = await whole.records(since)
    after = await streams.all
    same(after, before)
    assert record["planned"]
    assert (record["restored_pages"], record["lost_ranks"], record["sequences"]) == (0, [], STREAMS)
    assert record["recomputed_tokens"] <= STREAMS * (BLOCK + 1)
    assert server.ranks() == pids | {rank: spare}
    await asyncio.to_thread(old.wait, 5)
    print(f"held for {record['ended'] - record['started']:.3f} s, longest gap {longest_gap(after):.3f} s, "
          f"without {longest_gap(before):.3f} s")  # fmt: skip


async def test_a_rank_that_dies_while_it_is_copied_is_an_ordinary_loss(whole: Protected) -> None:
    server = whole.server
    before = await Decoding(server, "before").all
    since = await filled(whole)
    (spare,) = server.spares()
    held = (await whole.status())["stripes_protected"]
    blocks = STREAMS * (PROMPT // BLOCK)
    with whole.ordered("slow"), whole.ordered("hold"):
        streams = Decoding(server, f"moved-{since}")
        await streams.more(8)
        await whole.until(lambda status: status["stripes_protected"] >= held + blocks, "not protected")
        assert (await ask(whole, "replace", "rank:1"))[0] == 202
        await copying(whole)
        await streams.more(8)  # no step waits for the copies
        server.kill(1)
    same(await streams.all, before)
    (record,) = await whole.records(since)
    assert (record["planned"], record["lost_ranks"], record["sequences"]) == (False, [1], STREAMS)
    assert record["restored_pages"] > 0
    assert (await whole.status())["handover"] is None
    assert server.ranks()[1] == spare


async def test_where_the_spare_dies_meanwhile_the_rank_moves_to_the_next_one(whole: Protected) -> None:
    server = whole.server
    since = await filled(whole)
    old, (spare,) = server.ranks()[1], server.spares()
    with whole.ordered("hold"):
        assert (await ask(whole, "replace", "rank:1"))[0] == 202
        await copying(whole)
        os.kill(spare, signal.SIGKILL)
    (record,) = await whole.records(since)
    assert record["planned"]
    assert server.ranks()[1] not in (old, spare)
