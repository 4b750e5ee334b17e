"""Decides about an engine's ranks in the engine core itself: nothing is protected, what is lost is recomputed."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any, Literal, Protocol

from services.vllm.link import Loss
from services.vllm.messages import Placed

log = logging.getLogger("vllm.ghostserve")

SETTLE_S = 0.05
"""A step that failed at one rank is often a peer's death, which is heard a moment later."""
MAX_ATTEMPTS = 8
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 8.0
MAX_STILLBORN = 8
"""So many processes in a row died before they were ready: another one will too."""
TICK_S = 0.05
SPARE_AFTER_S = 2.0
"""A spare is started once steps have gone on for so long: loading takes the cores that a recovery needs."""


class Member(Protocol):
    """One worker process."""

    name: str
    device_failed: str
    """Why its device can't be used any more, where that is why it has ended; empty otherwise."""

    @property
    def pid(self) -> int: ...


class Engine(Protocol):
    """What can be done to the engine's ranks."""

    @property
    def size(self) -> int: ...

    def start(self, ranks: tuple[int, ...]) -> Member | None: ...

    def quiesce(self, epoch: int) -> None: ...

    def place(self, epoch: int, ranks: list[Any], hosted_epoch: int = 0) -> None: ...

    def resume(self, loss: Loss) -> None: ...

    def rest(self) -> None: ...

    def fail(self, reason: str) -> None: ...


class Alone:
    """Hears of workers on any thread, decides on its own.

    gathering: ranks are missing, or may not step; placing: all are told who they are; stepping.
    """

    def __init__(self, engine: Engine, spares: int):
        self._engine = engine
        self._spares = spares
        self._may_spare = False
        self._epoch = 1
        self._phase: Literal["gathering", "placing", "stepping"] = "gathering"
        self._ranks: list[Member | None] = [None] * engine.size
        self._ready: list[Member] = []
        self._starting: dict[Member, int | None] = {}
        self._placed: dict[int, Placed] = {}
        self._stepping_since = float("inf")
        self._attempts = 0
        self._closed = False
        self._stillborn = 0
        self._start_after = 0.0
        self._since = time.monotonic()
        self._events: queue.Queue[Callable[[], None]] = queue.Queue()
        self._due: list[tuple[float, Callable[[], None]]] = []
        threading.Thread(target=self._run, name="alone", daemon=True).start()

    def built(self, member: Member) -> None:
        """A process is ready to take a rank."""
        self._events.put(lambda: self._built(member))

    def gone(self, member: Member) -> None:
        """A process has ended."""
        self._events.put(lambda: self._gone(member))

    def placed(self, placed: Placed) -> None:
        """A process has taken its rank, or failed to."""
        self._events.put(lambda: self._took(placed))

    def failed(self, member: Member, epoch: int, reason: str, own: bool) -> None:
        """A rank could not do what was asked in `epoch`; `own`: not because its peers did not take part."""
        self._events.put(lambda: self._failed(member, epoch, reason, own))

    def close(self) -> None:
        """Nothing is decided any more."""
        self._closed = True

    def may_spare(self) -> None:
        """From now on a process can be made ready for any rank."""
        self._events.put(self._allow_spares)

    # -- the deciding thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        for rank in range(self._engine.size):
            if (member := self._engine.start((rank,))) is None:
                self._engine.fail(f"there is no device for rank {rank}")
                return
            self._starting[member] = rank
        while not self._closed:
            try:
                with suppress(queue.Empty):
                    self._events.get(timeout=TICK_S)()
                self._run_due(time.monotonic())
                self._go_on()
                if self._phase == "stepping":
                    self._engine.rest()
            except Exception as error:  # nobody would decide any more, and the engine stand still for ever
                log.exception("the decision about the ranks failed")
                self._engine.fail(f"the decision about the ranks failed: {type(error).__name__}: {error}")
                return

    def _run_due(self, now: float) -> None:
        due = [event for at, event in self._due if at <= now]
        self._due = [each for each in self._due if each[0] > now]
        for event in due:
            event()

    def _later(self, seconds: float, event: Callable[[], None]) -> None:
        self._due.append((time.monotonic() + seconds, event))

    def _allow_spares(self) -> None:
        self._may_spare = True

    def _built(self, member: Member) -> None:
        rank = self._starting.pop(member)
        self._stillborn = 0
        if rank is not None and self._ranks[rank] is None:
            self._ranks[rank] = member
        else:
            self._ready.append(member)

    def _gone(self, member: Member) -> None:
        log.warning("%s (pid %d) is gone", member.name, member.pid)
        if member in self._starting:
            del self._starting[member]
            self._brake()
        if member in self._ready:
            self._ready.remove(member)
        if member in self._ranks:
            self._ranks[self._ranks.index(member)] = None
            self._quiesce()
        if not self._may_spare:
            self._engine.fail(f"{member.name} ended while the engine was starting")

    def _brake(self) -> None:
        """A process died before it was ready: the next one is started later, and at last none."""
        self._stillborn += 1
        self._start_after = time.monotonic() + min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (self._stillborn - 1))
        if self._stillborn >= MAX_STILLBORN and None in self._ranks:
            self._engine.fail(f"{self._stillborn} workers in a row died before they were ready")

    def _took(self, placed: Placed) -> None:
        if placed.epoch != self._epoch:
            return
        if placed.error:
            log.warning("rank %d: %s", placed.rank, placed.error)
            self._quiesce()
        else:
            self._placed[placed.rank] = placed

    def _failed(self, member: Member, epoch: int, reason: str, own: bool) -> None:
        if epoch == self._epoch:
            log.warning("%s: %s", member.name, reason)
            self._quiesce()
            time.sleep(SETTLE_S)

    def _quiesce(self) -> None:
        if self._phase == "stepping":
            self._since = time.monotonic()
        self._phase, self._stepping_since = "gathering", float("inf")
        self._epoch += 1
        self._engine.quiesce(self._epoch)

    def _go_on(self) -> None:
        self._fill()
        if not self._events.empty():
            return
        members = [member for member in self._ranks if member is not None]
        if self._phase == "gathering" and len(members) == self._engine.size:
            self._attempts += 1
            if self._attempts > MAX_ATTEMPTS:
                self._engine.fail(f"the ranks did not come together in {MAX_ATTEMPTS} attempts")
            self._phase, self._placed = "placing", {}
            self._engine.place(self._epoch, members)
        elif self._phase == "placing" and len(self._placed) == self._engine.size:
            log.warning("epoch %d: stepping after %.3f s", self._epoch, time.monotonic() - self._since)
            self._step(kept=False)

    def _step(self, *, kept: bool, gone: Collection[int] = (), withheld: Collection[int] = (), hosted: int = 0) -> None:
        """All ranks are placed: they step. See `Loss` for what is left; `hosted` is the coordinator's epoch."""
        self._phase, self._attempts, self._stepping_since = "stepping", 0, time.monotonic()
        self._engine.resume(Loss(self._epoch, kept, gone, withheld, hosted))

    def _fill(self) -> None:
        """Give missing ranks to those who are ready; start others for what is missing, later as spares."""
        for rank, member in enumerate(self._ranks):
            if member is None and self._ready:
                self._ranks[rank] = self._ready.pop(0)
        self._start_missing()

    def _start_missing(self) -> None:
        if not self._may_spare or time.monotonic() < self._start_after:
            return
        missing = tuple(rank for rank, member in enumerate(self._ranks) if member is None)
        spares = self._spares if time.monotonic() - self._stepping_since > SPARE_AFTER_S else 0
        ranks = tuple(range(self._engine.size)) if self._spares else missing
        while len(self._starting) + len(self._ready) < len(missing) + spares:
            if (member := self._engine.start(ranks)) is None:
                return  # a device is free once the process on it has ended
            self._starting[member] = None
