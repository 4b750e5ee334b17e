"""Streams that share prefixes, and something that breaks in the middle of them."""

import asyncio
import threading
import time
from collections.abc import Callable

from tests.vllm.server import Seen, Server, prompt, stream

SHARED, PROMPT, TOKENS = 160, 300, 40


async def run_streams(
    server: Server, count: int, saw: Callable[[int], None] = lambda tokens: None, salt: str = ""
) -> list[Seen]:
    """`count` streams at once, of which pairs share their first tokens, and every second one is drawn with a seed.

    `saw` is told of the first one's tokens.
    """
    prompts = [prompt(10 + each // 2, SHARED) + prompt(50 + each, PROMPT - SHARED) for each in range(count)]
    extra = {"cache_salt": salt} if salt else {}
    watched = [saw, *[_ignore] * (count - 1)]
    drawn = [{"temperature": 1.0, "seed": each} if each % 2 else {} for each in range(count)]
    return await asyncio.gather(
        *(
            stream(server, ids, TOKENS, each, extra_body=extra, **how)
            for ids, each, how in zip(prompts, watched, drawn, strict=True)
        )
    )


def _ignore(tokens: int) -> None:
    pass


def same(after: list[Seen], before: list[Seen]) -> None:
    """Each token came once, and is that of the run without a fault."""
    assert [seen.tokens for seen in after] == [seen.tokens for seen in before]
    assert all(len(seen.tokens) == TOKENS and seen.finish == "length" for seen in after)


class Breaks:
    """Does something once, when a stream has so many tokens. `at`: when; `done` is set then."""

    def __init__(self, tokens: int, do: Callable[[], object]):
        self._tokens = tokens
        self._do = do
        self.at = 0.0
        self.done = threading.Event()

    def __call__(self, tokens: int) -> None:
        if tokens >= self._tokens and not self.done.is_set():
            self.at = time.monotonic()
            self._do()
            self.done.set()
