"""The gateway's side of the control channel: submits sequences, hands their events to whoever waits for them, and
dials again when the coordinator is away, to go on where it was."""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from services.gateway.call import Call, StreamLost
from shared.channel import REDIAL_S, Channel, dial
from shared.config import GatewaySettings, default_name
from shared.errors import GhostError, PeerLost, ProtocolError, RequestRejected
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
    NextTokens,
    Refused,
    StatusChanged,
    Submit,
)
from shared.messages import Tokens as TokensMessage
from shared.tls import client_context
from shared.types import ClusterStatus, GenerationRequest, OperatorAction

log = logging.getLogger(__name__)

APPLY_DEADLINE_S = 10.0
STATUS_DEADLINE_S = 10.0
"""Silence of the coordinator, which reports every second, after which its last report is not believed any more."""


@dataclass(slots=True)
class Work:
    """A sequence at the coordinator: what was asked for and what has come of it, enough to ask for the rest anew."""

    call: Call
    submit: Submit
    generated: bytearray = field(default_factory=bytearray)


class Cluster:
    """The coordinator as the gateway knows it. `run` keeps the channel; the rest is called by request handlers."""

    def __init__(self, settings: GatewaySettings):
        self._settings = settings
        self._channel: Channel | None = None
        self._works: dict[str, Work] = {}
        self._patience: asyncio.TimerHandle | None = None  # runs while the coordinator is away and streams wait for it
        self._asked: dict[str, asyncio.Future[Applied | Refused]] = {}
        self._status: ClusterStatus | None = None
        self._heard = 0.0
        self._reason = "the coordinator has not been reached yet"
        self._at_rest = asyncio.Event()  # set when the last sequence in work has ended
        self.leaving = False
        """Set once the gateway is to end: it takes no new work."""
        self.changed = asyncio.Event()
        """Set at the next change of the status; then another one stands here. So any number can wait for changes."""

    @property
    def status(self) -> ClusterStatus | None:
        """The last status heard, if the channel is open and the coordinator not silent."""
        return self._status if self.absence is None else None

    @property
    def absence(self) -> str | None:
        """Why nothing can be asked of the coordinator now; None if it can."""
        if self.leaving:
            return "the gateway is shutting down"
        if self._channel is None or self._channel.closed:
            return self._reason
        if self._status is None:
            return "the coordinator has not told its state yet"
        silence = time.monotonic() - self._heard
        return f"the coordinator has been silent for {silence:.0f} s" if silence > STATUS_DEADLINE_S else None

    @property
    def in_flight(self) -> int:
        """Sequences that wait for tokens."""
        return len(self._works)

    def open(self, sequences: Sequence[GenerationRequest]) -> Call:
        """A call for these sequences; they are submitted when it is entered."""
        return Call(self, sequences, self._settings.stream_buffer_tokens)

    async def submit(self, call: Call, sequences: Sequence[GenerationRequest]) -> None:
        """Send a call's sequences to the coordinator, as fast as it reads.

        Raises StreamLost if it is away, RequestRejected for what it would not take.
        """
        channel = self._channel
        if channel is None or self.absence is not None:
            raise StreamLost(self.absence or self._reason)
        model = self._status.model if self._status is not None else None
        works = {each.request_id: Work(call, Submit(each, model.fingerprint if model else "")) for each in sequences}
        self._works.update(works)
        try:
            for work in works.values():
                await channel.send_bulk(work.submit)
        except PeerLost as error:
            raise StreamLost("the coordinator is away") from error
        except ProtocolError as error:
            raise RequestRejected(str(error), status=413, code="request_too_large") from error

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
        work = self._works.pop(request_id, None)
        if not self._works:
            self._at_rest.set()
        if work is None or not abort or self._channel is None:
            return
        try:
            self._channel.send(Abort(request_id))
        except PeerLost:
            log.debug("no channel to abort %s on", request_id)

    async def run(self) -> None:
        """Keep a channel to the coordinator until cancelled."""
        name = default_name("gateway")
        settings = self._settings
        tls = client_context(settings.tls_ca_file)
        while True:
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
                    again = asyncio.create_task(self._submit_again(channel), name="submit again")
                    try:
                        async for message in channel:
                            self._take(message)
                    finally:
                        again.cancel()
                        await asyncio.gather(again, return_exceptions=True)
                raise PeerLost("the coordinator closed the channel")
            except GhostError as error:
                reason = str(error)
                log.log(logging.DEBUG if reason == self._reason else logging.WARNING, "no coordinator: %s", reason)
                self._lose(reason)
            await asyncio.sleep(REDIAL_S)

    async def drain(self, deadline_s: float) -> None:
        """Take no new work, and wait until what is in work has ended, or for `deadline_s`."""
        self.leaving = True
        self._tell()
        if self._works:
            log.info("waiting for %d sequences to end, for up to %g s", len(self._works), deadline_s)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                while self._works:
                    self._at_rest.clear()
                    await self._at_rest.wait()

    def stop(self) -> None:
        """End all calls, and take no more."""
        self.leaving = True
        self._lose("the gateway is shutting down")
        self._fail_all("the gateway is shutting down")

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
                if (work := self._works.get(message.request_id)) is not None:
                    if isinstance(message, TokensMessage):
                        work.generated += message.tokens
                    work.call.deliver(message)
            case NextTokens(request_ids=names, tokens=tokens):
                for place, name in enumerate(names):
                    if (work := self._works.get(name)) is not None:
                        token = tokens[4 * place : 4 * place + 4]
                        work.generated += token
                        work.call.deliver(TokensMessage(name, token, (), (), None, 0))
            case Goodbye():
                raise PeerLost(f"the coordinator said goodbye: {message.reason}")
            case _:
                log.debug("ignored %s", type(message).__name__)

    async def _submit_again(self, channel: Channel) -> None:
        """Have the coordinator, another one perhaps, go on with what waits, after the tokens that have come."""
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
        waiting = list(self._works)
        if waiting:
            log.info("%d sequences go on", len(waiting))
        for request_id in waiting:
            if (work := self._works.get(request_id)) is not None:
                try:
                    await channel.send_bulk(replace(work.submit, generated=bytes(work.generated)))
                except PeerLost:
                    return
                except ProtocolError as error:
                    work.call.fail(StreamLost(str(error)))

    def _lose(self, reason: str) -> None:
        """The coordinator is away. Who waits for tokens goes on waiting, for a time."""
        self._channel, self._status, self._reason = None, None, reason
        if self._patience is None:
            self._patience = asyncio.get_running_loop().call_later(self._settings.reconnect_s, self._give_up)
        self._tell()

    def _give_up(self) -> None:
        self._fail_all(f"the coordinator has been away for {self._settings.reconnect_s:g} s: {self._reason}")

    def _fail_all(self, message: str) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
        calls = {work.call for work in self._works.values()}
        self._works.clear()
        self._at_rest.set()
        for call in calls:
            call.fail(StreamLost(message))

    def _tell(self) -> None:
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()
