"""Steady mixed load: clients that ask for known completions again and again, and compare each with the first answer."""

import asyncio
import contextlib
import json
import random
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from services.cli.local import LocalCluster

RETRY_S = 0.2
SERVED_DEADLINE_S = 180.0
"""In which every request must have been served, whatever breaks meanwhile."""
STREAM_DEADLINE_S = 120.0


@dataclass(frozen=True, slots=True)
class Request:
    """A completion, and what it must be."""

    number: int
    prompt: tuple[int, ...]
    max_tokens: int
    seed: int | None
    """None: greedy."""


@dataclass(frozen=True, slots=True)
class Answer:
    tokens: tuple[int, ...]
    digests: tuple[str, ...]


@dataclass(slots=True)
class Tally:
    """What the clients have seen."""

    requests: int = 0
    identical: int = 0
    cancelled: int = 0
    broken: int = 0
    """Streams that broke off with their gateway, and were asked for again."""
    refused: int = 0
    """Answers that said to try again later."""
    stalls: list[float] = field(default_factory=list)
    """The longest gap between tokens in each stream."""
    wrong: list[str] = field(default_factory=list)


class Broken(Exception):
    """The connection ended before the answer did."""


class Refused(Exception):
    """The gateway can't be reached, or says to try again later."""


def make_requests(dice: random.Random, vocabulary: int, count: int) -> list[Request]:
    """Long and short prompts, some with the same beginning; short and long answers, greedy and drawn."""
    shared = [dice.randrange(3, vocabulary) for _ in range(160)]
    requests = []
    for number in range(count):
        length = dice.choice((1, 7, 40, 150, 400, 900))
        prompt = (shared if dice.random() < 0.3 else []) + [dice.randrange(3, vocabulary) for _ in range(length)]
        seed = dice.randrange(1 << 30) if dice.random() < 0.5 else None
        requests.append(Request(number, tuple(prompt), dice.choice((8, 30, 80, 160)), seed))
    return requests


class Clients:
    """Clients of one cluster."""

    def __init__(self, cluster: LocalCluster, requests: list[Request], model: str, clients: int):
        self.tally = Tally()
        self.broke_gateway_at = float("-inf")
        """When the gateway was last killed: streams of before may break."""
        self._cluster = cluster
        self._requests = requests
        self._model = model
        self._clients = clients
        self._expected: dict[int, Answer] = {}

    async def learn(self) -> None:
        """Ask for everything once, with nothing broken."""
        async with aiohttp.ClientSession() as session:
            for request in self._requests:
                self._expected[request.number] = await self._ask(session, request, "learn", stream=True, gaps=[])

    async def run(self, seed: int, stop: asyncio.Event) -> None:
        """Keep all clients asking until `stop` is set, and then until each has its answer."""
        async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as tasks:
            for number in range(self._clients):
                tasks.create_task(self._client(session, random.Random(f"{seed}/{number}"), stop))

    async def _client(self, session: aiohttp.ClientSession, dice: random.Random, stop: asyncio.Event) -> None:
        while not stop.is_set():
            request = dice.choice(self._requests)
            salt = dice.choice(("a", "b", f"{dice.random()}"))
            cancel = dice.randrange(1, request.max_tokens) if dice.random() < 0.1 else None
            stream = cancel is not None or dice.random() < 0.7
            await self._served(session, request, salt, stream=stream, cancel=cancel)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(dice.expovariate(5.0)):
                    await stop.wait()

    async def _served(
        self, session: aiohttp.ClientSession, request: Request, salt: str, *, stream: bool, cancel: int | None
    ) -> None:
        self.tally.requests += 1
        asked = time.monotonic()
        while True:
            began, gaps = time.monotonic(), [0.0]
            try:
                answer = await self._ask(
                    session, request, salt, stream=stream or cancel is not None, gaps=gaps, cancel=cancel
                )
            except Refused:
                self.tally.refused += 1
            except Broken as error:
                if began > self.broke_gateway_at:
                    self._wrong(request, f"broke off though its gateway was not touched: {error}")
                    return
                self.tally.broken += 1
            else:
                self.tally.stalls.append(max(gaps))
                self._judge(request, answer, cancelled=cancel is not None)
                return
            if time.monotonic() - asked > SERVED_DEADLINE_S:
                self._wrong(request, f"not served within {SERVED_DEADLINE_S:.0f} s")
                return
            await asyncio.sleep(RETRY_S)

    def _judge(self, request: Request, answer: Answer, *, cancelled: bool) -> None:
        expected = self._expected[request.number]
        if cancelled:
            self.tally.cancelled += 1
            if answer.tokens != expected.tokens[: len(answer.tokens)]:
                self._wrong(request, "the tokens before it was cancelled differ")
        elif answer.tokens != expected.tokens:
            same = next((n for n, (a, b) in enumerate(zip(answer.tokens, expected.tokens, strict=False)) if a != b), -1)
            self._wrong(
                request, f"differs from token {same} on ({len(answer.tokens)} of {len(expected.tokens)} tokens)"
            )
        elif answer.digests and answer.digests != expected.digests:
            self._wrong(request, "the ranks' KV differs")
        else:
            self.tally.identical += 1

    def _wrong(self, request: Request, what: str) -> None:
        told = f"request {request.number} ({len(request.prompt)} + {request.max_tokens} tokens): {what}"
        print(f"BROKEN PROMISE: {told}", flush=True)
        self.tally.wrong.append(told)

    async def _ask(
        self,
        session: aiohttp.ClientSession,
        request: Request,
        salt: str,
        *,
        stream: bool,
        gaps: list[float],
        cancel: int | None = None,
    ) -> Answer:
        """One answer, or its beginning up to `cancel` tokens. Raises Broken or Refused."""
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": list(request.prompt),
            "max_tokens": request.max_tokens,
            "temperature": 0 if request.seed is None else 1.0,
            "seed": request.seed or 0,
            "stream": stream,
            "ignore_eos": True,
            "cache_salt": salt,
            "return_token_ids": True,
        }
        if not self._cluster.hosted:  # others know no digest
            body["return_kv_digest"] = cancel is None
        url, timeout = self._cluster.api_url + "/v1/completions", aiohttp.ClientTimeout(STREAM_DEADLINE_S)
        begun = False
        try:
            async with session.post(url, json=body, timeout=timeout) as response:
                if response.status in (429, 503):
                    raise Refused(await response.text())
                if response.status != 200:
                    raise Broken(f"{response.status}: {await response.text()}")
                begun = True
                if not stream:
                    choice = (await response.json())["choices"][0]
                    return Answer(tuple(choice["token_ids"]), tuple(choice.get("kv_digests") or ()))
                return await _read(response, gaps, cancel)
        except aiohttp.ClientConnectorError as error:
            raise Refused(str(error)) from error
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Broken(f"{type(error).__name__}: {error}, {'in its answer' if begun else 'before it'}") from error


async def _read(response: aiohttp.ClientResponse, gaps: list[float], cancel: int | None) -> Answer:
    tokens: list[int] = []
    digests: tuple[str, ...] = ()
    last: float | None = None
    async for line in response.content:
        if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
            continue
        event = json.loads(line[6:])
        if "error" in event:
            raise Broken(str(event["error"].get("message")))
        choice = event["choices"][0]
        if ids := choice.get("token_ids"):
            tokens.extend(ids)
            now = time.monotonic()
            if last is not None:
                gaps.append(now - last)
            last = now
        digests = tuple(choice.get("kv_digests") or digests)
        if cancel is not None and len(tokens) >= cancel:
            return Answer(tuple(tokens), ())
        if choice.get("finish_reason"):
            return Answer(tuple(tokens), digests)
    raise Broken("the stream ended without a finish reason")
