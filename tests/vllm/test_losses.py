"""Ranks of vLLM die under real streams: the streams go on with the same tokens, and nothing else dies."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

from tests.vllm.server import Seen, Server, prompt, stream

pytestmark = pytest.mark.timeout(300)

PROMPT, TOKENS = 300, 40


async def _streams(server: Server, count: int, saw: Callable[[int], None] = lambda tokens: None) -> list[Seen]:
    """`count` streams at once; `saw` is told of the first one's tokens."""
    others = [stream(server, prompt(11 + each, PROMPT), TOKENS) for each in range(count - 1)]
    return await asyncio.gather(stream(server, prompt(10, PROMPT), TOKENS, saw), *others)


@pytest.fixture
async def whole(server: Server) -> AsyncIterator[Server]:
    """The server, with a spare ready; its engine core and API server are the same afterwards."""
    await server.whole()
    before = server.engine_core()
    yield server
    assert server.process.poll() is None
    assert server.engine_core() == before
    assert server.healthy()


@pytest.mark.parametrize(("rank", "count"), [(1, 1), (0, 4), (2, 4), (0, 1)])
async def test_streams_are_identical_when_a_rank_dies_in_decode(whole: Server, rank: int, count: int) -> None:
    before = await _streams(whole, count)
    survivors = {each: pid for each, pid in whole.ranks().items() if each != rank}
    killed: list[float] = []

    def kill(tokens: int) -> None:
        if tokens >= 8 and not killed:
            killed.append(whole.kill(rank))

    after = await _streams(whole, count, kill)
    assert [seen.tokens for seen in after] == [seen.tokens for seen in before]
    assert all(len(seen.tokens) == TOKENS and seen.finish == "length" for seen in after)
    assert survivors.items() <= whole.ranks().items()
    print(f"rank {rank}, {count} streams: stall {max(seen.stall(killed[0]) for seen in after):.3f} s")


@pytest.mark.parametrize("rank", [0, 1, 2])
async def test_stream_is_identical_when_a_rank_dies_in_chunked_prefill(whole: Server, rank: int) -> None:
    ids = prompt(100 + rank, 3900)  # 16 chunks

    async def read(salt: str) -> tuple[Seen, float]:
        began = time.monotonic()
        seen = await stream(whole, ids, 8, extra_body={"cache_salt": salt})
        return seen, seen.times[0] - began

    before, prefill = await read("before")
    reading = asyncio.create_task(read("after"))
    await asyncio.sleep(prefill / 2)
    whole.kill(rank)
    after, longer = await reading
    assert after.tokens == before.tokens
    assert len(after.tokens) == 8
    print(f"rank {rank}: first token after {longer:.3f} s instead of {prefill:.3f} s")
