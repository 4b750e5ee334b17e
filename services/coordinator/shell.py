"""The core's shell: connections, Redis and the clock. What happens goes into the core, what comes out is done."""

import asyncio
import itertools
import logging
import time
from collections.abc import Callable

from services.coordinator.events import (
    Answered,
    Ask,
    Came,
    Effect,
    EpochIs,
    Event,
    FindStripes,
    Hello,
    Keep,
    Left,
    NextEpoch,
    Peer,
    Question,
    Said,
    Send,
    Tick,
)
from services.coordinator.group import Group
from services.coordinator.membership.journal import Journal
from services.coordinator.protection.locator import Locator
from services.coordinator.recording.recorder import Recorder
from services.coordinator.recording.segments import encode
from shared import wire
from shared.channel import Channel
from shared.errors import GhostError, PeerLost, ProtocolError
from shared.messages import ShardsFound, StoreHello
from shared.stripe_index import StripeIndex

log = logging.getLogger(__name__)

TICK_S = 0.05


class Shell:
    """One group's core among its peers."""

    def __init__(
        self,
        group: Group,
        index: StripeIndex,
        journal: Journal,
        recorder: Recorder | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.group = group
        self._recorder = recorder
        self._locator = Locator(index, group.config.group)
        self._journal = journal
        self._clock = clock
        self._channels: dict[Peer, Channel] = {}
        self._numbers = itertools.count(1)
        self._tasks: asyncio.TaskGroup | None = None
        self._asking: set[asyncio.Task[None]] = set()

    async def run(self, stop: asyncio.Event) -> None:
        """Watch over the group until `stop` is set; peers are served meanwhile. Raises what the core raises."""
        try:
            async with asyncio.TaskGroup() as self._tasks:
                while not stop.is_set():
                    self._handle(Tick())
                    if self._recorder is not None:
                        self._recorder.tick(self._clock())
                    await asyncio.sleep(TICK_S)
                self._tasks, asking = None, list(self._asking)
                for task in asking:
                    task.cancel()
        finally:
            if self._recorder is not None:
                await self._recorder.close()

    async def serve(self, hello: Hello, channel: Channel) -> None:
        """Hand a peer's messages to the core, until it is gone. Raises ProtocolError for one that is not valid."""
        peer = next(self._numbers)
        self._channels[peer] = channel
        reason = "its channel closed"
        if isinstance(hello, StoreHello):
            self._locator.joins(hello.store.store_id, channel)
        try:
            self._handle(Came(peer, hello))
            async for frame in channel.frames():
                message = wire.decode(frame)
                if isinstance(message, ShardsFound):
                    self._locator.told(message)
                else:
                    self._handle(Said(peer, message), frame)
        except GhostError as error:
            reason = str(error)
            raise
        finally:
            self._locator.leaves(channel)
            self._handle(Left(peer, reason))
            del self._channels[peer]

    def _handle(self, event: Event, frame: bytes = b"") -> None:
        """`frame`: the event's message, as it came."""
        now = self._clock()
        try:
            self.group.handle(now, event)
        finally:
            recorder = self._recorder
            outputs = [
                (output, encode(output) if recorder is not None or isinstance(output, Send) else b"")
                for output in self.group.take()
            ]
            for output, sent in outputs:
                self._do(output, sent)
            if recorder is not None:
                recorder.saw(now, event, frame, outputs)

    def _do(self, output: Effect, frame: bytes) -> None:
        match output:
            case Send(peers):
                for peer in peers:
                    self._send(peer, frame)
            case Ask(number, question) if self._tasks is not None:
                task = self._tasks.create_task(self._answer(number, question))
                self._asking.add(task)
                task.add_done_callback(self._asking.discard)

    def _send(self, peer: Peer, frame: bytes) -> None:
        channel = self._channels.get(peer)
        if channel is None or channel.closed:
            return
        try:
            channel.send_frame(frame)
        except PeerLost as error:  # its reader will end, and tell the core
            log.warning("%s", error)
        except ProtocolError as error:
            log.error("can't be sent, so its peer is given up: %s", error)
            channel.abort()

    # -- Redis -------------------------------------------------------------------------------------------------------

    async def _answer(self, number: int, question: Question) -> None:
        match question:
            case NextEpoch(current):
                self._handle(Answered(number, EpochIs(await self._journal.next_epoch(current))))
            case Keep(current, cordons):
                self._handle(Answered(number, EpochIs(await self._journal.keep(current, cordons))))
            case FindStripes():
                self._handle(Answered(number, await self._locator.find(question)))
