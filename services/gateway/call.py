"""The sequences of one HTTP request, from their submission to their end."""

import asyncio
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

from shared.errors import GhostError, RequestRejected
from shared.messages import Accepted, Failed, Refused
from shared.messages import Tokens as TokensMessage
from shared.types import GenerationRequest

MOST_AT_ONCE = 256
"""Events that are handed out in one go: what is held for a client that does not read is bounded by the buffer."""


class Submitter(Protocol):
    """Takes sequences to the coordinator: the gateway's Cluster."""

    async def submit(self, call: "Call", sequences: Sequence[GenerationRequest]) -> None:
        """Send a call's sequences. Raises StreamLost if the coordinator is away, RequestRejected for too much."""

    def forget(self, request_id: str, *, abort: bool) -> None:
        """Nobody waits for this sequence any more."""


class StreamLost(GhostError):
    """An accepted request can't be finished; the message is meant for the client."""

    def __init__(self, message: str, *, status: int = 503):
        super().__init__(message)
        self.status = status


class Call:
    """The sequences of one HTTP request, and their events in order of arrival. Use as an async context manager.

    On leaving it, whatever is not finished is aborted. Never holds more than `buffer_tokens` tokens: past that, the
    client reads too slowly, and everything is aborted.
    """

    def __init__(self, cluster: Submitter, sequences: Sequence[GenerationRequest], buffer_tokens: int):
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
        self._waiter: asyncio.Future[None] | None = None

    async def __aenter__(self) -> Self:
        try:
            await self._cluster.submit(self, self._sequences)
        except BaseException:
            self._abandon()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._abandon()

    def _abandon(self) -> None:
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

    async def next(self) -> list[tuple[int, TokensMessage]]:
        """Events that have come, MOST_AT_ONCE at most, with the index of their sequence: all that are at hand, so that
        who is behind catches up. None where `rouse` was called before any came. Raises StreamLost.
        """
        if not self._events:
            if self._error is not None:
                raise self._error
            await self._event()
        taken: list[tuple[int, TokensMessage]] = []
        while self._events and len(taken) < MOST_AT_ONCE:
            taken.append(self._events.popleft())
            self._buffered -= len(taken[-1][1].tokens) // 4
        return taken

    def rouse(self) -> None:
        """Whoever waits for an event looks again."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def abort(self, index: int) -> None:
        """The rest of this sequence is not wanted; nothing more of it arrives."""
        if self._ids[index] in self._open:
            self._close(self._ids[index], abort=True)

    def deliver(self, message: Accepted | Refused | TokensMessage | Failed) -> None:
        """Take a message about one of the sequences; never blocks."""
        request_id = message.request_id
        accepted = request_id not in self._unanswered
        self._unanswered.discard(request_id)
        match message:
            case TokensMessage():
                self._events.append((self._index[request_id], message))
                self._buffered += len(message.tokens) // 4
                if message.finish_reason is not None:
                    self._close(request_id, abort=False)
                if self._buffered > self._buffer_tokens:
                    self.fail(StreamLost(f"the client left more than {self._buffer_tokens} tokens unread"))
            case Refused() if accepted:  # when it was submitted again to a coordinator that came back
                self._close(request_id, abort=False)
                self.fail(StreamLost(message.message, status=message.status))
            case Refused():
                self._close(request_id, abort=False)
                self.fail(
                    RequestRejected(message.message, status=message.status, code=message.code, param=message.param)
                )
            case Failed():
                self._close(request_id, abort=False)
                self.fail(StreamLost(message.message, status=500))
        self.rouse()

    def fail(self, error: GhostError) -> None:
        """End all sequences; what has arrived is still handed out, then the first error raised."""
        self._error = self._error or error
        for request_id in list(self._open):
            self._close(request_id, abort=True)
        self.rouse()

    async def _event(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def _close(self, request_id: str, *, abort: bool) -> None:
        self._open.discard(request_id)
        self._cluster.forget(request_id, abort=abort)
