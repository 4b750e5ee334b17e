"""Decides about an engine's ranks as GhostServe's coordinator says: the engine core is a hosted engine.

While the engine starts it decides alone, as `Alone` does; from then on who is a rank is the coordinator's word. The
messages are those of shared/messages/hosted.py.
"""

import logging
import os
import secrets
import socket
import time
from collections.abc import Callable
from typing import Protocol

from services.vllm.alone import Alone, Engine, Member
from services.vllm.dial import Dial
from services.vllm.link import HostedScheduler
from services.vllm.messages import Placed
from shared.config import WorkerSettings
from shared.messages import (
    EngineReady,
    EngineRuns,
    GivenUp,
    Message,
    PagesGone,
    PagesWhole,
    PinPages,
    Place,
    Quiesce,
    Resume,
    StepFailed,
    UnpinPages,
)
from shared.types import ModelInfo, unpack_ids

log = logging.getLogger("vllm.ghostserve")

LOAD_S = 1.0
START_S = 600.0
"""A worker that takes longer to load its weights is not waited for."""
BLAME_S = 30.0
LOST_S = 0.1
"""After a step failed: how long its reason may yet turn out to be a rank that died."""


class HostedEngineCore(Engine, Protocol):
    """What can be done to an engine whose ranks the coordinator decides about."""

    @property
    def scheduler(self) -> HostedScheduler | None: ...

    def hosted_model(self) -> tuple[ModelInfo, int, int, int]: ...

    def alike(self) -> bool: ...

    def when_scheduled(self, attached: Callable[[], None]) -> None: ...

    def tells(self, tell: Callable[[Message], None]) -> None: ...

    def host(self, member: Member, name: str) -> None: ...

    def kill(self, member: Member) -> None: ...


class Hosted(Alone):
    """Hears of workers and of the coordinator on any thread, and does what is to be done on its own."""

    _engine: HostedEngineCore

    def __init__(self, engine: HostedEngineCore, spares: int, kind: str, patience_s: float):
        """`patience_s`: how long the engine stands still at most, with a worker for each rank, before it ends as vLLM
        ends an engine.
        """
        # A container that starts again has its host's name and process ids again.
        self.name = f"vllm-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self._kind = kind
        self._patience_s = patience_s
        self._dial: Dial | None = None
        self._up = False
        self._hosted_epoch = 0
        self._doubtful = False  # ranks were changed, and it is not told yet which blocks are whole
        self._failed_epoch = -1  # the last one in which a step failed; its errors by rank are in `_raised`
        self._raised: dict[Member, str] = {}
        self._raised_alone: tuple[Member | None, float] = (None, 0.0)
        self._failed_in = -1  # the epoch of which a failed step was told
        self._asked: Resume | None = None
        self._load_told = 0.0
        self._waits_since = 0.0  # for a decision: no worker is being started for it
        super().__init__(engine, spares)

    def close(self) -> None:
        """The engine ends."""
        super().close()
        if self._dial is not None:
            self._dial.close()

    # -- the deciding thread -----------------------------------------------------------------------------------------

    def _allow_spares(self) -> None:
        super()._allow_spares()
        self._engine.when_scheduled(lambda: self._events.put(self._begin))

    def _begin(self) -> None:
        """The engine is complete: from now on the coordinator decides."""
        self._engine.tells(self._tell)
        for member in (*filter(None, self._ranks), *self._ready):
            self._engine.host(member, self._name_of(member))
        self._dial = Dial(
            WorkerSettings(),
            self._kind,
            self.name,
            lambda: self._events.put(self._connected),
            lambda message: self._events.put(lambda: self._said(message)),
            lambda: self._events.put(self._disconnected),
        )

    def _name_of(self, member: Member) -> str:
        return f"{self.name}.{member.name}"

    def _tell(self, message: Message) -> None:
        if self._dial is not None and self._up:
            self._dial.tell(message)

    def _built(self, member: Member) -> None:
        super()._built(member)
        if self._dial is not None:
            self._engine.host(member, self._name_of(member))

    def _connected(self) -> None:
        """The coordinator is there: it is told all, and will have the engine stand still."""
        self._up = True
        model, blocks, block_tokens, step_tokens = self._engine.hosted_model()
        names = tuple(self._name_of(member) if member is not None else "" for member in self._ranks)
        alike, moves = self._engine.alike(), self._spares > 0
        self._tell(EngineReady(model, blocks, block_tokens, step_tokens, names, alike, moves))
        if (scheduler := self._engine.scheduler) is not None:
            scheduler.tell_all(whole=not self._doubtful)

    def _disconnected(self) -> None:
        self._up = False

    def _gone(self, member: Member) -> None:
        was_rank = member in self._ranks
        super()._gone(member)
        if was_rank:
            why = member.device_failed
            self._tell(
                StepFailed(self._hosted_epoch, why or f"{member.name} died", (self._name_of(member),), bool(why))
            )

    def _failed(self, member: Member, epoch: int, reason: str, own: bool) -> None:
        if self._dial is None:
            super()._failed(member, epoch, reason, own)
            return
        if own and epoch in (self._epoch, self._failed_epoch) and member in self._ranks:
            self._raised[member] = reason
        if epoch == self._epoch:
            log.warning("%s: %s", member.name, reason)
            self._failed_epoch = epoch
            self._quiesce()
            self._later(LOST_S, lambda: self._told_failed(reason))

    def _told_failed(self, reason: str) -> None:
        """If no rank was lost meanwhile all are to try again, but for one that fails by itself."""
        raised, self._raised = self._raised, {}
        if self._phase == "gathering" and None not in self._ranks and self._failed_in != self._hosted_epoch:
            self._failed_in = self._hosted_epoch
            self._tell(
                StepFailed(self._hosted_epoch, next(iter(raised.values()), reason), self._culprits(list(raised)))
            )

    def _culprits(self, raised: list[Member]) -> tuple[str, ...]:
        """A rank that alone raised an error of its own, twice in BLAME_S: another process may do better."""
        now = time.monotonic()
        alone = raised[0] if len(raised) == 1 else None
        (before, at), self._raised_alone = self._raised_alone, (alone, now)
        return (self._name_of(alone),) if alone is not None and alone is before and now - at < BLAME_S else ()

    # -- what the coordinator says -----------------------------------------------------------------------------------

    def _said(self, message: Message) -> None:
        scheduler = self._engine.scheduler
        if scheduler is None:
            return
        match message:
            case Quiesce(epoch):
                self._quiesce()
                for part in EngineRuns.parts(epoch, scheduler.stand_still()):
                    self._tell(part)
            case Place(epoch, workers):
                self._place(epoch, workers)
            case Resume() if message.epoch == self._hosted_epoch and self._phase == "placing":
                self._asked = message
            case GivenUp(workers):
                for member in (*filter(None, self._ranks), *self._ready):
                    if self._name_of(member) in workers:
                        log.warning("%s (pid %d) is given up", member.name, member.pid)
                        self._engine.kill(member)
            case PinPages(pages, keys):
                scheduler.pin(unpack_ids(pages), keys)
            case UnpinPages(pages):
                scheduler.unpin(unpack_ids(pages))
            case PagesWhole(pages=pages):
                scheduler.back(unpack_ids(pages), whole=True)
            case PagesGone(pages=pages):
                scheduler.back(unpack_ids(pages), whole=False)
            case _:
                log.debug("the coordinator sent %s", type(message).__name__)

    def _place(self, epoch: int, workers: tuple[str, ...]) -> None:
        known = {self._name_of(member): member for member in (*filter(None, self._ranks), *self._ready)}
        self._hosted_epoch = epoch
        if any(name not in known for name in workers):
            return  # one has died: the coordinator is about to hear of it
        members = [known[name] for name in workers]
        for member in filter(None, self._ranks):
            if member not in members:
                self._engine.kill(member)
        self._doubtful = self._doubtful or members != self._ranks
        self._ready = [member for member in self._ready if member not in members]
        self._ranks = list(members)
        if self._phase != "gathering":
            self._quiesce()
        self._phase, self._placed, self._asked = "placing", {}, None
        self._engine.place(self._epoch, members, epoch)

    def _took(self, placed: Placed) -> None:
        super()._took(placed)
        if self._dial is not None and placed.epoch == self._epoch and placed.error:
            self._later(LOST_S, lambda: self._told_failed(placed.error))

    def _resume(self, message: Resume) -> None:
        self._doubtful = False
        log.info("epoch %d: stepping after %.3f s", message.epoch, time.monotonic() - self._since)
        gone, withheld = unpack_ids(message.gone), unpack_ids(message.withheld)
        self._step(kept=True, gone=gone, withheld=withheld, hosted=message.epoch)

    # -- always ------------------------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        if self._dial is None:
            super()._go_on()
            return
        self._start_missing()
        # A rank tells the coordinator and the engine that it has joined: on two ways.
        if self._phase == "placing" and self._asked is not None and len(self._placed) == self._engine.size:
            self._resume(self._asked)
        now = time.monotonic()
        missing = self._ranks.count(None) > len(self._ready)
        if self._phase == "stepping" or (missing and self._starting and now - self._since < START_S):
            self._waits_since = now
        elif now - self._waits_since > self._patience_s:
            self._engine.fail(f"the engine stood still for {self._patience_s:.0f} s: nobody says how it goes on")
        if self._up and now - self._load_told > LOAD_S and (scheduler := self._engine.scheduler) is not None:
            self._load_told = now
            self._tell(scheduler.load())
