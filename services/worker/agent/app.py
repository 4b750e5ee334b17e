"""A worker process: control channel on the event loop, model on the compute thread, protection in the shadow."""

import asyncio
import gc
import logging
import os
import signal
import socket
import threading
import time
from functools import partial
from pathlib import Path

import torch

from services.worker.agent import faults
from services.worker.agent.assembly import make_runner
from services.worker.agent.inventory import Inventory
from services.worker.agent.rank_engine import Load, RankEngine
from services.worker.device import watch
from services.worker.identity import host_id
from services.worker.shadow.copies import PageServer, copy_pages
from services.worker.shadow.stores import StoreClients
from shared.channel import REDIAL_S, Channel, dial
from shared.config import WorkerSettings
from shared.errors import ConfigError, GhostError, PeerLost, ProtocolError
from shared.logs import epoch_is
from shared.messages import (
    TOLD_TO_STOP,
    Assign,
    CopyPages,
    DigestPlan,
    Goodbye,
    Heartbeat,
    InjectFault,
    Join,
    Message,
    NotePages,
    Prepare,
    ProtectPlan,
    RestorePlan,
    StandBy,
    StepPlan,
    Welcome,
    WorkerHello,
    WorkerReady,
)
from shared.sockets import bracketed
from shared.tls import client_context
from shared.transport.server import serve
from shared.types import GroupConfig, unpack_ids

log = logging.getLogger(__name__)

ALIVE_S = 1.0
SETTLE_S = 5.0
"""A compute thread that is busy for longer after its epoch has ended is stuck."""


async def run(settings: WorkerSettings, name: str, device: str, host_memory: int | None, stop: asyncio.Event) -> None:
    """Serve the coordinator until `stop` is set, dialling it again whenever the channel is lost.

    `host_memory`: where this host's workers hold one copy of the weights; None if they hold none.
    """
    worker = Worker(settings, name, device, partial(make_runner, settings, torch.device(device), host_memory))
    if settings.fault_dir:
        faults.arm(worker, settings.fault_dir)
    works = (worker.serve(), stop.wait(), _show_life(settings.alive_dir, name))
    tasks: list[asyncio.Task[object]] = [asyncio.create_task(work) for work in works]
    try:
        done, others = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        worker.take_leave()
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.gather(*done)
    finally:
        await worker.close()


class Worker:
    """One device, from its first hello to its end.

    When the channel is lost it stops stepping and dials again, for as long as it takes; what it holds of its rank's KV
    it offers to the coordinator that answers.
    """

    def __init__(self, settings: WorkerSettings, name: str, device: str, load: Load):
        self._settings = settings
        self._load_engine = load
        self._name = name
        self._device = device
        self._loop = asyncio.get_running_loop()
        self._channel: Channel | None = None
        self._runner: RankEngine | None = None
        self._config: GroupConfig | None = None
        self._group = ""
        self._epoch = 0
        self._own_address = ""
        self._address = ""  # where other ranks reach this host
        self._copying: asyncio.Task[None] | None = None
        self._inventory = Inventory()
        self._ended = threading.Event()
        self._stores = StoreClients(
            settings.secret, put_deadline_s=settings.put_deadline_s, fetch_deadline_s=settings.fetch_deadline_s
        )

    async def serve(self) -> None:
        """Dial, serve, dial again. Raises GhostError when the coordinator does not want this worker."""
        tls = client_context(self._settings.tls_ca_file)
        told = ""
        while True:
            try:
                async with dial(
                    self._settings.coordinator_url,
                    self._settings.secret,
                    self._hello,
                    self._settings.dial_deadline_s,
                    tls,
                ) as (channel, welcome):
                    if isinstance(welcome, Welcome):
                        await self._session(channel, welcome)
            except PeerLost as error:
                log.log(logging.DEBUG if str(error) == told else logging.WARNING, "%s", error)
                told = str(error)
            finally:
                self._channel = None
                if self._runner is not None:
                    self._runner.interrupt(0)
            await self._settle()
            await asyncio.sleep(REDIAL_S)

    def take_leave(self) -> None:
        """Tell the coordinator, if it is there, that this worker ends in order; sent before the channel is closed."""
        if self._channel is not None and not self._channel.closed:
            self._channel.send(Goodbye(TOLD_TO_STOP))

    def _hello(self, own_address: str) -> WorkerHello:
        self._own_address = own_address
        self._address = self._settings.advertise_host or own_address
        return WorkerHello(self._name, socket.gethostname(), host_id(), os.getpid(), self._device)

    async def _settle(self) -> None:
        """Wait until nothing of the epoch before is computed any more. Raises GhostError if that does not end, or if
        this worker can take no rank."""
        runner = self._runner
        if runner is not None and runner.unfit:
            raise GhostError(f"{runner.unfit}: this worker starts anew")
        if runner is not None and not await asyncio.to_thread(runner.at_rest.wait, SETTLE_S):
            raise GhostError(f"the compute thread did not come back within {SETTLE_S:.0f} s: this worker starts anew")

    async def _session(self, channel: Channel, welcome: Welcome) -> None:
        self._channel = channel
        runner = await self._load(welcome.config)
        runner.address = self._address
        pages = PageServer(lambda: runner.pool, runner.pages, runner.shadow.restored)
        broken: GhostError | None = None
        async with serve(f"tcp://{bracketed(self._own_address)}:0", pages, token=self._settings.secret or "") as bulk:
            where = f"tcp://{bracketed(self._address)}:{bulk.address.rpartition(':')[2]}"
            channel.send(WorkerReady(runner.info, runner.pages, where, self._inventory.claim()))
            beating = asyncio.create_task(self._beat(channel, runner, welcome.config.heartbeat_s))
            try:
                async for message in channel:
                    self._handle(runner, message)
                log.warning("the coordinator closed the channel")
            except GhostError as error:
                broken = error  # raised below: the server's task group would wrap it
            finally:
                self._stop_copying()
                beating.cancel()
                await asyncio.gather(beating, return_exceptions=True)
        if broken is not None:
            raise broken

    async def _load(self, config: GroupConfig) -> RankEngine:
        """The runner for a configuration: made once, since the group's does not change while it lives."""
        if self._runner is not None:
            if self._config != config:
                raise GhostError("the group's configuration has changed; this worker starts anew")
            return self._runner
        self._config = config
        self._group = config.group
        began = time.monotonic()
        self._runner = await asyncio.to_thread(
            self._load_engine, config, self._inventory, self._stores, self._loop, self._report
        )
        gc.freeze()  # a full collection of all that is loaded takes 0.3 s, and would come in the middle of a restore
        self._runner.shadow.device.bind()
        watch(self._runner.shadow.device, self._device_failed, self._ended)
        log.info("ready in %.2f s: %d pages", time.monotonic() - began, self._runner.pages)
        return self._runner

    def _device_failed(self, why: str) -> None:
        """The next beat says so, and this worker ends; its supervisor does not start it again."""
        if self._runner is not None:
            self._runner.unfit = self._runner.unfit or why

    def _handle(self, runner: RankEngine, message: Message) -> None:
        match message:
            case Assign() | StandBy():
                self._stop_copying()
                if isinstance(message, StandBy):
                    self._inventory.forget()
                self._epoch = message.epoch
                epoch_is(message.epoch)
                runner.submit(message)
            case CopyPages():
                self._stop_copying()
                self._copying = asyncio.create_task(self._copy(runner, message))
            case Prepare():
                self._inventory.prepare(message.rank)
                runner.submit(message)
            case Join() | StepPlan() | NotePages() | DigestPlan():
                runner.submit(message)
            case ProtectPlan():
                runner.shadow.submit(message)
            case RestorePlan():
                runner.restore(message)
            case InjectFault(fault="kill") if self._settings.allow_faults:
                os.kill(os.getpid(), signal.SIGKILL)
            case Goodbye():
                if message.final:
                    raise ConfigError(f"the coordinator does not want this worker: {message.reason}")
                self._inventory.forget()
                runner.given_up()
                raise PeerLost(f"the coordinator gave this worker up: {message.reason}")
            case _:
                log.warning("the coordinator sent %s", type(message).__name__)

    async def _copy(self, runner: RankEngine, message: CopyPages) -> None:
        copied = await copy_pages(message, runner.pool, self._stores, self._group)
        runner.shadow.computed.leave()
        if not copied.reason:
            self._inventory.copied(unpack_ids(message.pages), message.keys)
        self._report(copied)

    def _stop_copying(self) -> None:
        """Nothing is copied into the pool any more: it is another rank's now, or nobody asks."""
        if self._copying is not None:
            self._copying.cancel()
            self._copying = None

    async def _beat(self, channel: Channel, runner: RankEngine, interval_s: float) -> None:
        while not channel.closed:
            channel.send(Heartbeat(self._epoch, runner.step_done, runner.in_flight, runner.progress))
            if runner.overstay_s > SETTLE_S:
                log.error("the compute thread does not come back from a step whose epoch is over")
                await channel.close()  # this worker is lost: `_settle` ends it
            elif runner.unfit:
                channel.send(Goodbye(runner.unfit))
                await channel.close()
            await asyncio.sleep(interval_s)

    def _report(self, message: Message) -> None:
        """Send to the coordinator, from any thread. What it can't be told any more it does not need to know."""

        def send() -> None:
            if self._channel is not None and not self._channel.closed:
                try:
                    self._channel.send(message)
                except ProtocolError as error:
                    log.error("can't be sent: %s", error)
                    self._channel.abort()

        self._loop.call_soon_threadsafe(send)

    async def close(self) -> None:
        """End threads and connections."""
        self._ended.set()
        if self._runner is not None:
            await asyncio.to_thread(self._runner.close)
            await asyncio.to_thread(self._runner.shadow.close)
        await self._stores.close()


async def _show_life(folder: str, name: str) -> None:
    """Touch a file as long as the event loop turns, for a container's health check. The next life has the same file."""
    file = Path(folder, f"worker-{name.rsplit('.', 1)[0].rpartition('-')[2]}")
    while True:
        try:
            if folder:
                await asyncio.to_thread(file.touch)
        except OSError as error:
            raise ConfigError(f"alive_dir {folder}: {error.strerror}") from error
        await asyncio.sleep(ALIVE_S)
