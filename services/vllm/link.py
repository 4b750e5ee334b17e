"""Where the executor and the scheduler of one engine core hear what was decided about its ranks, and wait for it."""

import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

from shared.messages import EngineLoad, EngineRun, Message
from shared.types import PageKey


@dataclass(frozen=True, slots=True)
class Loss:
    """What is left when an epoch begins. Filled by who decides."""

    epoch: int
    kept: bool
    """Whether blocks are kept at all; if not, everything is computed again."""
    gone: Collection[int]
    """Blocks that won't come back."""
    withheld: Collection[int]
    """Blocks that may yet come back: nobody gets them meanwhile."""
    hosted_epoch: int = 0
    """The coordinator's, where one decides."""


class HostedScheduler(Protocol):
    """What the decider asks of the scheduler, from its own thread."""

    def stand_still(self) -> tuple[EngineRun, ...]:
        """What the running requests stand on; called while no step may begin."""
        ...

    def roll_back(self, loss: Loss) -> None:
        """The lost steps have not been; called before the next one may begin."""
        ...

    def tell_all(self, *, whole: bool) -> None:
        """Tell of all sealed blocks; not `whole`: they are forgotten first."""
        ...

    def pin(self, blocks: Collection[int], keys: Collection[PageKey]) -> None:
        """Keep blocks."""
        ...

    def unpin(self, blocks: Collection[int]) -> None:
        """They need not be kept."""
        ...

    def back(self, blocks: Collection[int], *, whole: bool) -> None:
        """Withheld blocks are whole, or won't come back."""
        ...

    def load(self) -> EngineLoad:
        """How busy it is."""
        ...


class EngineFailed(RuntimeError):
    """The engine can't go on. What follows is vLLM's own end of an engine."""


class Link:
    """The epoch, and whether it may step."""

    def __init__(self) -> None:
        self.scheduler: HostedScheduler | None = None
        self._attached: Callable[[], None] = lambda: None
        self._changed = threading.Condition()
        self._epoch = 0
        self._open = False
        self._failed = ""
        self._tell: Callable[[Message], None] = lambda message: None

    def attach(self, scheduler: HostedScheduler) -> None:
        """The scheduler is made."""
        with self._changed:
            self.scheduler = scheduler
        self._attached()

    def when_attached(self, attached: Callable[[], None]) -> None:
        """Call this once the scheduler is made, from any thread."""
        with self._changed:
            self._attached = attached
            there = self.scheduler is not None
        if there:
            attached()

    def tells(self, tell: Callable[[Message], None]) -> None:
        """From now on `tell` sends to the coordinator."""
        self._tell = tell

    def tell(self, message: Message) -> None:
        """Send to the coordinator; of no effect where there is none."""
        self._tell(message)

    @property
    def epoch(self) -> int:
        """The epoch that is, or will be stepped in."""
        return self._epoch

    def quiesce(self, epoch: int) -> None:
        """No further step until `resume`."""
        with self._changed:
            self._epoch, self._open = epoch, False

    def resume(self, epoch: int) -> None:
        """Step again, if nothing has happened since."""
        with self._changed:
            if epoch == self._epoch:
                self._open = True
                self._changed.notify_all()

    def fail(self, reason: str) -> None:
        """Nobody needs to wait any more: the engine ends."""
        with self._changed:
            self._failed = self._failed or reason
            self._changed.notify_all()

    def wait_open(self) -> int:
        """The epoch, once it may step. Raises EngineFailed."""
        with self._changed:
            self._changed.wait_for(lambda: self._open or self._failed)
            if self._failed:
                raise EngineFailed(self._failed)
            return self._epoch


_links: dict[str, Link] = {}


def link_of(engine: str) -> Link:
    """The link of an engine (VllmConfig.instance_id): vLLM gives its executor and scheduler nothing else in common."""
    return _links.setdefault(engine, Link())
