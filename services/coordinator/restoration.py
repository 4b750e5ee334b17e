"""How lost pages come back: the index is asked, a RestorePlan goes to all ranks, and their answers are put together."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from services.coordinator.pages import PagePool
from services.coordinator.recovery import Rates, Stripe, plan_restore, wanted_keys
from services.coordinator.scheduler import Sequence
from services.coordinator.stores import Stores
from services.coordinator.timeline import Recovery
from shared.errors import GhostError
from shared.messages import Message, RestoreDone, RestorePlan
from shared.types import GroupConfig, ModelInfo, PageKey

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Restoring:
    """A RestorePlan under way: the ranks that have not answered, and the stripes that none has failed to decode."""

    plan: int
    waiting: set[int]
    good: set[PageKey]
    trouble: str = ""


class Restoration:
    """Restores one plan at a time. `to_ranks` sends a message to every rank; `rates` None: always restore."""

    def __init__(
        self, config: GroupConfig, model: ModelInfo, pool: PagePool, stores: Stores, to_ranks: Callable[[Message], None]
    ):
        self._config = config
        self._page_bytes = model.page_bytes
        self._pool = pool
        self._stores = stores
        self._to_ranks = to_ranks
        self._plans = 0
        self._current: Restoring | None = None

    def interrupted(self) -> None:
        """The epoch is over, and with it the plan under way."""
        self._current = None

    async def look_up(self, sequences: list[Sequence]) -> dict[PageKey, Stripe]:
        """The stripes in the index of what these sequences lack; none if it can't be read."""
        keys = wanted_keys(self._pool, sequences)
        if not keys or self._config.protection == "none":
            return {}
        try:
            return await self._stores.look_up(keys)
        except GhostError as error:
            log.warning("the stripe index can't be read, so all is recomputed: %s", error)
            return {}

    def begin(self, epoch: int, sequences: list[Sequence], stripes: dict[PageKey, Stripe], rates: Rates | None) -> bool:
        """Ask the ranks to decode what they can of the sequences' pages. False if there is nothing to decode."""
        plan = plan_restore(
            self._pool,
            sequences,
            stripes,
            rates,
            page_bytes=self._page_bytes,
            page_tokens=self._config.page_tokens,
            copies=self._config.protection == "replicate",
        )
        if not plan:
            return False
        self._plans += 1
        self._current = Restoring(self._plans, set(range(self._config.size)), {stripe.key for stripe in plan})
        self._to_ranks(RestorePlan(epoch, self._plans, plan))
        return True

    def done(self, message: RestoreDone, recovery: Recovery | None, rates: Rates) -> bool:
        """A rank's part in the plan is over. True when it was the last: then what came back counts as there."""
        current = self._current
        if current is None or current.plan != message.plan:
            return False
        current.waiting.discard(message.rank)
        current.good.difference_update(message.failed)
        current.trouble = current.trouble or message.reason
        if recovery is not None:
            recovery.kv_bytes += message.bytes_restored
        if current.waiting:
            return False
        self._current = None
        if current.trouble:
            log.warning("some pages are recomputed instead of restored: %s", current.trouble)
        for key in current.good:
            self._pool.restored(key)
        if recovery is not None:
            recovery.restored_pages += len(current.good)
            rates.saw_restore(recovery.kv_bytes, message.seconds)
        return True
