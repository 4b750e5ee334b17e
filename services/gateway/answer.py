"""Answers one generation request over HTTP, as a stream of server-sent events or as one JSON body."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from aiohttp import web

from services.gateway import sse
from services.gateway.call import Call, StreamLost
from services.gateway.intake import Job
from services.gateway.metrics import Metrics
from services.gateway.responses import Json, error_body, reply_to, usage
from services.gateway.stream import Choice, Delta, merged

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 10.0
"""A stream that has nothing to say says so this often, for proxies that end silent connections."""
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

    @property
    def outcome(self) -> str:
        """How the answer ended, or `error` while it has not."""
        reasons = [choice.finish_reason for choice in self._choices]
        return "error" if None in reasons else "length" if "length" in reasons else "stop"

    async def collect(self) -> bytes:
        """The whole answer as one JSON body. Raises StreamLost."""
        deltas: dict[int, list[Delta]] = {index: [] for index in range(len(self._choices))}
        async with aclosing(self._deltas()) as events:
            async for event in events:
                if event is not None:
                    deltas[event[0]].append(event[1])
        counts = self._usage()
        return await asyncio.to_thread(lambda: self._reply.response([merged(each) for each in deltas.values()], counts))

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """Send the answer as it comes. A stream that can't be finished ends with an error event and no [DONE].

        Raises ConnectionError when the client is gone, or does not read.
        """
        response = web.StreamResponse(headers=sse.HEADERS | {"X-Request-Id": self._job.reply_id})
        await response.prepare(request)
        try:
            for chunk in self._reply.opening():
                await sse.write(request, response, sse.event(chunk))
            async with aclosing(self._deltas()) as events:
                async for event in events:
                    if event is None:
                        await sse.write(request, response, b": still working\n\n")
                    else:
                        for body in self._reply.chunks(*event):
                            await sse.write(request, response, sse.event(body))
            counts = self._usage()
            if self._job.request.include_usage:
                await sse.write(request, response, sse.event(self._reply.usage_chunk(counts)))
            await sse.write(request, response, b"data: [DONE]\n\n")
        except StreamLost as error:
            log.warning("the stream ended unfinished: %s", error)
            self._metrics.errors.labels("stream_lost").inc()
            body = error_body(str(error), kind="server_error", code="stream_lost")
            await sse.write(request, response, sse.event(body))
        await response.write_eof()
        return response

    async def _deltas(self) -> AsyncGenerator[tuple[int, Delta] | None, None]:
        """Deltas with the index of their choice, until all are finished; None at each KEEP_ALIVE_S of silence."""
        heard = time.monotonic()
        self._metrics.prompt_tokens.inc(sum(len(prompt.ids) for prompt in self._job.prompts))
        last: dict[int, float] = {}
        while any(choice.finish_reason is None for choice in self._choices):
            try:
                index, event = await self._call.next(KEEP_ALIVE_S)
            except TimeoutError:
                if time.monotonic() - heard > STALL_DEADLINE_S:
                    raise StreamLost(f"no token for {STALL_DEADLINE_S:.0f} s") from None
                yield None
                continue
            heard = time.monotonic()
            if event.tokens:
                since = last.get(index)
                metric = self._metrics.first_token if since is None else self._metrics.token_gap
                metric.observe(heard - (self._started if since is None else since))
                last[index] = heard
            if (delta := self._choices[index].feed(event)) is None:
                continue
            self._metrics.generation_tokens.inc(len(delta.tokens))
            if delta.finish_reason is not None:
                self._call.abort(index)  # of no effect unless a stop string ended it
            yield index, delta

    def _usage(self) -> Json:
        counts = usage(self._job, self._choices)
        self._metrics.cached_tokens.inc(counts["prompt_tokens_details"]["cached_tokens"])
        return counts
