"""What a coordinator must not forget: the group's epoch, in Redis, from where stores and index are fenced, and which
workers an operator has cordoned.
"""

import asyncio
import logging
from collections.abc import Mapping

from shared.errors import PeerLost
from shared.stripe_index import StripeIndex

log = logging.getLogger(__name__)

ADVANCE_DEADLINE_S = 0.5
"""A recovery does not wait longer for Redis: then the epoch grows here, and Redis hears of it when it is back."""


class Journal:
    """The group's epoch and cordons. Only one coordinator writes them."""

    def __init__(self, index: StripeIndex, group: str):
        self._index = index
        self._group = group
        self._cordons: dict[str, int | None] = {}  # in Redis, as far as is known

    async def last(self) -> tuple[int, dict[str, int | None]]:
        """The last epoch known, and the workers that were cordoned. Raises PeerLost without a Redis."""
        self._cordons = await self._index.cordons(self._group)
        return await self._index.epoch(self._group), dict(self._cordons)

    async def next_epoch(self, current: int) -> int:
        """An epoch newer than `current`, known to Redis first unless Redis is away."""
        try:
            async with asyncio.timeout(ADVANCE_DEADLINE_S):
                epoch = await self._index.advance_epoch(self._group, at_least=current)
        except (PeerLost, TimeoutError) as error:
            log.warning("epoch %d is not in Redis yet: %s", current + 1, error)
            return current + 1
        return epoch

    async def keep(self, current: int, cordons: Mapping[str, int | None]) -> int:
        """See that Redis knows this, also a Redis that was away, or has lost its memory. Returns the epoch there."""
        try:
            before = await self._index.raise_epoch(self._group, current)
            if before < current or cordons != self._cordons:
                await self._index.keep_cordons(self._group, cordons)
                self._cordons = dict(cordons)
        except PeerLost as error:
            log.debug("Redis is still away: %s", error)
            return current
        return max(before, current)
