"""What a worker's agent asks of an engine's share on its device, whichever engine that is."""

import asyncio
import threading
from collections.abc import Callable
from typing import Protocol

from services.worker.agent.inventory import Inventory
from services.worker.shadow.exchange import PageBytes
from services.worker.shadow.shadow import Shadow
from services.worker.shadow.stores import StoreClients
from shared.messages import Assign, DigestPlan, Join, Message, NotePages, Prepare, RestorePlan, StandBy, StepPlan
from shared.types import GroupConfig, ModelInfo

Job = Assign | StandBy | Prepare | Join | StepPlan | NotePages | DigestPlan


class RankEngine(Protocol):
    """One device's model and pages. All is called from the event loop; nothing of it may take long."""

    info: ModelInfo
    address: str
    """Where other ranks reach this one; the agent sets it."""
    shadow: Shadow
    at_rest: threading.Event
    """Set while nothing is computed."""
    unfit: str
    """Why it can take no rank, in words; empty while it can."""

    @property
    def step_done(self) -> int:
        """The last step that is done in this epoch."""
        ...

    @property
    def in_flight(self) -> bool:
        """Whether one is being computed."""
        ...

    @property
    def pages(self) -> int:
        """The size of its pool."""
        ...

    @property
    def pool(self) -> PageBytes:
        """The pages as bytes of the rank that it is, or was told to prepare for."""
        ...

    @property
    def progress(self) -> int:
        """How much has begun in this epoch; see Heartbeat."""
        ...

    @property
    def overstay_s(self) -> float:
        """For how long a step has been computed whose epoch is over; 0: none is."""
        ...

    def submit(self, job: Job) -> None:
        """Queue what the coordinator asks for. An Assign or StandBy ends the epoch before."""
        ...

    def restore(self, plan: RestorePlan) -> None:
        """Hand a plan to the shadow; its parity is read at once."""
        ...

    def interrupt(self, epoch: int) -> None:
        """From now on only what is of `epoch` counts; 0: the coordinator is lost."""
        ...

    def given_up(self) -> None:
        """The coordinator has given this worker up: what it holds of a rank is out of date."""
        ...

    def close(self) -> None:
        """End its threads."""
        ...


Load = Callable[
    [GroupConfig, Inventory, StoreClients, asyncio.AbstractEventLoop, Callable[[Message], None]], RankEngine
]
"""Makes it for a group's configuration, in a thread of its own; the last argument reports, from any thread."""
