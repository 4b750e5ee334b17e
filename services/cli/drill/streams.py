"""The clients of a drill: streams, and what each saw."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from services.cli.drill.options import Options
from services.cli.local import LocalCluster
from shared.errors import GhostError

STREAM_DEADLINE_S = 900.0


@dataclass(slots=True)
class Stream:
    """What one client saw. `times` are CLOCK_MONOTONIC of each event with tokens."""

    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    text: str = ""
    started: float = 0.0
    finish: str | None = None
    digests: list[str] = field(default_factory=list)
    error: str = ""

    @property
    def gaps(self) -> list[float]:
        """Seconds between neighbouring tokens."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]

    @property
    def first_token_s(self) -> float:
        """Time to first token."""
        return self.times[0] - self.started


async def stream_all(
    cluster: LocalCluster,
    prompts: Sequence[Sequence[int]],
    options: Options,
    salt: str,
    *,
    max_tokens: int | None = None,
    digest: bool = True,
    watch: Callable[[int, Stream], None] = lambda index, stream: None,
    background: Callable[[], Awaitable[None]] | None = None,
    tolerant: bool = False,
    deadline_s: float = STREAM_DEADLINE_S,
) -> list[Stream]:
    """Stream one completion for each prompt, all at once. The cache salt keeps runs from sharing pages.

    Raises GhostError for a stream that breaks off or ends with an error; if `tolerant`, the stream says so instead.
    """
    model, tokens = (await cluster.status())["served_name"], max_tokens or options.max_tokens
    digest = digest and not cluster.hosted
    async with cluster.client(deadline_s) as session, asyncio.TaskGroup() as tasks:
        if background is not None:
            tasks.create_task(_awaited(background()))
        running = [
            tasks.create_task(
                _stream(session, cluster.api_url, _body(model, prompt, tokens, salt, digest), index, watch, tolerant)
            )
            for index, prompt in enumerate(prompts)
        ]
    return [task.result() for task in running]


async def _awaited(work: Awaitable[None]) -> None:
    await work


def _body(model: str, prompt: Sequence[int], max_tokens: int, salt: str, digest: bool) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
        "cache_salt": salt,
        "return_token_ids": True,
        "return_kv_digest": digest,
    }


async def _stream(
    session: aiohttp.ClientSession,
    base_url: str,
    body: dict[str, Any],
    index: int,
    watch: Callable[[int, Stream], None],
    tolerant: bool,
) -> Stream:
    seen = Stream(started=time.monotonic())
    try:
        await _read(session, base_url, body, index, watch, seen)
        if seen.finish is None:
            raise GhostError(f"stream {index} broke off after {len(seen.tokens)} tokens")
    except (GhostError, aiohttp.ClientError) as error:
        if not tolerant:
            raise
        seen.error = str(error) or type(error).__name__
    return seen


async def _read(
    session: aiohttp.ClientSession,
    base_url: str,
    body: dict[str, Any],
    index: int,
    watch: Callable[[int, Stream], None],
    seen: Stream,
) -> None:
    """Read one stream to its end, into `seen`. Raises GhostError for an error in it, ClientError if it breaks."""
    async with session.post(base_url + "/v1/completions", json=body) as response:
        if response.status != 200:
            raise GhostError(f"the gateway answered {response.status}: {await response.text()}")
        async for line in response.content:
            if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                continue
            event: dict[str, Any] = json.loads(line[6:])
            if "error" in event:
                raise GhostError(f"stream {index} ended with an error: {event['error'].get('message')}")
            for choice in event["choices"]:
                if ids := choice.get("token_ids"):
                    seen.tokens.extend(ids)
                    seen.times.append(time.monotonic())
                seen.text += choice.get("text") or ""
                seen.finish = choice.get("finish_reason") or seen.finish
                seen.digests = choice.get("kv_digests") or seen.digests
            watch(index, seen)
