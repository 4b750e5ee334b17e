"""The engine core's channel to the coordinator: on a thread of its own, dialled again for as long as it takes."""

import asyncio
import logging
import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

from shared.channel import REDIAL_S, Channel, dial
from shared.config import WorkerSettings
from shared.errors import GhostError, PeerLost
from shared.messages import TOLD_TO_STOP, EngineHello, Goodbye, Message, Welcome
from shared.tls import client_context

log = logging.getLogger("vllm.ghostserve")


class Dial:
    """`up`, `heard` and `down` are called on the channel's thread."""

    def __init__(
        self,
        settings: WorkerSettings,
        kind: str,
        name: str,
        up: Callable[[], None],
        heard: Callable[[Message], None],
        down: Callable[[], None],
    ):
        self._settings = settings
        self._hello = EngineHello(name, socket.gethostname(), os.getpid(), kind)
        self._up, self._heard, self._down = up, heard, down
        self._channel: Channel | None = None
        self._loop = asyncio.new_event_loop()
        self._serving = self._loop.create_task(self._serve())
        threading.Thread(target=self._loop.run_until_complete, args=(self._run(),), name="dial", daemon=True).start()

    def tell(self, message: Message) -> None:
        """Send, from any thread, in the order of the calls. Without a connection it is told all when it is back."""
        self._loop.call_soon_threadsafe(self._send, message)

    def close(self) -> None:
        """Say goodbye, if somebody is there, and dial no more."""
        self._loop.call_soon_threadsafe(self._take_leave)

    def _take_leave(self) -> None:
        self._send(Goodbye(TOLD_TO_STOP))
        self._serving.cancel()

    async def _run(self) -> None:
        with suppress(asyncio.CancelledError):
            await self._serving

    def _send(self, message: Message) -> None:
        channel = self._channel
        if channel is not None and not channel.closed:
            try:
                channel.send(message)
            except PeerLost as error:
                log.warning("%s", error)

    async def _serve(self) -> None:
        settings, told = self._settings, ""
        tls = client_context(settings.tls_ca_file)
        while True:
            try:
                async with dial(
                    settings.coordinator_url, settings.secret, lambda _: self._hello, settings.dial_deadline_s, tls
                ) as (channel, welcome):
                    if isinstance(welcome, Welcome):
                        self._channel = channel
                        self._up()
                        async for message in channel:
                            if isinstance(message, Goodbye):
                                raise PeerLost(f"the coordinator does not want this engine: {message.reason}")
                            self._heard(message)
            except GhostError as error:
                log.log(logging.DEBUG if str(error) == told else logging.WARNING, "%s", error)
                told = str(error)
            finally:
                if self._channel is not None:
                    self._channel = None
                    self._down()
            await asyncio.sleep(REDIAL_S)
