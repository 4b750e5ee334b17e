"""What a coordinator must not forget: the group's epoch, in Redis, from where stores and index are fenced."""

import asyncio
import logging

from shared.errors import PeerLost
from shared.stripe_index import StripeIndex

log = logging.getLogger(__name__)

ADVANCE_DEADLINE_S = 0.5
"""A recovery does not wait longer for Redis: then the epoch grows here, and Redis hears of it when it is back."""


class Journal:
    """The group's epoch. Only one coordinator writes it."""

    def __init__(self, index: StripeIndex, group: str):
        self._index = index
        self._group = group

    async def epoch(self) -> int:
        """The last epoch known. Raises PeerLost without a Redis."""
        return await self._index.epoch(self._group)

    async def next_epoch(self, current: int) -> int:
        """An epoch newer than `current`, known to Redis first unless Redis is away."""
        try:
            async with asyncio.timeout(ADVANCE_DEADLINE_S):
                epoch = await self._index.advance_epoch(self._group, at_least=current)
        except (PeerLost, TimeoutError) as error:
            log.warning("epoch %d is not in Redis yet: %s", current + 1, error)
            return current + 1
        return epoch

    async def keep(self, current: int) -> None:
        """See that Redis knows the current epoch, also a Redis that was away, or has lost its memory."""
        try:
            if await self._index.epoch(self._group) < current:
                await self._index.advance_epoch(self._group, at_least=current - 1)
        except PeerLost as error:
            log.debug("Redis is still away: %s", error)
