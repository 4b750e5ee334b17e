"""The shadow: a thread of its own that protects and restores pages, so that the model never waits for it."""

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from services.worker.agent.inventory import Inventory
from services.worker.communicator.base import Communicator
from services.worker.device import Device, Fence
from services.worker.shadow.exchange import Exchange, PageBytes
from services.worker.shadow.protect import Protector
from services.worker.shadow.restore import Restorer
from services.worker.shadow.windows import lost_pages
from shared.errors import CommunicatorAborted, DeadlineExceeded
from shared.messages import Message, ProtectPlan, RankFailed, RestoreDone, RestorePlan

log = logging.getLogger(__name__)

MAX_JOBS = 4096
"""More than the coordinator lets be pending."""
SLOT_BYTES = 4 << 20
"""Shared memory of one rank in the exchange communicator."""


class Shadow:
    """Runs ProtectPlans and RestorePlans in order, over the exchange communicator of the epoch."""

    def __init__(
        self,
        protector: Protector,
        restorer: Restorer,
        inventory: Inventory,
        report: Callable[[Message], None],
        device: Device,
    ):
        self.device = device
        self.computed = Fence(device)
        """Left by who computes, or copies pages in: the shadow reads and writes pages behind it."""
        self.restored = Fence(device)
        """Left by the shadow: who reads or writes pages on another stream goes behind it."""
        self._protector = protector
        self._restorer = restorer
        self._inventory = inventory
        self._report = report
        self._epoch = 0
        self._step = 0
        self._exchange: Exchange | None = None
        self._tail_exchange: Exchange | None = None
        self._stale: list[Communicator] = []
        self._busy = threading.Lock()
        """Held while a plan is carried out."""
        self._state = threading.Condition()
        self._jobs: queue.Queue[ProtectPlan | RestorePlan | None] = queue.Queue(MAX_JOBS)
        self._thread = threading.Thread(target=self._run, name="shadow", daemon=True)
        self._thread.start()

    # -- from other threads ------------------------------------------------------------------------------------------

    def submit(self, plan: ProtectPlan | RestorePlan) -> None:
        """Queue a plan."""
        self._jobs.put_nowait(plan)

    def prefetch(self, plan: RestorePlan, rank: int, page_bytes: int) -> None:
        """Begin to read the parity that a plan needs here."""
        if plan.epoch == self._epoch:
            self._restorer.prefetch(plan, rank, page_bytes)

    def enter(self, epoch: int, communicator: Communicator, pool: PageBytes, tokens: PageBytes) -> None:
        """The epoch's exchange communicator is there. `tokens`: the pool token by token."""
        with self._state:
            if epoch != self._epoch:
                self._stale.append(communicator)
                return
            self.computed.leave()  # what is left of the epoch before may be on its way still
            self._exchange = Exchange(communicator, pool, self.device.round_bytes)
            self._tail_exchange = Exchange(communicator, tokens, self.device.round_bytes)
            self._step = 0
            self._state.notify_all()

    def interrupt(self, epoch: int) -> None:
        """From now on only plans of `epoch` count; an exchange that waits for peers ends at once."""
        with self._state:
            self._epoch = epoch
            self._restorer.forget()
            if self._exchange is not None and self._tail_exchange is not None:
                self._exchange.end()
                self._tail_exchange.end()
                self._stale.append(self._exchange.communicator)
                self._exchange = self._tail_exchange = None
            self._state.notify_all()

    def step_done(self, step: int) -> None:
        """KV of all steps up to this one is in the pool, once the calling thread's stream gets there."""
        self.computed.leave()
        with self._state:
            self._step = step
            self._state.notify_all()

    @contextmanager
    def paused(self) -> Iterator[bool]:
        """As long as this is entered no plan is begun, and nothing is asked of the device here. Gives False, and has no
        effect, where a plan is being carried out: to wait for it could mean to wait for ranks that wait for this one.
        """
        if not self._busy.acquire(blocking=False):
            yield False
            return
        try:
            exchange = self._exchange
            with exchange.communicator.still() if exchange is not None else nullcontext():
                yield True
        finally:
            self._busy.release()

    def close(self) -> None:
        """End the thread."""
        self.interrupt(-1)
        self._jobs.put(None)
        self._thread.join(timeout=5.0)

    # -- the shadow thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        self.device.bind()
        with self.device.on(self.device.stream()):
            self._work()

    def _work(self) -> None:
        while (plan := self._jobs.get()) is not None:
            exchange = self._ready(plan)
            with self._busy:
                if exchange is not None:
                    self._carry_out(plan, exchange)
                self._drop_stale()
        self._drop_stale()

    def _carry_out(self, plan: ProtectPlan | RestorePlan, exchange: Exchange) -> None:
        self.computed.wait()
        try:
            if isinstance(plan, ProtectPlan):
                self._protector.protect(plan, exchange)
            else:
                with self._leaving_mark():
                    self._restore(plan, exchange)
        except (CommunicatorAborted, DeadlineExceeded) as error:
            self._failed(plan.epoch, exchange.rank, f"exchange: {error}", fatal=False)
        except Exception as error:  # the ranks are out of step: they connect anew, and nothing else is lost
            log.exception("%s failed", type(plan).__name__)
            exchange.communicator.abort()
            self._failed(plan.epoch, exchange.rank, f"shadow: {type(error).__name__}: {error}", fatal=False)

    @contextmanager
    def _leaving_mark(self) -> Iterator[None]:
        try:
            yield
        finally:
            self.restored.leave()  # however it ended: what was begun may be on its way still

    def _restore(self, plan: RestorePlan, exchange: Exchange) -> None:
        def tell(done: RestoreDone) -> None:
            self.restored.leave()
            self._report(done)

        if plan.tail:  # no sealed pages
            self._restorer.restore(plan, exchange, tell)
            return
        mine = deque(lost_pages(plan, exchange.rank))
        self._inventory.strike(plan.epoch, [page for _, page, _ in mine])

        def report(done: RestoreDone) -> None:
            failed, whole = set(done.failed), []
            while mine and mine[0][0] < done.upto:
                _, page, key = mine.popleft()
                if key not in failed:
                    whole.append((page, key))
            self._inventory.note(plan.epoch, whole)
            tell(done)

        self._restorer.restore(plan, exchange, report)

    def _ready(self, plan: ProtectPlan | RestorePlan) -> Exchange | None:
        """The exchange, once the step that a plan waits for is done; None if its epoch is over."""
        step = plan.after_step if isinstance(plan, ProtectPlan) else 0
        with self._state:
            self._state.wait_for(
                lambda: plan.epoch != self._epoch or (self._exchange is not None and self._step >= step)
            )
            if plan.epoch != self._epoch:
                return None
            return self._tail_exchange if plan.tail else self._exchange

    def _failed(self, epoch: int, rank: int, reason: str, *, fatal: bool) -> None:
        with self._state:
            current = epoch == self._epoch
        if current:
            self._report(RankFailed(epoch, rank, reason, fatal))

    def _drop_stale(self) -> None:
        with self._state:
            stale, self._stale = self._stale, []
        for communicator in stale:
            communicator.close()
