"""Answers one generation request over HTTP, as a stream of server-sent events or as one JSON body."""

import asyncio
import logging
import time
from contextlib import closing

from aiohttp import web
from pydantic_core import to_json

from services.gateway import sse
from services.gateway.alarm import Alarm
from services.gateway.call import Call, StreamLost
from services.gateway.intake import Job
from services.gateway.metrics import Metrics
from services.gateway.responses import Json, error_body, reply_to, usage
from services.gateway.stream import Choice, Delta, merged
from shared.messages import Tokens

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 10.0
"""A stream that has nothing to say says so this often, for proxies that end silent connections."""
WRITE_BYTES = 64 * 1024
"""Of events that have come together, written in one go."""
STALL_DEADLINE_S = 900.0
"""Silence of the coordinator about a request after which it is given up. Longer than any queue or recovery."""


class Answer:
    """Follows the sequences of one job, whose call has been accepted, from token events to the client."""

    def __init__(self, job: Job, call: Call, metrics: Metrics, started: float):
        self._job = job
        self._call = call
        self._metrics = metrics
        self._started = started
        self._reply = reply_to(job)
        asked, tokenizer = job.request, job.serving.tokenizer
        self._choices = [
            Choice(
                tokenizer,
                job.prompt_of(index).ids,
                asked.stops,
                keep_stop=asked.include_stop_str_in_output,
                special=not asked.skip_special_tokens,
            )
            for index in range(len(job.sequences))
        ]
        self._open = len(self._choices)  # that are not finished
        self._heard = time.monotonic()
        self._last: list[float | None] = [None] * len(self._choices)  # when each choice's last tokens came
        self._silence = Alarm(KEEP_ALIVE_S, call.rouse)
        metrics.prompt_tokens.inc(sum(len(prompt.ids) for prompt in job.prompts))

    @property
    def outcome(self) -> str:
        """How the answer ended, or `error` while it has not."""
        reasons = [choice.finish_reason for choice in self._choices]
        return "error" if None in reasons else "length" if "length" in reasons else "stop"

    async def collect(self) -> bytes:
        """The whole answer as one JSON body. Raises StreamLost."""
        deltas: dict[int, list[Delta]] = {index: [] for index in range(len(self._choices))}
        with closing(self._silence):
            while self._open:
                for index, delta in await self._news():
                    deltas[index].append(delta)
        counts = self._usage()
        return await asyncio.to_thread(lambda: self._reply.response([merged(each) for each in deltas.values()], counts))

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """Send the answer as it comes. A stream that can't be finished ends with an error event and no [DONE].

        Raises ConnectionError when the client is gone.
        """
        async with sse.Stream(request, {"X-Request-Id": self._job.reply_id}) as stream:
            try:
                await self._send(stream)
            except StreamLost as error:
                log.warning("the stream ended unfinished: %s", error)
                self._metrics.errors.labels("stream_lost").inc()
                body = error_body(str(error), kind="server_error", code="stream_lost")
                await stream.write(sse.event(to_json(body)))
            await stream.response.write_eof()
        return stream.response

    async def _send(self, stream: sse.Stream) -> None:
        for chunk in self._reply.opening():
            await stream.write(sse.event(chunk))
        with closing(self._silence):
            while self._open:
                news = await self._news()
                data = b""
                for chunk in (chunk for index, delta in news for chunk in self._reply.chunks(index, delta)):
                    data += sse.event(chunk)
                    if len(data) > WRITE_BYTES:
                        await stream.write(data)
                        data = b""
                if data or not news:
                    await stream.write(data or b": still working\n\n")
        counts = self._usage()
        if self._job.request.include_usage:
            await stream.write(sse.event(self._reply.usage_chunk(counts)))
        await stream.write(b"data: [DONE]\n\n")

    async def _news(self) -> list[tuple[int, Delta]]:
        """What has come, with the index of its choice. Empty after KEEP_ALIVE_S of silence."""
        while True:
            self._silence.begin()
            events = await self._call.next()
            self._silence.end()
            now = time.monotonic()
            if events:
                self._heard = now
            elif now - self._heard > STALL_DEADLINE_S:
                raise StreamLost(f"no token for {STALL_DEADLINE_S:.0f} s")
            news = [(index, delta) for index, event in events if (delta := self._delta(index, event)) is not None]
            self._metrics.generation_tokens.inc(sum(len(delta.tokens) for _, delta in news))
            if news or not events:
                return news

    def _delta(self, index: int, event: Tokens) -> Delta | None:
        if event.tokens:
            since = self._last[index]
            metric = self._metrics.first_token if since is None else self._metrics.token_gap
            metric.observe(self._heard - (self._started if since is None else since))
            self._last[index] = self._heard
        delta = self._choices[index].feed(event)
        if delta is not None and delta.finish_reason is not None:
            self._open -= 1
            self._call.abort(index)  # of no effect unless a stop string ended it
        return delta

    def _usage(self) -> Json:
        counts = usage(self._job, self._choices)
        self._metrics.cached_tokens.inc(counts["prompt_tokens_details"]["cached_tokens"])
        return counts
