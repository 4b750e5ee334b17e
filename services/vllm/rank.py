"""A worker process of vLLM among GhostServe's services: its agent and shadow run beside the model, in threads."""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch

from services.vllm.pages import BlockPages
from services.worker.agent.app import Worker
from services.worker.agent.assembly import make_shadow
from services.worker.agent.inventory import Inventory
from services.worker.agent.rank_engine import Job, Load
from services.worker.communicator import RendezvousHandle, create, open_rendezvous
from services.worker.communicator.base import Communicator, Kind
from services.worker.device import make_device
from services.worker.shadow.exchange import PageBytes
from services.worker.shadow.shadow import SLOT_BYTES, Shadow
from services.worker.shadow.stores import StoreClients
from shared.config import WorkerSettings
from shared.errors import GhostError
from shared.messages import (
    Assign,
    Join,
    Joined,
    Message,
    Prepare,
    Prepared,
    RankFailed,
    Rendezvous,
    RestorePlan,
    StandBy,
)
from shared.types import GroupConfig, ModelInfo

log = logging.getLogger("vllm.ghostserve")


@dataclass
class Steps:
    """What the main thread tells of the model; read by the agent. Plain fields: each has one writer."""

    rank: int | None = None
    taking: int = 0
    """The coordinator's epoch for which the main thread has begun to connect the model's ranks."""
    placed: int = 0
    """The coordinator's epoch in which the model's ranks are connected."""
    done: int = 0
    in_flight: bool = False
    channel: Communicator | None = None
    shadow: Shadow | None = None
    """What reads and writes pages beside the model, once this process is hosted."""
    changed: threading.Condition = field(default_factory=threading.Condition)

    def place(self, rank: int, epoch: int, channel: Communicator) -> None:
        """The model's ranks are connected."""
        with self.changed:
            self.rank, self.placed, self.channel, self.done = rank, epoch, channel, 0
            self.changed.notify_all()

    def begin(self) -> None:
        """The main thread is about to use the device: behind what the shadow has written."""
        if self.shadow is not None:
            self.shadow.restored.wait()

    def end(self) -> None:
        """The main thread has asked the device for a step, or part of one: the shadow goes on behind it."""
        if self.shadow is not None:
            self.shadow.computed.leave()
        self.done += self.in_flight
        self.in_flight = False

    def paused(self) -> AbstractContextManager[bool]:
        """See Shadow.paused."""
        return self.shadow.paused() if self.shadow is not None else nullcontext(True)

    def wait_placed(self, epoch: int, timeout_s: float, cancelled: threading.Event) -> bool:
        """Whether the model's ranks get connected in this epoch, or a later one, in time."""
        end = time.monotonic() + timeout_s
        with self.changed:
            while self.placed < epoch and not cancelled.is_set() and time.monotonic() < end:
                self.changed.wait(0.05)
            return self.placed >= epoch


class HostedRank:
    """See `RankEngine`: one rank's pages; the model is the main thread's."""

    def __init__(
        self,
        steps: Steps,
        info: ModelInfo,
        pages: int,
        pool: Callable[[int], BlockPages],
        device: torch.device,
        settings: WorkerSettings,
        config: GroupConfig,
        inventory: Inventory,
        stores: StoreClients,
        loop: asyncio.AbstractEventLoop,
        report: Callable[[Message], None],
    ):
        """`pool`: the pages of a rank that this process can be, in that rank's own buffer on `device`."""
        self.info = info
        self.pages = pages
        self.address = "127.0.0.1"
        self.at_rest = threading.Event()
        self.at_rest.set()
        self.unfit = ""
        self.overstay_s = 0.0
        self.shadow = make_shadow(settings.transport, make_device(device), config, inventory, stores, loop, report)
        self._kind = channel_kind(device)
        self._steps = steps
        steps.shadow = self.shadow
        self._pool_of = pool
        self._pool: BlockPages | None = None
        self._config = config
        self._inventory = inventory
        self._report = report
        if steps.rank is not None:
            inventory.begin(0, steps.rank)  # the rank that it was started as, which it claims
        self._assign: Assign | None = None
        self._meeting: RendezvousHandle | None = None
        self._cancelled = threading.Event()

    # -- what is told of the model -----------------------------------------------------------------------------------

    @property
    def pool(self) -> PageBytes:
        """See `RankEngine`. Raises GhostError where a spare has no pages of that rank."""
        if self._pool is None:
            self._pool = self._pool_of(self._steps.rank or 0)
        return self._pool

    @property
    def step_done(self) -> int:
        """Steps done in this epoch."""
        return self._steps.done

    @property
    def in_flight(self) -> bool:
        """Whether a step is being computed."""
        return self._steps.in_flight

    @property
    def progress(self) -> int:
        """Grows with each collective that the model enters; least where the main thread has not begun the epoch."""
        steps, epoch = self._steps, self._assign.epoch if self._assign is not None else 0
        if steps.placed < epoch:
            return int(steps.taking >= epoch)
        return 2 + steps.done + (steps.channel.entered if steps.channel is not None else 0)

    # -- what the coordinator asks -----------------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """Take a place in an epoch, or none; connect with the others."""
        match job:
            case Assign():
                self.interrupt(job.epoch)
                self._assign = job
                if job.rank == 0:
                    self._meeting = open_rendezvous(self._kind, job.size, slot_bytes=SLOT_BYTES)
                    self._report(Rendezvous(job.epoch, "", self._meeting.address))
            case StandBy():
                self.interrupt(job.epoch)
                self._assign = None
            case Prepare():  # it holds the weights; `pool_of` raises where it does not
                self._pool = self._pool_of(job.rank)
                self._report(Prepared(job.move))
            case Join() if self._assign is not None and job.epoch == self._assign.epoch:
                threading.Thread(
                    target=self._join, args=(self._assign, job, self._cancelled), name="join", daemon=True
                ).start()
            case _:
                log.debug("%s is of no use here", type(job).__name__)

    def restore(self, plan: RestorePlan) -> None:
        """See `RankEngine`."""
        if self._assign is not None:
            self.shadow.prefetch(plan, self._assign.rank, self.info.page_bytes)
            self.shadow.submit(plan)

    def interrupt(self, epoch: int) -> None:
        """The shadow's epoch ends; the model goes on: who runs it hears of an epoch's end from the engine core."""
        self._cancelled.set()
        self._cancelled = threading.Event()
        self.shadow.interrupt(epoch)
        if self._meeting is not None:
            self._meeting.close()
            self._meeting = None

    def given_up(self) -> None:
        """The coordinator wants this process no more: whatever it holds is out of date."""
        log.warning("the coordinator has given this worker up")
        os._exit(1)

    def close(self) -> None:
        """The process ends with its main thread."""
        self.interrupt(-1)

    # -- a thread of its own -----------------------------------------------------------------------------------------

    def _join(self, assign: Assign, join: Join, cancelled: threading.Event) -> None:
        began = time.monotonic()
        timeout_s = self._config.collective_timeout_s
        try:
            if not self._steps.wait_placed(assign.epoch, timeout_s, cancelled):
                raise GhostError("the engine did not connect the model's ranks")
            self.shadow.device.bind()
            exchange = create(
                self._kind, join.exchange_address, assign.rank, assign.size, timeout=timeout_s, slot_bytes=SLOT_BYTES,
                cancelled=cancelled,
            )  # fmt: skip
        except GhostError as error:
            if not cancelled.is_set():
                self._report(RankFailed(assign.epoch, assign.rank, f"Join: {error}", fatal=False))
            return
        self._pool = self._pool_of(assign.rank)
        self._inventory.begin(assign.epoch, assign.rank)
        self.shadow.enter(assign.epoch, exchange, self.pool, self.pool)
        self._report(Joined(assign.epoch, assign.rank, 0.0, time.monotonic() - began))


def channel_kind(device: torch.device) -> Kind:
    """How ranks on such devices, all of one host, talk to each other."""
    return "nccl" if device.type == "cuda" else "shm"


def run_agent(name: str, make: Callable[..., HostedRank], device_name: str) -> None:
    """Serve the coordinator from a thread of this process. `make`: HostedRank, but for the settings and what a `Load`
    is given.
    """
    settings = WorkerSettings()

    async def serve() -> None:
        load: Load = partial(make, settings)
        worker = Worker(settings, name, device_name, load)
        try:
            await worker.serve()
        except GhostError as error:
            log.error("this worker ends: %s", error)
            os._exit(1)

    threading.Thread(target=lambda: asyncio.run(serve()), name="agent", daemon=True).start()
