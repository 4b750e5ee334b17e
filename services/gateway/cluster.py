"""The gateway's side of the control channel: submits sequences, hands their events to whoever waits for them, and
dials again when the coordinator is away."""

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import Sequence
from types import TracebackType

from shared.channel import Channel, dial
from shared.config import GatewaySettings, default_name
from shared.errors import GhostError, PeerLost, RequestRejected
from shared.logs import epoch_is
from shared.messages import (
    Abort,
    Accepted,
    Applied,
    Apply,
    Failed,
    GatewayHello,
    Goodbye,
    Message,
    Refused,
    StatusChanged,
    Submit,
)
from shared.messages import Tokens as TokensMessage
from shared.tls import client_context
from shared.types import ClusterStatus, GenerationRequest, OperatorAction

log = logging.getLogger(__name__)

FIRST_REDIAL_S = 0.1
LAST_REDIAL_S = 2.0
APPLY_DEADLINE_S = 10.0
STATUS_DEADLINE_S = 10.0
"""Silence of the coordinator, which reports every second, after which its last report is not believed any more."""


class StreamLost(GhostError):
    """An accepted request can't be finished; the message is meant for the client."""

    def __init__(self, message: str, *, status: int = 503):
        super().__init__(message)
        self.status = status


class Call:
    """The sequences of one HTTP request, and their events in order of arrival. Use as a context manager.

    On leaving it, whatever is not finished is aborted. Never holds more than `buffer_tokens` tokens: past that, the
    client reads too slowly, and everything is aborted.
    """

    def __init__(self, cluster: "Cluster", sequences: Sequence[GenerationRequest], buffer_tokens: int):
        self._cluster = cluster
        self._index = {sequence.request_id: index for index, sequence in enumerate(sequences)}
        self._ids = [sequence.request_id for sequence in sequences]
        self._sequences = sequences
        self._open = set(self._ids)
        self._unanswered = set(self._ids)
        self._events: deque[tuple[int, TokensMessage]] = deque()
        self._buffered = 0
        self._buffer_tokens = buffer_tokens
        self._error: GhostError | None = None
        self._wake = asyncio.Event()

    def __enter__(self) -> "Call":
        self._cluster.submit(self, self._sequences)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for request_id in list(self._open):
            self._close(request_id, abort=True)

    async def accepted(self, deadline_s: float) -> None:
        """Wait until every sequence is accepted. Raises RequestRejected or StreamLost."""
        try:
            async with asyncio.timeout(deadline_s):
                while self._unanswered and self._error is None:
                    await self._event()
        except TimeoutError:
            raise StreamLost(f"the coordinator did not take the request within {deadline_s:.0f} s") from None
        if self._error is not None:
            raise self._error

    async def next(self, deadline_s: float) -> tuple[int, TokensMessage]:
        """The next event and the index of its sequence. Raises StreamLost, or TimeoutError if none comes in time."""
        async with asyncio.timeout(deadline_s):
            while not self._events:
                if self._error is not None:
                    raise self._error
                await self._event()
        index, event = self._events.popleft()
        self._buffered -= len(event.tokens) // 4
        return index, event

    def abort(self, index: int) -> None:
        """The rest of this sequence is not wanted; nothing more of it arrives."""
        if self._ids[index] in self._open:
            self._close(self._ids[index], abort=True)

    def deliver(self, message: Accepted | Refused | TokensMessage | Failed) -> None:
        """Take a message about one of the sequences; never blocks."""
        request_id = message.request_id
        self._unanswered.discard(request_id)
        match message:
            case TokensMessage():
                self._events.append((self._index[request_id], message))
                self._buffered += len(message.tokens) // 4
                if message.finish_reason is not None:
                    self._close(request_id, abort=False)
                if self._buffered > self._buffer_tokens:
                    self.fail(StreamLost(f"the client left more than {self._buffer_tokens} tokens unread"))
            case Refused():
                self._close(request_id, abort=False)
                self.fail(
                    RequestRejected(message.message, status=message.status, code=message.code, param=message.param)
                )
            case Failed():
                self._close(request_id, abort=False)
                self.fail(StreamLost(message.message, status=500))
        self._wake.set()

    def fail(self, error: GhostError) -> None:
        """End all sequences; what has arrived is still handed out, then the first error raised."""
        self._error = self._error or error
        for request_id in list(self._open):
            self._close(request_id, abort=True)
        self._wake.set()

    async def _event(self) -> None:
        self._wake.clear()
        await self._wake.wait()

    def _close(self, request_id: str, *, abort: bool) -> None:
        self._open.discard(request_id)
        self._cluster.forget(request_id, abort=abort)


class Cluster:
    """The coordinator as the gateway knows it. `run` keeps the channel; the rest is called by request handlers."""

    def __init__(self, settings: GatewaySettings):
        self._settings = settings
        self._channel: Channel | None = None
        self._calls: dict[str, Call] = {}
        self._asked: dict[str, asyncio.Future[Applied | Refused]] = {}
        self._status: ClusterStatus | None = None
        self._heard = 0.0
        self._reason = "the coordinator has not been reached yet"
        self.stopped = False
        self.changed = asyncio.Event()
        """Set at the next change of the status; then another one stands here. So any number can wait for changes."""

    @property
    def status(self) -> ClusterStatus | None:
        """The last status heard, if the channel is open and the coordinator not silent."""
        return self._status if self.absence is None else None

    @property
    def absence(self) -> str | None:
        """Why the coordinator can't be counted on now; None if it can."""
        if self._channel is None or self._channel.closed:
            return self._reason
        if self._status is None:
            return "the coordinator has not told its state yet"
        silence = time.monotonic() - self._heard
        return f"the coordinator has been silent for {silence:.0f} s" if silence > STATUS_DEADLINE_S else None

    @property
    def in_flight(self) -> int:
        """Sequences that wait for tokens."""
        return len(self._calls)

    def open(self, sequences: Sequence[GenerationRequest]) -> Call:
        """A call for these sequences; they are submitted when it is entered."""
        return Call(self, sequences, self._settings.stream_buffer_tokens)

    def submit(self, call: Call, sequences: Sequence[GenerationRequest]) -> None:
        """Send a call's sequences to the coordinator. Raises StreamLost if it is away."""
        if self._channel is None or self.absence is not None:
            raise StreamLost(self.absence or self._reason)
        for sequence in sequences:
            self._calls[sequence.request_id] = call
        try:
            for sequence in sequences:
                self._channel.send(Submit(sequence))
        except PeerLost as error:
            for sequence in sequences:
                self._calls.pop(sequence.request_id, None)
            raise StreamLost("the coordinator is away") from error

    def send(self, message: Message) -> None:
        """Send an operator's message to the coordinator. Raises StreamLost if it is away."""
        if self._channel is None or self.absence is not None:
            raise StreamLost(self.absence or self._reason)
        try:
            self._channel.send(message)
        except PeerLost as error:
            raise StreamLost("the coordinator is away") from error

    async def apply(self, action: OperatorAction, target: str) -> str:
        """Have the coordinator do an operator's word; returns what it says. Raises RequestRejected or StreamLost."""
        request_id = f"apply-{os.urandom(8).hex()}"
        answer: asyncio.Future[Applied | Refused] = asyncio.get_running_loop().create_future()
        self._asked[request_id] = answer
        try:
            self.send(Apply(request_id, action, target))
            async with asyncio.timeout(APPLY_DEADLINE_S):
                told = await answer
        except TimeoutError:
            raise StreamLost(f"the coordinator did not answer within {APPLY_DEADLINE_S:.0f} s") from None
        finally:
            del self._asked[request_id]
        if isinstance(told, Refused):
            raise RequestRejected(told.message, status=told.status, code=told.code, param=told.param)
        return told.message

    def forget(self, request_id: str, *, abort: bool) -> None:
        """Nobody waits for this sequence any more; tell the coordinator if it still works on it."""
        if self._calls.pop(request_id, None) is None or not abort or self._channel is None:
            return
        try:
            self._channel.send(Abort(request_id))
        except PeerLost:
            log.debug("no channel to abort %s on", request_id)

    async def run(self) -> None:
        """Keep a channel to the coordinator until cancelled or stopped."""
        pause = FIRST_REDIAL_S
        name = default_name("gateway")
        settings = self._settings
        tls = client_context(settings.tls_ca_file)
        while not self.stopped:
            try:
                async with dial(
                    settings.coordinator_url,
                    settings.secret,
                    lambda _: GatewayHello(name),
                    settings.dial_deadline_s,
                    tls,
                ) as (channel, _):
                    log.info("connected to the coordinator at %s", settings.coordinator_url)
                    self._channel = channel
                    async for message in channel:
                        self._take(message)
                raise PeerLost("the coordinator closed the channel")
            except GhostError as error:
                reason = str(error)
                log.log(logging.INFO if reason == self._reason else logging.WARNING, "no coordinator: %s", reason)
                pause = FIRST_REDIAL_S if self._status is not None else min(pause * 2, LAST_REDIAL_S)
                self._lose(reason, f"the connection to the coordinator was lost: {reason}")
            await asyncio.sleep(pause)

    def stop(self) -> None:
        """End all calls, and accept no more: the gateway shuts down."""
        self.stopped = True
        self._lose("the gateway is shutting down", "the gateway is shutting down")

    def _take(self, message: Message) -> None:
        match message:
            case StatusChanged():
                self._status, self._heard = message.status, time.monotonic()
                epoch_is(message.status.epoch)
                self._tell()
            case Applied() | Refused() if message.request_id in self._asked:
                if not (answer := self._asked[message.request_id]).done():
                    answer.set_result(message)
            case Accepted() | Refused() | TokensMessage() | Failed():
                if (call := self._calls.get(message.request_id)) is not None:
                    call.deliver(message)
            case Goodbye():
                raise PeerLost(f"the coordinator said goodbye: {message.reason}")
            case _:
                log.debug("ignored %s", type(message).__name__)

    def _lose(self, reason: str, message: str) -> None:
        self._channel, self._status, self._reason = None, None, reason
        calls = set(self._calls.values())
        self._calls.clear()
        for call in calls:
            call.fail(StreamLost(message))
        self._tell()

    def _tell(self) -> None:
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()
