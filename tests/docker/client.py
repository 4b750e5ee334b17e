"""The official client, streaming from gateways, and what it saw."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from openai import APIConnectionError, AsyncOpenAI, AsyncStream, InternalServerError
from openai.types import Completion

PROMPTS = ([5, 9, 17] * 100, [7, 3, 250, 11] * 50)
"""Of 300 and 200 tokens, of the small model's 400."""
TOKENS = 200
STRIKE_AT = 30
STREAM_S = 100.0
TAKEN_S = 30.0
TRY_AGAIN_S = 0.1

Strike = Callable[[], Awaitable[None]]


@dataclass(slots=True)
class Seen:
    """What one client saw."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    digests: list[str] = field(default_factory=list)
    finish: str | None = None
    stall_s: float = 0.0


async def nothing() -> None:
    """No fault."""


async def stream_all(urls: Sequence[str], key: str, model: str, salt: str, strike: Strike = nothing) -> list[Seen]:
    """Stream a completion of each prompt at once; the fault comes after a few tokens of the first.

    A stream begins at the first of these gateways that takes it. Raises openai.APIError for one that does not end as it
    should. The salt keeps runs from sharing pages.
    """
    struck = asyncio.Event()

    async def fault() -> None:
        await struck.wait()
        await strike()

    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(
                AsyncOpenAI(base_url=url + "/v1", api_key=key, max_retries=0, timeout=STREAM_S)
            )
            for url in urls
        ]
        running = [asyncio.create_task(_stream(clients, model, prompt, salt, struck)) for prompt in PROMPTS]
        try:
            results = await asyncio.gather(fault(), *running)
        finally:
            for task in running:
                task.cancel()
    return list(results[1:])


async def _begin(
    clients: Sequence[AsyncOpenAI], model: str, prompt: Sequence[int], salt: str
) -> AsyncStream[Completion]:
    """The stream, from the first gateway that takes it: what a load balancer does."""
    end = time.monotonic() + TAKEN_S
    while True:
        for client in clients:
            try:
                return await client.completions.create(
                    model=model,
                    prompt=list(prompt),
                    max_tokens=TOKENS,
                    temperature=0,
                    stream=True,
                    extra_body={
                        "ignore_eos": True, "cache_salt": salt, "return_token_ids": True, "return_kv_digest": True
                    },
                )  # fmt: skip
            except (APIConnectionError, InternalServerError) as error:
                if time.monotonic() > end or getattr(error, "status_code", 503) != 503:
                    raise
        await asyncio.sleep(TRY_AGAIN_S)


async def _stream(
    clients: Sequence[AsyncOpenAI], model: str, prompt: Sequence[int], salt: str, struck: asyncio.Event
) -> Seen:
    seen = Seen()
    last: float | None = None
    async for event in await _begin(clients, model, prompt, salt):
        for choice in event.choices:
            extra = choice.model_extra or {}
            if ids := extra.get("token_ids"):
                now = time.monotonic()
                seen.stall_s = max(seen.stall_s, now - (last or now))
                last = now
                seen.tokens += ids
            seen.text += choice.text or ""
            seen.digests = extra.get("kv_digests") or seen.digests
            seen.finish = choice.finish_reason or seen.finish
        if len(seen.tokens) >= STRIKE_AT:
            struck.set()
    return seen
